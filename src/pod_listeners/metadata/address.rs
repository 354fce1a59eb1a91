//! The calls in namespaces that add the metadata address and remove it.
//!
//! Their order matters. The listener is bound before the address is there, and the address is
//! removed before the listener: otherwise a process of the pod that listens on port 80 of all
//! addresses would answer as the metadata service.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use std::{io, iter};

use crate::attest::SockDiag;
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

/// The listeners that were opened in one namespace, and the address that has none.
#[derive(Debug, Default)]
pub(in crate::pod_listeners) struct Opened {
    pub(in crate::pod_listeners) listeners: Vec<PodListener>,
    /// An address that the pod needs, and the reason why it is not served there.
    pub(in crate::pod_listeners) missing: Option<(IpAddr, MetadataObstacle)>,
}

/// Adds the address to each of these namespaces, and listens there. The IPv6 address is served only
/// where that of IPv4 is. Waits up to [`ANSWER_TIMEOUT`] for other services to answer.
pub(in crate::pod_listeners) fn open_all(
    targets: Vec<MetadataTarget>,
) -> Vec<(Arc<NetnsRef>, Opened)> {
    let mut checked: Vec<_> = targets
        .into_iter()
        .map(|target| (candidates(&target), target))
        .collect();
    let found = checked
        .iter_mut()
        .filter_map(|(candidates, _)| candidates.as_mut().ok());
    let probes = found.flatten().filter_map(|one| one.probe.as_mut());
    await_answers(&mut probes.collect::<Vec<_>>(), ANSWER_TIMEOUT);
    let opened = checked.into_iter().map(|(candidates, target)| {
        let netns = target.netns.clone();
        let opened = match candidates {
            Ok(candidates) => open(target, candidates),
            Err(obstacle) => Opened {
                listeners: Vec::new(),
                missing: Some((METADATA_ADDRESSES[0].ip(), obstacle)),
            },
        };
        (netns, opened)
    });
    opened.collect()
}

/// An address that a pod needs, before it is added.
struct CandidateAddress {
    address: SocketAddr,
    /// Set if the loopback device already has the address: an instance of awsvid was killed, or a
    /// process of the pod added it.
    is_present: bool,
    probe: Option<AnswerProbe>,
    /// A route or its absence.
    obstacle: Option<MetadataObstacle>,
}

/// Returns the addresses that the pod needs and lacks, checks the routes to them, and starts to
/// connect. Those of received listeners are not checked, because awsvid answers there. The others
/// then wait for the next check of the namespace, which is the first that does check them.
fn candidates(target: &MetadataTarget) -> Result<Vec<CandidateAddress>, MetadataObstacle> {
    if !target.received.is_empty() {
        let received = target.received.iter().map(|(address, _)| CandidateAddress {
            address: *address,
            is_present: false,
            probe: None,
            obstacle: None,
        });
        return Ok(received.collect());
    }
    target.netns.run_in(|| {
        let routes = RouteSocket::open()?;
        let needed = needed_addresses(&routes)?;
        let may_wait = target.is_young && needed.iter().all(SocketAddr::is_ipv4);
        needed
            .into_iter()
            .filter(|address| !target.served.contains(address))
            .map(|address| CandidateAddress::start(&routes, address, may_wait))
            .collect()
    })?
}

/// Returns the addresses that a pod with these addresses of its own needs.
fn needed_addresses(routes: &RouteSocket) -> io::Result<Vec<SocketAddr>> {
    let has_v6 = routes.has_global_v6()?;
    let needed = METADATA_ADDRESSES
        .into_iter()
        .filter(|address| address.is_ipv4() || has_v6);
    Ok(needed.collect())
}

impl CandidateAddress {
    /// Checks the route to the address, and starts to connect there. With `may_wait` the pod's
    /// network may not be set up yet.
    fn start(
        routes: &RouteSocket,
        address: SocketAddr,
        may_wait: bool,
    ) -> Result<Self, MetadataObstacle> {
        let route = routes.route_to(address.ip())?;
        let obstacle = match &route {
            Route::Missing if may_wait => Some(MetadataObstacle::NotReady),
            Route::Missing | Route::Default | Route::Local { is_loopback: true } => None,
            Route::Local { is_loopback: false } => {
                let text = "an address of another device";
                Some(MetadataObstacle::Routed(text.to_owned()))
            }
            Route::Specific(route) => Some(MetadataObstacle::Routed(route.clone())),
        };
        let probe = match obstacle {
            Some(_) => None,
            None => AnswerProbe::start(address)?,
        };
        Ok(Self {
            address,
            is_present: route == Route::Local { is_loopback: true },
            probe,
            obstacle,
        })
    }

    fn is_answered(&self) -> bool {
        self.probe.as_ref().is_some_and(AnswerProbe::is_answered)
    }

    /// Fails if a route leads to the address, or another service answers there.
    fn verify(&mut self) -> Result<(), MetadataObstacle> {
        match self.obstacle.take() {
            Some(obstacle) => Err(obstacle),
            None if !self.is_answered() => Ok(()),
            // Nothing outside the namespace can have answered.
            None if self.is_present => Err(MetadataObstacle::PortTaken),
            None => Err(MetadataObstacle::Answered),
        }
    }
}

/// Serves these addresses in the namespace, up to the first that cannot be.
fn open(target: MetadataTarget, candidates: Vec<CandidateAddress>) -> Opened {
    let (netns, mut received) = (&target.netns, target.received.into_iter().collect());
    let mut opened = Opened::default();
    let mut candidates = candidates.into_iter();
    while let Some(mut candidate) = candidates.next() {
        let address = candidate.address;
        let listener = candidate.verify().and_then(|()| {
            let listen = || listen_on(netns, address, &mut received);
            netns.run_in(listen)?
        });
        match listener {
            Ok(listener) => opened.listeners.extend(listener),
            Err(obstacle) => {
                // A process of the pod took the port after an instance of awsvid was killed, or
                // another instance serves the pod.
                if candidate.is_present && candidate.is_answered() && !target.is_young {
                    let others = candidates.map(|other| other.address);
                    let all: Vec<_> = iter::once(address).chain(others).collect();
                    remove_own(netns, &all);
                }
                opened.missing = Some((address.ip(), obstacle));
                break;
            }
        }
    }
    opened
}

/// Listens on the address, and then adds it. Call it within the namespace. Returns `None` for the
/// address of IPv6 if the loopback device takes none.
fn listen_on(
    netns: &Arc<NetnsRef>,
    address: SocketAddr,
    received: &mut HashMap<SocketAddr, Arc<OwnedFd>>,
) -> Result<Option<PodListener>, MetadataObstacle> {
    let routes = RouteSocket::open()?;
    let listener = take_or_bind(netns, address, received).map_err(MetadataObstacle::of_bind)?;
    match routes.add_address(address.ip()) {
        Ok(_) => Ok(Some(listener)),
        Err(error) if has_no_v6(&error, address.ip()) => Ok(None),
        Err(error) => Err(error.into()),
    }
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
    /// Set if the pod needs another address by now, such as that of IPv6.
    pub(in crate::pod_listeners) needs_more: bool,
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
        let mut needed = needed_addresses(&routes)?.into_iter();
        Ok(AddressCheck {
            was_removed,
            needs_more: needed.any(|address| !served.contains(&address)),
        })
    })?
}

/// Removes these addresses from the namespace, unless it is gone.
pub(in crate::pod_listeners) fn remove(netns: &NetnsRef, addresses: &[SocketAddr]) {
    let removed = netns.run_in(|| {
        let routes = RouteSocket::open()?;
        let removals = addresses
            .iter()
            .map(|address| routes.remove_address(address.ip()));
        // Each is tried.
        removals.fold(Ok(()), io::Result::and)
    });
    if let Ok(Err(error)) = removed {
        let namespace = netns.path();
        tracing::warn!(%error, namespace = %namespace.display(), "169.254.169.254 cannot be removed from a pod");
    }
}

/// Removes those of the addresses that an instance of awsvid added, unless one still listens there.
/// Leaves those of the pod.
fn remove_own(netns: &NetnsRef, addresses: &[SocketAddr]) {
    let removed = netns.run_in(|| {
        let (routes, sockets) = (RouteSocket::open()?, SockDiag::open()?);
        for address in addresses {
            let is_served = sockets.is_served_on_loopback(*address);
            if !is_served.map_err(io::Error::other)? && routes.has_own_address(address.ip())? {
                routes.remove_address(address.ip())?;
            }
        }
        Ok::<_, io::Error>(())
    });
    if let Ok(Err(error)) = removed {
        let namespace = netns.path();
        tracing::debug!(%error, namespace = %namespace.display(), "the metadata address cannot be removed");
    }
}
