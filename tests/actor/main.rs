//! A process that an integration test starts as root, to play attackers and odd honest clients with
//! real processes: `actor SCENE LISTENER ADDRESS [PROGRAM]`, with the daemon's pid in `DAEMON`. It
//! prints the daemon's response on standard output. There are six more forms.
//!
//! - `actor connect UID LISTENER ADDRESS` only connects, for a test that sends the request itself.
//! - `actor in-numbers ACT LISTENER ADDRESS NUMBER...` is for acts that one user repeats very
//!   often.
//! - `actor without-sock-diag FILE PROGRAM...` executes a program where sock_diag(7) does not work
//!   while the file exists.
//! - `actor without-peer-pidfd PROGRAM...` executes a program as on a kernel before Linux 6.5.
//! - `actor without-pidfd-info PROGRAM...` executes a program as on a kernel before Linux 6.13.
//! - `actor asked SCENE LISTENER ADDRESS` goes on step by step, at the test's words.
//!
//! Two users take part: [`ALICE`] and [`BOB`]. The test knows which of them may be answered in a
//! scene.
#![allow(
    clippy::disallowed_methods,
    reason = "it measures and waits in real time"
)]
#![allow(
    unsafe_code,
    reason = "fork, clone3 and setuid are what this program is for; it has one thread"
)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a panic fails the test that runs it"
)]

mod attack_scenarios;
mod blocked;
mod cgroup_moves;
mod daemon;
mod floods;
mod forged_exe;
mod fuse;
mod peer_pidfd;
mod process;
mod programs;
mod raw_http;
mod requests;
mod short_lived;
mod soak;
mod sock_diag;
mod socket_passing;

/// A user with a rule.
pub(crate) const ALICE: u32 = 61001;
/// Another user with another rule.
pub(crate) const BOB: u32 = 61002;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        // Executed by scenes: to send a request on an inherited descriptor, or only to run.
        ["speak", descriptor] => print!("{}", raw_http::fetch_on(descriptor.parse().unwrap())),
        ["stay"] => process::stay(),
        ["connect", uid, listener, address] => {
            floods::connect(
                uid.parse().unwrap(),
                &raw_http::Address::parse(listener, address),
            );
        }
        ["in-numbers", act, listener, address, ref numbers @ ..] => {
            let numbers: Vec<usize> = numbers
                .iter()
                .map(|number| number.parse().unwrap())
                .collect();
            print!(
                "{}",
                floods::act(act, &numbers, &raw_http::Address::parse(listener, address))
            );
        }
        ["fetch", listener, address] => {
            let to = raw_http::Address::parse(listener, address);
            print!("{}", raw_http::fetch(&to.connect()));
        }
        ["blocked", count, listener, address, ref cgroups @ ..] => {
            blocked::callers(
                count.parse().unwrap(),
                cgroups,
                &raw_http::Address::parse(listener, address),
            );
        }
        ["blocked-agent", socket] => blocked::agent(socket),
        ["hanging-files"] => fuse::obey(),
        ["activated", listener, address] => {
            print!(
                "{}",
                socket_passing::used_again_by_service(&raw_http::Address::parse(listener, address))
            );
        }
        ["short-lived", users, rate, seconds, listener, address] => {
            println!(
                "{}",
                short_lived::fetch(
                    users,
                    rate,
                    seconds,
                    &raw_http::Address::parse(listener, address)
                )
            );
        }
        ["idle", uid, count] => short_lived::idle(uid, count),
        ["without-sock-diag", lost, ref words @ ..] => sock_diag::run_without(lost, words),
        ["without-peer-pidfd", ref words @ ..] => peer_pidfd::run_without(words),
        ["without-pidfd-info", ref words @ ..] => peer_pidfd::run_without_info(words),
        ["soak", uid, listener, address, pause] => {
            soak::fetch(uid, &raw_http::Address::parse(listener, address), pause)
        }
        ["requests", scene, listener, address] => requests::play(scene, [listener, address]),
        ["obey", descriptor, listener, address] => {
            requests::obey_on(descriptor, [listener, address])
        }
        ["become", listener, address, program] => {
            programs::become_another(&raw_http::Address::parse(listener, address), program)
        }
        ["forge", when, listener, address, file] => {
            let to = raw_http::Address::parse(listener, address);
            print!("{}", programs::fetch_as(file.as_ref(), when, &to));
        }
        ["conclude", descriptor] => {
            print!("{}", raw_http::conclude_on(descriptor.parse().unwrap()))
        }
        [scene, listener, address] => {
            let to = raw_http::Address::parse(listener, address);
            print!("{}", attack_scenarios::play(scene, &to));
        }
        [scene, listener, address, program] => programs::play(scene, [listener, address], program),
        _ => panic!("usage: actor SCENE LISTENER ADDRESS [PROGRAM]"),
    }
}
