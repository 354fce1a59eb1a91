//! The deb of a release on stock machines: upgrade under load, downgrade, removal, purge. Its
//! installation is that of every other slow test here.

use awsvid::clock::REQUEST_HOLD;
use serde_json::Value;

use super::caller_tables::ATTESTED_CALLERS;
use super::stock_machine::{AUDIT, NEWER_PACKAGE, PACKAGE, StockMachine};
use super::tried_machines::{DISTRIBUTIONS, Distribution, ServedCallers};
use super::{await_ready, identity};
use crate::harness::env::AWSVID;
use crate::harness::slow_only;

/// The directories in which a package may leave files. dpkg's own list is not one of its files.
const FIND: &str = "find /etc /run /usr /var -path /var/lib/dpkg -prune -o -path /run/log -prune \
                    -o -path '*awsvid*' -print | sort";

#[test]
fn deb_lives_on_stock_machines() {
    if slow_only() {
        let stock = DISTRIBUTIONS.iter().filter(|one| one.boot.is_empty());
        stock.for_each(lives_on);
    }
}

fn lives_on(distribution: &Distribution) {
    let Some(mut stock) = StockMachine::install(distribution.suite, distribution.start()) else {
        return;
    };
    let units = "systemctl is-enabled awsvid.socket awsvid.service || true
                 systemctl is-active awsvid.socket awsvid.service || true";
    assert_eq!(
        stock.read(units),
        "disabled\ndisabled\ninactive\ninactive",
        "the installation starts nothing"
    );
    // dpkg replaces the program some time before it restarts the daemon. The agent then sees
    // `/usr/bin/awsvid (deleted)` as its path. This entry does not have the path.
    let unit = ["unix:uid:0", "systemd:id:awsvid.service"];
    stock.spire.register(AWSVID, &unit);
    stock.configure(&identity("spire-delegated.toml"), "");
    await_ready(&mut stock);
    let served = ServedCallers::read(&mut stock);
    stock.assert_identities(&ATTESTED_CALLERS, &served);

    let configuration = stock.read("sha256sum /etc/awsvid/awsvid.toml");
    for package in [NEWER_PACKAGE, PACKAGE] {
        assert_change_rejects_nothing(&mut stock, package, &served);
    }
    assert_eq!(stock.read(units), "enabled\nenabled\nactive\nactive");
    assert_eq!(
        stock.read("sha256sum /etc/awsvid/awsvid.toml"),
        configuration
    );
    stock.assert_identities(&ATTESTED_CALLERS, &served);

    stock.read("apt-get remove --yes awsvid");
    let left = stock.read(FIND);
    let expected = "/etc/awsvid\n/etc/awsvid/awsvid.toml\n/etc/logrotate.d/awsvid\n\
                    /var/log/awsvid\n/var/log/awsvid/audit.log";
    assert_eq!(left, expected);
    let units = stock.read("systemctl list-units --all --plain --no-legend 'awsvid*'");
    assert_eq!(units, "");
    stock.read("apt-get purge --yes awsvid");
    assert_eq!(stock.read(FIND), "");
}

/// Installs this version while callers send one request after the other. It replaces the daemon,
/// which rejects no request.
///
/// dpkg's script first lets systemd reload its units. Until that ends, systemd does not answer
/// SPIRE's `systemd` attestor, and each process that SPIRE has to attest waits. Under emulation
/// that took 9 s. The daemon holds a request for [`REQUEST_HOLD`], and then answers 503.
fn assert_change_rejects_nothing(stock: &mut StockMachine, package: &str, served: &ServedCallers) {
    let mut listeners = vec![(
        "unix",
        "--unix-socket /run/awsvid/awsvid.sock http://localhost/v1/credentials",
    )];
    if served.tcp {
        listeners.push(("tcp", "http://127.0.0.1:974/v1/credentials"));
        listeners.push(("tcp6", "http://[::1]:974/v1/credentials"));
    }
    let records = stock.read(&format!("wc -l <{AUDIT}"));
    let found = stock.read(&change_under_load(package, &listeners));
    let failed = stock.read(&format!(
        "tail -n +$((1 + {records})) {AUDIT} | grep --invert-match '\"reason\":\"ok\"' || true"
    ));
    let (late, rejected): (Vec<&str>, Vec<&str>) = failed.lines().partition(|line| is_late(line));
    assert!(rejected.is_empty(), "{package}: {rejected:#?}");

    // A line for each listener, with counts and statuses. The status of a connection that fails
    // is 000.
    eprintln!("{package}: statuses by listener: {found:?}");
    assert_eq!(found.lines().count(), listeners.len(), "{package}: {found}");
    let mut answered_late = 0;
    for line in found.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        for pair in words.chunks(2) {
            let count: usize = pair[0].parse().unwrap();
            match pair[1] {
                "200" => assert!(count > 1, "{package}: {found}"),
                "503" => answered_late += count,
                _ => panic!("{package}: {found}"),
            }
        }
        assert!(words.contains(&"200"), "{package}: {found}");
    }
    assert_eq!(answered_late, late.len(), "{package}: {found}; {failed}");
}

/// Returns whether the daemon held the request of this audit record as long as it holds any.
fn is_late(record: &str) -> bool {
    let record: Value = serde_json::from_str(record).unwrap();
    let time = record["milliseconds"].as_f64().unwrap();
    let reasons = ["source_unavailable", "pending"].map(Value::from);
    reasons.contains(&record["reason"]) && time >= 1e3 * REQUEST_HOLD.as_secs_f64()
}

/// Returns a script that installs the package while a caller for each listener sends requests.
fn change_under_load(package: &str, listeners: &[(&str, &str)]) -> String {
    let start: String = listeners
        .iter()
        .map(|(name, address)| {
            format!(
                "systemd-run --quiet --collect --wait --pipe --unit=load-{name} --uid=billing \
                   -- sh /run/load {address} >/run/load-{name} &
                 head -n 1 <(tail --follow=name --retry --lines=+1 /run/load-{name}) >&2\n"
            )
        })
        .collect();
    let end: String = listeners
        .iter()
        .map(|(name, _)| format!("echo $(sort /run/load-{name} | uniq -c); rm /run/load-{name}\n"))
        .collect();
    format!(
        "cat >/run/load <<'EOF'
until [ -e /run/load-ends ]; do
    curl --silent --max-time 60 --header 'Authorization: any' --output /dev/null \\
        --write-out '%{{http_code}}\\n' \"$@\" || true
done
EOF
         before=$(systemctl show --value --property=MainPID awsvid)
         {start}
         DEBIAN_FRONTEND=noninteractive apt-get install --yes --allow-downgrades {package} >&2
         touch /run/load-ends
         wait
         {end}
         rm /run/load /run/load-ends
         [ $before != $(systemctl show --value --property=MainPID awsvid) ]"
    )
}
