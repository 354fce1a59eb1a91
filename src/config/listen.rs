//! `[listen]`: the addresses at which workloads and operators reach the daemon.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use super::config_line::ConfigLine;
use super::error::Problem;
use super::pods::PodsConfig;
use super::toml_reader::{Location, Table, socket};

const MAX_CONNECTIONS: usize = 1_000_000;
/// The first port that needs no privilege, by the kernel's default: `PROT_SOCK` of ip(7).
pub const FIRST_UNPRIVILEGED_PORT: u16 = 1024;

/// The table `[listen]` of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// Unix socket for workloads. `None`, an empty string in the file, disables it.
    pub unix: Option<PathBuf>,
    /// Loopback addresses for workloads. With port 0 the kernel chooses the port.
    pub tcp: Vec<SocketAddr>,
    /// Address for health and metrics, which may be one of the node. `None`, an empty string in the
    /// file, disables it.
    pub admin: Option<SocketAddr>,
    /// Unix socket of `/status`. `None`, an empty string in the file, disables it.
    pub status: Option<PathBuf>,
    /// Rule for the `Authorization` header of callers over TCP.
    pub authorization: AuthorizationMode,
    /// File of the token that callers may send, or must with [`AuthorizationMode::Token`].
    pub token_file: PathBuf,
    /// Maximum number of open connections of all callers.
    pub max_connections: usize,
    /// Maximum number of open connections of one workload.
    pub max_connections_per_workload: usize,
}

/// The line of each TCP address and of the admin address, if the file has them.
///
/// `Debug` leaves them out, because configurations with other lines may be equal.
#[derive(Clone, Default)]
pub(super) struct AddressLines {
    tcp: Vec<Option<ConfigLine>>,
    admin: Option<ConfigLine>,
}

impl fmt::Debug for AddressLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AddressLines")
    }
}

/// The `Authorization` header that a caller over TCP must send. It proves that the caller can set
/// headers (T4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are the words of the file")]
pub enum AuthorizationMode {
    /// A header with any value.
    Present,
    /// A header with the content of the token file.
    Token,
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
    /// Returns the keys in which `other` differs.
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

    /// Returns the admin address, if other programs may share its network namespace. `None` for a
    /// daemon that serves nothing but pods: it has a namespace of its own.
    pub fn exposed_admin(&self, serves_pods: bool) -> Option<SocketAddr> {
        self.admin.filter(|_| !serves_pods || !self.tcp.is_empty())
    }
}

/// Reads `[listen]`, and the lines of its addresses. Pods are callers over TCP, too.
pub(super) fn read(table: &Table<'_>, pods: &PodsConfig) -> (Listen, AddressLines) {
    let default = Listen::default();
    let (tcp, lines) =
        tcp(table).map_or((default.tcp, Vec::new()), |read| read.into_iter().unzip());
    table.reserved_key("node");
    let words = [
        ("present", AuthorizationMode::Present),
        ("token", AuthorizationMode::Token),
        ("off", AuthorizationMode::Off),
    ];
    let listen = Listen {
        unix: socket(table, "unix", default.unix),
        tcp,
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
    let admin = table.contains("admin").then(|| table.location("admin"));
    let lines = AddressLines {
        tcp: lines,
        admin: admin.and_then(|at| at.line),
    };
    (listen, lines)
}

/// Returns a warning for each address with a port that needs no privilege, so that any user can
/// take it (T9). `first` is the first of these ports.
pub(super) fn unprivileged_ports(
    listen: &Listen,
    serves_pods: bool,
    lines: &AddressLines,
    first: u16,
) -> Vec<Problem> {
    let tcp_lines = lines.tcp.iter().cloned().chain(std::iter::repeat(None));
    let tcp = listen.tcp.iter().copied().zip(tcp_lines);
    let admin = listen.exposed_admin(serves_pods);
    let admin = admin.map(|address| ("listen.admin", (address, lines.admin.clone())));
    tcp.map(|address| ("listen.tcp", address))
        .chain(admin)
        // The kernel chooses another port for 0.
        .filter(|(_, (address, _))| address.port() != 0 && address.port() >= first)
        .map(|(key, (address, line))| Problem {
            line,
            key: key.to_owned(),
            what: format!(
                "any user can take port {} while awsvid is down, and answer for it",
                address.port()
            ),
            fix: match first {
                // Less than the default ports need.
                0..=975 => "set net.ipv4.ip_unprivileged_port_start to 1024".to_owned(),
                _ => format!("use a port below {first}"),
            },
        })
        .collect()
}

fn tcp(table: &Table<'_>) -> Option<Vec<(SocketAddr, Option<ConfigLine>)>> {
    const FIX: &str = "write an address as \"127.0.0.1:974\" or \"[::1]:974\"";
    let report = table.report;
    let mut addresses: Vec<(SocketAddr, Option<ConfigLine>)> = Vec::new();
    for (at, text) in table.strings("tcp")? {
        let Ok(address) = text.parse::<SocketAddr>() else {
            report.error(
                &at,
                format!("{text:?} is not an IP address with a port"),
                FIX,
            );
            continue;
        };
        if !address.ip().is_loopback() {
            let what = format!(
                "{address} is not loopback, and awsvid can attest callers of this node only"
            );
            report.error(&at, what, FIX);
        }
        if addresses.iter().any(|(other, _)| overlap(*other, address)) {
            report.error(&at, format!("{address} occurs twice"), "remove one");
        }
        addresses.push((address, at.line));
    }
    Some(addresses)
}

fn check(table: &Table<'_>, listen: &Listen, pods: bool) {
    if listen.unix.is_none() && listen.tcp.is_empty() && !pods {
        table.error(
            "tcp",
            "neither a unix socket nor a TCP address is left for workloads",
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
    // With as many connections as all together, one workload could lock out all others (T20).
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
        let what = "a program that makes a workload fetch a URL can read its credentials";
        table.warn("authorization", what, "use \"present\"");
    }
    if listen.authorization == AuthorizationMode::Token && pods {
        let what = "pods do not have `token_file`, so awsvid rejects their requests";
        table.warn("authorization", what, "use \"present\"");
    }
}

/// Returns the location of the first key, or of the second if only that one is in the file.
fn location_of_either(table: &Table<'_>, first: &str, second: &str) -> Location {
    table.location(if table.contains(first) || !table.contains(second) {
        first
    } else {
        second
    })
}

/// Returns whether the kernel would reject a bind of both. Port 0 is another one each time.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let covers =
        |all: IpAddr, one: IpAddr| all.is_unspecified() && (all.is_ipv6() || one.is_ipv4());
    a.port() == b.port()
        && a.port() != 0
        && (a.ip() == b.ip() || covers(a.ip(), b.ip()) || covers(b.ip(), a.ip()))
}
