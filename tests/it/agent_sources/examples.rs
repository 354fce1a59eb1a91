//! The shipped configurations, unchanged, of the sources that attest callers themselves.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::harness::counterparts::process::{Process, behind, run};
use crate::harness::counterparts::spire::Spire;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::PROGRAM;
use crate::harness::env::{AWSVID, Source, awsvid_selectors};

const BILLING: u32 = 51_002;
const STRANGER: u32 = 51_003;
const TIMEOUT: Duration = Duration::from_secs(60);

/// A socket's path in the examples, and the real socket.
type SocketMount = (&'static str, PathBuf);

/// Runs a program as on a machine of its own, with these sockets at their paths and a loopback
/// device of its own.
fn run_isolated(mounts: &[SocketMount]) -> String {
    let mut script =
        String::from("mount -t tmpfs tmpfs /run; mkdir /run/awsvid; ip link set lo up");
    for (mount, socket) in mounts {
        let directory = Path::new(mount).parent().unwrap();
        script += &format!(
            "; mkdir -p {}; ln -s {} {mount}",
            directory.display(),
            socket.display()
        );
    }
    script + "; exec \"$@\""
}

fn as_it_stands(example: &str, source: Source, mounts: impl Fn(&Spire) -> Vec<SocketMount>) {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(spire) = Spire::start_with(folder.path(), source.of_spire()) else {
        return;
    };
    spire.register(
        AWSVID,
        &awsvid_selectors(Path::new(PROGRAM))
            .each_ref()
            .map(String::as_str),
    );
    spire.register(
        "spiffe://example.org/billing",
        &[&format!("unix:uid:{BILLING}")],
    );
    let script = run_isolated(&mounts(&spire));
    let mut command = behind(
        &["unshare", "--mount", "--net", "sh", "-ec", &script, "sh"],
        Path::new(PROGRAM),
    );
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("deploy")
        .join(example);
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .arg("serve")
        .arg("--config")
        .arg(file);
    let daemon = Process::start("awsvid", command, &folder.path().join("awsvid.log"));
    daemon.await_some("its listeners", TIMEOUT, || {
        daemon.log().contains("serving operators").then_some(())
    });

    let pid = daemon.id().to_string();
    let fetch = |uid: u32| -> (u16, Value) {
        let uid = uid.to_string();
        let inside = ["nsenter", "--target", &pid, "--mount", "--net"];
        let user = [
            "setpriv",
            "--reuid",
            &uid,
            "--regid",
            &uid,
            "--clear-groups",
        ];
        let mut curl = behind(&[&inside[..], &user[..]].concat(), Path::new("curl"));
        curl.args([
            "--silent",
            "--show-error",
            "--header",
            "Authorization: any",
            "--write-out",
            "\n%{http_code}",
        ]);
        curl.arg("http://127.0.0.1:974/v1/credentials");
        let output = run(curl, b"", TIMEOUT).success("curl");
        let (body, status) = output.rsplit_once('\n').expect("the status after the body");
        (
            status.parse().expect("a status"),
            serde_json::from_str(body).expect("JSON"),
        )
    };
    // The example names an account at AWS, which can't be reached from here: one caller gets as far
    // as that. Where a name server is queried for it, that may take longer than a request is held.
    let rejection = || Some(fetch(BILLING)).filter(|(_, body)| body["code"] != "pending");
    let (status, body) = daemon.await_some("what became of it", TIMEOUT, rejection);
    assert_eq!(
        (status, &body["code"]),
        (503, &"sts_unreachable".into()),
        "{body}"
    );
    assert_ne!(spire.jwt_svids_signed("spiffe://example.org/billing"), 0);
    let (status, body) = fetch(STRANGER);
    assert_eq!(
        (status, &body["code"]),
        (403, &"no_identity".into()),
        "{body}"
    );
}

#[test]
fn example_works_with_spire_delegated() {
    as_it_stands("spire-delegated.toml", Source::Delegated, |spire| {
        vec![("/run/spire/admin/api.sock", spire.admin_socket())]
    });
}

#[test]
fn example_works_with_spiffe_broker() {
    as_it_stands("spiffe-broker.toml", Source::Broker, |spire| {
        vec![
            (
                "/run/spire/agent-sockets/spire-agent.sock",
                spire.agent_socket(),
            ),
            ("/run/spire/broker/api.sock", spire.broker_socket()),
        ]
    });
}
