//! The directory of network namespaces stops responding (T25). Root can mount a file system there
//! that does, and so can a pod that may do anything.

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use super::{RULE, TIMEOUT, V4, await_namespaces, listens};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::hanging::HangingFiles;
use crate::harness::namespaces::NetnsNode;
use crate::harness::upstream::Upstream;

/// A directory of namespaces whose path leads over a link, to where it exists or to a file system
/// that hangs.
///
/// The file system ends first: before that, a daemon that waits for it cannot end.
struct LinkedDirectory {
    files: HangingFiles,
    daemon: Option<Daemon>,
    node: NetnsNode,
    link: PathBuf,
    folder: tempfile::TempDir,
}

impl LinkedDirectory {
    /// Makes it with the link to where the directory is.
    fn new() -> Self {
        let (files, folder) = (HangingFiles::mount(), folder());
        let node = NetnsNode::with_hanging(&files, folder.path());
        let link = folder.path().join("link");
        symlink(node.directory(), &link).unwrap();
        Self {
            files,
            daemon: None,
            node,
            link,
            folder,
        }
    }

    /// Makes each access to the path hang from here on.
    fn hang(&mut self) {
        self.files.hang();
        self.lead_to(self.files.program());
    }

    /// Ends the hanging calls with an error, and makes later ones find the directory.
    fn respond(&mut self) {
        self.lead_to(self.node.directory());
        self.files.end_server();
    }

    fn lead_to(&self, target: &Path) {
        let new = self.folder.path().join("new-link");
        symlink(target, &new).unwrap();
        fs::rename(new, &self.link).unwrap();
    }

    fn start(&mut self, upstream: &Upstream) {
        let words = self.node.enter();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.daemon = Some(Daemon::start_behind(
            &words,
            self.folder.path(),
            &NetnsNode::listen_in(&self.link),
            &(upstream.configuration() + RULE),
        ));
    }

    fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("it was started")
    }

    fn serves(&self, name: &str) -> bool {
        let answer = self
            .node
            .fetch(name, &Cgroup::of_pod(60), V4.parse().unwrap());
        answer.starts_with("HTTP/1.1 200") && answer.contains("AccessKeyId")
    }
}

const HANGS: &str = "[pods] netns_dir does not respond: new pods are not served";

#[test]
fn directory_that_hangs_stops_only_new_pods() {
    if !root() {
        return;
    }
    let upstream = Upstream::start(&[(0, "pod")]);
    let mut directory = LinkedDirectory::new();
    directory.node.add("early");
    directory.start(&upstream);
    await_namespaces(directory.daemon(), 1);
    directory.hang();
    directory.daemon().await_line(&[HANGS]);
    directory.node.add("late");
    assert!(directory.serves("early"));
    assert!(!listens(&directory.node, "late", V4));
    directory.respond();
    await_namespaces(directory.daemon(), 2);
    assert!(directory.serves("early") && directory.serves("late"));
}

#[test]
fn directory_that_hangs_stops_neither_start_nor_drain() {
    if !root() {
        return;
    }
    let upstream = Upstream::start(&[(0, "pod")]);
    let mut directory = LinkedDirectory::new();
    directory.node.add("early");
    directory.hang();
    directory.start(&upstream);
    let daemon = directory.daemon();
    daemon.await_line(&[HANGS]);
    daemon.await_line(&["serving workloads in pods"]);
    daemon.await_line(&["serving operators", "status.sock"]);
    assert_eq!(daemon.query_status_socket("/readyz").0, 503);
    let address = daemon.tcp();
    assert!(TcpStream::connect(address).is_ok());
    daemon.process().signal(Signal::SIGTERM);
    await_some("the daemon has closed its listeners", TIMEOUT, || {
        TcpStream::connect(address).err()
    });
    // Until then the kernel keeps the process, for the thread that waits for the file system.
    directory.respond();
    let ended = directory.daemon().process().owned().wait(TIMEOUT);
    assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
}
