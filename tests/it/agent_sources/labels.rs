//! An agent that returns one identity several times, or a token under another's name, like one that
//! merges the responses of two others: a token's own `sub` counts.

use crate::harness::actor::play;
use crate::harness::agent::{Entry, FakeAgent};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::env::id;
use crate::harness::outcome::{Outcome, credentials_of, rejected};

const ALICE: &str = "unix:uid:61001";
const BOB: &str = "unix:uid:61002";

/// Returns the outcome of a request of each user over every listener.
fn outcomes(entries: Vec<Entry>) -> Vec<[Outcome; 2]> {
    let folder = folder();
    let agent = FakeAgent::start(folder.path(), entries);
    let daemon = Daemon::start(folder.path(), "", &agent.configuration()).ready();
    let cgroup = Cgroup::new(&format!(
        "labels-{}",
        folder.path().file_name().unwrap().display()
    ));
    let fetch = |scene, listener| {
        Outcome::of(
            &play(
                scene,
                listener,
                &daemon.listener(listener),
                daemon.pid(),
                cgroup.path(),
            ),
            scene,
            &daemon,
        )
    };
    ["unix", "tcp", "tcp6"]
        .map(|listener| ["alice", "bob"].map(|scene| fetch(scene, listener)))
        .to_vec()
}

/// Alice's credentials are in the cache, and are served without a check of any token.
#[test]
fn token_subject_overrides_the_agents_label() {
    if !root() {
        return;
    }
    let entries = vec![
        Entry::new(&id("alice"), &[ALICE]),
        Entry::labelled(&id("alice"), &id("bob"), &[BOB]),
    ];
    assert_eq!(
        outcomes(entries),
        vec![[credentials_of(&id("alice")), rejected("bad_token")]; 3]
    );
}

#[test]
fn repeated_identity_counts_as_one() {
    if !root() {
        return;
    }
    let entries = vec![
        Entry::labelled(&id("alice"), &id("bob"), &[ALICE]),
        Entry::new(&id("alice"), &[ALICE]),
        Entry::new(&id("alice"), &[ALICE]),
        Entry::new(&id("bob"), &[BOB]),
        Entry::labelled(&id("alice"), &id("bob"), &[BOB]),
    ];
    assert_eq!(
        outcomes(entries),
        vec![[credentials_of(&id("alice")), credentials_of(&id("bob"))]; 3]
    );
}
