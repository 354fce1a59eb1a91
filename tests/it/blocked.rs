//! Callers that block each read of their `/proc` files, and the effect on other callers (T25).

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::harness::actor::{self, Connector, Repeater};
use crate::harness::agent::{Entry, FakeAgent};
use crate::harness::cgroup::Cgroup;
use crate::harness::client;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::env::{Env, Setting, Source, id};
use crate::harness::hanging::HangingFiles;
use crate::harness::namespaces::NetnsNode;
use crate::harness::outcome::{Outcome, credentials_of, rejected};
use crate::harness::upstream::Upstream;

const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];
/// Each with processes of its own: together they are more than the daemon has threads.
const WORKLOADS: usize = 6;
/// The numbers of this test's pods begin here. Other tests have other ones.
const FIRST_POD: u16 = 700;
const POD_ADDRESS: &str = "127.0.0.1:974";
const CALLERS: usize = 3;

/// Checks that Bob is answered while Alice's processes are stuck. They belong to several workloads.
fn others_are_answered(daemon: &Daemon, folder: &Path, bob: &str) {
    others_are_answered_until(daemon, folder, bob, || {
        daemon.await_line(&["reading a caller's process blocks"]);
    });
}

/// Does the same. The callers of each listener are stuck until `done` returns.
fn others_are_answered_until(daemon: &Daemon, folder: &Path, bob: &str, done: impl Fn()) {
    let name = folder.file_name().unwrap().display().to_string();
    let honest = Cgroup::new(&format!("honest-{name}"));
    for listener in LISTENERS {
        let address = daemon.listener(listener);
        let cgroups: Vec<_> = (0..WORKLOADS)
            .map(|number| Cgroup::new(&format!("stuck-{number}-{name}")))
            .collect();
        let paths: Vec<_> = cgroups.iter().map(Cgroup::path).collect();
        let stuck =
            Repeater::block(CALLERS, listener, &address, daemon.pid(), &paths).wait_started();
        for other in LISTENERS {
            for _ in 0..10 {
                let answer = actor::play(
                    "bob",
                    other,
                    &daemon.listener(other),
                    daemon.pid(),
                    honest.path(),
                );
                let outcome = Outcome::of(&answer, "bob", daemon);
                assert_eq!(
                    outcome,
                    credentials_of(bob),
                    "over {other}, while callers over {listener} are stuck"
                );
            }
        }
        done();
        stuck.stop();
    }
}

#[test]
fn blocked_callers_do_not_stop_others_with_rules() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = Upstream::start(&[(61001, "alice"), (61002, "bob")]);
    let rules = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/alice\"\nuid = 61001\n\
                 exe = \"/bin/true\"\n\
                 [[workload]]\nspiffe_id = \"spiffe://example.org/user/bob\"\nuid = 61002\n";
    let daemon = Daemon::start(
        folder.path(),
        "",
        &format!("{}{rules}", upstream.configuration()),
    )
    .ready();
    others_are_answered(&daemon, folder.path(), "spiffe://example.org/user/bob");
}

/// Starts the daemon behind these words, with rules by user alone.
fn with_rules_by_user(words: &[&str], folder: &Path, upstream: &Upstream) -> Daemon {
    let rules = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/alice\"\nuid = 61001\n\
                 [[workload]]\nspiffe_id = \"spiffe://example.org/user/bob\"\nuid = 61002\n";
    let configuration = format!("{}{rules}", upstream.configuration());
    Daemon::start_behind(words, folder, "", &configuration).ready()
}

/// Before Linux 6.5 the daemon reads the start of each caller's process on the unix socket.
#[test]
fn blocked_callers_do_not_stop_others_without_peer_pidfd() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = Upstream::start(&[(61001, "alice"), (61002, "bob")]);
    let actor = actor::program();
    let words = [actor.to_str().unwrap(), "without-peer-pidfd"];
    let daemon = with_rules_by_user(&words, folder.path(), &upstream);
    daemon.await_line(&["callers on the unix socket are rejected", "SO_PEERPIDFD"]);
    others_are_answered(&daemon, folder.path(), BOB);
}

/// The kernel checks each path below `/proc/<pid>` as ptrace(2), and the check does not block.
#[test]
fn blocked_callers_do_not_stop_others_where_proc_hides_processes() {
    if !root() {
        return;
    }
    let folder = folder();
    let upstream = Upstream::start(&[(61001, "alice"), (61002, "bob")]);
    let mount = "mount -t proc -o hidepid=ptraceable none /proc && exec \"$@\"";
    let words = ["unshare", "--mount", "sh", "-euc", mount, "sh"];
    let daemon = with_rules_by_user(&words, folder.path(), &upstream);
    // Nothing blocks, and nothing is logged.
    others_are_answered_until(&daemon, folder.path(), BOB, || ());
}

#[test]
fn blocked_callers_do_not_stop_others_with_agent() {
    if !root() {
        return;
    }
    let folder = folder();
    let entries = vec![
        Entry::new(&id("alice"), &["unix:uid:61001"]),
        Entry::new(&id("bob"), &["unix:uid:61002"]),
    ];
    let agent = FakeAgent::start(folder.path(), entries);
    let daemon = Daemon::start(folder.path(), "", &agent.configuration()).ready();
    others_are_answered(&daemon, folder.path(), &id("bob"));
}

/// The real agent attests the callers, by a reference to the process.
#[test]
fn blocked_callers_do_not_stop_others_with_spiffe_broker() {
    let folder = folder();
    let setting = Setting {
        source: Source::Broker,
        ..Setting::default()
    };
    let Some(env) = Env::start(folder.path(), &[(61001, "alice"), (61002, "bob")], &setting) else {
        return;
    };
    others_are_answered(&env.daemon, folder.path(), &id("bob"));
}

/// The blocked callers are in pods, each with a listener of its own.
#[test]
fn blocked_callers_in_pods_do_not_stop_others() {
    if !root() {
        return;
    }
    let folder = folder();
    let node = NetnsNode::start(folder.path());
    let names: Vec<String> = (0..WORKLOADS).map(|pod| format!("stuck-{pod}")).collect();
    names.iter().for_each(|name| node.add(name));
    node.add("honest");
    let upstream = Upstream::start(&[(0, "pod"), (61002, "bob")]);
    // The first rule makes the daemon read each caller's program.
    let rules = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/true\"\n\
                 cgroup = \"/kubepods/**\"\nexe = \"/bin/true\"\n\
                 [[workload]]\nspiffe_id = \"spiffe://example.org/user/pod\"\ncgroup = \"/kubepods/**\"\n\
                 [[workload]]\nspiffe_id = \"spiffe://example.org/user/bob\"\nuid = 61002\n";
    let words = node.enter();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let configuration = format!("{}{rules}", upstream.configuration());
    let daemon =
        Daemon::start_behind(&words, folder.path(), &node.listen(), &configuration).ready();

    let pods: Vec<Cgroup> = (0..WORKLOADS)
        .map(|pod| Cgroup::of_pod(FIRST_POD + u16::try_from(pod).unwrap()))
        .collect();
    let stuck: Vec<Repeater> = names
        .iter()
        .zip(&pods)
        .map(|(name, pod)| {
            let network = format!("--net={}", node.path(name).display());
            let words = [&words[..], &["nsenter", &network, "--"]].concat();
            let pods = [pod.path()];
            Repeater::block_behind(&words, CALLERS, ("tcp", POD_ADDRESS), daemon.pid(), &pods)
                .wait_started()
        })
        .collect();
    let honest = Cgroup::of_pod(FIRST_POD + 100);
    let bobs = Cgroup::new("honest-beside-pods");
    for _ in 0..10 {
        let answer = node.fetch("honest", &honest, POD_ADDRESS.parse().unwrap());
        let outcome = Outcome::of(&answer, "another pod", &daemon);
        assert_eq!(outcome, credentials_of("spiffe://example.org/user/pod"));
        for listener in LISTENERS {
            let address = daemon.listener(listener);
            let answer = actor::play("bob", listener, &address, daemon.pid(), bobs.path());
            let outcome = Outcome::of(&answer, "bob", &daemon);
            assert_eq!(outcome, credentials_of(BOB), "over {listener}");
        }
    }
    stuck.into_iter().for_each(|stuck| drop(stuck.stop()));
}

/// The daemon has to find out about the process at the agent's end of the socket, and that process
/// blocks reads of its `/proc` files.
#[test]
fn blocked_agent_does_not_stop_threads() {
    if !root() {
        return;
    }
    let folder = folder();
    let socket = folder.path().join("agent.sock");
    let cgroup = Cgroup::new("blocked-agent.service");
    let stuck = Repeater::block_agent(&socket, &cgroup).wait_started();
    let configuration = format!(
        "[identity]\nsource = \"spire-delegated\"\nadmin_socket = \"unix://{}\"\n\
         [sts]\nregion = \"us-east-1\"\n\
         [[role]]\nname = \"all\"\nspiffe_id = \"{}\"\nrole_arn = \"arn:aws:iam::123456789012:role/all\"\n",
        socket.display(),
        id("*"),
    );
    let daemon = Daemon::start(folder.path(), "", &configuration);
    // A call that has no response ends on time, since its thread is free.
    await_some("the call ends", TIMEOUT, || {
        daemon.log().contains("did not answer within").then_some(())
    });
    stuck.stop();
}

/// A rule names a program on a file system that hangs. Alice has that rule, and one for all other
/// programs. Bob's rules name a program on another file system.
struct HangingRule {
    /// The first field, so that it ends first.
    files: HangingFiles,
    daemon: Daemon,
    configuration: String,
    cgroup: Cgroup,
    _upstream: Upstream,
    _folder: tempfile::TempDir,
}

const PROGRAM: &str = "spiffe://example.org/user/program";
const ALICE: &str = "spiffe://example.org/user/alice";
const BOB: &str = "spiffe://example.org/user/bob";
const TIMEOUT: Duration = Duration::from_secs(60);

impl HangingRule {
    fn start() -> Self {
        let (folder, files) = (folder(), HangingFiles::mount());
        let upstream = Upstream::start(&[
            (61001, "alice"),
            (61002, "bob"),
            (61003, "program"),
            (61004, "another"),
        ]);
        let rule = |id, keys: &str| format!("\n[[workload]]\nspiffe_id = \"{id}\"\n{keys}\n");
        let rules = [
            rule(
                PROGRAM,
                &format!("uid = 61001\nexe = {:?}", files.program()),
            ),
            rule(ALICE, "uid = 61001"),
            rule(
                "spiffe://example.org/user/another",
                "uid = 61002\nexe = \"/bin/true\"",
            ),
            rule(BOB, "uid = 61002"),
        ];
        let configuration = format!("{}{}", upstream.configuration(), rules.concat());
        let enter = files.enter();
        let enter: Vec<&str> = enter.iter().map(String::as_str).collect();
        let daemon = Daemon::start_behind(&enter, folder.path(), "", &configuration).ready();
        let cgroup = Cgroup::new(&format!(
            "callers-{}",
            folder.path().file_name().unwrap().display()
        ));
        Self {
            files,
            daemon,
            configuration,
            cgroup,
            _upstream: upstream,
            _folder: folder,
        }
    }

    /// Connects as a caller that runs the file on that file system.
    fn runs_it(&self, uid: u32, listener: &str) -> Connector {
        let address = self.daemon.listener(listener);
        let (words, program) = (self.files.enter(), self.files.program());
        Connector::start_behind(&words, program, uid, listener, &address, self.cgroup.path())
    }

    /// Returns the outcome of a request.
    fn outcome(&self, mut connection: File) -> Outcome {
        let mut answer = String::new();
        let timeout = TimeVal::seconds(TIMEOUT.as_secs().cast_signed());
        setsockopt(&connection, sockopt::ReceiveTimeout, &timeout).unwrap();
        connection.read_to_string(&mut answer).expect("an answer");
        Outcome::of(&answer, "a request", &self.daemon)
    }

    fn fetch(&self, caller: &Connector) -> Outcome {
        self.outcome(send(caller))
    }
}

fn send(caller: &Connector) -> File {
    client::send(File::from(caller.connect_and_keep()))
}

/// While the file does not respond, the daemon cannot decide which of Alice's rules is right. Bob
/// may run any program.
#[test]
fn hanging_exe_rule_affects_only_its_user() {
    if !root() {
        return;
    }
    let mut stage = HangingRule::start();
    let callers = LISTENERS.map(|listener| {
        let usual = |uid| {
            Connector::start(
                uid,
                listener,
                &stage.daemon.listener(listener),
                stage.cgroup.path(),
            )
        };
        let alices = [
            (stage.runs_it(61001, listener), PROGRAM),
            (usual(61001), ALICE),
        ];
        (
            listener,
            alices,
            [stage.runs_it(61002, listener), usual(61002)],
        )
    });
    let bob_is_answered = |stage: &HangingRule, when: &str| {
        for (listener, _, bobs) in &callers {
            for bob in bobs {
                assert_eq!(
                    stage.fetch(bob),
                    credentials_of(BOB),
                    "over {listener} {when}"
                );
            }
        }
    };
    let alices = || callers.iter().flat_map(|(_, alices, _)| alices);
    for (alice, id) in alices() {
        assert_eq!(stage.fetch(alice), credentials_of(id));
    }
    bob_is_answered(&stage, "before");

    stage.files.hang();
    // The daemon keeps the file's status for a moment.
    let unresponsive = rejected("process_unresponsive");
    await_some("the file is read again", TIMEOUT, || {
        let (alice, id) = &callers[0].1[0];
        let outcome = stage.fetch(alice);
        assert!(
            outcome == unresponsive || outcome == credentials_of(id),
            "{outcome:?}"
        );
        (outcome == unresponsive).then_some(())
    });
    assert!(
        stage.daemon.reload("", &stage.configuration),
        "rules are read without their files"
    );
    let waiting: Vec<File> = alices().map(|(alice, _)| send(alice)).collect();
    bob_is_answered(&stage, "while it hangs");
    for connection in waiting {
        assert_eq!(stage.outcome(connection), unresponsive, "while it hangs");
    }

    // Programs that run from there may end with the server, when they need more of their file.
    let connected: Vec<File> = alices()
        .map(|(alice, _)| File::from(alice.connect_and_keep()))
        .collect();
    stage.files.end_server();
    for connection in connected {
        assert_eq!(
            stage.outcome(client::send(connection)),
            unresponsive,
            "without its server"
        );
    }
    for (listener, _, [_, bob]) in &callers {
        assert_eq!(
            stage.fetch(bob),
            credentials_of(BOB),
            "over {listener} without its server"
        );
    }
}
