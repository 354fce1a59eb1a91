//! The exit statuses of all commands. deploy/docs/cli.md documents them.

use std::io;
use std::process::{ExitCode, Termination};

/// The way in which a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// The command did what it is for.
    Success,
    /// The command failed, or a condition that it checked does not hold.
    Failure,
    /// Nothing failed, but a part could not be checked.
    Unchecked,
    /// The configuration or the environment has a mistake, which another start would repeat:
    /// EX_CONFIG of sysexits.h. The systemd unit does not restart on it.
    Config,
    /// awsvid failed before it became another command, as env(1) and timeout(1) report it.
    OwnFailure,
    /// The other command cannot be run, as shells report it.
    NotExecutable,
    /// The other command does not exist, as shells report it.
    NotFound,
    /// This signal ended the process, or cut its open requests, as shells report it.
    Signal(u8),
    /// The status of the other command.
    Command(u8),
}

impl ExitStatus {
    /// Returns the status of a command that could not be started.
    pub fn of_unstarted(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            _ => Self::NotExecutable,
        }
    }

    /// Returns the number that the parent process sees.
    pub fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Unchecked => 2,
            Self::Config => 78,
            Self::OwnFailure => 125,
            Self::NotExecutable => 126,
            Self::NotFound => 127,
            Self::Signal(number) => 128_u8.saturating_add(number),
            Self::Command(code) => code,
        }
    }
}

impl Termination for ExitStatus {
    fn report(self) -> ExitCode {
        ExitCode::from(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unstarted_command_has_the_status_of_a_shell() {
        let status = |kind: io::ErrorKind| ExitStatus::of_unstarted(&kind.into()).code();
        assert_eq!(status(io::ErrorKind::NotFound), 127);
        assert_eq!(status(io::ErrorKind::PermissionDenied), 126);
    }
}
