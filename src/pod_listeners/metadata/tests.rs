use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{getsockopt, sockopt};

use super::address::AddressCheck;
use super::*;
use crate::listen::{METADATA_ADDRESSES, NetnsRef, PodListener};
use crate::netlink::tests::{add_eth0, ip};
use crate::netns::NetNs;
use crate::skip::root;

const V4: SocketAddr = METADATA_ADDRESSES[0];
const V6: SocketAddr = METADATA_ADDRESSES[1];

/// A pod's network namespace, on a file that only the calling thread sees mounted.
struct TestPod {
    netns: Arc<NetnsRef>,
    _folder: tempfile::TempDir,
}

impl TestPod {
    /// Makes one with a device that has the pod's address, a default route, and what `setup` adds.
    fn new(setup: &[&str]) -> Option<Self> {
        if !root() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pod");
        File::create_new(&path).unwrap();
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let id = thread::scope(|scope| {
            let make = || {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                let own = Path::new("/proc/thread-self/ns/net");
                mount(Some(own), &path, none, MsFlags::MS_BIND, none).unwrap();
                ip("link set lo up");
                add_eth0();
                setup.iter().for_each(|words| drop(ip(words)));
                NetNs::own().unwrap().id()
            };
            scope.spawn(make).join().unwrap()
        });
        Some(Self {
            netns: Arc::new(NetnsRef::new(id, path)),
            _folder: folder,
        })
    }

    fn connected() -> Option<Self> {
        Self::new(&[
            "address add 10.9.0.1/24 dev eth0",
            "route add default via 10.9.0.2",
        ])
    }

    fn target(&self, is_young: bool) -> MetadataTarget {
        MetadataTarget {
            netns: self.netns.clone(),
            is_young,
            served: Vec::new(),
            received: Vec::new(),
        }
    }

    fn open(&self, is_young: bool) -> Opened {
        Self::open_target(self.target(is_young))
    }

    /// Opens what is missing next to the IPv4 address.
    fn open_later(&self) -> Opened {
        let mut target = self.target(false);
        target.served.push(V4);
        Self::open_target(target)
    }

    fn open_target(target: MetadataTarget) -> Opened {
        let mut opened = open_all(vec![target]);
        assert_eq!(opened.len(), 1);
        opened.pop().unwrap().1
    }

    fn check(&self, served: &[SocketAddr]) -> AddressCheck {
        check(&self.netns, served).unwrap()
    }

    /// Runs `ip` in the namespace.
    fn ip(&self, words: &str) -> String {
        self.netns.run_in(|| ip(words)).unwrap()
    }

    fn has_address(&self) -> bool {
        self.ip("address show dev lo").contains("169.254.169.254")
    }

    fn is_reached(&self, address: SocketAddr) -> bool {
        let limit = Duration::from_secs(1);
        let connected = self
            .netns
            .run_in(|| TcpStream::connect_timeout(&address, limit));
        connected.unwrap().is_ok()
    }

    /// Waits until the address is reached. The kernel adds the route of an IPv6 address a moment
    /// after the address, and until then connections take the default route.
    fn becomes_reached(&self, address: SocketAddr) -> bool {
        self.becomes(true, address)
    }

    /// Waits until the address is not reached. A process that another test starts has a closed
    /// listener until it executes its program.
    fn becomes_unreached(&self, address: SocketAddr) -> bool {
        self.becomes(false, address)
    }

    fn becomes(&self, reached: bool, address: SocketAddr) -> bool {
        (0..1000).any(|_| {
            let is_expected = self.is_reached(address) == reached;
            if !is_expected {
                thread::sleep(Duration::from_millis(10));
            }
            is_expected
        })
    }
}

impl Drop for TestPod {
    fn drop(&mut self) {
        // The folder could not be removed.
        let _ = umount2(&self.netns.path(), MntFlags::MNT_DETACH);
    }
}

/// Returns the listeners, if no address is missing that the pod needs.
fn complete(opened: Opened) -> Vec<PodListener> {
    assert!(opened.missing.is_none(), "{opened:?}");
    opened.listeners
}

/// Returns the cause, if no address is served.
fn failure(opened: Opened) -> Option<PodListenerFailure> {
    assert!(opened.listeners.is_empty(), "{opened:?}");
    opened.missing.unwrap().1.failure()
}

#[test]
fn address_is_served_and_removed_with_its_listener() {
    let Some(pod) = TestPod::connected() else {
        return;
    };
    let listeners = complete(pod.open(true));
    // The pod has no IPv6.
    assert_eq!(listeners.len(), 1);
    assert!(pod.has_address() && pod.is_reached(V4));
    assert!(!pod.check(&[V4]).was_removed);
    pod.ip("address delete 169.254.169.254/32 dev lo");
    assert!(pod.check(&[V4]).was_removed);
    assert!(pod.is_reached(V4));
    // The address of IPv6 is the pod's own, since awsvid did not serve it.
    pod.ip("address add fd00:ec2::254/128 dev lo nodad");
    remove(&pod.netns, &[V4]);
    assert!(!pod.has_address());
    assert!(pod.ip("address show dev lo").contains("fd00:ec2::254"));
}

#[test]
fn pod_with_ipv6_gets_both_addresses() {
    let setup = [
        "address add 2001:db8::1/64 dev eth0 nodad",
        "-6 route add default via 2001:db8::2",
    ];
    let Some(pod) = TestPod::new(&setup) else {
        return;
    };
    let listeners = complete(pod.open(true));
    assert_eq!(listeners.len(), 2);
    assert!(pod.becomes_reached(V4) && pod.becomes_reached(V6));
    drop(listeners);
    // As after a kill of the daemon.
    assert!(pod.becomes_unreached(V4) && pod.becomes_unreached(V6));
    assert_eq!(complete(pod.open(true)).len(), 2);
    pod.netns
        .run_in(|| std::fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "1").unwrap())
        .unwrap();
    remove(&pod.netns, &[V4, V6]);
    assert_eq!(
        complete(pod.open(true)).len(),
        1,
        "lo takes no IPv6 address"
    );
}

/// Also after a failure, which costs the pod nothing that it had.
#[test]
fn ipv6_address_is_added_later() {
    let Some(pod) = TestPod::connected() else {
        return;
    };
    let first = complete(pod.open(true));
    assert_eq!((first.len(), first[0].address()), (1, V4));
    let check = |served: &[SocketAddr]| pod.check(served);
    let unchanged = AddressCheck {
        was_removed: false,
        needs_more: false,
    };
    assert_eq!(check(&[V4]), unchanged);
    pod.ip("address add 2001:db8::1/64 dev eth0 nodad");
    assert!(check(&[V4]).needs_more);
    pod.ip("-6 route add blackhole fd00:ec2::254");
    let failed = failure(pod.open_later());
    assert_eq!(failed, Some(PodListenerFailure::ImdsRouted));
    pod.ip("-6 route delete blackhole fd00:ec2::254");
    assert!(pod.has_address() && pod.is_reached(V4));
    let later = complete(pod.open_later());
    assert_eq!((later.len(), later[0].address()), (1, V6));
    assert!(pod.becomes_reached(V6) && pod.is_reached(V4));
    assert_eq!(check(&[V4, V6]), unchanged);
}

#[test]
fn answer_does_not_pass_a_router() {
    let setup = ["address add 2001:db8::1/64 dev eth0 nodad"];
    let Some(pod) = TestPod::new(&setup) else {
        return;
    };
    let listeners = complete(pod.open(false));
    assert!(pod.becomes_reached(V6));
    for (listener, address) in listeners.iter().zip([V4, V6]) {
        let client = pod.netns.run_in(|| TcpStream::connect(address));
        let client = client.unwrap().unwrap();
        let listening = TcpListener::from(listener.listener().try_clone().unwrap());
        listening.set_nonblocking(false).unwrap();
        let (accepted, _) = listening.accept().unwrap();
        let hops = match address {
            SocketAddr::V4(_) => getsockopt(&accepted, sockopt::Ipv4Ttl),
            SocketAddr::V6(_) => getsockopt(&accepted, sockopt::Ipv6Ttl),
        };
        assert_eq!(hops.unwrap(), 1, "{address}");
        drop(client);
    }
}

#[test]
fn route_to_the_address_is_respected() {
    let Some(pod) = TestPod::connected() else {
        return;
    };
    for route in [
        "169.254.169.254 via 10.9.0.2",
        "169.254.0.0/16 dev eth0",
        "blackhole 169.254.169.254",
    ] {
        pod.ip(&format!("route add {route}"));
        let failed = failure(pod.open(false));
        assert_eq!(failed, Some(PodListenerFailure::ImdsRouted), "{route}");
        pod.ip(&format!("route delete {route}"));
    }
    pod.ip("address add 169.254.169.254/32 dev eth0");
    let failed = failure(pod.open(false));
    assert_eq!(failed, Some(PodListenerFailure::ImdsRouted));
    assert!(!pod.has_address());
}

#[test]
fn pod_without_a_network_yet_waits() {
    let Some(pod) = TestPod::new(&[]) else {
        return;
    };
    assert_eq!(failure(pod.open(true)), None);
    assert!(!pod.has_address());
    // It has none at all.
    assert_eq!(complete(pod.open(false)).len(), 1);
}

#[test]
fn server_of_the_pod_keeps_port_80() {
    let Some(pod) = TestPod::connected() else {
        return;
    };
    let listen = |address: &'static str| {
        let bound = pod.netns.run_in(|| TcpListener::bind(address));
        bound.unwrap().unwrap()
    };
    for address in ["0.0.0.0:80", "[::]:80"] {
        let server = listen(address);
        let failed = failure(pod.open(false));
        assert_eq!(failed, Some(PodListenerFailure::ImdsPortTaken), "{address}");
        assert!(!pod.has_address(), "it would answer there");
        drop(server);
    }
    // These do not conflict.
    let servers = [listen("127.0.0.1:80"), listen("10.9.0.1:80")];
    drop(complete(pod.open(false)));
    drop(servers);
    // The daemon was killed, and a server of the pod has the port now.
    let server = listen("0.0.0.0:80");
    assert!(pod.has_address() && pod.is_reached(V4));
    let failed = failure(pod.open(true));
    assert_eq!(failed, Some(PodListenerFailure::ImdsPortTaken));
    assert!(pod.has_address(), "another instance may be ending");
    let failed = failure(pod.open(false));
    assert_eq!(failed, Some(PodListenerFailure::ImdsPortTaken));
    assert!(!pod.has_address() && !pod.is_reached(V4));
    // The pod has added the address itself.
    pod.ip("address add 169.254.169.254/32 dev lo");
    let failed = failure(pod.open(false));
    assert_eq!(failed, Some(PodListenerFailure::ImdsPortTaken));
    assert!(pod.has_address() && pod.is_reached(V4));
    drop(server);
    assert_eq!(complete(pod.open(false)).len(), 1);
}

/// Two instances run where none passes its listeners to the other.
#[test]
fn address_of_another_instance_is_left_to_it() {
    let setup = [
        "address add 10.9.0.1/24 dev eth0",
        "route add default via 10.9.0.2",
        "address add 2001:db8::1/64 dev eth0 nodad",
    ];
    let Some(pod) = TestPod::new(&setup) else {
        return;
    };
    let served = complete(pod.open(false));
    assert_eq!(served.len(), 2);
    assert!(pod.becomes_reached(V6));
    let failed = failure(pod.open(false));
    assert_eq!(failed, Some(PodListenerFailure::ImdsPortTaken));
    assert!(!pod.check(&[V4, V6]).was_removed);
    assert!(pod.is_reached(V4) && pod.is_reached(V6));
}

#[test]
fn missing_capability_adds_and_binds_nothing() {
    let Some(pod) = TestPod::connected() else {
        return;
    };
    let without = thread::scope(|scope| {
        let open = || {
            let capability = caps::Capability::CAP_NET_ADMIN;
            caps::drop(None, caps::CapSet::Effective, capability).unwrap();
            failure(pod.open(false))
        };
        scope.spawn(open).join().unwrap()
    });
    assert_eq!(without, Some(PodListenerFailure::ImdsDenied));
    assert!(!pod.has_address());
    assert_eq!(complete(pod.open(false)).len(), 1, "the port is free");
}

/// Another program's listener is not that of the previous instance.
#[test]
fn received_listener_is_verified() {
    let Some(pod) = TestPod::connected() else {
        return;
    };
    pod.ip("address add 169.254.169.254/32 dev lo");
    let unbound = pod.netns.run_in(|| TcpListener::bind(V4)).unwrap().unwrap();
    let unbound = Arc::new(unbound.into());
    let mut target = pod.target(false);
    target.received.push((V4, Arc::clone(&unbound)));
    let opened = TestPod::open_target(target);
    assert_eq!(failure(opened), Some(PodListenerFailure::ImdsError));
    drop(unbound);
    let first = complete(pod.open(false));
    let mut target = pod.target(false);
    target.received.push((V4, first[0].listener()));
    let opened = complete(TestPod::open_target(target));
    assert!(Arc::ptr_eq(&opened[0].listener(), &first[0].listener()));
}

/// A pod keeps the address of IPv4 where that of IPv6 belongs to another, whether it is found so or
/// taken over from another instance.
#[test]
fn obstacle_to_ipv6_leaves_ipv4() {
    let setup = [
        "address add 10.9.0.1/24 dev eth0",
        "address add 2001:db8::1/64 dev eth0 nodad",
    ];
    let Some(pod) = TestPod::new(&setup) else {
        return;
    };
    let only_v4 = |opened: Opened, expected| {
        let (address, obstacle) = opened.missing.unwrap();
        assert_eq!((address, obstacle.failure()), (V6.ip(), Some(expected)));
        assert_eq!(opened.listeners.len(), 1);
        assert!(pod.has_address() && pod.is_reached(V4));
        assert!(!pod.ip("address show dev lo").contains("fd00:ec2"));
        opened.listeners
    };
    let server = pod.netns.run_in(|| {
        std::fs::write("/proc/sys/net/ipv6/bindv6only", "1").unwrap();
        TcpListener::bind("[::]:80").unwrap()
    });
    let server = server.unwrap();
    let served = only_v4(pod.open(false), PodListenerFailure::ImdsPortTaken);
    drop(server);
    pod.ip("-6 route add blackhole fd00:ec2::254");
    let failed = failure(pod.open_later());
    assert_eq!(failed, Some(PodListenerFailure::ImdsRouted));
    let mut target = pod.target(true);
    target.received.push((V4, served[0].listener()));
    let received = complete(TestPod::open_target(target));
    assert_eq!((received.len(), received[0].address()), (1, V4));
    assert!(pod.check(&[V4]).needs_more);
    drop((served, received));
    only_v4(pod.open(false), PodListenerFailure::ImdsRouted);
}

#[test]
fn same_cause_is_reported_once() {
    let mut state = MetadataState::waiting();
    let routed = || MetadataObstacle::Routed("10.0.0.0/8".to_owned());
    let mut unserved = |obstacle: MetadataObstacle| state.set_unserved(&obstacle, Vec::new());
    assert!(unserved(routed()));
    assert!(!unserved(routed()));
    assert!(!unserved(MetadataObstacle::NotReady));
    assert!(!unserved(routed()));
    assert!(unserved(MetadataObstacle::PortTaken));
    assert!(unserved(routed()));
    state.set_served(vec![V4]);
    assert!(state.set_unserved(&routed(), vec![V4]));
    assert_eq!(state.addresses(), [V4]);
    assert!(!state.set_unserved(&routed(), vec![V4]));
    state.set_checked();
    assert!(!state.set_unserved(&routed(), vec![V4]));
}

/// The address that is there is checked more often than another one is tried.
#[tokio::test(start_paused = true)]
async fn missing_address_is_tried_as_its_cause_allows() {
    for (obstacle, checks) in [
        (MetadataObstacle::Routed(String::new()), 6),
        (MetadataObstacle::Answered, 6),
        (MetadataObstacle::PortTaken, 1),
    ] {
        let mut state = MetadataState::waiting();
        state.set_served(vec![V4]);
        assert!(state.may_retry());
        state.set_unserved(&obstacle, vec![V4]);
        let begun = Instant::now();
        let mut count = 0;
        while !state.may_retry() {
            tokio::time::sleep_until(state.due().unwrap()).await;
            assert_eq!(state.step(Instant::now()), Some(MetadataStep::Check));
            state.set_checked();
            count += 1;
        }
        assert_eq!((count, begun.elapsed()), (checks, obstacle.retry_after()));
    }
}

#[tokio::test(start_paused = true)]
async fn pod_is_polled_until_it_cannot_opt_in_any_more() {
    // This network namespace has no such opt-in.
    let mut state = MetadataState::undecided(OptInFile::open().unwrap());
    let mut polls = 0_u32;
    while let Some(due) = state.due() {
        tokio::time::sleep_until(due).await;
        assert_eq!(state.step(Instant::now()), None);
        assert_eq!(state.step(Instant::now()), None, "not before the next one");
        polls += 1;
    }
    let (short, long) = (500, (300 - 10) * 4);
    assert!(
        (short + long..short + long + 10).contains(&polls),
        "{polls}"
    );
    assert!(matches!(state, MetadataState::Off));
}
