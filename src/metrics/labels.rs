//! The label sets of all metrics.

use prometheus_client::encoding::EncodeLabelSet;

use crate::caller::ListenerKind;
use crate::protocol::Protocol;

/// The labels of `awsvid_requests_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabel {
    /// `unix`, `tcp` or `pod`.
    pub listener: &'static str,
    /// The protocol: `container` or `imds`.
    pub protocol: &'static str,
    /// `issued`, `answered`, `refused`, `failed` or `aborted`.
    pub outcome: &'static str,
    /// The reason of a request without credentials; `ok` if they were issued.
    pub reason: &'static str,
}

/// The label of families that have only a reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
#[expect(missing_docs, reason = "the name of the field is its meaning")]
pub struct ReasonLabel {
    pub reason: &'static str,
}

/// The label of calls, exchanges and lookups.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabel {
    /// `ok`, or the reason of the failure; of a lookup `hit`, `stale` or `miss`.
    pub result: &'static str,
}

impl CallLabel {
    /// Returns the label of `outcome`, by `reason` if it is an error.
    pub fn of<T, E>(outcome: &Result<T, E>, reason: impl Fn(&E) -> &'static str) -> Self {
        Self {
            result: outcome.as_ref().map_or_else(reason, |_| "ok"),
        }
    }
}

/// The label of request durations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CacheLabel {
    /// `hit`, `miss`, or `none` if the request got no credentials.
    pub cache: &'static str,
}

impl CacheLabel {
    /// A request that was answered from the cache.
    pub const HIT: Self = Self { cache: "hit" };
    /// A request that waited for an exchange.
    pub const MISS: Self = Self { cache: "miss" };
    /// A request that got no credentials.
    pub const NONE: Self = Self { cache: "none" };
    /// All values of the label.
    pub const ALL: [Self; 3] = [Self::HIT, Self::MISS, Self::NONE];
}

/// The label of `awsvid_sts_up`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EndpointLabel {
    /// The URL, or AWS's region.
    pub endpoint: String,
}

/// The label of `awsvid_config_info`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ConfigLabel {
    pub(super) sha256: String,
}

/// The labels of `awsvid_build_info`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct BuildLabel {
    version: &'static str,
    revision: &'static str,
}

impl BuildLabel {
    pub(super) fn of_this_build() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            // Only release builds record it, see proto/build.rs.
            revision: option_env!("AWSVID_REVISION").unwrap_or("unknown"),
        }
    }
}

/// The state of a cache entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryStateLabel {
    /// Has credentials that are not due for a refresh.
    Fresh,
    /// Is due for a refresh, which has not failed.
    Due,
    /// Failed its latest refresh; the cache serves the previous credentials.
    Failing,
    /// Was rejected by STS or the source; the cache serves its credentials for the grace.
    Refused,
    /// Has no credentials: the exchange runs, or failed seconds ago.
    Empty,
}

impl EntryStateLabel {
    /// All states of an entry.
    pub const ALL: [Self; 5] = [
        Self::Fresh,
        Self::Due,
        Self::Failing,
        Self::Refused,
        Self::Empty,
    ];
}

/// The label of `awsvid_cache_entries`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EntryLabel {
    /// `fresh`, `due`, `failing`, `refused` or `empty`.
    pub state: &'static str,
}

impl From<EntryStateLabel> for EntryLabel {
    fn from(state: EntryStateLabel) -> Self {
        let state = match state {
            EntryStateLabel::Fresh => "fresh",
            EntryStateLabel::Due => "due",
            EntryStateLabel::Failing => "failing",
            EntryStateLabel::Refused => "refused",
            EntryStateLabel::Empty => "empty",
        };
        Self { state }
    }
}

/// The cause for which the cache removed credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvictionReason {
    /// No workload requested them during a whole lifetime.
    Unused,
    /// No refresh succeeded before they expired.
    Expired,
    /// STS rejected the refresh, and the grace has passed.
    Refused,
    /// The identity source withdrew the identity.
    Withdrawn,
    /// Another role of the same SPIFFE ID needed the entry.
    Evicted,
    /// A reload changed or removed the role, or a rule of the SPIFFE ID.
    Reload,
}

impl EvictionReason {
    /// All causes of an eviction.
    pub const ALL: [Self; 6] = [
        Self::Unused,
        Self::Expired,
        Self::Refused,
        Self::Withdrawn,
        Self::Evicted,
        Self::Reload,
    ];
}

impl From<EvictionReason> for ReasonLabel {
    fn from(reason: EvictionReason) -> Self {
        let reason = match reason {
            EvictionReason::Unused => "unused",
            EvictionReason::Expired => "expired",
            EvictionReason::Refused => "refused",
            EvictionReason::Withdrawn => "withdrawn",
            EvictionReason::Evicted => "evicted",
            EvictionReason::Reload => "reload",
        };
        Self { reason }
    }
}

/// The cause for which the daemon does not listen in a pod's network namespace, or not on every
/// address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodListenerFailure {
    /// No namespace was mounted on its file for a while.
    NotMounted,
    /// Another process of the pod has the port.
    PortTaken,
    /// The daemon does not have `CAP_NET_BIND_SERVICE`.
    PortDenied,
    /// The kernel does not report the cgroup of a socket.
    UnsupportedKernel,
    /// Any other error, which is in the log.
    Error,
    /// A route of the pod leads to the metadata address.
    ImdsRouted,
    /// Another service answers at the metadata address.
    ImdsAnswered,
    /// Another process of the pod has port 80 of all addresses.
    ImdsPortTaken,
    /// The daemon does not have `CAP_NET_ADMIN`.
    ImdsDenied,
    /// The pod removed the metadata address.
    ImdsRemoved,
    /// Any other error at the metadata address, which is in the log.
    ImdsError,
}

impl PodListenerFailure {
    /// All causes of a failure at the loopback addresses.
    pub const LOOPBACK: [Self; 5] = [
        Self::NotMounted,
        Self::PortTaken,
        Self::PortDenied,
        Self::UnsupportedKernel,
        Self::Error,
    ];
    /// All causes of a failure at the metadata address.
    pub const METADATA: [Self; 6] = [
        Self::ImdsRouted,
        Self::ImdsAnswered,
        Self::ImdsPortTaken,
        Self::ImdsDenied,
        Self::ImdsRemoved,
        Self::ImdsError,
    ];
}

impl From<PodListenerFailure> for ReasonLabel {
    fn from(failure: PodListenerFailure) -> Self {
        let reason = match failure {
            PodListenerFailure::NotMounted => "not_mounted",
            PodListenerFailure::PortTaken => "port_taken",
            PodListenerFailure::PortDenied => "port_denied",
            PodListenerFailure::UnsupportedKernel => "unsupported_kernel",
            PodListenerFailure::Error => "error",
            PodListenerFailure::ImdsRouted => "imds_routed",
            PodListenerFailure::ImdsAnswered => "imds_answered",
            PodListenerFailure::ImdsPortTaken => "imds_port_taken",
            PodListenerFailure::ImdsDenied => "imds_denied",
            PodListenerFailure::ImdsRemoved => "imds_removed",
            PodListenerFailure::ImdsError => "imds_error",
        };
        Self { reason }
    }
}

impl RequestLabel {
    /// Returns the label of a request on `listener`.
    pub fn new(
        (listener, protocol): (ListenerKind, Protocol),
        outcome: &'static str,
        reason: &'static str,
    ) -> Self {
        Self {
            listener: listener.name(),
            protocol: protocol.name(),
            outcome,
            reason,
        }
    }
}
