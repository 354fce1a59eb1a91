//! Runs the command of `awsvid dev -- CMD` like a shell: same terminal, same signals, its exit
//! status.

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

/// Runs `command` to its end. Returns its exit status, or `128 + n` if signal `n` ended it.
///
/// SIGTERM, SIGHUP, SIGINT and SIGQUIT end the command, and `dev` ends after it. An error means
/// that the command could not be started; [`crate::sdk_environment::exit_code`] has the exit
/// status for it.
pub async fn run(command: &[OsString], environment: &Environment) -> io::Result<u8> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| io::Error::other("the command is missing"))?;
    // Before the command starts, so that `dev` handles every signal.
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
        // Ctrl-C reaches all processes in the terminal's foreground, so forwarding it would send it
        // twice.
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

/// Sends the signal to the child. A child that was not waited for keeps its pid, so no other
/// process can get the signal.
fn forward(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // It may have ended at this moment.
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
    fn exit_status_is_that_of_a_shell() {
        // Values of wait(2): the exit code in the second byte, a signal in the first.
        for (raw, expected) in [(0, 0), (7 << 8, 7), (255 << 8, 255), (15, 143), (9, 137)] {
            assert_eq!(code(ExitStatus::from_raw(raw)), expected, "{raw:#x}");
        }
    }
}
