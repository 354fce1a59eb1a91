//! The callers on a stock machine, with what awsvid has to answer each.

use super::stock_machine::{BILLING, REPORTS, RULES};
use super::unit_caller::{Launch, UnitCaller};

/// Callers that SPIRE attests: one by its user, one by its unit.
pub(super) const ATTESTED_CALLERS: [UnitCaller; 3] = [
    UnitCaller::new("billing", "billing.service", Some(BILLING)),
    UnitCaller::new("shop", "reports.service", Some(REPORTS)),
    UnitCaller::new("shop", "shop.service", None),
];
/// Callers that awsvid's rules know: by user, by unit, by cgroup.
pub(super) const RULED_CALLERS: [UnitCaller; 4] = [
    UnitCaller::new("billing", "billing.service", Some(RULES[0])),
    UnitCaller::new("shop", "reports.service", Some(RULES[1])).by_cgroup(),
    UnitCaller {
        slice: "night.slice",
        ..UnitCaller::new("shop", "night-1.service", Some(RULES[2])).by_cgroup()
    },
    UnitCaller::new("shop", "shop.service", None),
];
/// The same in sandboxes of systemd. One in a user namespace of its own counts as a container,
/// which a rule without `cgroup` does not match.
pub(super) const SANDBOXED_CALLERS: [UnitCaller; 7] = [
    UnitCaller::new("billing", "own-users.service", None)
        .launched(Launch::Service(
            "-p PrivateUsers=yes -p PrivateTmp=yes -p NoNewPrivileges=yes",
        ))
        .in_container(),
    UnitCaller {
        slice: "night.slice",
        ..UnitCaller::new("billing", "night-users.service", Some(RULES[2]))
            .launched(Launch::Service("-p PrivateUsers=yes"))
            .by_cgroup()
            .in_container()
    },
    UnitCaller::new("billing", "own-proc.service", Some(RULES[0])).launched(Launch::Service(
        "-p ProtectProc=invisible -p ProcSubset=pid -p ProtectSystem=strict",
    )),
    UnitCaller::new("billing", "own-network.service", Some(RULES[0]))
        .launched(Launch::Service("-p PrivateNetwork=yes"))
        .without_network(),
    UnitCaller::new("reports", "reports.service", Some(RULES[1]))
        .launched(Launch::Service("-p DynamicUser=yes"))
        .by_cgroup(),
    UnitCaller::new("stranger", "stranger.service", None)
        .launched(Launch::Service("-p DynamicUser=yes")),
    // The name of a dynamic user that a rule has by another name.
    UnitCaller::new("billing2", "billing2.service", None)
        .launched(Launch::Service("-p DynamicUser=yes")),
];
/// The same, as other parts of systemd start them.
pub(super) const LAUNCHED_CALLERS: [UnitCaller; 4] = [
    UnitCaller::new("billing", "user@1001.service", Some(RULES[0])).launched(Launch::UserService),
    UnitCaller::new("shop", "user@1002.service", None).launched(Launch::UserService),
    UnitCaller::new("billing", "session-*", Some(RULES[0])).launched(Launch::Session),
    UnitCaller::new("billing", "activated@*", Some(RULES[0])).launched(Launch::Socket),
];
/// The same in containers. A rule has to name their cgroup.
pub(super) const CONTAINER_CALLERS: [UnitCaller; 7] = [
    UnitCaller::new("billing", "user@1001.service", None)
        .launched(Launch::RootlessPodman("--network host"))
        .in_container(),
    UnitCaller::new("root", "libpod-*", Some(RULES[1]))
        .launched(Launch::Podman("--network host --user 1001"))
        .by_cgroup()
        .in_container(),
    UnitCaller::new("root", "libpod-*", Some(RULES[1]))
        .launched(Launch::Podman(
            "--network none --uidmap 0:100000:65536 --gidmap 0:100000:65536",
        ))
        .by_cgroup()
        .in_container()
        .without_network(),
    UnitCaller::new("root", "docker-*", Some(RULES[2]))
        .launched(Launch::Docker("--network host --user 1001"))
        .by_cgroup()
        .in_container(),
    UnitCaller::new("root", "docker-*", Some(RULES[2]))
        .launched(Launch::Docker("--network none"))
        .by_cgroup()
        .in_container()
        .without_network(),
    // LXC's cgroups are outside of all units.
    UnitCaller::new("root", "", Some(RULES[0]))
        .launched(Launch::Lxc(
            "lxc.init.uid = 1001\nlxc.apparmor.profile = unconfined",
        ))
        .by_cgroup()
        .in_container(),
    UnitCaller::new("root", "", Some(RULES[0]))
        .launched(Launch::Lxc(
            "lxc.idmap = u 0 100000 65536\nlxc.idmap = g 0 100000 65536",
        ))
        .by_cgroup()
        .in_container(),
];
