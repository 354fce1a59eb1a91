//! `[listen]`: where awsvid is asked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use super::pods::PodsConfig;
use super::reader::{Location, Table, absolute};

/// `sun_path` has 108 bytes, the last of which is NUL.
const UNIX_PATH_MAX: usize = 107;
const MAX_CONNECTIONS: usize = 1_000_000;
/// Ports below this one need a privilege, so that no other user can take them (attack 9).
const FIRST_UNPRIVILEGED_PORT: u16 = 1024;

/// `[listen]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// The unix socket; `None` (in the file: an empty string) switches it off.
    pub unix: Option<PathBuf>,
    /// Loopback addresses. Port 0 lets the kernel pick one.
    pub tcp: Vec<SocketAddr>,
    /// Health and metrics; may be an address of the node. `None` (an empty string) switches it off.
    pub admin: Option<SocketAddr>,
    /// The unix socket of `/status`; `None` (an empty string) switches it off.
    pub status: Option<PathBuf>,
    /// What TCP callers have to send.
    pub authorization: AuthorizationMode,
    /// Where the token is written that callers may (or with [`AuthorizationMode::Token`] must) send.
    pub token_file: PathBuf,
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
            admin: Some((Ipv4Addr::LOCALHOST, 975).into()),
            status: Some(PathBuf::from("/run/awsvid/status.sock")),
            authorization: AuthorizationMode::Present,
            token_file: PathBuf::from("/run/awsvid/token"),
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
            admin,
            status,
            authorization,
            token_file,
            max_connections,
            max_connections_per_workload,
        } = self;
        let changed = [
            ("unix", *unix != other.unix),
            ("tcp", *tcp != other.tcp),
            ("admin", *admin != other.admin),
            ("status", *status != other.status),
            ("authorization", *authorization != other.authorization),
            ("token_file", *token_file != other.token_file),
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

/// Reads `[listen]`; `pods` is what `[pods]` has.
pub(super) fn read(table: &Table<'_>, pods: &PodsConfig) -> Listen {
    let default = Listen::default();
    table.reserved_key("node");
    let words = [
        ("present", AuthorizationMode::Present),
        ("token", AuthorizationMode::Token),
        ("off", AuthorizationMode::Off),
    ];
    let listen = Listen {
        unix: socket(table, "unix", default.unix),
        tcp: tcp(table).unwrap_or(default.tcp),
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
        max_connections: table
            .number("max_connections", 1..=MAX_CONNECTIONS)
            .unwrap_or(default.max_connections),
        max_connections_per_workload: table
            .number("max_connections_per_workload", 1..=MAX_CONNECTIONS)
            .unwrap_or(default.max_connections_per_workload),
    };
    check(table, &listen, pods.enabled);
    listen
}

/// Reads the path of a unix socket, which an empty string disables.
pub(super) fn socket(
    table: &Table<'_>,
    key: &'static str,
    default: Option<PathBuf>,
) -> Option<PathBuf> {
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

fn check(table: &Table<'_>, listen: &Listen, pods: bool) {
    if listen.unix.is_none() && listen.tcp.is_empty() && !pods {
        table.error(
            "tcp",
            "neither a unix socket nor a TCP address is left to ask",
            "set `unix`, `tcp` or `enabled` in [pods]",
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
    if listen.authorization == AuthorizationMode::Off && (!listen.tcp.is_empty() || pods) {
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
