//! Users of a directory, which SSSD knows some time after the boot.

use std::time::Duration;

use super::stock_machine::{RULES, StockMachine};
use super::tried_machines::ServedCallers;
use super::unit_caller::UnitCaller;
use super::{WORKLOAD_API, await_ready};
use crate::harness::counterparts::process::await_some;
use crate::harness::machine::MachineStart;
use crate::harness::slow_only;

/// Bounds the start of SSSD, whose processes wait for one another.
const TIMEOUT: Duration = Duration::from_secs(300);

/// The only user of the directory.
const ENTRY: &str = "\
dn: uid=carol,dc=nodomain
objectClass: account
objectClass: posixAccount
uid: carol
cn: carol
uidNumber: 5001
gidNumber: 5001
homeDirectory: /home/carol
";
const SSSD: &str = "\
[sssd]
services = nss
domains = directory
[domain/directory]
id_provider = ldap
ldap_uri = ldap://127.0.0.1
ldap_search_base = dc=nodomain
ldap_id_use_start_tls = false
cache_credentials = false
";
const RULE: &str =
    "[[workload]]\nspiffe_id = \"spiffe://example.org/rules/user\"\nuser = \"carol\"\n";
const CAROL: UnitCaller = UnitCaller::new("carol", "carol.service", Some(RULES[0]));

/// Fills the directory, and starts SSSD at each boot.
fn directory() -> String {
    format!(
        "systemctl start slapd
         ldapadd -Q -Y EXTERNAL -H ldapi:/// <<'EOF'
dn: olcDatabase={{1}}mdb,cn=config
changetype: modify
replace: olcRootPW
olcRootPW: machine
EOF
         ldapadd -x -D cn=admin,dc=nodomain -w machine <<'EOF'
{ENTRY}EOF
         install -m 0600 /dev/stdin /etc/sssd/sssd.conf <<'EOF'
{SSSD}EOF
         systemctl enable --quiet sssd.service
         systemctl restart sssd.service"
    )
}

/// A rule names a user of the directory. The daemon starts while that user is not known, serves
/// others, and knows the user as soon as SSSD does: without a restart, and after a reboot.
#[test]
fn users_of_a_directory_are_known_when_sssd_knows_them() {
    if !slow_only() {
        return;
    }
    let Some(mut stock) = StockMachine::install("trixie-directory", MachineStart::Resumed) else {
        return;
    };
    stock.configure(WORKLOAD_API, RULE);
    await_ready(&mut stock);
    let served = ServedCallers::read(&mut stock);
    stock.run(&directory()).success("the directory");
    await_carol(&mut stock);
    stock.assert_identities(&[CAROL], &served);

    stock.machine.reboot();
    await_carol(&mut stock);
    await_some("ready", TIMEOUT, || {
        let probe = stock.run("awsvid probe ready");
        probe.status.success().then_some(())
    });
    stock.assert_identities(&[CAROL], &served);
    let restarts = stock.read("systemctl show --value --property=NRestarts awsvid");
    assert_eq!(restarts, "0");
}

/// Waits until the machine knows the user.
fn await_carol(stock: &mut StockMachine) {
    await_some("carol", TIMEOUT, || {
        let lookup = stock.run("getent passwd carol");
        lookup.stdout.starts_with("carol:").then_some(())
    });
}
