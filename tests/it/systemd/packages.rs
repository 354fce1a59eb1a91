//! The deb and the rpm on a machine with systemd: install, configure, upgrade under load,
//! downgrade, remove, purge.

use std::fs;
use std::path::Path;
use std::thread;

use super::{
    CONFIGURATION, Content, PROGRAM, TCP, UNIX, USERS, assert_known, fetch, newer_version, rule,
    start, with_rules,
};
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::Output;
use crate::harness::daemon::PROGRAM as BUILT;
use crate::harness::release::Release;
use crate::harness::systemd::SystemdMachine;

/// A package manager's commands. Each gets the path of a package, or the package's name.
struct Manager {
    /// The end of the packages' names.
    format: &'static str,
    install: &'static [&'static str],
    downgrade: &'static [&'static str],
    remove: &'static [&'static str],
    /// The configuration files that a removal leaves. The first is the changed one.
    left: &'static [&'static str],
}

const DPKG: Manager = Manager {
    format: "deb",
    install: &["dpkg", "--force-confdef", "--force-confold", "--install"],
    downgrade: &["dpkg", "--force-confdef", "--force-confold", "--install"],
    remove: &["dpkg", "--remove"],
    left: &[CONFIGURATION, "/etc/logrotate.d/awsvid"],
};
/// Debian's rpm has no database of the system, so dependencies can't be resolved.
const RPM: Manager = Manager {
    format: "rpm",
    install: &["rpm", "--force-debian", "--nodeps", "--upgrade"],
    downgrade: &[
        "rpm",
        "--force-debian",
        "--nodeps",
        "--upgrade",
        "--oldpackage",
    ],
    remove: &["rpm", "--force-debian", "--nodeps", "--erase"],
    left: &["/etc/awsvid/awsvid.toml.rpmsave"],
};

/// Dpkg's list of installed packages: those that awsvid's depends on.
fn dpkg_status() -> String {
    let installed = [("libc6", "2.36"), ("ca-certificates", "20230311")];
    let entry = |(name, version): (&str, &str)| {
        format!(
            "Package: {name}\nStatus: install ok installed\nMaintainer: a\nArchitecture: all\nVersion: {version}\nDescription: a\n\n"
        )
    };
    installed.map(entry).concat()
}

fn run(machine: &SystemdMachine, words: &[&str], last: &str) -> Output {
    machine.run(&[words, &[last]].concat())
}

fn states(machine: &SystemdMachine) -> [String; 4] {
    let state = |verb: &str, unit: &str| {
        let printed = machine.run(&["systemctl", verb, unit]);
        printed.stdout.trim().to_owned()
    };
    [
        state("is-enabled", "awsvid.socket"),
        state("is-enabled", "awsvid.service"),
        state("is-active", "awsvid.socket"),
        state("is-active", "awsvid.service"),
    ]
}

#[test]
fn deb_lives_on_a_machine() {
    assert_life(&DPKG);
}

#[test]
fn rpm_lives_on_a_machine() {
    assert_life(&RPM);
}

/// Installs, configures, upgrades, downgrades and removes the package.
fn assert_life(manager: &Manager) {
    let directory = folder();
    let Some(machine) = boot(directory.path(), manager) else {
        return;
    };
    let [old, new] = ["old", "new"].map(|name| format!("/packages/{name}.{}", manager.format));
    let install = |words: &[&str], package: &str| run(&machine, words, package).success(package);
    install(manager.install, &old);
    let disabled = ["disabled", "disabled", "inactive", "inactive"];
    assert_eq!(states(&machine), disabled, "nothing is started");
    assert!(machine.path("/run/awsvid").is_dir());

    let text = with_rules("", &rule("user = \"billing\""));
    fs::write(machine.path(CONFIGURATION), &text).unwrap();
    start(&machine);
    assert_known(fetch(&machine, "billing.service", "billing", TCP));
    let program = || fs::read(machine.path(PROGRAM)).unwrap();
    let first = program();
    assert_change_rejects_nothing(&machine, || drop(install(manager.install, &new)));
    assert!(program() != first, "it is the newer program");
    assert_change_rejects_nothing(&machine, || drop(install(manager.downgrade, &old)));
    assert!(program() == first, "it is the older program again");
    let configuration = fs::read_to_string(machine.path(CONFIGURATION)).unwrap();
    assert_eq!(configuration, text);

    let text = format!("{text}[cache]\nrevocation_grace = \"1m\"\n");
    fs::write(machine.path(CONFIGURATION), &text).unwrap();
    assert_rejected_file_leaves_the_daemon(&machine, manager, &new);
    assert_removal_leaves_the_changed_file(&machine, manager, &text);
}

/// Boots a machine with two versions of the package in a folder.
fn boot(directory: &Path, manager: &Manager) -> Option<SystemdMachine> {
    let newer = newer_version(directory);
    let versions = [
        ("old", "1.0.0", Path::new(BUILT)),
        ("new", "1.1.0", newer.as_path()),
    ];
    let mut packages = Vec::new();
    for (name, version, program) in versions {
        let release = Release::of_tests(&directory.join(name), program)?
            .with_version(version)
            .with_format(manager.format);
        release.run(&["files", "packages"]);
        let path = format!("/packages/{name}.{}", manager.format);
        packages.push((path, release.ending(&format!(".{}", manager.format))));
    }
    let status = dpkg_status();
    let mut files = vec![
        ("/etc/sysusers.d/workloads.conf", Content::Text(USERS)),
        ("/var/lib/dpkg/status", Content::Text(&status)),
        ("/var/lib/dpkg/info/format", Content::Text("1\n")),
        ("/var/lib/dpkg/updates/.keep", Content::Text("")),
    ];
    for (path, package) in &packages {
        files.push((path, Content::Copy(package)));
    }
    SystemdMachine::boot(directory, &files)
}

/// Upgrades to a version that does not know a key of the file. The daemon that runs goes on.
fn assert_rejected_file_leaves_the_daemon(
    machine: &SystemdMachine,
    manager: &Manager,
    package: &str,
) {
    let before = machine.property("awsvid.service", "MainPID");
    let upgraded = run(machine, manager.install, package);
    let words = "awsvid was not restarted";
    assert!(
        upgraded.status.success() && upgraded.stderr.contains(words),
        "{upgraded:?}"
    );
    assert_eq!(machine.property("awsvid.service", "MainPID"), before);
    assert_known(fetch(machine, "billing.service", "billing", UNIX));
}

/// Removes the package, and purges it where the manager can.
fn assert_removal_leaves_the_changed_file(machine: &SystemdMachine, manager: &Manager, text: &str) {
    run(machine, manager.remove, "awsvid").success("remove");
    let mut left = named_awsvid(machine);
    left.sort();
    assert_eq!(left, manager.left);
    let kept = fs::read_to_string(machine.path(manager.left[0])).unwrap();
    assert_eq!(kept, text);
    let units = machine.run(&["systemctl", "list-units", "--all", "--plain", "awsvid*"]);
    let units = units.success("list-units");
    assert!(units.contains("0 loaded units"), "{units}");
    if manager.format == DPKG.format {
        run(machine, &["dpkg", "--purge"], "awsvid").success("purge");
        assert_eq!(named_awsvid(machine), Vec::<String>::new());
        assert!(!machine.path("/etc/awsvid").exists());
    }
}

/// Runs `change` while callers send one request after the other. It replaces the daemon, and no
/// caller is rejected.
fn assert_change_rejects_nothing(machine: &SystemdMachine, change: impl FnOnce()) {
    const DONE: &str = "/tmp/done";
    let before = machine.property("awsvid.service", "MainPID");
    // One service each: systemd may forget a transient unit that it creates during a reload.
    let script = format!(
        "until [ -e {DONE} ]; do curl --silent --show-error --max-time 50 --header 'Authorization: any' \
         --output /dev/null --write-out '%{{http_code}}\\n' \"$@\"; done"
    );
    thread::scope(|scope| {
        let callers = [("unix-caller.service", UNIX), ("tcp-caller.service", TCP)];
        let callers = callers.map(|(unit, address)| {
            let words = [&["sh", "-euc", &script, "sh"], address].concat();
            scope.spawn(move || machine.run_as(unit, "billing", &words).success(unit))
        });
        for unit in ["unix-caller.service", "tcp-caller.service"] {
            machine.await_property(unit, "ActiveState", "active");
        }
        change();
        fs::write(machine.path(DONE), "").unwrap();
        for caller in callers {
            let statuses = caller.join().unwrap();
            // Of the answer without an agent from which to fetch a token.
            assert!(
                statuses.lines().count() > 1 && statuses.lines().all(|status| status == "503"),
                "{statuses}"
            );
        }
    });
    fs::remove_file(machine.path(DONE)).unwrap();
    assert_ne!(machine.property("awsvid.service", "MainPID"), before);
    assert_known(fetch(machine, "billing.service", "billing", TCP));
    let enabled = ["enabled", "enabled", "active", "active"];
    assert_eq!(states(machine), enabled);
}

/// Returns all files whose names or folders have the name of the package. dpkg's own are not among
/// them.
fn named_awsvid(machine: &SystemdMachine) -> Vec<String> {
    let find =
        "find /etc /run /usr /var -path /var/lib/dpkg -prune -o -path '*awsvid*' ! -type d -print";
    let found = machine.run(&["sh", "-euc", find]).success("find");
    found.lines().map(str::to_owned).collect()
}
