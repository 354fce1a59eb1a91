//! The exit statuses of all commands. A test compares deploy/docs/cli.md and each `--help` with the
//! list here.

use std::io;
use std::mem::discriminant;
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
    /// An argument is unknown. clap itself ends the process with this status.
    Usage,
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

/// The statuses of each command. Every command can end with [`ExitStatus::Usage`]. It is listed
/// where a service manager sees it. The number in `Signal(0)` and `Command(0)` stands for any.
const OF_COMMANDS: [(&str, &[ExitStatus]); 11] = {
    use ExitStatus::*;
    [
        (
            "serve",
            &[Success, Failure, Usage, Config, Signal(2), Signal(15)],
        ),
        ("config", &[Success, Failure, Config]),
        ("status", &[Success, Failure]),
        ("probe", &[Success, Failure]),
        ("check", &[Success, Failure, Unchecked]),
        ("trust-policy", &[Success, Failure, Config]),
        ("exec", &[OwnFailure, NotExecutable, NotFound, Command(0)]),
        ("credential-process", &[Success, Failure]),
        (
            "dev",
            &[
                Success,
                Failure,
                NotExecutable,
                NotFound,
                Signal(0),
                Command(0),
            ],
        ),
        ("man", &[Success, Failure]),
        ("completions", &[Success, Failure]),
    ]
};

impl ExitStatus {
    /// Returns the statuses that a command of `awsvid` can have. Empty for an unknown name.
    pub fn of_command(name: &str) -> &'static [Self] {
        let command = OF_COMMANDS.iter().find(|(command, _)| *command == name);
        command.map_or(&[], |(_, statuses)| statuses)
    }

    /// Returns whether the list of a command has this status.
    pub fn is_of(self, command: &str) -> bool {
        let kind = discriminant(&self);
        Self::of_command(command)
            .iter()
            .any(|status| discriminant(status) == kind)
    }

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
            Self::Unchecked | Self::Usage => 2,
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
