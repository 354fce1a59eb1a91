//! Attacks 2 and 3 against the real SPIRE agent: it falls for them when it is asked about the process, and awsvid does not.
//! The table of attacks is in ../attacks/README.md.

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
use crate::harness::fake_docker::FakeEngine;
use crate::harness::outcome::{Made, answered, refused};
use crate::harness::pausable_proxy::Gate;
use crate::harness::sts::{AUDIENCE, OneRoleSts};

const ALICE: u32 = 61001;
/// This test's own SPIFFE ID, by which it may ask the agent, too.
const TEST: &str = "spiffe://example.org/test";
const LISTENERS: [&str; 2] = ["unix", "tcp"];

/// SPIRE with a delegate besides awsvid: the test itself.
struct Agents {
    spire: Spire,
    asking: SpireDelegated,
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
        let asking = SpireDelegated::new(&spire.admin_socket(), Duration::from_secs(30));
        Some(Self {
            spire,
            asking,
            runtime: Runtime::new().unwrap(),
        })
    }

    /// Whom the agent itself takes this process for.
    fn ids(&self, pid: i32) -> Vec<String> {
        let svids = self
            .runtime
            .block_on(self.asking.fetch_for_pid(pid.try_into().unwrap(), AUDIENCE))
            .expect("SVIDs");
        svids.into_iter().map(|svid| svid.spiffe_id).collect()
    }

    /// How often somebody has asked it about another process.
    fn asked(&self) -> usize {
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

/// A copy of the actor in the folder, whose path is an entry's.
fn copy(folder: &Path, name: &str, mode: u32) -> PathBuf {
    let program = folder.join(name);
    fs::copy(actor::program(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
    program
}

/// A cgroup that is handed over to a user, as systemd does it for `user@.service`.
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

/// Attack 2. The victim is a container that SPIRE knows by a label.
#[test]
fn a_container_is_not_who_has_given_its_cgroup_that_name() {
    if !root() {
        return;
    }
    let (folder, victim) = (folder(), random_id());
    let engine = FakeEngine::start(folder.path(), &victim, ("app", "victim"));
    let Some(agents) = Agents::start(folder.path(), engine.attestor()) else {
        return;
    };
    let program = copy(folder.path(), "first", 0o755);
    agents
        .spire
        .register(&id("victim"), &["docker:label:app:victim"]);
    // There is no role for this one, so it leaves a choice to nobody.
    let own = "spiffe://example.org/alice".to_owned();
    agents.spire.register(&own, &["unix:uid:61001"]);
    let sts = OneRoleSts::start(&agents.spire.issuer_url());
    let daemon = daemon(folder.path(), &agents.spire.admin_socket(), &sts);
    let docker = Cgroup::new("docker");
    let (container, attacker) = (docker.below(&victim), docker.below(&random_id()));
    // What root in a container may make below its own cgroup, if that can be written to.
    let inner = attacker.path().join("docker").join(&victim);
    fs::create_dir_all(&inner).unwrap();
    let user = Cgroup::new("user@61001.service");
    delegate(&user, ALICE);
    let pod = "kubepods/besteffort/pod72f7f152-440c-66ac-9084-e0fc1d8a910c";

    let other = id("victim");
    for listener in LISTENERS {
        for (start, then, taken_for, right) in [
            // A container is asked about, and answered with its own.
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
            // There and back is seen nowhere, so nobody is asked about who lives in a user's own cgroups.
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
            let before = (engine.asked(), agents.asked());
            steps.step("ask");
            let made = Made::of(&steps.step("answer"), &scene, &daemon);
            match right {
                Some(reason) => {
                    assert_eq!(made, refused(reason), "{scene}");
                    assert_eq!(
                        (engine.asked(), agents.asked()),
                        before,
                        "{scene}: somebody was asked"
                    );
                }
                None => assert_eq!(made, answered(&other), "{scene}"),
            }
        }
    }
}

/// Attack 3. The daemon's question to the agent waits at a gate until the caller has become something else.
#[test]
fn a_setuid_program_is_not_who_has_executed_it() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(agents) = Agents::start(folder.path(), String::new()) else {
        return;
    };
    let (first, setuid) = (
        copy(folder.path(), "first", 0o755),
        copy(folder.path(), "root", 0o4755),
    );
    let path = |program: &Path| format!("unix:path:{}", program.display());
    agents
        .spire
        .register(&id("alice"), &["unix:uid:61001", &path(&first)]);
    agents
        .spire
        .register(&id("root"), &["unix:uid:0", &path(&setuid)]);
    let sts = OneRoleSts::start(&agents.spire.issuer_url());
    let socket = folder.path().join("gate.sock");
    let new_gate = || {
        let _ = fs::remove_file(&socket);
        Gate::start(&socket, &agents.spire.admin_socket())
    };
    let gate = new_gate();
    gate.set_open(true);
    let daemon = daemon(folder.path(), &socket, &sts);
    let cgroup = Cgroup::new("setuid");

    for listener in LISTENERS {
        // The agent's socket is another one, so the next question comes over a new connection.
        let gate = new_gate();
        let mut steps = Steps::start(
            &first,
            "setuid",
            listener,
            &daemon.listener(listener),
            cgroup.path(),
        );
        steps.step("ask");
        gate.await_came(1);
        assert_eq!(agents.ids(steps.caller()), [id("alice")]);
        steps.step("change");
        assert_eq!(agents.ids(steps.caller()), [id("root")], "SPIRE by itself");
        let exchanged = sts.exchanged();
        gate.set_open(true);
        assert_eq!(
            Made::of(&steps.step("answer"), "setuid", &daemon),
            refused("identity_changed"),
            "over {listener}"
        );
        assert_eq!(sts.exchanged(), exchanged, "root's token was exchanged");
        // Asked about for itself it is root, and nothing was kept of the question before.
        assert_eq!(
            Made::of(&steps.step("again"), "setuid", &daemon),
            answered(&id("root")),
            "over {listener}"
        );
    }
}
