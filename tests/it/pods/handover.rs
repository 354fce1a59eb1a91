//! Listeners in pods pass from one daemon to the next, so that an update refuses no connection.

use std::path::Path;

use nix::sys::signal::Signal;

use super::{PATIENCE, RULE, Stage, V4, V6, await_namespaces, listens};
use crate::harness::actor::Acting;
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::daemon::Daemon;
use crate::harness::namespaces::{Node, Peer};

pub(super) fn handing_over(folder: &Path, node: &Node) -> String {
    format!(
        "pods = true\npods_dir = {:?}\nhandover = {:?}\n",
        node.directory(),
        folder.join("handover/awsvid.sock")
    )
}

/// Asks from a pod, over and over, each time on a new connection, until it is told that it is enough.
fn asking(node: &Node, name: &str, cgroup: &Cgroup, address: &str) -> Acting {
    let words = node.enter_pod(name, cgroup);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    Acting::start_behind(&words, "tcp", address).begun()
}

#[test]
fn an_update_refuses_no_connection() {
    let Some(stage) = Stage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    let Stage {
        daemon: mut old,
        site,
    } = stage;
    let cgroups = [Cgroup::of_pod(20), Cgroup::of_pod(20)];
    let askers = [
        asking(&site.node, "a", &cgroups[0], V4),
        asking(&site.node, "a", &cgroups[1], V6),
    ];
    let peer = Peer::new(20);
    let mut folders = vec![folder()];
    for update in 0..10 {
        let mut new = site.next(folders.last().unwrap().path());
        new.await_line(&["the listeners in pods are handed over"]);
        old.await_line(&["the next daemon serves pods now"]);
        // Between the two, pods come and go as ever.
        let name = format!("b{update}");
        site.node.add_with(&name, |_| peer.make());
        await_namespaces(&new, 2);
        assert!(
            site.serves(&name, &Cgroup::of_pod(30 + update), V4),
            "{update}"
        );
        site.node.remove(&name);
        await_some("the namespace is freed", PATIENCE, || {
            (!peer.is_there()).then_some(())
        });
        std::mem::swap(&mut old, &mut new);
        new.process().signal(Signal::SIGTERM);
        let ended = new.process().owned().wait(PATIENCE).expect("it ends");
        assert!(ended.success(), "{ended}");
        folders.push(folder());
    }
    for (asker, address) in askers.into_iter().zip([V4, V6]) {
        let counts = asker.enough();
        eprintln!("ten updates: {counts:?} over {address}");
        assert!(counts.len() == 1 && counts["Success"] > 20, "{counts:?}");
    }
    assert!(!old.log().contains("is taken"), "{}", old.log());
}

#[test]
fn an_update_that_fails_leaves_the_daemon_before_in_its_place() {
    let Some(stage) = Stage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    let cgroup = Cgroup::of_pod(50);
    let (first, second) = (folder(), folder());
    let next = stage.site.next(first.path());
    stage
        .daemon
        .await_line(&["the next daemon serves pods now"]);
    let peer = Peer::new(21);
    stage.site.node.add_with("b", |_| peer.make());
    await_namespaces(&next, 2);
    // SIGKILL, which cuts what it has accepted, and nothing else.
    drop(next);
    stage.daemon.await_line(&["the next daemon is gone"]);
    stage.await_namespaces(2);
    for name in ["a", "b"] {
        await_some("it is listened there", PATIENCE, || {
            listens(&stage.site.node, name, V4).then_some(())
        });
    }
    assert!(stage.site.serves("a", &cgroup, V4) && stage.site.serves("b", &Cgroup::of_pod(52), V6));
    // Which can hand over again.
    let asker = asking(&stage.site.node, "a", &cgroup, V4);
    let next = stage.site.next(second.path());
    next.await_line(&["the listeners in pods are handed over"]);
    let counts = asker.enough();
    assert!(counts.len() == 1 && counts["Success"] > 2, "{counts:?}");
    // A namespace that goes while one has handed it over and the other has it, is freed all the same.
    stage.site.node.remove("b");
    await_some("the namespace is freed", PATIENCE, || {
        (!peer.is_there()).then_some(())
    });
}

/// Both are restarted before the next one could serve. Whoever asks meanwhile is answered, if only that it has to wait.
#[test]
fn a_daemon_that_ends_gives_to_one_that_is_not_ready() {
    let Some(stage) = Stage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    let cgroup = Cgroup::of_pod(53);
    let folder = folder();
    let Stage {
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
    next.await_line(&["another daemon serves pods"]);
    assert!(site.serves("a", &cgroup, V4), "the one before still does");
    let asker = asking(&site.node, "a", &cgroup, V4);
    old.process().signal(Signal::SIGTERM);
    next.await_line(&["the listeners in pods are handed over"]);
    assert!(
        old.process()
            .owned()
            .wait(PATIENCE)
            .expect("it ends")
            .success()
    );
    // That a connection was refused, or reset, would be a panic of the asker's.
    let counts = asker.enough();
    assert!(!counts.contains_key("nothing"), "{counts:?}");
}

#[test]
fn a_daemon_that_was_killed_is_followed_by_one_that_binds_anew() {
    let Some(mut stage) = Stage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    stage.daemon.process().owned().end();
    let folder = folder();
    let next = stage.site.next(folder.path());
    assert_eq!(next.metric("awsvid_pod_listeners"), 1);
    assert!(stage.site.serves("a", &Cgroup::of_pod(51), V4));
}

/// Two updates one after the other, and the first daemon is there still: it is the last that serves again.
#[test]
fn a_daemon_goes_on_only_if_all_who_came_after_it_are_gone() {
    let Some(stage) = Stage::set_with(|node| node.add("a"), handing_over) else {
        return;
    };
    let Stage {
        daemon: first,
        site,
    } = stage;
    let cgroup = Cgroup::of_pod(54);
    let folders = [folder(), folder()];
    let mut second = site.next(folders[0].path());
    first.await_line(&["the next daemon serves pods now"]);
    let third = site.next(folders[1].path());
    second.await_line(&["the next daemon serves pods now"]);
    second.process().signal(Signal::SIGTERM);
    assert!(
        second
            .process()
            .owned()
            .wait(PATIENCE)
            .expect("it ends")
            .success()
    );
    // The end of the second one is seen by whoever waits for it before that one's process can be waited for.
    for count in 1..=20 {
        assert!(site.serves("a", &cgroup, V4));
        assert_eq!(third.issued(), count, "nobody else answers");
    }
    assert!(
        !first.log().contains("this one serves pods again"),
        "{}",
        first.log()
    );
    // SIGKILL.
    drop(third);
    first.await_line(&["the next daemon is gone"]);
    await_namespaces(&first, 1);
    assert!(site.serves("a", &cgroup, V4));
}
