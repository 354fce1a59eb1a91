//! Counters for operators. deploy/README.md describes each; labels are bounded and name no single workload.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::upstream_status::UpstreamStatus;

/// Labels of `awsvid_requests`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabel {
    /// `unix`, `tcp` or `pod`.
    pub listener: &'static str,
    /// `issued`, `refused`, `failed` or `aborted`.
    pub outcome: &'static str,
    /// Why; `ok` where it was issued.
    pub reason: &'static str,
}

/// Labels of what has only a reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    /// Why.
    pub reason: &'static str,
}

/// Labels of calls to the identity source and to STS.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabel {
    /// `ok` or the reason of the failure.
    pub result: &'static str,
}

impl CallLabel {
    /// The label of this result, by `reason` if it is an error.
    pub fn of<T, E>(result: &Result<T, E>, reason: impl Fn(&E) -> &'static str) -> Self {
        Self {
            result: result.as_ref().map_or_else(reason, |_| "ok"),
        }
    }
}

/// What an entry of the cache is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryStateLabel {
    /// Has credentials, not yet due for a refresh.
    Fresh,
    /// Due for a refresh, which has not failed.
    Due,
    /// The last refresh has failed; what is there is handed out.
    Failing,
    /// STS or the source refuses the refresh; what is there is handed out for the grace.
    Refused,
    /// Has no credentials: they are being issued, or that has failed a moment ago.
    Empty,
}

impl EntryStateLabel {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Fresh,
        Self::Due,
        Self::Failing,
        Self::Refused,
        Self::Empty,
    ];
}

/// Labels of `awsvid_cache_entries`.
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

/// Every metric. Cheap to clone: all are handles.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Requests whose head arrived.
    pub requests: Family<RequestLabel, Counter>,
    /// Connections that ended before a request was read, or were never taken.
    pub connections_dropped: Family<ReasonLabel, Counter>,
    /// Connections open now.
    pub connections: Gauge,
    /// Calls to the identity source for a JWT-SVID.
    pub source_calls: Family<CallLabel, Counter>,
    /// Calls to STS.
    pub sts_calls: Family<CallLabel, Counter>,
    /// Credentials issued: a JWT-SVID exchanged at STS, or the failure.
    pub issues: Family<CallLabel, Counter>,
    /// Entries in the cache, as of the last look at them.
    pub cache_entries: Family<EntryLabel, Gauge>,
    /// Credentials that the cache let go before anybody replaced them.
    pub cache_removed: Family<ReasonLabel, Counter>,
    /// Audit records that could not be written.
    pub audit_lost: Counter,
    /// Lines of the log that could not be written.
    pub log_lost: Counter,
    /// Pods' network namespaces that are listened in.
    pub pod_namespaces: Gauge,
    /// Those that could not be listened in, or not on every address.
    pub pod_namespaces_failed: Family<ReasonLabel, Counter>,
    /// Users and groups that rules name and whose number is not known.
    pub unknown_accounts: Gauge,
    /// 1 once `/readyz` has been 200.
    pub ready: Gauge,
    /// From the request's head to the answer.
    pub latency: Latency,
    /// What the last answers of source and STS were; for `/status` alone, since it is no number.
    pub health: UpstreamStatus,
}

/// A histogram of seconds, 10 microseconds to 10 seconds.
#[derive(Debug, Clone)]
pub struct Latency(pub Histogram);

impl Default for Latency {
    fn default() -> Self {
        Self(Histogram::new(exponential_buckets(10e-6, 4.0, 11)))
    }
}

impl Metrics {
    /// All metrics in the text format of the OpenMetrics 1.0 specification.
    pub fn encode(&self) -> String {
        let mut registry = Registry::with_prefix("awsvid");
        registry.register(
            "requests",
            "Requests by listener, outcome and reason",
            self.requests.clone(),
        );
        registry.register(
            "connections_dropped",
            "Connections that ended without a request",
            self.connections_dropped.clone(),
        );
        registry.register(
            "connections",
            "Connections open now",
            self.connections.clone(),
        );
        registry.register(
            "source_calls",
            "Questions to the identity source, by result",
            self.source_calls.clone(),
        );
        registry.register(
            "sts_calls",
            "Calls to STS, by result",
            self.sts_calls.clone(),
        );
        registry.register(
            "issues",
            "JWT-SVIDs exchanged at STS, by result",
            self.issues.clone(),
        );
        registry.register(
            "cache_entries",
            "Sets of credentials in the cache, by state",
            self.cache_entries.clone(),
        );
        registry.register(
            "cache_removed",
            "Credentials taken out of the cache",
            self.cache_removed.clone(),
        );
        registry.register(
            "audit_lost",
            "Audit records that could not be written",
            self.audit_lost.clone(),
        );
        registry.register(
            "log_lost",
            "Lines of the log that could not be written",
            self.log_lost.clone(),
        );
        registry.register(
            "pod_namespaces",
            "Network namespaces of pods listened in",
            self.pod_namespaces.clone(),
        );
        registry.register(
            "pod_namespaces_failed",
            "Network namespaces of pods that could not be listened in",
            self.pod_namespaces_failed.clone(),
        );
        registry.register(
            "unknown_accounts",
            "Users and groups of rules whose number is not known",
            self.unknown_accounts.clone(),
        );
        registry.register(
            "ready",
            "1 once the daemon has been ready",
            self.ready.clone(),
        );
        let latency = self.latency.0.clone();
        registry.register_with_unit(
            "request_duration",
            "From head to answer",
            Unit::Seconds,
            latency,
        );
        // The build's version as a label, by the usual convention.
        let version = Family::<VersionLabel, Gauge<i64>>::default();
        version
            .get_or_create(&VersionLabel {
                version: env!("CARGO_PKG_VERSION"),
            })
            .set(1);
        registry.register("build_info", "What is running", version);
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &registry);
        text
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VersionLabel {
    version: &'static str,
}
