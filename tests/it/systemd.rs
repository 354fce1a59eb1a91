//! The shipped units, unchanged, under a real systemd: `deploy/systemd` and the example
//! configuration.

mod attesting;
mod documented;
mod packages;
mod watchdog;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::sys::statvfs::{FsFlags, statvfs};
use serde_json::Value;

use crate::harness::actor;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::minio::{self, Minio};
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::spire::Spire;
use crate::harness::documents;
use crate::harness::systemd::{Content, SystemdMachine};

/// Bounds steps that take milliseconds on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(60);
const CONFIGURATION: &str = "/etc/awsvid/awsvid.toml";
const PROGRAM: &str = "/usr/bin/awsvid";
/// Where the files of `deploy` go.
const INSTALLED: [(&str, &str); 4] = [
    (
        "/etc/systemd/system/awsvid.service",
        "systemd/awsvid.service",
    ),
    ("/etc/systemd/system/awsvid.socket", "systemd/awsvid.socket"),
    (
        "/etc/tmpfiles.d/awsvid.conf",
        "systemd/awsvid.tmpfiles.conf",
    ),
    (CONFIGURATION, "awsvid.toml"),
];
const BILLING: &str = "spiffe://example.org/billing";
/// Two users without any privilege.
const USERS: &str = "u billing 1001\nu shop 1002\n";

/// curl's arguments for the daemon's unix socket.
const UNIX: &[&str] = &[
    "--unix-socket",
    "/run/awsvid/awsvid.sock",
    "http://localhost/v1/credentials",
];
const TCP: &[&str] = &["http://127.0.0.1:974/v1/credentials"];
const TCP6: &[&str] = &["http://[::1]:974/v1/credentials"];
const ADDRESSES: [(&str, &[&str]); 3] = [("unix", UNIX), ("tcp", TCP), ("tcp6", TCP6)];

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("deploy")
        .join(name)
}

/// Boots a machine with awsvid installed as the README describes, from the shipped files. No unit
/// of awsvid is started yet.
fn install(directory: &Path, more: &[(&str, Content<'_>)]) -> Option<SystemdMachine> {
    let sources = INSTALLED.map(|(_, source)| shipped(source));
    let mut files = vec![
        (
            PROGRAM,
            Content::Copy(Path::new(env!("CARGO_BIN_EXE_awsvid"))),
        ),
        ("/etc/sysusers.d/workloads.conf", Content::Text(USERS)),
    ];
    files.extend(
        INSTALLED
            .iter()
            .zip(&sources)
            .map(|((path, _), source)| (*path, Content::Copy(source))),
    );
    files.extend(more.iter().map(|(path, content)| (*path, *content)));
    SystemdMachine::boot(directory, &files)
}

fn start(machine: &SystemdMachine) {
    // Succeeds once the daemon has sent READY=1, since the unit is of Type=notify.
    machine
        .run(&[
            "systemctl",
            "enable",
            "--now",
            "awsvid.socket",
            "awsvid.service",
        ])
        .success("enable and start awsvid");
}

/// Sends a request as a service of some user, and returns the status and the body. Panics if the
/// connection is rejected or reset.
fn fetch(machine: &SystemdMachine, unit: &str, user: &str, address: &[&str]) -> (u16, Value) {
    let fixed = [
        "curl",
        "--silent",
        "--show-error",
        "--max-time",
        "50",
        "--header",
        "Authorization: any",
    ];
    let requests = machine.run_as(
        unit,
        user,
        &[&fixed[..], &["--write-out", "\n%{http_code}"], address].concat(),
    );
    let output = requests.success(&format!("curl {address:?} of {user} in {unit}"));
    let (body, status) = output.rsplit_once('\n').expect("the status after the body");
    let body = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error} in {body}"));
    (status.parse().expect("a status"), body)
}

/// Asserts that awsvid answers and has attested the caller, which has no identity.
fn assert_answered(machine: &SystemdMachine, address: &[&str]) {
    let (status, body) = fetch(machine, "stranger.service", "shop", address);
    assert_eq!(
        (status, &body["code"]),
        (403, &Value::from("no_identity")),
        "{address:?}: {body}"
    );
}

fn restarts(machine: &SystemdMachine) -> u32 {
    machine
        .property("awsvid.service", "NRestarts")
        .parse()
        .expect("a number")
}

/// Runs the documented installation, word by word but for the build. It installs the same files as
/// `install` does for all other tests.
#[test]
fn documented_installation_works() {
    let directory = folder();
    let block = documents::block("install-vm.md", "1. Install the files", "cargo build");
    let (build, block) = block.split_once('\n').expect("several");
    assert_eq!(build, "cargo build --release");
    for command in [
        documents::block("cli.md", "`awsvid man`", "sudo awsvid man"),
        documents::block(
            "cli.md",
            "`awsvid completions`",
            "awsvid completions bash |",
        ),
    ] {
        assert!(
            block.contains(command.trim().trim_start_matches("sudo ")),
            "{command}"
        );
    }
    let (program, deploy) = (Path::new(env!("CARGO_BIN_EXE_awsvid")), shipped(""));
    let files = [
        ("/source/target/release/awsvid", Content::Copy(program)),
        ("/source/deploy", Content::Mount(&deploy)),
        // The example has a rule for one of them.
        ("/etc/sysusers.d/workloads.conf", Content::Text(USERS)),
    ];
    let Some(machine) = SystemdMachine::boot(directory.path(), &files) else {
        return;
    };
    let script = format!("sudo() {{ \"$@\"; }}\ncd /source\n{block}");
    let installed = machine.run(&["sh", "-euc", &script]);
    assert!(
        installed.status.success() && installed.stderr.is_empty(),
        "{installed:?}"
    );
    for (path, source) in INSTALLED {
        assert!(
            fs::read(machine.path(path)).unwrap() == fs::read(shipped(source)).unwrap(),
            "{path}"
        );
    }
    start(&machine);
    assert_answered(&machine, UNIX);
    let page = fs::read_to_string(machine.path("/usr/share/man/man1/awsvid-check.1")).unwrap();
    assert!(page.contains(".TH awsvid-check 1"), "{page}");
    let completed = "source /usr/share/bash-completion/completions/awsvid; complete -p awsvid";
    let completed = machine
        .run(&["bash", "-euc", completed])
        .success("the completions");
    assert!(completed.contains("_awsvid"), "{completed}");
    assert_removal_leaves_records_only(&machine);
}

/// Runs the documented removal.
fn assert_removal_leaves_records_only(machine: &SystemdMachine) {
    let block = documents::block("install-vm.md", "Remove", "sudo systemctl disable --now");
    let script = format!("sudo() {{ \"$@\"; }}\n{block}");
    let removed = machine.run(&["sh", "-euc", &script]);
    assert!(removed.status.success(), "{removed:?}");
    let find =
        "find /etc /run /usr /var -name '*awsvid*' ! -path '/run/systemd/*' ! -path '/run/log/*'";
    let left = machine.run(&["sh", "-euc", find]).success(find);
    assert_eq!(left, "/var/log/awsvid\n");
    assert_eq!(machine.property("awsvid.service", "LoadState"), "not-found");
}

#[test]
fn units_are_valid_and_sandbox_holds() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    let verified = machine.run(&[
        "systemd-analyze",
        "verify",
        "awsvid.service",
        "awsvid.socket",
    ]);
    assert!(
        verified.status.success() && verified.stdout.is_empty() && verified.stderr.is_empty(),
        "{verified:?}"
    );
    assert_exposure_is_explained(&machine);
    // Users and groups of SSSD or LDAP are there before the daemon.
    let order = machine.run(&["systemctl", "show", "--property=After", "awsvid.service"]);
    assert!(order.stdout.contains("nss-user-lookup.target"), "{order:?}");

    // tmpfiles.d has created it at boot.
    let run_directory = fs::metadata(machine.path("/run/awsvid")).unwrap();
    assert_eq!(
        (
            run_directory.uid(),
            run_directory.gid(),
            run_directory.mode() & 0o7777
        ),
        (0, 0, 0o755)
    );
    start(&machine);
    for (name, mode) in [
        ("awsvid.sock", 0o666),
        ("status.sock", 0o600),
        ("token", 0o644),
    ] {
        let found = fs::symlink_metadata(machine.path("/run/awsvid").join(name)).unwrap();
        assert_eq!((found.uid(), found.mode() & 0o7777), (0, mode), "{name}");
    }
    assert_eq!(machine.property("awsvid.socket", "ReusePort"), "no");

    let process = format!("/proc/{}", machine.property("awsvid.service", "MainPID"));
    let status = fs::read_to_string(machine.path(&format!("{process}/status"))).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name} in {status}"))
            .trim()
    };
    // CAP_NET_BIND_SERVICE, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH. The daemon drops CAP_PERFMON
    // and CAP_BPF, which rules do not need.
    let three = 1_u64 << 10 | 1 << 19 | 1 << 2;
    let [three, five] = [three, three | 1 << 38 | 1 << 39].map(|set| format!("{set:016x}"));
    assert_eq!(
        [field("CapBnd"), field("CapPrm"), field("CapEff")],
        [&*five, &*three, &*three]
    );
    assert_eq!([field("NoNewPrivs"), field("Seccomp")], ["1", "2"]);
    let mounts = fs::read_to_string(machine.path(&format!("{process}/mountinfo"))).unwrap();
    // Of several mounts at one path the last one is visible.
    let is_writable = |path: &str| {
        let observed = statvfs(&machine.path(&format!("{process}/root{path}")));
        observed.is_ok_and(|found| !found.flags().contains(FsFlags::ST_RDONLY))
    };
    let writable: BTreeSet<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|path| {
            !["/dev", "/proc"]
                .iter()
                .any(|api| Path::new(path).starts_with(api))
        })
        // In this file systemd, from version 254 on, notifies a unit that the machine is short of
        // memory.
        .filter(|path| !path.ends_with("/awsvid.service/memory.pressure"))
        .filter(|path| is_writable(path))
        .collect();
    assert_eq!(
        writable,
        BTreeSet::from(["/run/awsvid", "/var/log/awsvid"]),
        "{mounts}"
    );
}

/// Asserts the exposure level that the documents have, and that the unit explains what is left.
fn assert_exposure_is_explained(machine: &SystemdMachine) {
    let unit = "/etc/systemd/system/awsvid.service";
    let analyze = |more: &[&str]| {
        let fixed = ["systemd-analyze", "security", "--no-pager", "--offline=yes"];
        let analyzed = machine.run(&[&fixed, more, &[unit]].concat());
        analyzed.success("an exposure level of at most 2.7")
    };
    analyze(&["--threshold=27"]);
    let points: Value = serde_json::from_str(&analyze(&["--json=short"])).unwrap();
    let text = fs::read_to_string(machine.path(unit)).unwrap();
    let (_, explained) = text.split_once("remaining points:").unwrap();
    let is_left = |point: &&Value| point["exposure"].as_str().is_some_and(|by| by != "0.0");
    let unexplained: Vec<&str> = (points.as_array().unwrap().iter())
        .filter(is_left)
        .filter_map(|point| point["name"].as_str())
        .filter(|name| !explained.contains(name))
        .collect();
    assert!(unexplained.is_empty(), "{unexplained:?}");
}

#[test]
fn callers_are_distinguished_by_unit_with_spire() {
    let directory = folder();
    let Some(spire) = Spire::start(directory.path()) else {
        return;
    };
    let policy = minio::readable_by(BILLING, "shop");
    let Some(minio) = Minio::start(directory.path(), &spire.issuer_url(), &policy) else {
        return;
    };
    spire.register(BILLING, &["unix:uid:0", "unix:path:/usr/bin/awsvid"]);
    let socket = spire.agent_socket();
    let agent = socket.parent().unwrap();
    symlink(socket.file_name().unwrap(), agent.join("spire-agent.sock")).unwrap();
    // The path in the example, and SPIRE's default path.
    let more = [
        ("/run/spire/agent-sockets", Content::Mount(agent)),
        ("/tmp/spire-agent/public", Content::Mount(agent)),
    ];
    let Some(machine) = install(directory.path(), &more) else {
        return;
    };
    start(&machine);

    // The shipped example names an account at AWS, which can't be reached from here: one caller
    // gets as far as that.
    for (_, address) in ADDRESSES {
        let (status, body) = fetch(&machine, "billing.service", "billing", address);
        assert_eq!(
            (status, &body["code"]),
            (503, &Value::from("sts_unreachable")),
            "{address:?}: {body}"
        );
        assert_answered(&machine, address);
    }
    assert_ne!(
        spire.jwt_svids_fetched(BILLING),
        0,
        "the daemon has fetched the caller's JWT-SVID"
    );

    let forward = machine.forward(
        minio
            .endpoint()
            .trim_start_matches("http://")
            .parse()
            .unwrap(),
    );
    let configuration = format!(
        r#"
[identity]
workload_api_socket = "unix:///tmp/spire-agent/public/api.sock"
audience = "{}"
[sts]
endpoint = "http://{}"
[audit]
file = "/var/log/awsvid/audit.log"
[[workload]]
spiffe_id = "{BILLING}"
systemd_unit = "billing.service"
[[workload]]
spiffe_id = "{BILLING}"
user = "shop"
exe = "/usr/bin/curl"
[[role]]
name = "shop"
spiffe_id = "{BILLING}"
role_arn = "{}"
"#,
        minio::AUDIENCE,
        forward.address(),
        minio.role_arn(),
    );
    fs::write(machine.path(CONFIGURATION), configuration).unwrap();
    machine
        .run(&["systemctl", "restart", "awsvid.service"])
        .success("restart with another configuration");
    let mut keys = Vec::new();
    for (_, address) in ADDRESSES {
        let (status, body) = fetch(&machine, "billing.service", "billing", address);
        assert_eq!(status, 200, "{address:?}: {body}");
        keys.push(body["AccessKeyId"].clone());
        // The unit decides, not the user.
        let (status, body) = fetch(&machine, "payroll.service", "billing", address);
        assert_eq!(
            (status, &body["code"]),
            (403, &Value::from("no_identity")),
            "{address:?}: {body}"
        );
        // By its executable: over TCP the daemon has to read a process of another user.
        let (status, body) = fetch(&machine, "search.service", "shop", address);
        assert_eq!(status, 200, "{address:?}: {body}");
        keys.push(body["AccessKeyId"].clone());
    }
    assert!(
        keys[0].is_string() && keys.iter().all(|key| *key == keys[0]),
        "{keys:?}"
    );
    let audit = fs::read_to_string(machine.path("/var/log/awsvid/audit.log")).unwrap();
    assert_eq!(
        audit
            .lines()
            .filter(|line| line.contains(keys[0].as_str().unwrap()))
            .count(),
        6,
        "{audit}"
    );
    // Every listener, SPIRE and STS have responded.
    let ready = ["curl", "--silent", "--fail", "http://127.0.0.1:975/readyz"];
    await_some("ready", TIMEOUT, || {
        machine
            .run_as("probe.service", "shop", &ready)
            .status
            .success()
            .then_some(())
    });
}

/// T24: systemd creates a service's listener as root, and keeps it while the service has it.
#[test]
fn activated_service_is_not_root_on_inherited_socket() {
    let directory = folder();
    let actor = actor::program();
    let socket = "[Socket]\nListenStream=127.0.0.1:8081\n";
    let service = "[Service]\nUser=shop\nExecStart=/usr/bin/actor activated tcp 127.0.0.1:974\n\
                   StandardOutput=file:/run/web.out\n";
    let more = [
        ("/usr/bin/actor", Content::Copy(&actor)),
        ("/etc/systemd/system/web.socket", Content::Text(socket)),
        ("/etc/systemd/system/web.service", Content::Text(service)),
    ];
    let Some(machine) = install(directory.path(), &more) else {
        return;
    };
    // Root has an identity, which this test never serves: its agent is unavailable.
    let rule = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/root\"\nuser = \"root\"\n\
                [[role]]\nname = \"root\"\nspiffe_id = \"spiffe://example.org/root\"\n\
                role_arn = \"arn:aws:iam::123456789012:role/root\"\n";
    let configuration = fs::read_to_string(machine.path(CONFIGURATION)).unwrap();
    fs::write(machine.path(CONFIGURATION), configuration + rule).unwrap();
    start(&machine);
    let (status, body) = fetch(&machine, "admin.service", "root", TCP);
    assert_eq!(
        (status, &body["code"]),
        (503, &Value::from("source_unavailable")),
        "{body}"
    );

    machine
        .run(&["systemctl", "start", "web.socket"])
        .success("start the socket");
    // A connection makes systemd start the service, which sends a request itself and never answers
    // the connection.
    machine.run(&[
        "curl",
        "--silent",
        "--max-time",
        "1",
        "http://127.0.0.1:8081/",
    ]);
    let answer = await_some("the service is answered", TIMEOUT, || {
        let text = fs::read_to_string(machine.path("/run/web.out")).ok()?;
        text.contains("\"code\"").then_some(text)
    });
    assert!(answer.contains("\"code\":\"manager_socket\""), "{answer}");
}

#[test]
fn addresses_are_held_while_daemon_is_stopped() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    start(&machine);

    // Restarts while callers send requests: no connection is rejected.
    let machine = &machine;
    thread::scope(|scope| {
        let askers = ADDRESSES.map(|(name, address)| {
            scope.spawn(move || {
                for _ in 0..10 {
                    let (status, body) =
                        fetch(machine, &format!("asker-{name}.service"), "shop", address);
                    assert_eq!(status, 403, "{body}");
                }
            })
        });
        while askers.iter().any(|asker| !asker.is_finished()) {
            machine
                .run(&["systemctl", "restart", "awsvid.service"])
                .success("restart awsvid");
        }
    });

    // While the service is stopped, no other process can bind the port: no user, for it is below
    // 1024, nor root, for systemd holds it.
    machine
        .run(&["systemctl", "stop", "awsvid.service"])
        .success("stop awsvid");
    assert_eq!(
        machine.property("awsvid.service", "ActiveState"),
        "inactive"
    );
    for (user, why) in [
        ("shop", "Permission denied"),
        ("root", "Address already in use"),
    ] {
        let listen = [
            "systemd-socket-activate",
            "--listen=127.0.0.1:974",
            "/usr/bin/true",
        ];
        let thief = machine.run_as("thief.service", user, &listen);
        assert!(
            !thief.status.success() && thief.stderr.contains(why),
            "{user}: {thief:?}"
        );
    }
    assert_answered(machine, TCP);
    assert_eq!(machine.property("awsvid.service", "ActiveState"), "active");

    // Killed: it restarts by itself, and requests meanwhile are answered.
    for (_, address) in ADDRESSES {
        let before = restarts(machine);
        machine
            .run(&["systemctl", "kill", "--signal=KILL", "awsvid.service"])
            .success("kill awsvid");
        assert_answered(machine, address);
        assert_eq!(restarts(machine), before + 1);
    }
}

#[test]
fn failing_daemon_is_restarted_while_callers_wait() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    start(&machine);
    let aside = machine.path("/usr/bin/awsvid.aside");
    fs::rename(machine.path(PROGRAM), &aside).unwrap();
    symlink("/usr/bin/false", machine.path(PROGRAM)).unwrap();
    machine
        .run(&["systemctl", "kill", "--signal=KILL", "awsvid.service"])
        .success("kill awsvid");
    let machine = &machine;
    thread::scope(|scope| {
        let askers = ADDRESSES.map(|(name, address)| {
            scope.spawn(move || fetch(machine, &format!("waits-{name}.service"), "shop", address))
        });
        // While the callers wait, there are more starts than systemd allows a service (5 in 10 s)
        // and a socket (20 in 2 s).
        let before = restarts(machine);
        await_some("more restarts", TIMEOUT, || {
            (restarts(machine) > before + 25).then_some(())
        });
        assert_eq!(machine.property("awsvid.socket", "ActiveState"), "active");
        fs::rename(&aside, machine.path(PROGRAM)).unwrap();
        for asker in askers {
            let (status, body) = asker.join().unwrap();
            assert_eq!(
                (status, &body["code"]),
                (403, &Value::from("no_identity")),
                "{body}"
            );
        }
    });
}

#[test]
fn invalid_configuration_is_not_restarted() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    start(&machine);
    let good = fs::read_to_string(machine.path(CONFIGURATION)).unwrap();
    fs::write(
        machine.path(CONFIGURATION),
        good.replace("spiffe_id", "spifee_id"),
    )
    .unwrap();
    let curl = |unit: &str, address: &[&str]| {
        machine.run_as(unit, "shop", &[&["curl", "--silent"], address].concat())
    };
    thread::scope(|scope| {
        // A connection that no process accepts makes systemd start the daemon. Callers must not
        // cause a loop of starts.
        for (name, address) in ADDRESSES {
            let curl = &curl;
            let rejected = move || {
                (curl(&format!("asker-{name}.service"), address)
                    .status
                    .code()
                    == Some(7))
                .then_some(())
            };
            scope.spawn(move || await_some("callers are rejected at once", TIMEOUT, rejected));
        }
        let restarted = machine.run(&["systemctl", "restart", "awsvid.service"]);
        assert!(!restarted.status.success(), "{restarted:?}");
    });
    let found = ["SubState", "ExecMainStatus", "NRestarts"]
        .map(|name| machine.property("awsvid.service", name));
    assert_eq!(found, ["failed", "78", "0"]);
    let journal = machine.journal();
    assert_eq!(
        journal.matches("Starting awsvid.service").count(),
        2,
        "the good start and the bad one:\n{journal}"
    );
    assert!(
        journal.contains("spifee_id"),
        "the journal has the mistake:\n{journal}"
    );
    assert_eq!(machine.property("awsvid.socket", "ActiveState"), "inactive");

    // `restart` of the service alone restores the sockets too.
    fs::write(machine.path(CONFIGURATION), good).unwrap();
    machine
        .run(&["systemctl", "restart", "awsvid.service"])
        .success("start with the configuration repaired");
    for (_, address) in ADDRESSES {
        assert_answered(&machine, address);
    }
}

#[test]
fn reload_reads_the_configuration_again() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    start(&machine);
    let process = machine.property("awsvid.service", "MainPID");
    let good = fs::read_to_string(machine.path(CONFIGURATION)).unwrap();
    let reload = |text: &str, status: &str| {
        fs::write(machine.path(CONFIGURATION), text).unwrap();
        machine
            .run(&["systemctl", "reload", "awsvid.service"])
            .success("reload awsvid");
        await_some(status, TIMEOUT, || {
            machine
                .property("awsvid.service", "StatusText")
                .contains(status)
                .then_some(())
        });
        machine.await_property("awsvid.service", "ActiveState", "active");
    };
    reload(
        &good.replace("spiffe_id", "spifee_id"),
        "The new configuration has errors",
    );
    assert!(
        machine.journal().contains("spifee_id"),
        "the journal has the mistake"
    );
    assert_answered(&machine, UNIX);
    // In its sandbox it can reopen the audit file, and the other changes take effect.
    let other = good
        .replace("[audit]", "[audit]\nfile = \"/var/log/awsvid/audit.log\"")
        .replace("\"billing\"\n", "\"shop\"\n");
    assert_ne!(other, good);
    reload(&other, "Reloaded");
    let (status, body) = fetch(&machine, "stranger.service", "shop", UNIX);
    assert_eq!(
        (status, &body["code"]),
        (503, &Value::from("source_unavailable")),
        "the stranger has an identity: {body}"
    );
    let audit = fs::read_to_string(machine.path("/var/log/awsvid/audit.log")).unwrap();
    assert!(
        audit.lines().any(|line| line.contains("\"uid\":1002")),
        "{audit}"
    );
    // It ends as before.
    machine
        .run(&["systemctl", "stop", "awsvid.service"])
        .success("stop awsvid");
    let found = ["Result", "ExecMainStatus"].map(|name| machine.property("awsvid.service", name));
    assert_eq!(found, ["success", "0"]);
    assert_ne!(process, "0");
}

/// Writes a version of the program that has a key more: this one with another name for a key.
fn newer_version(directory: &Path) -> PathBuf {
    let newer = directory.join("awsvid.newer");
    let mut program = fs::read(env!("CARGO_BIN_EXE_awsvid")).unwrap();
    let (attested, future) = (b"revocation_grace", b"revocation_pause");
    let offsets: Vec<usize> = (0..program.len() - attested.len())
        .filter(|i| program[*i..].starts_with(attested))
        .collect();
    offsets
        .iter()
        .for_each(|i| program[*i..i + future.len()].copy_from_slice(future));
    fs::write(&newer, program).unwrap();
    fs::set_permissions(&newer, fs::Permissions::from_mode(0o755)).unwrap();
    newer
}

/// Runs the documented rollback, word by word, from a version that has a key more.
#[test]
fn documented_rollback_interrupts_no_caller() {
    let directory = folder();
    let newer = newer_version(directory.path());
    let previous = with_rules("", &rule("user = \"billing\""));
    let text = format!("{previous}[cache]\nrevocation_pause = \"1m\"\n");
    let more = [
        (
            "/usr/bin/awsvid.previous",
            Content::Copy(Path::new(env!("CARGO_BIN_EXE_awsvid"))),
        ),
        ("/etc/awsvid/awsvid.toml.previous", Content::Text(&previous)),
        (PROGRAM, Content::Copy(&newer)),
        (CONFIGURATION, Content::Text(&text)),
    ];
    let Some(machine) = install(directory.path(), &more) else {
        return;
    };
    start(&machine);
    assert_known(fetch(&machine, "billing.service", "billing", TCP));
    // The check that CI runs before such a file is installed.
    let check = documents::block("upgrade.md", "The order of steps", "awsvid.previous");
    let check = check.replace("awsvid.toml", CONFIGURATION);
    let checked = machine.run(&["sh", "-euc", &check]);
    let words = format!(
        "cache.revocation_pause: awsvid {} has no such key",
        env!("CARGO_PKG_VERSION")
    );
    assert!(
        checked.status.code() == Some(78) && checked.stderr.contains(&words),
        "{checked:?}"
    );

    let machine = &machine;
    thread::scope(|scope| {
        let asker = scope.spawn(|| {
            for _ in 0..10 {
                assert_known(fetch(machine, "asker.service", "billing", UNIX));
            }
        });
        let rollback = documents::block("upgrade.md", "Roll back on a VM", "install");
        machine
            .run(&["sh", "-euc", &rollback])
            .success("the documented rollback");
        asker.join().unwrap();
    });
    assert_known(fetch(machine, "billing.service", "billing", TCP));
    let found = ["ActiveState", "NRestarts"].map(|name| machine.property("awsvid.service", name));
    assert_eq!(found, ["active", "0"]);
    let version = |path: &str| fs::read(machine.path(path)).unwrap();
    assert!(
        version(PROGRAM) == version("/usr/bin/awsvid.previous"),
        "it is the previous program"
    );
}

/// Returns a configuration for rules, without an agent.
fn with_rules(listen: &str, rules: &str) -> String {
    format!(
        "[listen]\n{listen}\n[sts]\nregion = \"eu-central-1\"\n{rules}\n\
         [[role]]\nname = \"all\"\nspiffe_id = \"spiffe://example.org/**\"\nrole_arn = \"arn:aws:iam::123456789012:role/all\"\n"
    )
}

fn rule(keys: &str) -> String {
    format!("[[workload]]\nspiffe_id = \"{BILLING}\"\n{keys}\n")
}

/// Asserts that awsvid has an identity for the caller, and no agent from which to fetch its token.
fn assert_known((status, body): (u16, Value)) {
    assert_eq!(
        (status, &body["code"]),
        (503, &Value::from("source_unavailable")),
        "{body}"
    );
}

#[test]
fn unconfigured_socket_of_unit_is_rejected_and_others_are_served() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    // The advice of `awsvid check` where callers over TCP can't be distinguished.
    fs::write(
        machine.path(CONFIGURATION),
        with_rules("tcp = []", &rule("user = \"billing\"")),
    )
    .unwrap();
    start(&machine);
    assert_known(fetch(&machine, "billing.service", "billing", UNIX));
    for address in [TCP, TCP6] {
        let rejected = machine.run_as(
            "refused.service",
            "shop",
            &[&["curl", "--silent", "--max-time", "50"], address].concat(),
        );
        // Reset, at once or a moment later, and not left waiting.
        assert!(
            matches!(rejected.status.code(), Some(7 | 56)),
            "{address:?}: {rejected:?}"
        );
    }
    let journal = machine.journal();
    assert_eq!(
        journal
            .matches("callers of a systemd socket are rejected")
            .count(),
        2,
        "{journal}"
    );
    let warnings = || {
        let validated = machine.run(&["awsvid", "config", "validate"]);
        assert!(validated.status.success(), "{validated:?}");
        validated
            .stderr
            .matches("awsvid.socket has the address")
            .count()
    };
    assert_eq!(warnings(), 2);
    let drop_in = documents::block("install-vm.md", "Without callers over TCP", "[Socket]");
    let path = machine.path("/etc/systemd/system/awsvid.socket.d/override.conf");
    fs::create_dir(path.parent().unwrap()).unwrap();
    fs::write(&path, drop_in).unwrap();
    assert_eq!(warnings(), 0);
    let restart = "systemctl daemon-reload; systemctl restart awsvid.socket awsvid.service";
    machine.run(&["sh", "-euc", restart]).success(restart);
    assert_known(fetch(&machine, "billing.service", "billing", UNIX));
    let closed = machine.run(&["curl", "--silent", TCP[0]]);
    assert_eq!(closed.status.code(), Some(7), "{closed:?}");
    fs::remove_file(&path).unwrap();
    machine.run(&["sh", "-euc", restart]).success(restart);
    assert_eq!(
        (
            restarts(&machine),
            machine.property("awsvid.service", "ActiveState")
        ),
        (0, "active".to_owned())
    );
    // With the addresses back in the file a restart serves them again.
    fs::write(
        machine.path(CONFIGURATION),
        with_rules("", &rule("user = \"billing\"")),
    )
    .unwrap();
    machine
        .run(&["systemctl", "restart", "awsvid.service"])
        .success("restart awsvid");
    for (_, address) in ADDRESSES {
        assert_known(fetch(&machine, "billing.service", "billing", address));
    }
}

#[test]
fn callers_in_unit_with_many_cgroups_are_attested() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    fs::write(
        machine.path(CONFIGURATION),
        with_rules("", &rule("systemd_unit = \"many.service\"")),
    )
    .unwrap();
    start(&machine);
    // More than awsvid reads when it has to search for a cgroup.
    let script = "cd /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup); i=0; \
        while [ $i -lt 2000 ]; do mkdir g$i; i=$((i+1)); done; for last in g0 g400 g800 g1200 g1600 g1999; do echo 0 >$last/cgroup.procs; \
        curl --silent --max-time 50 --header 'Authorization: any' http://127.0.0.1:974/v1/credentials; echo; done";
    let requests = machine.run(&[
        "systemd-run",
        "--quiet",
        "--collect",
        "--wait",
        "--pipe",
        "--unit=many.service",
        "--property=Delegate=yes",
        "--",
        "sh",
        "-euc",
        script,
    ]);
    let answers = requests.success("curl from many cgroups");
    assert_eq!(
        answers.matches("source_unavailable").count(),
        2 * 6,
        "{answers}"
    );
    assert!(
        !machine.journal().contains("a system call is forbidden"),
        "{}",
        machine.journal()
    );
}

#[test]
fn calls_that_a_filter_forbids_are_logged_at_start() {
    let directory = folder();
    let drop_in = "[Service]\nSystemCallFilter=~open_by_handle_at pidfd_open statx\n";
    let more = [(
        "/etc/systemd/system/awsvid.service.d/narrow.conf",
        Content::Text(drop_in),
    )];
    let Some(machine) = install(directory.path(), &more) else {
        return;
    };
    // A rule by user needs the process of a caller over TCP.
    fs::write(
        machine.path(CONFIGURATION),
        with_rules("", &rule("user = \"billing\"")),
    )
    .unwrap();
    start(&machine);
    let journal = machine.journal();
    let lines: Vec<&str> = journal
        .lines()
        .filter(|line| line.contains("a system call is forbidden"))
        .collect();
    for call in ["open_by_handle_at", "pidfd_open", "statx"] {
        let of_call: Vec<_> = lines.iter().filter(|line| line.contains(call)).collect();
        assert!(
            of_call.len() == 1 && of_call[0].contains("under systemd add it to SystemCallFilter="),
            "{call}: {journal}"
        );
    }
    let held = |line: &&&str| line.contains("CAP_DAC_READ_SEARCH");
    assert_eq!(lines.iter().filter(held).count(), 1, "{journal}");
}

#[test]
fn user_created_after_boot_is_served() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    let rules = rule("user = \"late\"") + &rule("user = \"shop\"\nsystemd_unit = \"shop.service\"");
    fs::write(machine.path(CONFIGURATION), with_rules("", &rules)).unwrap();
    start(&machine);
    assert_known(fetch(&machine, "shop.service", "shop", TCP));
    assert!(
        machine
            .journal()
            .contains("the account does not exist on this node"),
        "{}",
        machine.journal()
    );
    machine
        .run(&["sh", "-euc", "echo 'u late 1003' | systemd-sysusers -"])
        .success("make the user");
    await_some("the user is known", TIMEOUT, || {
        (fetch(&machine, "late.service", "late", TCP).1["code"] == "source_unavailable")
            .then_some(())
    });
    for (_, address) in ADDRESSES {
        assert_known(fetch(&machine, "late.service", "late", address));
    }
}

#[test]
fn stop_leaves_only_the_token() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    start(&machine);
    let token = || fs::read_to_string(machine.path("/run/awsvid/token")).unwrap();
    let before = token();
    machine
        .run(&["systemctl", "stop", "awsvid.socket", "awsvid.service"])
        .success("stop both units");
    let left = fs::read_dir(machine.path("/run/awsvid"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    // Workloads that have read it keep using it.
    assert_eq!(left.collect::<Vec<_>>(), ["token"]);
    start(&machine);
    assert_eq!(token(), before);
}

#[test]
fn other_addresses_are_served_without_ipv6() {
    let directory = folder();
    let Some(machine) = install(directory.path(), &[]) else {
        return;
    };
    let off = "for i in all lo; do echo 1 >/proc/sys/net/ipv6/conf/$i/disable_ipv6; done";
    machine.run(&["sh", "-c", off]).success("switch IPv6 off");
    start(&machine);
    let requests = machine.run_as(
        "six.service",
        "shop",
        &[&["curl", "--silent"], TCP6].concat(),
    );
    assert_eq!(requests.status.code(), Some(7), "::1 is gone: {requests:?}");
    for address in [UNIX, TCP] {
        assert_answered(&machine, address);
    }
}
