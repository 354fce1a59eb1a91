//! The real agent reads supplementary groups (`unix:supplementary_gid`), and so they count, up to a
//! number (T27).

use crate::harness::actor::{Counts, Repeater};
use crate::harness::counterparts::folder;
use crate::harness::env::{Env, Setting, Source, id};

const USER: u32 = 51_001;
/// The actor's processes have those from 100,000 on.
const GROUP: &str = "unix:supplementary_gid:100000";

fn check_too_many_groups(source: Source) {
    let folder = folder();
    let setting = Setting::of(source);
    let Some(mut env) = Env::start(folder.path(), &[(51_002, "reader")], &setting) else {
        return;
    };
    env.register(&id("member"), &[&format!("unix:uid:{USER}"), GROUP], &[]);
    let ask = |listener: &str, groups: usize, processes: usize| {
        let numbers = [usize::try_from(USER).unwrap(), groups, processes];
        Repeater::start(
            "grouped",
            listener,
            &env.daemon.listener(listener),
            &numbers,
            env.cgroup().path(),
        )
        .stop()
    };
    let all = |code: &str, count: usize| Counts::from([(code.to_owned(), count)]);
    let before = env.daemon.memory();
    for listener in ["unix", "tcp", "tcp6"] {
        assert_eq!(
            ask(listener, 0, 1),
            all("no_identity", 1),
            "over {listener}"
        );
        assert_eq!(ask(listener, 1, 1), all("Success", 1), "over {listener}");
        assert_eq!(ask(listener, 1024, 1), all("Success", 1), "over {listener}");
        let outcomes = env.spire.attested(&format!("uid:{USER}")).len();
        assert_eq!(
            ask(listener, 65_536, 100),
            all("too_many_groups", 100),
            "over {listener}"
        );
        assert_eq!(
            env.spire.attested(&format!("uid:{USER}")).len(),
            outcomes,
            "over {listener}"
        );
    }
    let after = env.daemon.memory();
    assert!(
        after < before + 24 * 1024,
        "{before} KiB before, {after} KiB after"
    );
}

#[test]
fn too_many_groups_are_refused_with_spire_delegated() {
    check_too_many_groups(Source::Delegated);
}

#[test]
fn too_many_groups_are_refused_with_spiffe_broker() {
    check_too_many_groups(Source::Broker);
}
