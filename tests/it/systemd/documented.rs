//! Runs the commands of deploy/docs on a machine with systemd, SPIRE and MinIO.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;

use super::{
    BILLING, CONFIGURATION, Content, PROGRAM, TCP, TIMEOUT, UNIX, assert_known, fetch, install,
    newer_version, rule, shipped, start, with_rules,
};
use crate::harness::counterparts::folder;
use crate::harness::counterparts::minio::{self, Minio};
use crate::harness::counterparts::process::{Output, await_some};
use crate::harness::counterparts::spire::Spire;
use crate::harness::documents::{block, blocks};
use crate::harness::systemd::SystemdMachine;

const UNITS: [&str; 2] = ["awsvid.service", "awsvid.socket"];

/// Returns the path of an installed unit.
fn installed(unit: &str) -> String {
    format!("/etc/systemd/system/{unit}")
}

fn sh(machine: &SystemdMachine, script: &str) -> Output {
    machine.run(&["sh", "-euc", &format!("sudo() {{ \"$@\"; }}\n{script}")])
}

/// Runs commands of a document as the workload's service, with the variables of its unit.
fn sh_of_workload(machine: &SystemdMachine, script: &str) -> Output {
    let unit = block(
        "install-vm.md",
        "6. Set the workload's environment",
        "[Service]",
    );
    let variables = unit
        .lines()
        .filter_map(|line| line.strip_prefix("Environment="));
    let variables: String = variables
        .map(|variable| format!("export {variable}\n"))
        .collect();
    let script = format!("{variables}{}", script.replace("sudo -u billing ", ""));
    machine.run_as("billing.service", "billing", &["sh", "-euc", &script])
}

/// The configuration of step 3, with MinIO as its STS.
fn configuration(sts: &str, role_arn: &str) -> String {
    let text = block(
        "install-vm.md",
        "3. Configure the first workload and role",
        "[identity]",
    );
    let text = text.replace(
        "region = \"eu-central-1\"",
        &format!("endpoint = \"{sts}\""),
    );
    let text = text.replace(
        "[identity]\n",
        &format!("[identity]\naudience = {:?}\n", minio::AUDIENCE),
    );
    let text = text.replace("arn:aws:iam::123456789012:role/billing", role_arn);
    text + "[audit]\nfile = \"/var/log/awsvid/audit.log\"\n"
}

#[test]
fn documented_first_workload_gets_credentials() {
    let directory = folder();
    let Some(spire) = Spire::start(directory.path()) else {
        return;
    };
    let policy = minio::readable_by(BILLING, "shop");
    let Some(minio) = Minio::start(directory.path(), &spire.issuer_url(), &policy) else {
        return;
    };
    let entry = spire.register(BILLING, &["unix:uid:0", "unix:path:/usr/bin/awsvid"]);
    let socket = spire.agent_socket();
    let agent = socket.parent().unwrap();
    symlink(socket.file_name().unwrap(), agent.join("spire-agent.sock")).unwrap();
    let more = [
        ("/run/spire/agent-sockets", Content::Mount(agent)),
        ("/tmp/spire-agent/public", Content::Mount(agent)),
    ];
    let Some(machine) = install(directory.path(), &more) else {
        return;
    };
    let forward = machine.forward(
        minio
            .endpoint()
            .trim_start_matches("http://")
            .parse()
            .unwrap(),
    );
    let text = configuration(&format!("http://{}", forward.address()), &minio.role_arn());
    fs::write(machine.path(CONFIGURATION), &text).unwrap();

    let validate = block(
        "install-vm.md",
        "3. Configure the first workload and role",
        "sudo",
    );
    sh(&machine, &validate).success(&validate);
    let start = block("install-vm.md", "5. Start and check", "sudo systemctl");
    await_some("ready", TIMEOUT, || {
        sh(&machine, &start).status.success().then_some(())
    });
    let curl = block("cli.md", "`awsvid credential-process`", "curl");
    let answer = sh_of_workload(&machine, &curl).success(&curl);
    assert!(answer.contains("\"AccessKeyId\""), "{answer}");
    for check in [
        block(
            "install-vm.md",
            "6. Set the workload's environment",
            "sudo -u billing awsvid check",
        ),
        block("migrate.md", "Be sure", "awsvid check"),
        block("troubleshooting.md", "On a host", "sudo -u billing awsvid"),
    ] {
        sh_of_workload(&machine, &check).success(&check);
    }
    assert_checked(&machine, &spire);
    assert_reason_by_unit(&machine, &text);

    for (page, heading, begin, expected) in [
        (
            "install-vm.md",
            "5. Start and check",
            "sudo awsvid status",
            BILLING,
        ),
        ("cli.md", "`awsvid status`", "sudo awsvid status", BILLING),
        ("cli.md", "`awsvid probe`", "sudo awsvid probe", "ready"),
        (
            "metrics-and-alerts.md",
            "Scrape",
            "curl",
            "awsvid_requests_total",
        ),
    ] {
        let commands = block(page, heading, begin);
        let output = sh(&machine, &commands).success(&commands);
        assert!(output.contains(expected), "{commands}: {output}");
    }

    // README.md has commands of the installation.
    let short = block("README.md", "Install", "sudo systemctl enable");
    let installation: String = blocks("install-vm.md")
        .into_iter()
        .map(|block| block.text)
        .collect();
    for line in short.lines() {
        assert!(installation.lines().any(|known| known == line), "{line}");
    }

    assert_revoked(&machine, &spire, &entry, &text);
}

/// Runs `awsvid check` with each documented option. The issuer's documents are outside of the
/// machine. Every other step passes.
fn assert_checked(machine: &SystemdMachine, spire: &Spire) {
    let of_page = block("cli.md", "`awsvid check`", "sudo awsvid check");
    let first = block("install-vm.md", "5. Start and check", "sudo awsvid check");
    let of_workload: Vec<&str> = of_page
        .lines()
        .filter(|l| l.contains("--workload"))
        .collect();
    sh_of_workload(machine, of_workload[0]).success(of_workload[0]);
    let running = "systemd-run --quiet --unit=billing --uid=billing sleep infinity";
    sh(machine, running).success("a running workload");
    let issuer = spire.issuer_url().replace("http://", "");
    for line in first
        .lines()
        .chain(of_page.lines().filter(|line| !of_workload.contains(line)))
        // The recipe for a 403 in a pod has that one.
        .filter(|line| !line.starts_with("kubectl"))
    {
        let check = sh(machine, &line.replace("oidc.example.org:443", &issuer));
        let failed: Vec<&str> = check
            .stdout
            .lines()
            .filter(|line| line.contains("FAIL"))
            .collect();
        assert!(
            check.status.code() == Some(1) && failed.len() == 1 && failed[0].contains("discovery"),
            "{line}: {check:?}"
        );
        assert!(
            check.stdout.contains(&format!("assumed by {BILLING}")),
            "{line}: {check:?}"
        );
    }
    sh(machine, "systemctl stop billing").success("end the workload");
}

/// Runs the documented trial of a rule by unit, with a copy of the rule for the unit of the trial.
fn assert_reason_by_unit(machine: &SystemdMachine, text: &str) {
    let trial = block("troubleshooting.md", "On a host", "sudo systemd-run");
    let of_unit = text.replace(
        "user      = \"billing\"",
        "systemd_unit = \"billing-test.service\"",
    );
    assert_ne!(of_unit, text);
    let (other, _) = fetch(machine, "billing.service", "billing", UNIX);
    assert_eq!(other, 200);
    let reload = |text: &str| {
        fs::write(machine.path(CONFIGURATION), text).unwrap();
        sh(machine, "systemctl reload awsvid").success("reload awsvid");
    };
    reload(&of_unit);
    await_some("the rule is by unit", TIMEOUT, || {
        (fetch(machine, "billing.service", "billing", UNIX).0 == 403).then_some(())
    });
    sh(machine, &trial).success(&trial);
    reload(text);
    await_some("the rule is by user", TIMEOUT, || {
        (fetch(machine, "billing.service", "billing", UNIX).0 == 200).then_some(())
    });
}

/// Runs the documented revocation for the workload.
fn assert_revoked(machine: &SystemdMachine, spire: &Spire, entry: &str, text: &str) {
    let count = block("revoke.md", "3. See that it worked", "sudo awsvid status");
    assert_eq!(sh(machine, &count).success(&count).trim(), "1");
    let commands = block(
        "revoke.md",
        "2. Stop new credentials",
        "spire-server entry show",
    )
    .replace("...", entry);
    for line in commands.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        spire.server_command(&words[1..]).success(line);
    }
    // A role for another identity replaces the workload's.
    let (rest, role) = text.split_once("[[role]]").expect("a role");
    let other = format!(
        "{rest}[[role]]{}",
        role.replace(BILLING, "spiffe://example.org/shop")
    );
    assert_ne!(other, text);
    fs::write(machine.path(CONFIGURATION), other).unwrap();
    let reload = block(
        "revoke.md",
        "2. Stop new credentials",
        "sudo awsvid config validate",
    );
    sh(machine, &reload).success(&reload);
    await_some("the workload is rejected", TIMEOUT, || {
        let (status, body) = fetch(machine, "billing.service", "billing", UNIX);
        (status == 403 && body["code"] == "no_role").then_some(())
    });
    assert_eq!(sh(machine, &count).success(&count).trim(), "0");
}

#[test]
fn documented_upgrade_interrupts_no_caller() {
    let directory = folder();
    let newer = newer_version(directory.path());
    let text = with_rules("", &rule("user = \"billing\""));
    let deploy = shipped("");
    let more = [
        ("/source/target/release/awsvid", Content::Copy(&newer)),
        ("/source/deploy", Content::Mount(&deploy)),
        (CONFIGURATION, Content::Text(&text)),
    ];
    let Some(machine) = install(directory.path(), &more) else {
        return;
    };
    let older = |unit: &str| {
        let unit = fs::read_to_string(shipped(&format!("systemd/{unit}"))).unwrap();
        unit + "# of the previous version\n"
    };
    for unit in UNITS {
        fs::write(machine.path(&installed(unit)), older(unit)).unwrap();
    }
    sh(&machine, "systemctl daemon-reload").success("read the units");
    start(&machine);
    assert_known(fetch(&machine, "billing.service", "billing", TCP));
    let machine = &machine;
    thread::scope(|scope| {
        let asker = scope.spawn(|| {
            for _ in 0..10 {
                assert_known(fetch(machine, "asker.service", "billing", UNIX));
            }
        });
        // The units of a release that has others, before the restart.
        let units = block(
            "upgrade.md",
            "Upgrade on a VM",
            "cp --preserve /etc/systemd",
        );
        let upgrade = block("upgrade.md", "Upgrade on a VM", "cp --preserve /usr/bin");
        sh(machine, &format!("cd /source\n{units}\n{upgrade}")).success("the documented upgrade");
        asker.join().unwrap();
    });
    assert_known(fetch(machine, "billing.service", "billing", TCP));
    let read = |path: &str| fs::read(machine.path(path)).unwrap();
    assert!(
        read(PROGRAM) == fs::read(&newer).unwrap(),
        "it is the new program"
    );
    assert!(
        read("/usr/bin/awsvid.previous")
            == fs::read(Path::new(env!("CARGO_BIN_EXE_awsvid"))).unwrap()
    );
    assert_eq!(read("/etc/awsvid/awsvid.toml.previous"), text.as_bytes());
    for unit in UNITS {
        let previous = read(&format!("/etc/awsvid/{unit}.previous"));
        assert_eq!(previous, older(unit).as_bytes(), "{unit}");
        let shipped = fs::read(shipped(&format!("systemd/{unit}"))).unwrap();
        assert_eq!(read(&installed(unit)), shipped, "{unit}");
        assert_eq!(machine.property(unit, "NeedDaemonReload"), "no", "{unit}");
    }
}
