//! The state of the metadata address in a pod's network namespace.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

use crate::metrics::PodListenerFailure;
use crate::netns::NamespaceError;
use crate::pod_listeners::opt_in::OptInFile;

mod address;

pub(super) use address::{MetadataTarget, Opened, check, open_all, remove};

/// The time for which a pod is polled at the short interval. The runtime sets its sysctls within
/// that, and starts its first process some 70 ms later.
const START_TIME: Duration = Duration::from_secs(10);
const SHORT_POLL: Duration = Duration::from_millis(20);
/// The time for which a pod may opt in. The kubelet gives up on a pod that starts for longer.
const OPT_IN_TIME: Duration = Duration::from_secs(300);
const LONG_POLL: Duration = Duration::from_millis(250);
/// The time for which a pod may have no route because its network is not set up yet.
const NETWORK_GRACE: Duration = Duration::from_secs(3);
/// Interval between attempts to bind a port that is in use.
const BIND_RETRY: Duration = Duration::from_secs(1);
/// Interval between attempts after any other cause.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// Interval between checks that a pod still has the address, which a process with `CAP_NET_ADMIN`
/// there can remove (T44), and whether it needs the IPv6 address by now.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// The state of the metadata address in one namespace.
#[derive(Debug)]
pub(super) enum MetadataState {
    /// The daemon does not serve it, or the pod has not opted in in time.
    Off,
    /// The pod may opt in.
    Undecided {
        opt_in: OptInFile,
        since: Instant,
        poll: Instant,
    },
    /// The pod has opted in, and the daemon tries to serve it at `retry`.
    Waiting {
        since: Instant,
        retry: Instant,
        /// The cause of the latest failure.
        cause: Option<PodListenerFailure>,
    },
    /// The namespace has these addresses, which are checked at `check`.
    Served {
        addresses: Vec<SocketAddr>,
        check: Instant,
        /// The time from which on another address that the pod needs, that of IPv6, may be tried.
        retry: Instant,
        /// The cause of the latest failure to add that one.
        cause: Option<PodListenerFailure>,
    },
}

/// The next act in a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MetadataStep {
    /// Serves the address. `is_young` is set while the pod's network may not be set up.
    Open { is_young: bool },
    /// Checks that the address is still there.
    Check,
}

/// The reason why the address is not served in a namespace.
#[derive(Debug)]
pub(super) enum MetadataObstacle {
    /// The pod's network may not be set up yet, or has ended.
    NotReady,
    /// A route leads there, described for the log.
    Routed(String),
    /// Another service answers there.
    Answered,
    /// A process of the pod has port 80 of this address or of all.
    PortTaken,
    /// The daemon lacks `CAP_NET_ADMIN`.
    Denied,
    /// Any other error of a system call.
    Failed(io::Error),
}

impl MetadataState {
    /// The state of a namespace that was found now.
    pub(super) fn undecided(opt_in: OptInFile) -> Self {
        let now = Instant::now();
        Self::Undecided {
            opt_in,
            since: now,
            poll: now,
        }
    }

    /// The state of a pod that has opted in, before the next attempt.
    pub(super) fn waiting() -> Self {
        let now = Instant::now();
        Self::Waiting {
            since: now,
            retry: now,
            cause: None,
        }
    }

    /// The state of a namespace whose addresses are checked at once.
    pub(super) fn unchecked(addresses: Vec<SocketAddr>) -> Self {
        let now = Instant::now();
        Self::Served {
            addresses,
            check: now,
            retry: now,
            cause: None,
        }
    }

    /// Returns the addresses that the namespace has. Their listeners may be closed by now.
    pub(super) fn addresses(&self) -> &[SocketAddr] {
        match self {
            Self::Served { addresses, .. } => addresses,
            _ => &[],
        }
    }

    pub(super) fn is_served(&self) -> bool {
        matches!(self, Self::Served { .. })
    }

    /// Returns whether another address may be tried in a namespace that has one.
    pub(super) fn may_retry(&self) -> bool {
        matches!(self, Self::Served { retry, .. } if *retry <= Instant::now())
    }

    /// Returns the time of the next step.
    pub(super) fn due(&self) -> Option<Instant> {
        match self {
            Self::Off => None,
            Self::Undecided { poll: at, .. }
            | Self::Waiting { retry: at, .. }
            | Self::Served { check: at, .. } => Some(*at),
        }
    }

    /// Returns the step that is due now, if there is one. It is due again soon, in case its calls
    /// do not return.
    pub(super) fn step(&mut self, now: Instant) -> Option<MetadataStep> {
        if self.due()? > now {
            return None;
        }
        match self {
            Self::Off => None,
            Self::Served { check, .. } => {
                *check = now + BIND_RETRY;
                Some(MetadataStep::Check)
            }
            Self::Waiting { since, retry, .. } => {
                *retry = now + BIND_RETRY;
                Some(MetadataStep::Open {
                    is_young: now.duration_since(*since) < NETWORK_GRACE,
                })
            }
            Self::Undecided {
                opt_in,
                since,
                poll,
            } => {
                let age = now.duration_since(*since);
                match opt_in.is_set() {
                    Ok(true) => {
                        *self = Self::waiting();
                        Some(MetadataStep::Open { is_young: true })
                    }
                    Ok(false) if age < OPT_IN_TIME => {
                        let is_starting = age < START_TIME;
                        *poll = now + if is_starting { SHORT_POLL } else { LONG_POLL };
                        None
                    }
                    // The namespace has ended, or the pod runs without it.
                    Ok(false) | Err(_) => {
                        *self = Self::Off;
                        None
                    }
                }
            }
        }
    }

    /// Records that all addresses are there that the pod needs.
    pub(super) fn set_served(&mut self, addresses: Vec<SocketAddr>) {
        let now = Instant::now();
        *self = Self::Served {
            addresses,
            check: now + CHECK_INTERVAL,
            retry: now,
            cause: None,
        };
    }

    /// Records that the addresses that are served were checked.
    pub(super) fn set_checked(&mut self) {
        if let Self::Served { check, .. } = self {
            *check = Instant::now() + CHECK_INTERVAL;
        }
    }

    /// Records that an address cannot be served, and which are. Returns whether the cause is
    /// another one than that of the last attempt.
    pub(super) fn set_unserved(
        &mut self,
        obstacle: &MetadataObstacle,
        addresses: Vec<SocketAddr>,
    ) -> bool {
        let now = Instant::now();
        let (since, before) = match self {
            Self::Waiting { since, cause, .. } => (*since, *cause),
            Self::Served { cause, .. } => (now, *cause),
            _ => (now, None),
        };
        let (retry, cause) = (now + obstacle.retry_after(), obstacle.failure());
        let latest = cause.or(before);
        *self = match addresses.is_empty() {
            true => Self::Waiting {
                since,
                retry,
                cause: latest,
            },
            false => Self::Served {
                addresses,
                check: retry.min(now + CHECK_INTERVAL),
                retry,
                cause: latest,
            },
        };
        cause.is_some() && cause != before
    }
}

impl MetadataObstacle {
    /// Returns the cause as metrics have it. `None` for one that passes by itself.
    pub(super) fn failure(&self) -> Option<PodListenerFailure> {
        Some(match self {
            Self::NotReady => return None,
            Self::Routed(_) => PodListenerFailure::ImdsRouted,
            Self::Answered => PodListenerFailure::ImdsAnswered,
            Self::PortTaken => PodListenerFailure::ImdsPortTaken,
            Self::Denied => PodListenerFailure::ImdsDenied,
            Self::Failed(_) => PodListenerFailure::ImdsError,
        })
    }

    fn retry_after(&self) -> Duration {
        match self {
            Self::NotReady => SHORT_POLL,
            Self::PortTaken => BIND_RETRY,
            Self::Routed(_) | Self::Answered | Self::Denied | Self::Failed(_) => RETRY_INTERVAL,
        }
    }

    fn of_bind(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EADDRINUSE) => Self::PortTaken,
            _ => Self::Failed(error),
        }
    }
}

impl From<io::Error> for MetadataObstacle {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM) => Self::Denied,
            _ => Self::Failed(error),
        }
    }
}

impl From<NamespaceError> for MetadataObstacle {
    fn from(error: NamespaceError) -> Self {
        match error {
            NamespaceError::NotMounted => Self::NotReady,
            NamespaceError::Io(error) if error.kind() == io::ErrorKind::NotFound => Self::NotReady,
            NamespaceError::Io(error) => Self::Failed(error),
            other => Self::Failed(io::Error::other(other)),
        }
    }
}

#[cfg(test)]
mod tests;
