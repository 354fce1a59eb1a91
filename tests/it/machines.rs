//! Stock Debian machines, with their own kernels and systemd, under emulation.

mod aarch64;
mod caller_tables;
mod directory_users;
mod inside;
mod kubernetes_node;
mod packages;
mod stock_machine;
mod tried_machines;
mod unit_caller;

use std::time::Duration;

use crate::harness::counterparts::process::await_some;
use crate::harness::documents::block;
use crate::harness::machine::MachineStart;
use crate::harness::{documents, is_slow, slow_only};
use caller_tables::{
    ATTESTED_CALLERS, CONTAINER_CALLERS, LAUNCHED_CALLERS, RULED_CALLERS, SANDBOXED_CALLERS,
};
use stock_machine::{BILLING, REPORTS, RULES, StockMachine};
use tried_machines::{DISTRIBUTIONS, Distribution, ServedCallers};
use unit_caller::{Launch, UnitCaller};

/// Bounds steps that take seconds under emulation.
const TIMEOUT: Duration = Duration::from_secs(300);
/// The mark of AppArmor's rejections in the kernel's log.
const DENIED: &str = "apparmor=\"DENIED\"";

/// `[identity]` for a source that fetches the JWT-SVIDs of awsvid's own entries.
const WORKLOAD_API: &str = "[identity]\n\
     workload_api_socket = \"unix:///run/spire/agent-sockets/spire-agent.sock\"\n";

/// Returns the rules by which those callers are known.
fn rules() -> String {
    let rule = |id: &str, key: &str| format!("[[workload]]\nspiffe_id = {id:?}\n{key}\n");
    rule(RULES[0], "user = \"billing\"")
        + &rule(RULES[1], "systemd_unit = \"reports.service\"")
        + &rule(RULES[2], "cgroup = \"/night.slice/night-*.service\"")
        + &rule(RULES[1], "cgroup = \"/machine.slice/libpod-*.scope/**\"")
        + &rule(RULES[2], "cgroup = \"/system.slice/docker-*.scope\"")
        + &rule(RULES[0], "cgroup = \"/lxc.payload.*\"")
}

/// Returns `[identity]` of a shipped example.
fn identity(example: &str) -> String {
    let path = documents::path("").join("../").join(example);
    let text = std::fs::read_to_string(&path).unwrap();
    let (identity, _) = text.split_once("[sts]").expect("[sts]");
    identity.to_owned()
}

/// Runs the documented start until the daemon is ready.
fn await_ready(stock: &mut StockMachine) {
    let start = block("install-vm.md", "5. Start and check", "sudo systemctl");
    await_some("ready", TIMEOUT, || {
        stock.run(&start).status.success().then_some(())
    });
}

/// Restarts the daemon with this `[identity]` and these rules.
fn restart(stock: &mut StockMachine, identity: &str, rules: &str) {
    stock.configure(identity, rules);
    stock.read("systemctl restart awsvid");
    await_ready(stock);
}

/// Tries all kinds of source on the machine, and compares it with the documents.
fn serves_its_callers(distribution: &Distribution) {
    let Some(mut stock) = StockMachine::install(distribution.suite, distribution.start()) else {
        return;
    };
    assert_eq!(stock.read("cat /proc/sys/kernel/perf_event_paranoid"), "3");
    stock.configure(&identity("spire-delegated.toml"), "");
    await_ready(&mut stock);
    let served = ServedCallers::read(&mut stock);
    served.assert_documented(distribution);
    if served.tcp {
        assert_documented_command_works(&mut stock);
    }
    stock.assert_identities(&ATTESTED_CALLERS, &served);
    let check = stock.run("sudo awsvid check");
    let words = "the running daemon counts executions";
    assert!(
        check.status.success() == served.tcp && check.stdout.contains(words),
        "{check:?}"
    );

    if is_slow() {
        // Ubuntu's kernels have this value.
        stock.read("sysctl --quiet --write kernel.perf_event_paranoid=4");
        for example in ["spire-delegated.toml", "spiffe-broker.toml"] {
            restart(&mut stock, &identity(example), "");
            stock.assert_identities(&ATTESTED_CALLERS, &served);
        }
    }

    restart(&mut stock, WORKLOAD_API, &rules());
    stock.assert_identities(&RULED_CALLERS, &served);
    if is_slow() {
        stock.assert_identities(&SANDBOXED_CALLERS, &served);
        stock.assert_identities(&LAUNCHED_CALLERS, &served);
        assert_exposure_is_explained(&mut stock);
    }
    let found = stock.read(&format!(
        "systemctl show --value --property=NRestarts awsvid
         journalctl --dmesg --no-pager | grep --count '{DENIED}' || true"
    ));
    assert_eq!(found, "0\n0", "no crash, and no rejection by AppArmor");
}

/// Asserts that this machine's systemd rates the unit as the documents have it, and that the unit
/// explains each remaining point. Versions of systemd differ in their points.
fn assert_exposure_is_explained(stock: &mut StockMachine) {
    let printed = stock.read("systemd-analyze security --no-pager awsvid.service");
    let level = printed.lines().find_map(|line| {
        let (_, rest) = line.split_once("exposure level for awsvid.service:")?;
        rest.split_whitespace().next()?.parse::<f32>().ok()
    });
    eprintln!("exposure level: {level:?}");
    assert!(level.is_some_and(|level| level <= 2.7), "{printed}");
    let unit = stock.read("systemctl cat awsvid.service");
    let (_, explained) = unit.split_once("remaining points:").unwrap();
    // A point is a line of a mark, a name, a description and what it adds to the level.
    let unexplained: Vec<&str> = printed
        .lines()
        .filter(|line| line.trim_start().starts_with('✗'))
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter(|name| !explained.contains(name))
        .collect();
    assert!(unexplained.is_empty(), "{unexplained:?} of {printed}");
}

/// Runs README.md's last step. Its machine has no AWS CLI.
fn assert_documented_command_works(stock: &mut StockMachine) {
    let get = "curl --silent --fail --retry 30 --retry-delay 1 --header \"Authorization: $AWS_CONTAINER_AUTHORIZATION_TOKEN\" \
               \"$AWS_CONTAINER_CREDENTIALS_FULL_URI\"";
    let answer = stock.read(&format!("sudo -u billing awsvid exec -- sh -c '{get}'"));
    stock.assert_opens_object(&answer);
}

#[test]
fn stock_machines_serve_callers_by_user_unit_and_cgroup() {
    for distribution in ["Debian 13", "Debian 12"] {
        serves_its_callers(Distribution::named(distribution));
    }
}

/// The same on all other machines.
#[test]
fn documented_machines_serve_what_the_table_has() {
    if slow_only() {
        let others = DISTRIBUTIONS.iter().skip(2);
        others.for_each(serves_its_callers);
    }
}

/// Containers of podman, without a daemon and as root, of Docker and of LXC.
#[test]
fn containers_are_known_by_their_cgroup() {
    if !slow_only() {
        return;
    }
    let Some(mut stock) = StockMachine::install("trixie-containers", MachineStart::Resumed) else {
        return;
    };
    stock.configure(WORKLOAD_API, &rules());
    await_ready(&mut stock);
    let served = ServedCallers::read(&mut stock);
    stock.assert_identities(&CONTAINER_CALLERS, &served);
}

/// All that this machine's SELinux denies is logged in the kernel's log.
#[test]
fn selinux_denies_awsvid_nothing() {
    if !slow_only() {
        return;
    }
    let Some(mut stock) = StockMachine::install("trixie-selinux", MachineStart::Resumed) else {
        return;
    };
    assert_eq!(stock.read("cat /sys/fs/selinux/enforce"), "1");
    stock.configure(&identity("spire-delegated.toml"), "");
    await_ready(&mut stock);
    let served = ServedCallers::read(&mut stock);
    stock.assert_identities(&ATTESTED_CALLERS, &served);
    assert_documented_command_works(&mut stock);
    restart(&mut stock, WORKLOAD_API, &rules());
    stock.assert_identities(&RULED_CALLERS, &served);
    let found = stock.read(
        "ps --no-headers -o label -C awsvid
         journalctl --dmesg --no-pager | grep 'avc:  denied' | grep awsvid || true",
    );
    assert_eq!(found, "system_u:system_r:initrc_t:s0");
}

#[test]
fn rebooted_machine_serves_everything_again() {
    if !slow_only() {
        return;
    }
    for distribution in ["Debian 13", "Debian 12"] {
        reboots(Distribution::named(distribution));
    }
}

fn reboots(distribution: &Distribution) {
    let start = MachineStart::Booted("");
    let Some(mut stock) = StockMachine::install(distribution.suite, start) else {
        return;
    };
    stock.configure(&identity("spire-delegated.toml"), "");
    await_ready(&mut stock);
    let served = ServedCallers::read(&mut stock);
    stock.machine.reboot();
    // Nothing but the boot starts it.
    await_some("ready", TIMEOUT, || {
        let probe = stock.run("awsvid probe ready");
        probe.status.success().then_some(())
    });
    stock.assert_identities(&ATTESTED_CALLERS, &served);
    assert_documented_command_works(&mut stock);
    let order = stock.read(
        "for unit in awsvid.socket spire-agent.service awsvid.service; do
             systemctl show --value --property=ActiveEnterTimestampMonotonic $unit
         done
         systemctl show --value --property=NRestarts awsvid",
    );
    let times: Vec<u64> = order.lines().map(|line| line.parse().unwrap()).collect();
    let [socket, agent, service, restarts] = times[..] else {
        panic!("{order}")
    };
    assert!(socket < service && agent < service, "{order}");
    assert_eq!(restarts, 0);
}

/// A profile like that of a container runtime: the daemon may do everything, but inspect only
/// processes of the same profile.
const CONFINING: &str = "\
profile confining flags=(attach_disconnected,mediate_deleted) {
  capability, network, unix, signal, file, dbus,
  ptrace (trace, read, tracedby, readby) peer=confining,
}
";

/// Callers of the daemon without a profile, outside of the profile and in it, as containers are.
const PROFILED_CALLERS: [UnitCaller; 2] = [
    UnitCaller::new("billing", "billing.service", Some(BILLING)),
    UnitCaller::new("shop", "reports.service", Some(REPORTS))
        .launched(Launch::Service("-p AppArmorProfile=confining")),
];

/// Callers are rejected there, and the log names the profile.
#[test]
fn profile_that_hides_callers_is_logged() {
    if !slow_only() {
        return;
    }
    let distribution = Distribution::named("Debian 13");
    let Some(mut stock) = StockMachine::install(distribution.suite, distribution.start()) else {
        return;
    };
    stock.configure(&identity("spire-delegated.toml"), "");
    stock.read(&format!(
        "echo '{CONFINING}' >/run/profile
         apparmor_parser --replace /run/profile
         mkdir /run/systemd/system/awsvid.service.d
         printf '[Service]\\nAppArmorProfile=confining\\n' >/run/systemd/system/awsvid.service.d/a.conf
         systemctl daemon-reload"
    ));
    await_ready(&mut stock);
    let records = stock.request(&ATTESTED_CALLERS[..1]);
    let reasons: Vec<_> = records[0].iter().map(|record| &record["reason"]).collect();
    assert_eq!(reasons, ["unseen_program", "no_holder", "no_holder"]);
    let journal = stock.machine.journal();
    for words in [
        "an AppArmor profile confines the daemon",
        "appArmorProfile: { type: Unconfined }",
    ] {
        assert!(journal.contains(words), "{journal}");
    }
    stock.read(
        "rm /run/systemd/system/awsvid.service.d/a.conf
         systemctl daemon-reload
         systemctl restart awsvid.service",
    );
    await_ready(&mut stock);
    let served = ServedCallers::read(&mut stock);
    stock.assert_identities(&PROFILED_CALLERS, &served);
}

/// Callers on the unix socket, on TCP and in pods, and what a kernel lacks.
#[test]
fn tests_of_attestation_pass_on_stock_machines() {
    if slow_only() {
        for distribution in &DISTRIBUTIONS {
            let filters: &[&str] = match distribution.attests_tcp {
                true => &["pod_callers::", "caller_facts::", "unsupported::"],
                false => &["unsupported::"],
            };
            inside::assert_passes(distribution, filters);
        }
    }
}
