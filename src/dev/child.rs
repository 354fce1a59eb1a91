//! Runs the command of `awsvid dev -- CMD` like a shell: same terminal, same signals, its exit
//! status.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgrp, tcgetpgrp};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::exit_status::ExitStatus;
use crate::sdk_environment::Environment;

/// Runs `command` to its end. Returns its exit status.
///
/// SIGTERM, SIGHUP, SIGINT and SIGQUIT end the command, and `dev` ends after it. An error means
/// that the command could not be started.
pub async fn run(command: &[OsString], environment: &Environment) -> io::Result<ExitStatus> {
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
            status = child.wait() => return Ok(exit_status(status?)),
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

fn exit_status(status: process::ExitStatus) -> ExitStatus {
    let number = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Command(number(code)),
        (None, signal) => ExitStatus::Signal(signal.map_or(u8::MAX, number)),
    }
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
            let status = exit_status(process::ExitStatus::from_raw(raw));
            assert_eq!(status.code(), expected, "{raw:#x}");
        }
    }
}
