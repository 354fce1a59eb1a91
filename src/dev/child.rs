//! Runs the command of `awsvid dev -- CMD` as a shell would: same terminal, same signals, its exit status.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgrp, tcgetpgrp};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::sdk_environment::Environment;

/// Runs `command` to its end and gives its exit status, `128 + n` if signal `n` ended it.
///
/// SIGTERM, SIGHUP, SIGINT and SIGQUIT end the command, not `dev`, which ends after it. An error means that the command
/// could not be started; [`crate::sdk_environment::exit_code`] is the status for that.
pub async fn run(command: &[OsString], environment: &Environment) -> io::Result<u8> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| io::Error::other("there is no command"))?;
    // Before the command is there, so that a signal never finds `dev` unprepared.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut child = Command::new(program);
    child.args(arguments).kill_on_drop(true);
    environment.apply(child.as_std_mut());
    let mut child = child.spawn()?;
    loop {
        let received = tokio::select! {
            status = child.wait() => return Ok(code(status?)),
            _ = terminate.recv() => Signal::SIGTERM,
            _ = hang_up.recv() => Signal::SIGHUP,
            _ = interrupt.recv() => Signal::SIGINT,
            _ = quit.recv() => Signal::SIGQUIT,
        };
        // Ctrl-C reaches all processes in the terminal's foreground; a second one from here would be one too many.
        if matches!(received, Signal::SIGTERM | Signal::SIGHUP) || !in_foreground() {
            forward(&child, received);
        }
    }
}

fn code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX)
}

/// A child that has not been waited for keeps its pid, so this can't hit another process.
fn forward(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // It may have ended in this moment.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn in_foreground() -> bool {
    File::open("/dev/tty")
        .is_ok_and(|terminal| tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_what_a_shell_would_give() {
        // As wait(2) has them: the exit code in the second byte, a signal in the first.
        for (raw, expected) in [(0, 0), (7 << 8, 7), (255 << 8, 255), (15, 143), (9, 137)] {
            assert_eq!(code(ExitStatus::from_raw(raw)), expected, "{raw:#x}");
        }
    }
}
