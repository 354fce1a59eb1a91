//! Ports that any user may bind. A process that takes the endpoint's port while awsvid does not
//! hold it can return credentials of another account (T9).

use std::fs;
use std::net::SocketAddr;

/// The value where the sysctl is not readable: `PROT_SOCK` of ip(7).
const DEFAULT_FIRST_PORT: u16 = 1024;
/// The sysctl of the calling thread's network namespace. It covers IPv6 too.
const SYSCTL_PATH: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// Returns the first port that a process without `CAP_NET_BIND_SERVICE` may bind in the calling
/// thread's network namespace.
pub fn first_unprivileged_port() -> u16 {
    let value = fs::read_to_string(SYSCTL_PATH)
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok());
    // 65536 means that every port is privileged.
    value.map_or(DEFAULT_FIRST_PORT, |value| {
        u16::try_from(value).unwrap_or(u16::MAX)
    })
}

/// Returns the ports that any user may bind because the sysctl is lower than the kernel's default.
/// The configuration's reader warns of ports above the default.
pub fn unprivileged_ports(addresses: &[SocketAddr], first_unprivileged: u16) -> Vec<u16> {
    let mut ports: Vec<u16> = addresses.iter().map(SocketAddr::port).collect();
    ports.retain(|port| (first_unprivileged..DEFAULT_FIRST_PORT).contains(port));
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Logs a warning about such ports in the daemon's own network namespace.
pub fn warn_of_unprivileged_ports(addresses: &[SocketAddr]) {
    let first = first_unprivileged_port();
    let ports = unprivileged_ports(addresses, first);
    if !ports.is_empty() {
        tracing::warn!(
            ?ports,
            ip_unprivileged_port_start = first,
            "any user can bind awsvid's port while it is free and return credentials of another account; \
             set net.ipv4.ip_unprivileged_port_start to 1024"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_decides_for_ports_below_the_default() {
        let addresses: Vec<SocketAddr> = [
            "127.0.0.1:974",
            "[::1]:974",
            "127.0.0.1:80",
            "127.0.0.1:8080",
        ]
        .map(|text| text.parse().unwrap())
        .into();
        for (first, expected) in [
            (1024, &[][..]),
            (975, &[]),
            (974, &[974]),
            (81, &[974]),
            (80, &[80, 974]),
            (0, &[80, 974]),
            (u16::MAX, &[]),
        ] {
            assert_eq!(unprivileged_ports(&addresses, first), expected, "{first}");
        }
    }
}
