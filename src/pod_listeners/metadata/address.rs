//! The calls in namespaces that add the metadata address and remove it.
//!
//! Their order matters. The listener is bound before the address is there, and the address is
//! removed before the listener: otherwise a process of the pod that listens on port 80 of all
//! addresses would answer as the metadata service.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::listen::{METADATA_ADDRESSES, NetnsRef, PodListener};
use crate::netlink::{Addition, Route, RouteSocket};
use crate::pod_listeners::metadata::MetadataObstacle;
use crate::pod_listeners::pod::{ReceivedSockets, take_or_bind};
use crate::pod_listeners::probe::{AnswerProbe, await_answers};

/// The time that a service at the address has for its answer. A proxy on the node needs about 2 ms.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(25);

/// A namespace in which the address is to be served.
#[derive(Debug)]
pub(in crate::pod_listeners) struct MetadataTarget {
    pub(in crate::pod_listeners) netns: Arc<NetnsRef>,
    pub(in crate::pod_listeners) is_young: bool,
    /// The addresses that this instance serves there already.
    pub(in crate::pod_listeners) served: Vec<SocketAddr>,
    /// The listeners of another instance there, which has served them until now.
    pub(in crate::pod_listeners) received: ReceivedSockets,
}

/// The listeners of the address in one namespace, or the reason why there are none.
pub(in crate::pod_listeners) type Opened = Result<Vec<PodListener>, MetadataObstacle>;

/// Adds the address to each of these namespaces, and listens there. Waits up to
/// [`ANSWER_TIMEOUT`] for other services to answer.
pub(in crate::pod_listeners) fn open_all(
    targets: Vec<MetadataTarget>,
) -> Vec<(Arc<NetnsRef>, Opened)> {
    let mut checked: Vec<_> = targets
        .into_iter()
        .map(|target| (Checks::run(&target), target))
        .collect();
    let probes = checked
        .iter_mut()
        .filter_map(|(checks, _)| checks.as_mut().ok());
    let mut probes: Vec<_> = probes.flat_map(|checks| &mut checks.probes).collect();
    await_answers(&mut probes, ANSWER_TIMEOUT);
    let opened = checked.into_iter().map(|(checks, target)| {
        let MetadataTarget {
            netns,
            is_young,
            served: _,
            received,
        } = target;
        let opened = checks.and_then(|checks| {
            checks.find_answer().inspect_err(|_| {
                // A process of the pod took the port after an instance of awsvid was killed.
                if checks.is_present && !is_young {
                    remove_own(&netns, &checks.addresses);
                }
            })?;
            open(&netns, &checks.addresses, received)
        });
        (netns, opened)
    });
    opened.collect()
}

/// The checks of one namespace before the address is added.
struct Checks {
    addresses: Vec<SocketAddr>,
    /// Set if the loopback device already has one of the addresses: an instance of awsvid was
    /// killed, or a process of the pod added it.
    is_present: bool,
    probes: Vec<AnswerProbe>,
}

impl Checks {
    /// Finds the addresses that the pod needs, checks the routes to them, and starts to connect.
    fn run(target: &MetadataTarget) -> Result<Self, MetadataObstacle> {
        let is_received = !target.received.is_empty();
        target.netns.run_in(|| {
            let routes = RouteSocket::open()?;
            let has_v6 = routes.has_global_v6()?;
            let addresses = METADATA_ADDRESSES
                .into_iter()
                .filter(|address| address.is_ipv4() || has_v6)
                .filter(|address| !target.served.contains(address));
            let mut checks = Self {
                addresses: addresses.collect(),
                is_present: false,
                probes: Vec::new(),
            };
            for address in checks.addresses.iter().filter(|_| !is_received) {
                match routes.route_to(address.ip())? {
                    Route::Missing if target.is_young && !has_v6 => {
                        return Err(MetadataObstacle::NotReady);
                    }
                    Route::Missing | Route::Default => {}
                    Route::Local { is_loopback: true } => checks.is_present = true,
                    Route::Local { is_loopback: false } => {
                        let text = "an address of another device";
                        return Err(MetadataObstacle::Routed(text.to_owned()));
                    }
                    Route::Specific(route) => return Err(MetadataObstacle::Routed(route)),
                }
                checks.probes.extend(AnswerProbe::start(*address)?);
            }
            Ok(checks)
        })?
    }

    /// Fails if another service answers at one of the addresses.
    fn find_answer(&self) -> Result<(), MetadataObstacle> {
        match self.probes.iter().any(AnswerProbe::is_answered) {
            false => Ok(()),
            // Nothing outside the namespace can have answered.
            true if self.is_present => Err(MetadataObstacle::PortTaken),
            true => Err(MetadataObstacle::Answered),
        }
    }
}

/// Listens on the addresses in the namespace, and then adds them.
fn open(netns: &Arc<NetnsRef>, addresses: &[SocketAddr], received: ReceivedSockets) -> Opened {
    let mut received = received.into_iter().collect();
    netns.run_in(|| {
        let routes = RouteSocket::open()?;
        let bound = addresses
            .iter()
            .map(|address| take_or_bind(netns, *address, &mut received));
        let bound: Vec<_> = bound
            .collect::<Result<_, _>>()
            .map_err(MetadataObstacle::of_bind)?;
        let mut listeners = Vec::new();
        for listener in bound {
            match routes.add_address(listener.address().ip()) {
                Ok(_) => listeners.push(listener),
                Err(error) if has_no_v6(&error, listener.address().ip()) => {}
                Err(error) => {
                    // The listeners close now, so the addresses have to be gone before.
                    remove_from(&routes, addresses);
                    return Err(error.into());
                }
            }
        }
        Ok(listeners)
    })?
}

/// Returns whether the loopback device takes no IPv6 address.
fn has_no_v6(error: &io::Error, address: IpAddr) -> bool {
    let errors = [libc::EACCES, libc::EOPNOTSUPP, libc::EAFNOSUPPORT];
    address.is_ipv6()
        && error
            .raw_os_error()
            .is_some_and(|errno| errors.contains(&errno))
}

/// The state of a namespace in which addresses are served.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::pod_listeners) struct AddressCheck {
    /// Set if one of the addresses was missing. It is there again.
    pub(in crate::pod_listeners) was_removed: bool,
    /// Set if the pod has a global IPv6 address by now, and only the IPv4 address is served.
    pub(in crate::pod_listeners) needs_v6: bool,
}

/// Adds these addresses again if they are missing, and finds whether the pod needs another one.
pub(in crate::pod_listeners) fn check(
    netns: &NetnsRef,
    served: &[SocketAddr],
) -> Result<AddressCheck, MetadataObstacle> {
    netns.run_in(|| {
        let routes = RouteSocket::open()?;
        let mut was_removed = false;
        for address in served {
            was_removed |= routes.add_address(address.ip())? == Addition::New;
        }
        let needs_v6 = served.iter().all(SocketAddr::is_ipv4) && routes.has_global_v6()?;
        Ok(AddressCheck {
            was_removed,
            needs_v6,
        })
    })?
}

/// Removes the addresses from the namespace, unless it is gone.
pub(in crate::pod_listeners) fn remove(netns: &NetnsRef) {
    let removed = netns
        .run_in(|| RouteSocket::open().map(|routes| remove_from(&routes, &METADATA_ADDRESSES)));
    if let Ok(Err(error)) = removed {
        let namespace = netns.path();
        tracing::warn!(%error, namespace = %namespace.display(), "169.254.169.254 cannot be removed from a pod");
    }
}

/// Removes those of the addresses that an instance of awsvid added, and leaves those of the pod.
fn remove_own(netns: &NetnsRef, addresses: &[SocketAddr]) {
    let removed = netns.run_in(|| {
        let routes = RouteSocket::open()?;
        for ip in addresses.iter().map(SocketAddr::ip) {
            if routes.has_own_address(ip)? {
                routes.remove_address(ip)?;
            }
        }
        Ok::<_, io::Error>(())
    });
    if let Ok(Err(error)) = removed {
        let namespace = netns.path();
        tracing::debug!(%error, namespace = %namespace.display(), "the metadata address cannot be removed");
    }
}

fn remove_from(routes: &RouteSocket, addresses: &[SocketAddr]) {
    for address in addresses {
        if let Err(error) = routes.remove_address(address.ip()) {
            tracing::debug!(%error, address = %address.ip(), "an address cannot be removed from a pod");
        }
    }
}
