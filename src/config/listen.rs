//! `[listen]`: where awsvid is asked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use super::toml_reader::{Location, Table, absolute};
use crate::cgroup::CgroupPath;

/// `sun_path` has 108 bytes, the last of which is NUL.
const UNIX_PATH_MAX: usize = 107;
const MAX_CONNECTIONS: usize = 1_000_000;
const CGROUP_FIX: &str = "write the cgroup that holds those of all pods, as in \"/kubepods.slice\"";
/// Ports below this one need a privilege, so that no other user can take them (attack 9).
const FIRST_UNPRIVILEGED_PORT: u16 = 1024;

/// Where every daemon of the node finds it. Not beside the other sockets, whose directory is mounted in containers (attack 10).
const HANDOVER: &str = "/run/awsvid-handover/awsvid.sock";

/// `[listen]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// The unix socket; `None` (in the file: an empty string) switches it off.
    pub unix: Option<PathBuf>,
    /// Loopback addresses. Port 0 lets the kernel pick one.
    pub tcp: Vec<SocketAddr>,
    /// Whether to listen inside pods' network namespaces.
    pub pods: bool,
    /// Where container runtimes mount those.
    pub pods_dir: PathBuf,
    /// The unix socket over which pods' listeners pass to the next daemon; `None` if there are none, or (an empty string) if
    /// they are not to.
    pub handover: Option<PathBuf>,
    /// Health and metrics; may be an address of the node. `None` (an empty string) switches it off.
    pub admin: Option<SocketAddr>,
    /// The unix socket of `/status`; `None` (an empty string) switches it off.
    pub status: Option<PathBuf>,
    /// What TCP callers have to send.
    pub authorization: AuthorizationMode,
    /// Where the token is written that callers may (or with [`AuthorizationMode::Token`] must) send.
    pub token_file: PathBuf,
    /// The kubelet's cgroup root, below which its pods are; `None`: one of the usual places.
    pub pods_cgroup: Option<CgroupPath>,
    /// Connections at one time, of all callers.
    pub max_connections: usize,
    /// Connections at one time, of one workload.
    pub max_connections_per_workload: usize,
}

/// What a caller over TCP has to send in the `Authorization` header, as proof that it can set one (attack 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthorizationMode {
    /// Any value.
    Present,
    /// The content of the token file.
    Token,
    /// Nothing.
    Off,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            unix: Some(PathBuf::from("/run/awsvid/awsvid.sock")),
            tcp: vec![
                (Ipv4Addr::LOCALHOST, 974).into(),
                (Ipv6Addr::LOCALHOST, 974).into(),
            ],
            pods: false,
            pods_dir: PathBuf::from("/run/netns"),
            handover: None,
            admin: Some((Ipv4Addr::LOCALHOST, 975).into()),
            status: Some(PathBuf::from("/run/awsvid/status.sock")),
            authorization: AuthorizationMode::Present,
            token_file: PathBuf::from("/run/awsvid/token"),
            pods_cgroup: None,
            max_connections: 4096,
            max_connections_per_workload: 512,
        }
    }
}

impl Listen {
    /// The keys in which `other` differs.
    pub fn changed(&self, other: &Self) -> Vec<&'static str> {
        let Self {
            unix,
            tcp,
            pods,
            pods_dir,
            handover,
            admin,
            status,
            authorization,
            token_file,
            pods_cgroup,
            max_connections,
            max_connections_per_workload,
        } = self;
        let changed = [
            ("unix", *unix != other.unix),
            ("tcp", *tcp != other.tcp),
            ("pods", *pods != other.pods),
            ("pods_dir", *pods_dir != other.pods_dir),
            ("handover", *handover != other.handover),
            ("admin", *admin != other.admin),
            ("status", *status != other.status),
            ("authorization", *authorization != other.authorization),
            ("token_file", *token_file != other.token_file),
            ("pods_cgroup", *pods_cgroup != other.pods_cgroup),
            ("max_connections", *max_connections != other.max_connections),
            (
                "max_connections_per_workload",
                *max_connections_per_workload != other.max_connections_per_workload,
            ),
        ];
        changed
            .into_iter()
            .filter(|(_, changed)| *changed)
            .map(|(key, _)| key)
            .collect()
    }
}

/// Reads `[listen]`.
pub(super) fn read(table: &Table<'_>) -> Listen {
    let default = Listen::default();
    table.reserved_key("node");
    let pods = table.flag("pods").unwrap_or(default.pods);
    let handover = Some(PathBuf::from(HANDOVER));
    let words = [
        ("present", AuthorizationMode::Present),
        ("token", AuthorizationMode::Token),
        ("off", AuthorizationMode::Off),
    ];
    let listen = Listen {
        unix: socket(table, "unix", default.unix),
        tcp: tcp(table).unwrap_or(default.tcp),
        pods,
        pods_dir: table
            .parse(
                "pods_dir",
                "write the whole path of a directory, from the first `/`",
                |text| absolute(text.trim_end_matches('/')),
            )
            .unwrap_or(default.pods_dir),
        handover: socket(table, "handover", handover).filter(|_| pods),
        admin: table
            .parse(
                "admin",
                "write an IP address and a port, as in \"127.0.0.1:975\", or \"\" to switch it off",
                |text| {
                    if text.is_empty() {
                        Ok(None)
                    } else {
                        text.parse().map(Some)
                    }
                },
            )
            .unwrap_or(default.admin),
        status: socket(table, "status", default.status),
        authorization: table
            .word("authorization", &words)
            .unwrap_or(default.authorization),
        token_file: table.path("token_file").unwrap_or(default.token_file),
        pods_cgroup: table.parse("pods_cgroup", CGROUP_FIX, cgroup),
        max_connections: table
            .number("max_connections", 1..=MAX_CONNECTIONS)
            .unwrap_or(default.max_connections),
        max_connections_per_workload: table
            .number("max_connections_per_workload", 1..=MAX_CONNECTIONS)
            .unwrap_or(default.max_connections_per_workload),
    };
    check(table, &listen);
    listen
}

fn socket(table: &Table<'_>, key: &'static str, default: Option<PathBuf>) -> Option<PathBuf> {
    let parse = |text: &str| match text {
        "" => Ok(None),
        _ if text.len() > UNIX_PATH_MAX => Err("the path of a socket has at most 107 bytes"),
        _ => absolute(text).map(Some),
    };
    table
        .parse(
            key,
            "write the whole path of a socket, or \"\" to switch it off",
            parse,
        )
        .unwrap_or(default)
}

/// The path of a cgroup, as `/proc/<pid>/cgroup` shows it to the host.
fn cgroup(text: &str) -> Result<CgroupPath, &'static str> {
    if text.starts_with("/sys/") {
        return Err("it is the path of a cgroup, not of its directory");
    }
    let path = CgroupPath::parse(text.trim_end_matches('/')).filter(|path| !path.is_root());
    path.ok_or("it is no path of a cgroup below the root")
}

fn tcp(table: &Table<'_>) -> Option<Vec<SocketAddr>> {
    const FIX: &str = "write an address as \"127.0.0.1:974\" or \"[::1]:974\"";
    let report = table.report;
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for (at, text) in table.strings("tcp")? {
        let Ok(address) = text.parse::<SocketAddr>() else {
            report.error(&at, format!("{text:?} is no IP address with a port"), FIX);
            continue;
        };
        if !address.ip().is_loopback() {
            let what = format!(
                "{address} is not loopback, and only callers on this host can be told apart"
            );
            report.error(&at, what, FIX);
        }
        if addresses.iter().any(|other| overlap(*other, address)) {
            report.error(&at, format!("{address} is there twice"), "remove one");
        }
        if address.port() >= FIRST_UNPRIVILEGED_PORT {
            let what = format!(
                "any user can take port {} while awsvid is down, and answer for it",
                address.port()
            );
            report.warn(&at, what, "use a port below 1024");
        }
        addresses.push(address);
    }
    Some(addresses)
}

fn check(table: &Table<'_>, listen: &Listen) {
    if listen.unix.is_none() && listen.tcp.is_empty() && !listen.pods {
        table.error(
            "tcp",
            "neither a unix socket nor a TCP address is left to ask",
            "set `unix`, `tcp` or `pods`",
        );
    }
    if let Some(admin) = listen.admin.filter(|_| !table.is_wrong("admin"))
        && let Some(tcp) = listen.tcp.iter().find(|tcp| overlap(**tcp, admin))
    {
        let at = location_of_either(table, "admin", "tcp");
        table.report.error(
            &at,
            format!("`admin` ({admin}) and `tcp` ({tcp}) overlap"),
            "give one another port",
        );
    }
    let counts_are_wrong =
        table.is_wrong("max_connections") || table.is_wrong("max_connections_per_workload");
    // With as many as all together, one workload could keep every other out (attack 20).
    if listen.max_connections_per_workload >= listen.max_connections && !counts_are_wrong {
        let at = location_of_either(table, "max_connections_per_workload", "max_connections");
        let what = format!(
            "one workload may have {} connections, which leaves none of all {} to the others",
            listen.max_connections_per_workload, listen.max_connections
        );
        table
            .report
            .error(&at, what, "lower `max_connections_per_workload`");
    }
    if listen.authorization == AuthorizationMode::Off && (!listen.tcp.is_empty() || listen.pods) {
        let what = "whoever makes a workload fetch a URL can read its credentials";
        table.warn("authorization", what, "use \"present\"");
    }
}

/// The place of the first key, or of the second if only that one is in the file.
fn location_of_either(table: &Table<'_>, first: &str, second: &str) -> Location {
    table.place(if table.contains(first) || !table.contains(second) {
        first
    } else {
        second
    })
}

/// Whether the kernel would refuse to bind both. Port 0 is another one each time.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let covers =
        |all: IpAddr, one: IpAddr| all.is_unspecified() && (all.is_ipv6() || one.is_ipv4());
    a.port() == b.port()
        && a.port() != 0
        && (a.ip() == b.ip() || covers(a.ip(), b.ip()) || covers(b.ip(), a.ip()))
}
