//! Listeners in pods pass from one daemon to the next, so that an update rejects no connection.

use std::path::Path;

use nix::sys::signal::Signal;

use super::{PodsStage, RULE, TIMEOUT, V4, V6, await_namespaces, listens};
use crate::harness::actor::Repeater;
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::daemon::Daemon;
use crate::harness::namespaces::{NetnsNode, Peer};

pub(super) fn handing_over(folder: &Path, node: &NetnsNode) -> String {
    format!(
        "[pods]\nenabled = true\nnetns_dir = {:?}\nhandover_socket = {:?}\n",
        node.directory(),
        folder.join("handover/awsvid.sock")
    )
}

/// Sends requests from a pod repeatedly, each on a new connection, until it is stopped.
fn start_polling(node: &NetnsNode, name: &str, cgroup: &Cgroup, address: &str) -> Repeater {
    let words = node.enter_pod(name, cgroup);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    Repeater::start_behind(&words, "tcp", address).wait_started()
}

#[test]
fn update_rejects_no_connection() {
    let Some(stage) = PodsStage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    let PodsStage {
        daemon: mut old,
        site,
    } = stage;
    let cgroups = [Cgroup::of_pod(20), Cgroup::of_pod(20)];
    let askers = [
        start_polling(&site.node, "a", &cgroups[0], V4),
        start_polling(&site.node, "a", &cgroups[1], V6),
    ];
    let peer = Peer::new(20);
    let mut folders = vec![folder()];
    for update in 0..10 {
        let mut new = site.next(folders.last().unwrap().path());
        new.await_line(&["took over pods' listeners"]);
        old.await_line(&["passed pods' listeners to the next instance"]);
        // Between the two, pods start and end as usual.
        let name = format!("b{update}");
        site.node.add_with(&name, |_| peer.make());
        await_namespaces(&new, 2);
        assert!(
            site.serves(&name, &Cgroup::of_pod(30 + update), V4),
            "{update}"
        );
        site.node.remove(&name);
        await_some("the namespace is freed", TIMEOUT, || {
            (!peer.exists()).then_some(())
        });
        std::mem::swap(&mut old, &mut new);
        new.process().signal(Signal::SIGTERM);
        new.await_end();
        folders.push(folder());
    }
    for (asker, address) in askers.into_iter().zip([V4, V6]) {
        let counts = asker.stop();
        eprintln!("ten updates: {counts:?} over {address}");
        assert!(counts.len() == 1 && counts["Success"] > 20, "{counts:?}");
    }
    assert!(!old.log().contains("is in use"), "{}", old.log());
}

#[test]
fn failed_update_leaves_previous_daemon_active() {
    let Some(stage) = PodsStage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    let cgroup = Cgroup::of_pod(50);
    let (first, second) = (folder(), folder());
    let next = stage.site.next(first.path());
    stage
        .daemon
        .await_line(&["passed pods' listeners to the next instance"]);
    let peer = Peer::new(21);
    stage.site.node.add_with("b", |_| peer.make());
    await_namespaces(&next, 2);
    // SIGKILL, which cuts only the connections that it has accepted.
    drop(next);
    stage.daemon.await_line(&["the next instance is gone"]);
    stage.await_namespaces(2);
    for name in ["a", "b"] {
        await_some("it is listened there", TIMEOUT, || {
            listens(&stage.site.node, name, V4).then_some(())
        });
    }
    assert!(stage.site.serves("a", &cgroup, V4) && stage.site.serves("b", &Cgroup::of_pod(52), V6));
    // This one can hand over again.
    let asker = start_polling(&stage.site.node, "a", &cgroup, V4);
    let next = stage.site.next(second.path());
    next.await_line(&["took over pods' listeners"]);
    let counts = asker.stop();
    assert!(counts.len() == 1 && counts["Success"] > 2, "{counts:?}");
    // A namespace that ends after one daemon has passed it to another is freed all the same.
    stage.site.node.remove("b");
    await_some("the namespace is freed", TIMEOUT, || {
        (!peer.exists()).then_some(())
    });
}

/// Both are restarted before the next one could serve. Requests meanwhile are answered, if only
/// with a 503.
#[test]
fn ending_daemon_hands_over_to_standby_not_yet_ready() {
    let Some(stage) = PodsStage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    let cgroup = Cgroup::of_pod(53);
    let folder = folder();
    let PodsStage {
        daemon: mut old,
        site,
    } = stage;
    let words = site.node.enter();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let configuration = site
        .upstream
        .configuration_at(Path::new("/nonexistent/agent.sock"))
        + RULE;
    let listen = handing_over(site.folder.path(), &site.node);
    let next = Daemon::start_behind(&words, folder.path(), &listen, &configuration);
    next.await_line(&["waiting to take over pods' listeners"]);
    assert!(site.serves("a", &cgroup, V4), "the one before still does");
    let asker = start_polling(&site.node, "a", &cgroup, V4);
    old.process().signal(Signal::SIGTERM);
    next.await_line(&["took over pods' listeners"]);
    old.await_end();
    // A rejected or reset connection would be a panic of the client.
    let counts = asker.stop();
    assert!(!counts.contains_key("nothing"), "{counts:?}");
}

#[test]
fn killed_daemon_is_replaced_by_one_that_binds() {
    let Some(mut stage) = PodsStage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    stage.daemon.process().owned().end();
    let folder = folder();
    let next = stage.site.next(folder.path());
    assert_eq!(next.metric("awsvid_pod_listeners"), 1);
    assert!(stage.site.serves("a", &Cgroup::of_pod(51), V4));
}

/// Two updates, one after the other, and the first daemon still runs: it serves again only as the
/// last one.
#[test]
fn superseded_daemon_resumes_only_without_successors() {
    let Some(stage) = PodsStage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    let PodsStage {
        daemon: first,
        site,
    } = stage;
    let cgroup = Cgroup::of_pod(54);
    let folders = [folder(), folder()];
    let mut second = site.next(folders[0].path());
    first.await_line(&["passed pods' listeners to the next instance"]);
    let third = site.next(folders[1].path());
    second.await_line(&["passed pods' listeners to the next instance"]);
    second.process().signal(Signal::SIGTERM);
    second.await_end();
    // A daemon that waits for the second one sees its end before the process can be reaped.
    for count in 1..=20 {
        assert!(site.serves("a", &cgroup, V4));
        assert_eq!(third.issued(), count, "no other daemon answers");
    }
    assert!(
        !first.log().contains("serving pods again"),
        "{}",
        first.log()
    );
    // SIGKILL.
    drop(third);
    first.await_line(&["the next instance is gone"]);
    await_namespaces(&first, 1);
    assert!(site.serves("a", &cgroup, V4));
}
