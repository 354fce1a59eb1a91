//! Sockets that another process made than the one that sends the request, and a container without
//! a name in its cgroup (T24, T31), with the real agent. Each caller is attested by its process.
//! ../attacks/README.md has the table of attacks.

use crate::harness::actor;
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::folder;
use crate::harness::env::{Env, Setting, Source, id};
use crate::harness::outcome::{Outcome, credentials_of, refused};

const USERS: [(u32, &str); 3] = [(61_001, "alice"), (61_002, "bob"), (0, "root")];

fn check_sockets_of_others(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    // With an entry for root the daemon itself has two identities, and the broker knows only one.
    let users = match source {
        Source::Broker => &USERS[..2],
        _ => &USERS[..],
    };
    let Some(env) = Env::start(folder.path(), users, &setting) else {
        return;
    };
    let name = folder.path().file_name().unwrap().display().to_string();
    let cgroup = Cgroup::new(&format!("sockets-{name}"));
    let alice = &credentials_of(&id("alice"));
    let (ambiguous, manager) = (&refused("ambiguous_caller"), &refused("manager_socket"));
    // The agent attests a process in a pid namespace of its own as any other of its user.
    let scenes = [
        ("alice", Some(alice), alice),
        (
            "bob",
            Some(&credentials_of(&id("bob"))),
            &credentials_of(&id("bob")),
        ),
        ("listener-used-again", None, ambiguous),
        ("shared-listener-used-again", None, ambiguous),
        ("accepted-used-again", None, ambiguous),
        ("made-for-activation", Some(alice), manager),
        ("pid-namespace", Some(alice), alice),
    ];
    let mut wrong = Vec::new();
    for (scene, unix, tcp) in scenes {
        let listeners = [("unix", unix), ("tcp", Some(tcp)), ("tcp6", Some(tcp))];
        for (listener, right) in listeners {
            let Some(right) = right else { continue };
            let address = env.daemon.listener(listener);
            let answer = actor::play(scene, listener, &address, env.daemon.pid(), cgroup.path());
            let outcome = Outcome::of(&answer, scene, &env.daemon);
            if outcome != *right {
                wrong.push(format!(
                    "{scene} over {listener}: {outcome:?}, not {right:?}"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn socket_of_another_process_gets_no_identity_with_spire_delegated() {
    check_sockets_of_others(Source::Delegated);
}

#[test]
fn socket_of_another_process_gets_no_identity_with_spiffe_broker() {
    check_sockets_of_others(Source::Broker);
}
