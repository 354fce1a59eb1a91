//! Ports that any user may bind. A process that takes the endpoint's port while awsvid does not
//! hold it can return credentials of another account (T9).

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use crate::config::FIRST_UNPRIVILEGED_PORT;

/// The sysctl of the calling thread's network namespace. It covers IPv6 too.
const SYSCTL_PATH: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// Returns the first port that a process without `CAP_NET_BIND_SERVICE` may bind in the calling
/// thread's network namespace.
///
/// Where the sysctl is not readable, it is the kernel's default.
pub fn first_unprivileged_port() -> u16 {
    read_first_unprivileged_port().unwrap_or(FIRST_UNPRIVILEGED_PORT)
}

/// Reads the sysctl for [`first_unprivileged_port`].
pub fn read_first_unprivileged_port() -> io::Result<u16> {
    read_port(Path::new(SYSCTL_PATH))
}

fn read_port(path: &Path) -> io::Result<u16> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(io::Error::other)
}

/// Returns the ports that any user may bind.
pub fn unprivileged_ports(addresses: &[SocketAddr], first_unprivileged: u16) -> Vec<u16> {
    let mut ports: Vec<u16> = addresses.iter().map(SocketAddr::port).collect();
    ports.retain(|port| *port >= first_unprivileged);
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Logs a warning about such ports in the daemon's own network namespace: those of callers, and
/// that of `admin`. Port 0, which the kernel replaces by another one, causes none.
pub fn warn_of_unprivileged_ports(callers: &[SocketAddr], admin: Option<SocketAddr>) {
    warn_from(Path::new(SYSCTL_PATH), callers, admin);
}

fn warn_from(sysctl: &Path, callers: &[SocketAddr], admin: Option<SocketAddr>) {
    let is_named = |address: &SocketAddr| address.port() != 0;
    let callers: Vec<_> = callers.iter().copied().filter(is_named).collect();
    let admin: Vec<_> = admin.into_iter().filter(is_named).collect();
    if callers.is_empty() && admin.is_empty() {
        return;
    }
    let first = read_port(sysctl).unwrap_or_else(|error| {
        tracing::warn!(
            %error,
            assumed = FIRST_UNPRIVILEGED_PORT,
            "cannot read net.ipv4.ip_unprivileged_port_start: any user may be able to bind awsvid's ports while they are free"
        );
        FIRST_UNPRIVILEGED_PORT
    });
    let ports = unprivileged_ports(&callers, first);
    if !ports.is_empty() {
        tracing::warn!(
            ?ports,
            ip_unprivileged_port_start = first,
            "any user can bind awsvid's port while it is free and return credentials of another account; \
             use a port below net.ipv4.ip_unprivileged_port_start, and set that to 1024 if it is lower"
        );
    }
    if let [port] = unprivileged_ports(&admin, first)[..] {
        tracing::warn!(
            port,
            ip_unprivileged_port_start = first,
            "any user can bind the admin port while it is free, and answer probes and scrapes as awsvid; \
             use a port below net.ipv4.ip_unprivileged_port_start, and set that to 1024 if it is lower"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_decides_which_ports_any_user_may_bind() {
        let addresses: Vec<SocketAddr> = [
            "127.0.0.1:974",
            "[::1]:974",
            "127.0.0.1:80",
            "127.0.0.1:8080",
        ]
        .map(|text| text.parse().unwrap())
        .into();
        for (first, expected) in [
            (1024, &[8080][..]),
            (975, &[8080]),
            (974, &[974, 8080]),
            (81, &[974, 8080]),
            (80, &[80, 974, 8080]),
            (0, &[80, 974, 8080]),
            (8081, &[]),
            (u16::MAX, &[]),
        ] {
            assert_eq!(unprivileged_ports(&addresses, first), expected, "{first}");
        }
    }
}
