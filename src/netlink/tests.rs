use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::skip::root;

const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));
const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254));

/// Runs `act` in a new network namespace whose loopback device is up, with a device `eth0` that has
/// an IPv4 address.
fn inside(act: impl FnOnce(&RouteSocket) + Send) {
    if !root() {
        return;
    }
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            add_eth0();
            ip("address add 10.9.0.1/24 dev eth0");
            act(&RouteSocket::open().unwrap());
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Adds a device that is up, in the calling thread's network namespace.
pub(crate) fn add_eth0() {
    ip("link add eth0 type veth peer name eth1");
    ip("link set eth0 up");
    ip("link set eth1 up");
}

/// Runs `ip` in the calling thread's network namespace, and returns its output.
pub(crate) fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn address_is_added_once_and_removed() {
    inside(|socket| {
        for address in [V4, V6] {
            assert!(!socket.has_own_address(address).unwrap());
            assert_eq!(socket.add_address(address).unwrap(), Addition::New);
            assert_eq!(socket.add_address(address).unwrap(), Addition::Present);
            let local = Route::Local { is_loopback: true };
            // The kernel adds the route of an IPv6 address a moment later.
            while socket.route_to(address).unwrap() == Route::Missing {
                thread::yield_now();
            }
            assert_eq!(socket.route_to(address).unwrap(), local);
        }
        let shown = ip("address show dev lo");
        assert!(
            shown.contains("inet 169.254.169.254/32 scope host lo"),
            "{shown}"
        );
        assert!(
            shown.contains("inet6 fd00:ec2::254/128 scope global nodad deprecated"),
            "{shown}"
        );
        // Other addresses are as before.
        assert!(shown.contains("inet 127.0.0.1/8 scope host lo"), "{shown}");
        for address in [V4, V6] {
            socket.remove_address(address).unwrap();
            socket.remove_address(address).unwrap();
            assert_eq!(socket.route_to(address).unwrap(), Route::Missing);
        }
        let shown = ip("address show dev lo");
        assert!(
            !shown.contains("169.254") && !shown.contains("fd00"),
            "{shown}"
        );
    });
}

/// A workload's connections to other hosts do not begin at the address.
#[test]
fn address_is_no_source_of_other_connections() {
    inside(|socket| {
        ip("address add fd09::1/64 dev eth0 nodad");
        ip("route add default via 10.9.0.2");
        ip("-6 route add default via fd09::2");
        for address in [V4, V6] {
            socket.add_address(address).unwrap();
        }
        assert!(ip("route get 198.51.100.1").contains("src 10.9.0.1"));
        assert!(ip("-6 route get 2001:db8::1").contains("src fd09::1"));
    });
}

#[test]
fn route_is_described_by_its_prefix() {
    inside(|socket| {
        let to = |address: IpAddr| socket.route_to(address).unwrap();
        let specific = |text: &str| Route::Specific(text.to_owned());
        assert_eq!(to(V4), Route::Missing);
        ip("route add default via 10.9.0.2");
        assert_eq!(to(V4), Route::Default);
        ip("route add 128.0.0.0/1 via 10.9.0.3");
        assert_eq!(to(V4), Route::Default);
        ip("route add 169.254.0.0/16 dev eth0");
        assert_eq!(to(V4), specific("169.254.0.0/16"));
        ip("route add 169.254.169.254 via 10.9.0.2");
        assert_eq!(to(V4), specific("169.254.169.254/32 via 10.9.0.2"));
        for kind in ["blackhole", "unreachable", "prohibit"] {
            ip(&format!("route replace {kind} 169.254.169.254"));
            assert_eq!(to(V4), specific(kind));
        }
        ip("route delete 169.254.169.254");
        ip("address add 169.254.169.254/32 dev eth0");
        assert_eq!(to(V4), Route::Local { is_loopback: false });
        assert_eq!(to(V6), Route::Missing);
        ip("address add fd09::1/64 dev eth0 nodad");
        ip("-6 route add default via fd09::2");
        assert_eq!(to(V6), Route::Default);
        ip("-6 route add fd00:ec2::/32 via fd09::2");
        assert_eq!(to(V6), specific("fd00:ec2::/32 via fd09::2"));
    });
}

#[test]
fn own_addresses_differ_from_those_of_the_pod() {
    // The kernel reports it from 5.18 on.
    let is_reported = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = is_reported
        .split(['.', '-'])
        .map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    let is_reported = version >= (5, 18);
    inside(|socket| {
        ip("address add 169.254.169.254/32 dev lo");
        assert_eq!(socket.add_address(V4).unwrap(), Addition::Present);
        assert!(!socket.has_own_address(V4).unwrap());
        socket.remove_address(V4).unwrap();
        for address in [V4, V6] {
            socket.add_address(address).unwrap();
            assert_eq!(socket.has_own_address(address).unwrap(), is_reported);
        }
    });
}

#[test]
fn only_addresses_of_other_devices_are_global() {
    inside(|socket| {
        assert!(!socket.has_global_v6().unwrap());
        socket.add_address(V6).unwrap();
        assert!(!socket.has_global_v6().unwrap(), "of the loopback device");
        // More than one datagram.
        let folder = tempfile::tempdir().unwrap();
        let batch = folder.path().join("batch");
        let lines = (1..1000).map(|i| format!("address add fe80::{i:x}/64 dev eth0 nodad\n"));
        std::fs::write(&batch, lines.collect::<String>()).unwrap();
        ip(&format!("-batch {}", batch.display()));
        assert!(!socket.has_global_v6().unwrap(), "of one link");
        ip("address add 2001:db8::1/64 dev eth0 nodad");
        assert!(socket.has_global_v6().unwrap());
    });
}

#[test]
fn error_of_the_kernel_is_returned() {
    if !root() {
        return;
    }
    let denied = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let socket = RouteSocket::open().unwrap();
        caps::drop(
            None,
            caps::CapSet::Effective,
            caps::Capability::CAP_NET_ADMIN,
        )
        .unwrap();
        [socket.add_address(V4).map(drop), socket.remove_address(V4)]
    });
    for error in denied.join().unwrap() {
        assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
}
