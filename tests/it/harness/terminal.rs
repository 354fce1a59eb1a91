//! A pseudo-terminal, for programs that check whether they have one.

use std::fs::File;
use std::io::Read;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use nix::pty::openpty;

use super::counterparts::process::{OwnedProcess, spawn};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs a short program with a terminal as its standard output, and returns what it prints.
pub(crate) fn on_a_terminal(mut command: Command) -> String {
    let pty = openpty(None, None).expect("a pseudo-terminal");
    command.stdout(pty.slave);
    let mut process = spawn(command).expect("start it");
    assert!(process.wait(TIMEOUT).expect("it ends").success());
    let mut shown = Vec::new();
    // The terminal hangs up (EIO) once no process has its other end.
    let _ = File::from(pty.master).read_to_end(&mut shown);
    String::from_utf8(shown).expect("UTF-8")
}

/// Runs a program on a terminal until its output, errors included, is `stop`. Then ends it and
/// returns the output.
pub(crate) fn on_a_terminal_until(mut command: Command, enough: impl Fn(&str) -> bool) -> String {
    let pty = openpty(None, None).expect("a pseudo-terminal");
    command
        .stderr(pty.slave.try_clone().expect("a second handle"))
        .stdout(pty.slave);
    let process: OwnedProcess = spawn(command).expect("start it");
    let (sender, printed) = channel();
    let mut terminal = File::from(pty.master);
    std::thread::spawn(move || {
        let mut part = [0; 4096];
        // Until the program has ended (EIO), or the reader is gone.
        while let Ok(length) = terminal.read(&mut part) {
            if sender.send(part[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut shown = Vec::new();
    while !enough(&String::from_utf8_lossy(&shown)) {
        shown.extend(printed.recv_timeout(TIMEOUT).expect("it goes on printing"));
    }
    drop(process);
    String::from_utf8_lossy(&shown).into_owned()
}
