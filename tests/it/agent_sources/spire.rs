//! T2 and T3 against the real SPIRE agent: they succeed against the agent if it is queried about
//! the process, and fail against awsvid. ../attacks/README.md has the table of attacks.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use awsvid::svid::SpireDelegated;
use awsvid::svid::agent::AttestingAgent;
use tokio::runtime::Runtime;

use crate::harness::actor::{self, Steps};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::spire::{Spire, SpireSetting};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::env::{AWSVID, awsvid_selectors, id};
use crate::harness::fake_docker::FakeDocker;
use crate::harness::outcome::{Outcome, credentials_of, rejected};
use crate::harness::pausable_proxy::PausableProxy;
use crate::harness::sts::{AUDIENCE, OneRoleSts};

const ALICE: u32 = 61001;
/// This test's own SPIFFE ID, by which it may query the agent, too.
const TEST: &str = "spiffe://example.org/test";
const LISTENERS: [&str; 2] = ["unix", "tcp"];

/// SPIRE with a second delegate in addition to awsvid: the test itself.
struct Agents {
    spire: Spire,
    client: SpireDelegated,
    runtime: Runtime,
}

impl Agents {
    fn start(folder: &Path, attestor: String) -> Option<Self> {
        let delegates = vec![AWSVID.to_owned(), TEST.to_owned()];
        let spire = Spire::start_with(
            folder,
            SpireSetting {
                delegates,
                attestor,
                ..SpireSetting::default()
            },
        )?;
        spire.register(
            AWSVID,
            &awsvid_selectors(std::path::Path::new(crate::harness::daemon::PROGRAM))
                .each_ref()
                .map(String::as_str),
        );
        let own = format!("unix:path:{}", std::env::current_exe().unwrap().display());
        spire.register(TEST, &["unix:uid:0", &own]);
        let client = SpireDelegated::new(&spire.admin_socket(), Duration::from_secs(30));
        Some(Self {
            spire,
            client,
            runtime: Runtime::new().unwrap(),
        })
    }

    /// Returns the SPIFFE IDs that the agent itself gives this process.
    fn ids(&self, pid: i32) -> Vec<String> {
        let svids = self
            .runtime
            .block_on(self.client.fetch_for_pid(pid.try_into().unwrap(), AUDIENCE))
            .expect("SVIDs");
        svids.into_iter().map(|svid| svid.spiffe_id).collect()
    }

    /// Returns the number of queries that other clients made about a process.
    fn queries(&self) -> usize {
        self.spire
            .agent_log()
            .matches("Caller authorized as delegate")
            .count()
    }
}

fn daemon(folder: &Path, admin_socket: &Path, sts: &OneRoleSts) -> Daemon {
    let identity = format!(
        "admin_socket = \"unix://{}\"\naudience = \"{AUDIENCE}\"",
        admin_socket.display()
    );
    let configuration = format!(
        "[identity]\nsource = \"spire-delegated\"\n{identity}\n{}",
        sts.configuration()
    );
    Daemon::start(folder, "", &configuration).ready()
}

/// Makes a copy of the actor in the folder, at a path for an entry.
fn copy(folder: &Path, name: &str, mode: u32) -> PathBuf {
    let program = folder.join(name);
    fs::copy(actor::program(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
    program
}

/// Delegates a cgroup to a user, as systemd does for `user@.service`.
fn delegate(cgroup: &Cgroup, uid: u32) {
    for name in [
        "",
        "cgroup.procs",
        "cgroup.threads",
        "cgroup.subtree_control",
    ] {
        chown(cgroup.path().join(name), Some(uid), Some(uid)).unwrap();
    }
}

fn random_id() -> String {
    (0..64).map(|_| fastrand::char('0'..='9')).collect()
}

/// T2: the victim is a container that SPIRE knows by a label.
#[test]
fn container_is_not_impersonated_by_cgroup_name() {
    if !root() {
        return;
    }
    let (folder, victim) = (folder(), random_id());
    let engine = FakeDocker::start(folder.path(), &victim, ("app", "victim"));
    let Some(agents) = Agents::start(folder.path(), engine.attestor()) else {
        return;
    };
    let program = copy(folder.path(), "first", 0o755);
    agents
        .spire
        .register(&id("victim"), &["docker:label:app:victim"]);
    // No role exists for this one, so it leaves no choice.
    let own = "spiffe://example.org/alice".to_owned();
    agents.spire.register(&own, &["unix:uid:61001"]);
    let sts = OneRoleSts::start(&agents.spire.issuer_url());
    let daemon = daemon(folder.path(), &agents.spire.admin_socket(), &sts);
    let docker = Cgroup::new("docker");
    let (container, attacker) = (docker.below(&victim), docker.below(&random_id()));
    // Root in a container may create this below its own cgroup, if that is writable.
    let inner = attacker.path().join("docker").join(&victim);
    fs::create_dir_all(&inner).unwrap();
    let user = Cgroup::new("user@61001.service");
    delegate(&user, ALICE);
    let pod = "kubepods/besteffort/pod72f7f152-440c-66ac-9084-e0fc1d8a910c";

    let other = id("victim");
    for listener in LISTENERS {
        for (start, then, taken_for, right) in [
            // The query is about a container, and gets that container's identity.
            (container.path(), None, vec![&own, &other], None),
            (
                user.path(),
                Some(user.path().join("docker").join(&victim)),
                vec![&own, &other],
                Some("delegated_cgroup"),
            ),
            (
                user.path(),
                Some(user.path().join(pod).join(&victim)),
                vec![&own, &other],
                Some("delegated_cgroup"),
            ),
            // No event shows a move there and back, so the daemon does not query a process in a
            // user's own cgroups.
            (user.path(), None, vec![&own], Some("delegated_cgroup")),
            (
                inner.as_path(),
                None,
                vec![&own, &other],
                Some("nested_container"),
            ),
        ] {
            let scene = format!("{} then {then:?} over {listener}", start.display());
            let mut steps = Steps::start(
                &program,
                "still",
                listener,
                &daemon.listener(listener),
                start,
            );
            if let Some(then) = &then {
                steps.step(&format!("alice move {}", then.display()));
            }
            let mut ids = agents.ids(steps.caller());
            ids.sort();
            assert_eq!(
                ids.iter().collect::<Vec<_>>(),
                taken_for,
                "SPIRE by itself: {scene}"
            );
            let before = (engine.queries(), agents.queries());
            steps.step("send");
            let outcome = Outcome::of(&steps.step("answer"), &scene, &daemon);
            match right {
                Some(reason) => {
                    assert_eq!(outcome, rejected(reason), "{scene}");
                    assert_eq!(
                        (engine.queries(), agents.queries()),
                        before,
                        "{scene}: the agent was queried"
                    );
                }
                None => assert_eq!(outcome, credentials_of(&other), "{scene}"),
            }
        }
    }
}

/// T3 and T37: the daemon's query to the agent waits at a proxy until the caller has executed
/// another program, or shows another file as its executable.
#[test]
fn program_that_changes_during_a_query_is_not_served() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(agents) = Agents::start(folder.path(), String::new()) else {
        return;
    };
    let [first, second] = ["first", "second"].map(|name| copy(folder.path(), name, 0o755));
    let setuid = copy(folder.path(), "root", 0o4755);
    let path = |program: &Path| format!("unix:path:{}", program.display());
    for (name, uid, program) in [
        ("alice", ALICE, &first),
        ("second", ALICE, &second),
        ("root", 0, &setuid),
    ] {
        let user = format!("unix:uid:{uid}");
        agents.spire.register(&id(name), &[&user, &path(program)]);
    }
    let sts = OneRoleSts::start(&agents.spire.issuer_url());
    let socket = folder.path().join("gate.sock");
    let new_gate = || {
        let _ = fs::remove_file(&socket);
        PausableProxy::start(&socket, &agents.spire.admin_socket())
    };
    let gate = new_gate();
    gate.set_open(true);
    let daemon = daemon(folder.path(), &socket, &sts);
    let cgroup = Cgroup::new("setuid");

    let scenes = [("setuid", "root"), ("forged", "second")];
    for (listener, (scene, other)) in LISTENERS
        .into_iter()
        .flat_map(|listener| scenes.map(|scene| (listener, scene)))
    {
        let what = format!("{scene} over {listener}");
        // The agent's socket is replaced, so the next query uses a new connection.
        let gate = new_gate();
        let mut steps = Steps::start(
            &first,
            scene,
            listener,
            &daemon.listener(listener),
            cgroup.path(),
        );
        steps.step("send");
        gate.await_arrivals(1);
        assert_eq!(agents.ids(steps.caller()), [id("alice")], "{what}");
        steps.step("change");
        assert_eq!(
            agents.ids(steps.caller()),
            [id(other)],
            "SPIRE by itself: {what}"
        );
        let exchanged = sts.exchanged();
        gate.set_open(true);
        assert_eq!(
            Outcome::of(&steps.step("answer"), scene, &daemon),
            rejected("identity_changed"),
            "{what}"
        );
        assert_eq!(sts.exchanged(), exchanged, "a token was exchanged: {what}");
        // In a query about itself it is the other one, and nothing was kept of the previous query.
        assert_eq!(
            Outcome::of(&steps.step("again"), scene, &daemon),
            credentials_of(&id(other)),
            "{what}"
        );
    }
}
