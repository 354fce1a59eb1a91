//! A terminal, for programs that look whether there is one.

use std::fs::File;
use std::io::Read;
use std::process::Command;
use std::time::Duration;

use nix::pty::openpty;

use super::counterparts::process::spawn;

/// What a short program prints where its standard output is a terminal.
pub(crate) fn on_a_terminal(mut command: Command) -> String {
    let pty = openpty(None, None).expect("a pseudo-terminal");
    command.stdout(pty.slave);
    let mut process = spawn(command).expect("start it");
    assert!(process.wait(Duration::from_secs(60)).expect("it ends").success());
    let mut shown = Vec::new();
    // The terminal hangs up (EIO) once nobody has its other end.
    let _ = File::from(pty.master).read_to_end(&mut shown);
    String::from_utf8(shown).expect("UTF-8")
}
