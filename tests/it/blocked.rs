//! Callers that keep whoever looks at them waiting, and what comes of the others (attack 25).

use std::path::Path;

use crate::harness::actor::{self, Acting};
use crate::harness::agent::{Entry, FakeAgent};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::made::{Made, answered};
use crate::harness::upstream::Upstream;
use crate::harness::world::id;

const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];
/// Each with processes of its own: together they are more than the daemon has threads.
const WORKLOADS: usize = 6;
const CALLERS: usize = 3;

/// Bob is answered while Alice's processes are stuck; they belong to several workloads.
fn others_are_answered(daemon: &Daemon, folder: &Path, bob: &str) {
    let name = folder.file_name().unwrap().display().to_string();
    let honest = Cgroup::new(&format!("honest-{name}"));
    for listener in LISTENERS {
        let address = daemon.listener(listener);
        let cgroups: Vec<_> = (0..WORKLOADS).map(|number| Cgroup::new(&format!("stuck-{number}-{name}"))).collect();
        let paths: Vec<_> = cgroups.iter().map(Cgroup::path).collect();
        let stuck = Acting::block(CALLERS, listener, &address, daemon.pid(), &paths).begun();
        for other in LISTENERS {
            for _ in 0..10 {
                let answer = actor::play("bob", other, &daemon.listener(other), daemon.pid(), honest.path());
                let made = Made::of(&answer, "bob", daemon);
                assert_eq!(made, answered(bob), "over {other}, while callers over {listener} are stuck");
            }
        }
        stuck.enough();
    }
}

#[test]
fn callers_that_hold_their_own_locks_stop_nobody_else() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = Upstream::start(&[(61001, "alice"), (61002, "bob")]);
    let rules = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/alice\"\nuid = 61001\n\
                 exe = \"/bin/true\"\n\
                 [[workload]]\nspiffe_id = \"spiffe://example.org/user/bob\"\nuid = 61002\n";
    let daemon = Daemon::start(folder.path(), "", &format!("{}{rules}", upstream.configuration())).ready();
    others_are_answered(&daemon, folder.path(), "spiffe://example.org/user/bob");
}

#[test]
fn callers_that_hold_their_own_locks_stop_nobody_else_where_an_agent_attests() {
    if !root() {
        return;
    }
    let folder = folder();
    let entries = vec![Entry::new(&id("alice"), &["unix:uid:61001"]), Entry::new(&id("bob"), &["unix:uid:61002"])];
    let agent = FakeAgent::start(folder.path(), entries);
    let daemon = Daemon::start(folder.path(), "", &agent.configuration()).ready();
    others_are_answered(&daemon, folder.path(), &id("bob"));
}
