//! Blocks of deploy/docs that are for other programs, read by those programs: SPIRE, logrotate, a
//! database.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use serde_json::Value;

use super::stand_in;
use crate::harness::counterparts::process::{Output, Process, await_some, behind, run};
use crate::harness::counterparts::spire::Spire;
use crate::harness::counterparts::{folder, root, skip, tool};
use crate::harness::daemon::Daemon;
use crate::harness::documents::{block, blocks};
use crate::harness::upstream::{Upstream, my_rule};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns an agent's configuration with the inner part of an `agent` block, and with a plugin.
fn agent(folder: &Path, agent: &str, plugin: &str) -> String {
    let folder = folder.display();
    format!(
        "agent {{\n  data_dir = \"{folder}/data\"\n  trust_domain = \"example.org\"\n\
         server_address = \"127.0.0.1\"\n  server_port = 1\n  insecure_bootstrap = true\n\
         socket_path = \"{folder}/public/api.sock\"\n{agent}\n}}\n\
         plugins {{\n  NodeAttestor \"join_token\" {{ plugin_data {{}} }}\n\
         KeyManager \"memory\" {{ plugin_data {{}} }}\n{plugin}\n}}\n"
    )
}

/// Returns the content of a block with this name, such as `agent {`.
fn inner(text: &str) -> &str {
    let (_, rest) = text.split_once("{\n").expect("the begin of a block");
    rest.trim_end().strip_suffix('}').expect("its end")
}

fn validated(program: &Path, folder: &Path, text: &str) -> Output {
    let path = folder.join("validated.conf");
    fs::write(&path, text).unwrap();
    let mut command = Command::new(program);
    command.args(["validate", "-config"]).arg(path);
    run(command, b"", TIMEOUT)
}

/// Asserts that SPIRE accepts a configuration, and notices if a key of it is misspelled.
fn assert_valid(program: &Path, folder: &Path, text: &str, key: &str) {
    let output = validated(program, folder, text);
    assert!(output.status.success(), "{output:?}: {text}");
    let output = validated(program, folder, &text.replace(key, "no_such_key"));
    assert!(!output.status.success(), "{key}: {output:?}");
}

fn run_agent(program: &Path, folder: &Path, text: &str) -> Command {
    let path = folder.join("agent.conf");
    fs::write(&path, text).unwrap();
    let mut command = Command::new(program);
    command.args(["run", "-joinToken", "none", "-config"]);
    command.arg(path);
    command
}

/// Runs the agent until it has failed to start, and asserts that its output has these words.
fn assert_fails(program: &Path, folder: &Path, text: &str, words: &str) {
    let output = run(run_agent(program, folder, text), b"", TIMEOUT);
    let all = output.stdout.clone() + &output.stderr;
    assert!(
        !output.status.success() && all.contains(words),
        "{output:?}"
    );
}

#[test]
fn documented_configurations_of_spire_are_valid() {
    let folder = folder();
    let Some(spire) = Spire::start(folder.path()) else {
        return;
    };
    let [server, program, provider] =
        ["spire-server", "spire-agent", "oidc-discovery-provider"].map(|name| tool(name).unwrap());
    let folder = folder.path();
    let unix = "WorkloadAttestor \"unix\" { plugin_data {} }";
    let delegated = block(
        "spire-setup.md",
        "`spire-delegated`",
        "agent {\n  admin_socket_path",
    );
    let text = agent(folder, inner(&delegated), unix);
    assert_valid(&program, folder, &text, "authorized_delegates");
    let broker = block(
        "spire-setup.md",
        "`spiffe-broker`",
        "agent {\n  experimental",
    );
    let text = agent(folder, inner(&broker), unix);
    assert_valid(&program, folder, &text, "allowed_reference_types");
    assert_plugins_read(&program, folder);
    let issuer = block("spire-setup.md", "OIDC discovery", "server {");
    let text = format!(
        "server {{\n  data_dir = \"{0}\"\n  trust_domain = \"example.org\"\n{1}\n}}\n\
         plugins {{\n  KeyManager \"memory\" {{ plugin_data {{}} }}\n  DataStore \"sql\" {{ plugin_data {{\n\
         database_type = \"sqlite3\", connection_string = \"{0}/none\" }} }}\n}}\n",
        folder.display(),
        inner(&issuer)
    );
    assert_valid(&server, folder, &text, "jwt_issuer");
    assert_provider_serves(&provider, &spire, folder);
}

/// Starts agents with the documented plugins, and with a fault in each.
fn assert_plugins_read(program: &Path, folder: &Path) {
    // Only a pod has the kubelet's CA. The plugin reads its keys before it needs that.
    let k8s = block(
        "spire-setup.md",
        "`spiffe-broker`",
        "WorkloadAttestor \"k8s\"",
    );
    let text = agent(folder, "", &k8s);
    assert_fails(program, folder, &text, "unable to load kubelet CA");
    let text = text.replace("access_policy", "no_such_key");
    assert_fails(program, folder, &text, "no_such_key");
    let hashing = block(
        "spire-setup.md",
        "Bound the cost of attestation",
        "WorkloadAttestor \"unix\"",
    );
    let text = agent(folder, "", &hashing);
    assert_fails(
        program,
        folder,
        &text.replace("= -1", "= \"none\""),
        "failed to configure plugin",
    );
    let command = run_agent(program, folder, &text);
    let started = Process::start("spire-agent", command, &folder.join("documented.log"));
    started.await_some("the plugin is loaded", TIMEOUT, || {
        let is_loaded = |line: &str| line.contains("Plugin loaded") && line.contains("=unix ");
        started.log().lines().any(is_loaded).then_some(())
    });
}

/// Runs the documented provider with the keys of this server, in a network of its own because it
/// listens on port 443.
fn assert_provider_serves(provider: &Path, spire: &Spire, folder: &Path) {
    if !root() {
        return;
    }
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["oidc.example.org".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    fs::write(folder.join("tls.crt"), certificate.pem()).unwrap();
    fs::write(folder.join("tls.key"), key.serialize_pem()).unwrap();
    let text = block("spire-setup.md", "OIDC discovery", "domains =")
        .replace("/etc/spire/oidc", &folder.display().to_string())
        .replace(
            "/run/spire/server/api.sock",
            &spire.server_socket().display().to_string(),
        );
    let path = folder.join("oidc.conf");
    fs::write(&path, text).unwrap();
    let network = "ip link set lo up; exec \"$0\" \"$@\"";
    let mut command = behind(&["unshare", "--net", "sh", "-euc", network], provider);
    command.arg("-config").arg(path);
    let started = Process::start("the provider", command, &folder.join("provider.log"));
    let pid = started.id().to_string();
    let get = |host: &str, path: &str| {
        let mut command = Command::new("nsenter");
        command.args(["--target", &pid, "--net", "curl", "--silent", "--insecure"]);
        command.args(["--write-out", "\n%{http_code}", "--resolve"]);
        command.arg(format!("{host}:443:127.0.0.1"));
        command.arg(format!("https://{host}{path}"));
        run(command, b"", TIMEOUT).stdout
    };
    let keys = started.await_some("the provider has keys", TIMEOUT, || {
        let keys = get("oidc.example.org", "/keys");
        keys.ends_with("\n200").then_some(keys)
    });
    assert!(
        keys.contains("\"use\": \"sig\"") || keys.contains("\"use\":\"sig\""),
        "{keys}"
    );
    let document = get("oidc.example.org", "/.well-known/openid-configuration");
    assert!(
        document.contains("\"https://oidc.example.org\""),
        "{document}"
    );
    let other = get("other.example.org", "/.well-known/openid-configuration");
    assert!(other.ends_with("\n400"), "{other}");
}

/// Rotates the audit log of a running daemon. The only change is its path.
#[test]
fn documented_rotation_loses_no_record() {
    if !root() {
        return;
    }
    let logrotate = Path::new("/usr/sbin/logrotate");
    if !logrotate.exists() {
        return skip("logrotate is missing: run tests/counterparts/get shells");
    }
    let folder = folder();
    let upstream = Upstream::start_for_me();
    let daemon = Daemon::start(folder.path(), "", &(upstream.configuration() + &my_rule())).ready();
    let folder = folder.path();
    let request = || {
        let mut command = Command::new("curl");
        command.args([
            "--silent",
            "--fail",
            "--output",
            "/dev/null",
            "--unix-socket",
        ]);
        command
            .arg(daemon.unix())
            .arg("http://localhost/v1/credentials");
        run(command, b"", TIMEOUT).success("curl");
    };
    request();
    let before = daemon.audit_after(0);
    assert_eq!(before.len(), 1, "{before:?}");

    fs::create_dir(folder.join("bin")).unwrap();
    let reload = format!(
        "[ \"$*\" = \"try-reload-or-restart awsvid.service\" ]\nkill -HUP {}",
        daemon.pid()
    );
    stand_in(folder, "bin/systemctl", &reload);
    let log = folder.join("audit.log");
    let text = block("audit-log.md", "Rotation", "/var/log/awsvid/audit.log {")
        .replace("/var/log/awsvid/audit.log", log.to_str().unwrap());
    let path = folder.join("logrotate.conf");
    fs::write(&path, text).unwrap();
    let mut command = Command::new(logrotate);
    command
        .args(["--force", "--state"])
        .arg(folder.join("state"));
    command.arg(path).env(
        "PATH",
        format!("{}:/usr/bin:/bin", folder.join("bin").display()),
    );
    run(command, b"", TIMEOUT).success("logrotate");
    await_some("the daemon opens the file again", TIMEOUT, || {
        log.exists().then_some(())
    });
    request();
    let after = daemon.audit_after(0);
    assert_eq!(after.len(), 1, "{after:?}");
    assert_ne!(after[0]["request_id"], before[0]["request_id"]);
    let rotated: PathBuf = folder.join("audit.log.1");
    let rotated: Value = serde_json::from_str(&fs::read_to_string(rotated).unwrap()).unwrap();
    assert_eq!(rotated, before[0]);
}

/// Runs the query of Athena in SQLite. Only a column of a column is written in another way there.
#[test]
fn documented_query_joins_records_and_events() {
    let sqlite = Path::new("/usr/bin/sqlite3");
    if !sqlite.exists() {
        return skip("sqlite3 is missing: run tests/counterparts/get shells");
    }
    let mut script = String::from(
        "CREATE TABLE awsvid_audit (outcome, access_key_id, spiffe_id, pod_uid, uid);\n\
         CREATE TABLE cloudtrail_logs (eventtime, eventname, sourceipaddress, useridentity);\n",
    );
    // The examples of the same page.
    let records = blocks("audit-log.md").into_iter();
    for record in records.filter(|block| block.language == "json") {
        let record = record.text.trim().replace('\'', "''");
        let value = |name: &str| format!("json_extract('{record}', '$.{name}')");
        script.push_str(&format!(
            "INSERT INTO awsvid_audit VALUES ({});\n",
            ["outcome", "access_key_id", "spiffe_id", "pod_uid", "uid"]
                .map(value)
                .join(", ")
        ));
    }
    for (event, key) in [("PutObject", "ASIAEXAMPLE1"), ("GetObject", "ASIAOTHER")] {
        script.push_str(&format!(
            "INSERT INTO cloudtrail_logs VALUES ('2026-11-29T20:20:00Z', '{event}', '192.0.2.1', \
             '{{\"accesskeyid\":\"{key}\"}}');\n"
        ));
    }
    let query = block("audit-log.md", "Join with CloudTrail", "SELECT");
    let column = "c.useridentity.accesskeyid";
    assert!(query.contains(column), "{query}");
    script.push_str(&query.replace(column, "json_extract(c.useridentity, '$.accesskeyid')"));
    script.push(';');
    let mut command = Command::new(sqlite);
    command.arg(":memory:");
    let rows = run(command, script.as_bytes(), TIMEOUT).success("sqlite3");
    assert_eq!(
        rows.trim(),
        "spiffe://example.org/billing||1001|2026-11-29T20:20:00Z|PutObject|192.0.2.1"
    );
}
