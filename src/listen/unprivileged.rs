//! Ports that any user may bind. A process that takes the endpoint's port while awsvid does not
//! hold it can return credentials of another account (T9).

use std::fs;
use std::net::SocketAddr;

use crate::config::FIRST_UNPRIVILEGED_PORT;

/// The sysctl of the calling thread's network namespace. It covers IPv6 too.
const SYSCTL_PATH: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// Returns the first port that a process without `CAP_NET_BIND_SERVICE` may bind in the calling
/// thread's network namespace.
///
/// Where the sysctl is not readable, it is the kernel's default.
pub fn first_unprivileged_port() -> u16 {
    fs::read_to_string(SYSCTL_PATH)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(FIRST_UNPRIVILEGED_PORT)
}

/// Returns the ports that any user may bind.
pub fn unprivileged_ports(addresses: &[SocketAddr], first_unprivileged: u16) -> Vec<u16> {
    let mut ports: Vec<u16> = addresses.iter().map(SocketAddr::port).collect();
    ports.retain(|port| *port >= first_unprivileged);
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Logs a warning about such ports in the daemon's own network namespace. For a port that the
/// kernel has chosen, as for trials, there is none.
pub fn warn_of_unprivileged_ports(addresses: &[SocketAddr]) {
    let first = first_unprivileged_port();
    let ports = unprivileged_ports(addresses, first);
    if !ports.is_empty() {
        tracing::warn!(
            ?ports,
            ip_unprivileged_port_start = first,
            "any user can bind awsvid's port while it is free and return credentials of another account; \
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
