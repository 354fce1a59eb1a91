//! Stock Debian machines, with their own kernels and systemd, under emulation.

mod inside;
mod stock_machine;
mod tried_machines;

use std::time::Duration;

use crate::harness::counterparts::process::await_some;
use crate::harness::documents::block;
use crate::harness::machine::MachineStart;
use crate::harness::{documents, is_slow, slow_only};
use stock_machine::{BILLING, REPORTS, RULES, StockMachine, UnitCaller};
use tried_machines::{DISTRIBUTIONS, Distribution, ServedCallers};

/// Bounds steps that take seconds under emulation.
const TIMEOUT: Duration = Duration::from_secs(300);
/// The mark of AppArmor's rejections in the kernel's log.
const DENIED: &str = "apparmor=\"DENIED\"";

/// Callers that SPIRE attests: one by its user, one by its unit.
const ATTESTED_CALLERS: [UnitCaller; 3] = [
    UnitCaller::new("billing", "billing.service", Some(BILLING)),
    UnitCaller::new("shop", "reports.service", Some(REPORTS)),
    UnitCaller::new("shop", "shop.service", None),
];
/// Callers that awsvid's rules know: by user, by unit, by cgroup.
const RULED_CALLERS: [UnitCaller; 4] = [
    UnitCaller::new("billing", "billing.service", Some(RULES[0])),
    UnitCaller::new("shop", "reports.service", Some(RULES[1])).by_cgroup(),
    UnitCaller {
        slice: "night.slice",
        ..UnitCaller::new("shop", "night-1.service", Some(RULES[2])).by_cgroup()
    },
    UnitCaller::new("shop", "shop.service", None),
];
/// The same callers in sandboxes of systemd, which change what they see, and not what they are.
const SANDBOXED_CALLERS: [UnitCaller; 5] = [
    UnitCaller {
        properties: &["-p PrivateUsers=yes -p PrivateTmp=yes -p NoNewPrivileges=yes"],
        ..UnitCaller::new("billing", "own-users.service", Some(RULES[0]))
    },
    UnitCaller {
        properties: &["-p ProtectProc=invisible -p ProcSubset=pid"],
        ..UnitCaller::new("billing", "own-proc.service", Some(RULES[0]))
    },
    UnitCaller {
        properties: &["-p PrivateNetwork=yes"],
        has_network: false,
        ..UnitCaller::new("billing", "own-network.service", Some(RULES[0]))
    },
    UnitCaller {
        properties: &["-p DynamicUser=yes"],
        ..UnitCaller::new("reports", "reports.service", Some(RULES[1])).by_cgroup()
    },
    UnitCaller {
        properties: &["-p DynamicUser=yes"],
        ..UnitCaller::new("stranger", "stranger.service", None)
    },
];

/// `[identity]` for a source that fetches the JWT-SVIDs of awsvid's own entries.
const WORKLOAD_API: &str = "[identity]\n\
     workload_api_socket = \"unix:///run/spire/agent-sockets/spire-agent.sock\"\n";

/// Returns the rules by which those callers are known.
fn rules() -> String {
    let rule = |id: &str, key: &str| format!("[[workload]]\nspiffe_id = {id:?}\n{key}\n");
    rule(RULES[0], "user = \"billing\"")
        + &rule(RULES[1], "systemd_unit = \"reports.service\"")
        + &rule(RULES[2], "cgroup = \"/night.slice/night-*.service\"")
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

/// Tries both kinds of source on the machine, and compares it with the documents.
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

    stock.configure(WORKLOAD_API, &rules());
    stock.read("systemctl restart awsvid");
    await_ready(&mut stock);
    stock.assert_identities(&RULED_CALLERS, &served);
    if is_slow() {
        stock.assert_identities(&SANDBOXED_CALLERS, &served);
    }
    let found = stock.read(&format!(
        "systemctl show --value --property=NRestarts awsvid
         journalctl --dmesg --no-pager | grep --count '{DENIED}' || true"
    ));
    assert_eq!(found, "0\n0", "no crash, and no rejection by AppArmor");
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
    stock.assert_identities(&ATTESTED_CALLERS, &served);
}

/// Callers on the unix socket, on TCP and in pods, and what a kernel lacks.
#[test]
fn tests_of_attestation_pass_on_stock_machines() {
    if is_slow() {
        for distribution in &DISTRIBUTIONS {
            let filters: &[&str] = match distribution.attests_tcp {
                true => &["pod_callers::", "caller_facts::", "unsupported::"],
                false => &["unsupported::"],
            };
            inside::assert_passes(distribution, filters);
        }
    }
}
