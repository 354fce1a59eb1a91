//! Scenes about the program that a caller runs (T11): a forged executable path, and a replaced
//! executable.

use std::ffi::CString;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::execv;

use crate::ALICE;
use crate::process::become_user;
use crate::raw_http::{self, Address};

/// Plays a request by `program`, or by another file that Alice has mounted at its path.
pub(crate) fn play(scene: &str, [listener, address]: [&str; 2], program: &str) {
    match scene {
        "program" => become_user(ALICE),
        "other-program" => {
            become_user(ALICE);
            execute(&forged(program), &["ask", listener, address]);
        }
        // In a mount namespace alone, which takes root to make: only the file itself shows it.
        "forged-path" => {
            cover(program, CloneFlags::CLONE_NEWNS);
            become_user(ALICE);
        }
        // As Alice can do it without root.
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

/// Makes a program of Alice's own, next to the one that a rule names.
fn forged(program: &str) -> String {
    Path::new(program)
        .with_file_name("forged")
        .to_str()
        .unwrap()
        .to_owned()
}

/// Moves this process into namespaces of its own, with another file at the program's path.
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
