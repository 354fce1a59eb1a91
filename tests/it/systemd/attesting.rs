//! The shipped unit with the sources that attest callers themselves, and the real SPIRE agent on
//! the same machine. The unit's sandbox is in effect when the daemon loads the program that counts
//! executions (bpf(2)), and when it inspects its callers.
//!
//! The machine has pids of its own, so executions are counted by cgroup here. `agent_sources`
//! counts them by pid, without the sandbox.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{
    ADDRESSES, BILLING, CONFIGURATION, Content, PROGRAM, fetch, install, restarts, shipped, start,
};
use crate::harness::counterparts::spire::{Spire, SpireSetting};
use crate::harness::counterparts::{folder, root, tool};
use crate::harness::env::{AWSVID, Source, awsvid_selectors, id};
use crate::harness::sts::{AUDIENCE, OneRoleSts};
use crate::harness::systemd::SystemdMachine;

const DROP_IN: &str = "/etc/systemd/system/awsvid.service.d/narrow.conf";

/// A machine with awsvid and an agent. The agent knows the user billing, with curl.
struct AttestingMachine {
    machine: SystemdMachine,
    spire: Spire,
    _folder: tempfile::TempDir,
}

impl AttestingMachine {
    /// Boots the machine, with this file of `deploy` as awsvid's configuration, and starts the
    /// agent in it. No unit of awsvid is started yet.
    fn boot(source: Source, example: &str) -> Option<Self> {
        if !root() {
            return None;
        }
        let folder = folder();
        let programs: PathBuf = tool("spire-agent")?.ancestors().nth(2)?.to_owned();
        let data = folder.path().join("spire");
        let [admin, agent, broker] = ["admin", "agent", "broker"].map(|name| data.join(name));
        for directory in [&admin, &agent, &broker] {
            fs::create_dir_all(directory).unwrap();
        }
        let example = fs::read_to_string(shipped(example)).unwrap();
        // SPIRE's data and programs have the same paths inside. The sockets have those of the
        // examples in addition.
        let more = [
            (data.to_str()?, Content::Mount(&data)),
            (programs.to_str()?, Content::Mount(&programs)),
            ("/run/spire/admin", Content::Mount(&admin)),
            ("/run/spire/agent-sockets", Content::Mount(&agent)),
            ("/run/spire/broker", Content::Mount(&broker)),
            (CONFIGURATION, Content::Text(&example)),
        ];
        let machine = install(folder.path(), &more)?;
        let setting = SpireSetting {
            // Its network is that of the server.
            agent_behind: machine.enter(&["--mount", "--pid", "--cgroup"]),
            ..source.of_spire()
        };
        let spire = Spire::start_with(folder.path(), setting)?;
        std::os::unix::fs::symlink("api.sock", agent.join("spire-agent.sock")).unwrap();
        let awsvid = awsvid_selectors(Path::new(PROGRAM));
        spire.register(AWSVID, &awsvid.each_ref().map(String::as_str));
        let curl = ["unix:uid:1001", "unix:path:/usr/bin/curl"];
        spire.register(BILLING, &curl);
        spire.register(&id("billing"), &curl);
        Some(Self {
            machine,
            spire,
            _folder: folder,
        })
    }

    fn fetch(&self, user: &str, address: &[&str]) -> (u16, Value) {
        fetch(&self.machine, &format!("{user}.service"), user, address)
    }

    /// Asserts that callers over each listener get this status and code.
    fn assert_code(&self, user: &str, status: u16, code: &str) {
        for (_, address) in ADDRESSES {
            let (found, body) = self.fetch(user, address);
            assert_eq!(
                (found, &body["code"]),
                (status, &Value::from(code)),
                "{user} over {address:?}: {body}"
            );
        }
    }

    /// Restarts the daemon with these lines in the unit's `[Service]`.
    fn restart_with(&self, lines: &str) {
        let file = self.machine.path(DROP_IN);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, format!("[Service]\n{lines}\n")).unwrap();
        for words in [&["daemon-reload"][..], &["restart", "awsvid.service"]] {
            self.machine
                .run(&[&["systemctl"], words].concat())
                .success("restart awsvid with a narrower unit");
        }
    }

    /// Returns the files that the daemon has open, as links.
    fn open_files(&self) -> Vec<String> {
        let pid = self.machine.property("awsvid.service", "MainPID");
        let entries = fs::read_dir(self.machine.path(&format!("/proc/{pid}/fd"))).unwrap();
        entries
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .map(|link| link.display().to_string())
            .collect()
    }
}

/// Checks the shipped unit and the shipped configuration as they are, then with an STS that
/// responds, then with a unit that forbids what counts executions.
fn check_unit(source: Source, example: &str) {
    let Some(attested) = AttestingMachine::boot(source, example) else {
        return;
    };
    let machine = &attested.machine;
    start(machine);
    // The example names an account at AWS, which can't be reached from here.
    attested.assert_code("billing", 503, "sts_unreachable");
    attested.assert_code("shop", 403, "no_identity");
    assert_ne!(attested.spire.jwt_svids_signed(BILLING), 0);

    let sts = OneRoleSts::start(&attested.spire.issuer_url());
    let forward = machine.forward(sts.address());
    let text = fs::read_to_string(machine.path(CONFIGURATION)).unwrap();
    let (identity, _) = text.split_once("[sts]").unwrap();
    let configuration = sts
        .configuration()
        .replace(&sts.address().to_string(), &forward.address().to_string());
    let text = format!("{identity}audience = \"{AUDIENCE}\"\n{configuration}");
    fs::write(machine.path(CONFIGURATION), text).unwrap();
    attested.restart_with("");
    assert!(
        attested
            .open_files()
            .iter()
            .any(|link| link.contains("bpf")),
        "the program that counts executions is attached: {:?}",
        attested.open_files()
    );
    for (_, address) in ADDRESSES {
        let (status, body) = attested.fetch("billing", address);
        assert_eq!(status, 200, "{address:?}: {body}");
    }
    attested.assert_code("shop", 403, "no_identity");
    let journal = machine.journal();
    for complaint in ["cannot be counted", "forbidden although", "is missing:"] {
        assert!(!journal.contains(complaint), "{complaint}:\n{journal}");
    }

    for (number, forbidden) in [
        "SystemCallFilter=~bpf",
        "CapabilityBoundingSet=~CAP_BPF",
        "CapabilityBoundingSet=~CAP_PERFMON",
    ]
    .into_iter()
    .enumerate()
    {
        attested.restart_with(forbidden);
        attested.assert_code("billing", 403, "unseen_program");
        let journal = machine.journal();
        assert_eq!(
            (
                journal.matches("cannot be counted").count(),
                journal.matches("with bpf in SystemCallFilter=").count(),
            ),
            (number + 1, number + 1),
            "one line at each start, with the fix: {journal}"
        );
    }
    attested.restart_with("");
    for (_, address) in ADDRESSES {
        assert_eq!(attested.fetch("billing", address).0, 200, "{address:?}");
    }
    assert_eq!(restarts(machine), 0);
}

#[test]
fn shipped_unit_attests_with_spire_delegated() {
    check_unit(Source::Delegated, "spire-delegated.toml");
}

#[test]
fn shipped_unit_attests_with_spiffe_broker() {
    check_unit(Source::Broker, "spiffe-broker.toml");
}
