//! Scenes about what a caller runs: attack 11, an executable's path that is forged, and one that is replaced.

use std::ffi::CString;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::execv;

use crate::ALICE;
use crate::process::become_user;
use crate::raw_http::{self, Address};

/// Alice runs `program`, or makes another file appear at its path and runs that; whichever it is, it asks.
pub(crate) fn play(scene: &str, [listener, address]: [&str; 2], program: &str) {
    match scene {
        "program" => become_user(ALICE),
        "other-program" => {
            become_user(ALICE);
            execute(&forged(program), &["ask", listener, address]);
        }
        // In a mount namespace alone, which takes root to make: only the file itself tells.
        "forged-path" => {
            cover(program, CloneFlags::CLONE_NEWNS);
            become_user(ALICE);
        }
        // As Alice can do it by herself.
        "forged-path-in-user-namespace" => {
            become_user(ALICE);
            cover(program, CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS);
        }
        // The program connects, and another one goes on from there.
        "replaced" => {
            become_user(ALICE);
            execute(program, &["become", listener, address, &forged(program)]);
        }
        other => panic!("no scene {other}"),
    }
    execute(program, &["ask", listener, address]);
}

/// Begins a request, and leaves the rest of it to another program.
pub(crate) fn become_another(to: &Address, program: &str) {
    let fd = to.connect();
    raw_http::begin(to, &fd);
    execute(
        program,
        &["conclude", &raw_http::inheritable(fd).to_string()],
    );
}

/// A program of Alice's own, beside the one that a rule names.
fn forged(program: &str) -> String {
    Path::new(program)
        .with_file_name("forged")
        .to_str()
        .unwrap()
        .to_owned()
}

/// In namespaces of its own, this process sees another file at the program's path.
fn cover(program: &str, namespaces: CloneFlags) {
    let none: Option<&str> = None;
    unshare(namespaces).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(
        Some(forged(program).as_str()),
        program,
        none,
        MsFlags::MS_BIND,
        none,
    )
    .unwrap();
}

fn execute(program: &str, words: &[&str]) {
    let words = [&[program], words].concat();
    let words: Vec<CString> = words
        .into_iter()
        .map(|word| CString::new(word).unwrap())
        .collect();
    let Err(error) = execv(&words[0], &words);
    panic!("{program}: {error}");
}
