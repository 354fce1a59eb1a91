//! Scenes about the program that a caller runs: a forged executable path and a replaced executable
//! (T11), and a forged executable (T37).

use std::ffi::CString;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::execv;

use crate::process::become_user;
use crate::raw_http::{self, Address};
use crate::{ALICE, BOB, forged_exe};

/// Plays a request by `program`, or by another file that Alice has mounted at its path.
pub(crate) fn play(scene: &str, [listener, address]: [&str; 2], program: &str) {
    match scene {
        "program" => become_user(ALICE),
        "other-program" => {
            become_user(ALICE);
            execute(&forged(program), &["fetch", listener, address]);
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
        // Another program makes the kernel report the rule's file as its executable.
        "forged-file" | "forged-file-by-bob" => {
            become_user(if scene == "forged-file" { ALICE } else { BOB });
            execute(
                &forged(program),
                &["forge", "before", listener, address, program],
            );
        }
        // The rule's program does so with another file, when the daemon has attested it.
        "forged-file-late" => {
            become_user(ALICE);
            let other = forged(program);
            execute(program, &["forge", "late", listener, address, &other]);
        }
        other => panic!("no scene {other}"),
    }
    execute(program, &["fetch", listener, address]);
}

/// Sends a request with this file as the executable, from the beginning or late.
pub(crate) fn fetch_as(file: &Path, when: &str, to: &Address) -> String {
    if when != "late" {
        forged_exe::show_as(file);
        return raw_http::fetch(&to.connect());
    }
    let fd = to.connect();
    raw_http::begin(to, &fd);
    forged_exe::show_as(file);
    raw_http::conclude(&fd)
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
