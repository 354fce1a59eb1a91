//! Metrics for operators. `deploy/docs/metrics-and-alerts.md` describes each family, and a test
//! compares that page with this module. Labels are bounded, and none identifies a single workload.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::upstream_status::{LastError, UpstreamStatus};

mod exposition;
mod labels;
mod process;
#[cfg(any(test, fuzzing))]
pub(crate) use process::fuzzing;

pub use exposition::Exposition;
pub use labels::{
    CacheLabel, CallLabel, EndpointLabel, EntryLabel, EntryStateLabel, EvictionReason,
    PodListenerFailure, ReasonLabel, RequestLabel,
};

use labels::{BuildLabel, ConfigLabel};
use process::ProcessStart;

/// A family of request durations by [`CacheLabel`].
type DurationFamily = Family<CacheLabel, Histogram, fn() -> Histogram>;

/// The handles of every metric. A clone is cheap and shares its values.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Requests that sent a complete head.
    pub requests: Family<RequestLabel, Counter>,
    /// Time from a request's head to its answer, in seconds.
    pub request_duration: DurationFamily,
    /// Connections that ended before a request was read, or were never accepted.
    pub connections_dropped: Family<ReasonLabel, Counter>,
    /// Connections that are open now.
    pub connections: Gauge,
    /// Calls to the identity source for identities or a JWT-SVID. See [`Metrics::source_call`].
    pub source_calls: Family<CallLabel, Counter>,
    source_call_duration: Histogram,
    source_up: Gauge,
    /// Calls to STS. See [`Metrics::sts_call`].
    pub sts_calls: Family<CallLabel, Counter>,
    sts_call_duration: Histogram,
    sts_up: Family<EndpointLabel, Gauge>,
    /// Exchanges of a JWT-SVID for credentials, by result.
    pub exchanges: Family<CallLabel, Counter>,
    exchanges_in_flight: Gauge,
    /// Lookups of credentials in the cache.
    pub cache_requests: Family<CallLabel, Counter>,
    /// Cache entries, as of the latest scrape.
    pub cache_entries: Family<EntryLabel, Gauge>,
    /// Credentials that the cache removed before a refresh replaced them.
    pub cache_evictions: Family<ReasonLabel, Counter>,
    earliest_expiry: EarliestExpiry,
    /// Audit records that could not be written.
    pub audit_records_dropped: Counter,
    /// Lines of the log that could not be written.
    pub log_lines_dropped: Counter,
    /// Network namespaces of pods in which the daemon listens.
    pub pod_listeners: Gauge,
    /// Network namespaces in which the daemon could not listen, or not on every address.
    pub pod_listener_failures: Family<ReasonLabel, Counter>,
    /// Network namespaces of pods in which the daemon serves the metadata address.
    pub imds_namespaces: Gauge,
    /// Users and groups in rules that have no known number.
    pub unknown_accounts: Gauge,
    reload_successful: Gauge,
    reload_success_timestamp: Gauge,
    config_info: Family<ConfigLabel, Gauge>,
    /// 1 once `/readyz` has been 200.
    pub ready: Gauge,
    process: ProcessStart,
    /// The latest answers of the source and of STS in words, for `/status`.
    pub health: UpstreamStatus,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            request_duration: Family::new_with_constructor(request_histogram),
            connections_dropped: Family::default(),
            connections: Gauge::default(),
            source_calls: Family::default(),
            source_call_duration: call_histogram(),
            source_up: Gauge::default(),
            sts_calls: Family::default(),
            sts_call_duration: call_histogram(),
            sts_up: Family::default(),
            exchanges: Family::default(),
            exchanges_in_flight: Gauge::default(),
            cache_requests: Family::default(),
            cache_entries: Family::default(),
            cache_evictions: Family::default(),
            earliest_expiry: EarliestExpiry::default(),
            audit_records_dropped: Counter::default(),
            log_lines_dropped: Counter::default(),
            pod_listeners: Gauge::default(),
            pod_listener_failures: Family::default(),
            imds_namespaces: Gauge::default(),
            unknown_accounts: Gauge::default(),
            reload_successful: Gauge::default(),
            reload_success_timestamp: Gauge::default(),
            config_info: Family::default(),
            ready: Gauge::default(),
            process: ProcessStart::of_this_process(),
            health: UpstreamStatus::default(),
        }
    }
}

/// Returns buckets of 10 microseconds to 10 seconds.
fn request_histogram() -> Histogram {
    Histogram::new(exponential_buckets(10e-6, 4.0, 11))
}

/// Returns buckets of 1 millisecond to 65 seconds, beyond the longest timeout of a call.
fn call_histogram() -> Histogram {
    Histogram::new(exponential_buckets(1e-3, 2.0, 17))
}

/// One finished call to the identity source or to an STS.
#[derive(Debug)]
pub struct UpstreamCall {
    /// The source's address, or the STS endpoint: its URL, or AWS's region.
    pub name: String,
    /// The result as a label.
    pub result: CallLabel,
    /// The error in words, if there was one.
    pub error: Option<LastError>,
    /// Time from the call to its answer.
    pub took: Duration,
    /// Wall-clock time of the answer.
    pub at: SystemTime,
}

/// An exchange that runs, counted until it is dropped.
#[derive(Debug)]
pub struct RunningExchange(Gauge);

impl Drop for RunningExchange {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Seconds until the earliest expiry, as of the latest scrape.
#[derive(Debug, Clone)]
struct EarliestExpiry(Arc<AtomicI64>);

/// Stands for a cache without credentials.
const NO_EXPIRY: i64 = i64::MIN;

impl Default for EarliestExpiry {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(NO_EXPIRY)))
    }
}

impl Metrics {
    /// Records a call to the identity source.
    pub fn source_call(&self, call: UpstreamCall) {
        self.source_calls.get_or_create(&call.result).inc();
        self.source_call_duration.observe(call.took.as_secs_f64());
        let is_up = self.health.source(call.name, call.error, call.at);
        self.set_source_up(is_up);
    }

    /// Counts a call to the identity source that was cancelled in favour of another workload's. It
    /// shows nothing about the source.
    pub fn source_call_evicted(&self, result: CallLabel, took: Duration) {
        self.source_calls.get_or_create(&result).inc();
        self.source_call_duration.observe(took.as_secs_f64());
    }

    /// Records a call to an STS.
    pub fn sts_call(&self, call: UpstreamCall) {
        self.sts_calls.get_or_create(&call.result).inc();
        self.sts_call_duration.observe(call.took.as_secs_f64());
        let is_up = self.health.sts(&call.name, call.error, call.at);
        self.set_sts_up(call.name, is_up);
    }

    /// Sets whether the identity source answers, where no call of a workload has shown it yet.
    pub fn set_source_up(&self, is_up: bool) {
        self.source_up.set(i64::from(is_up));
    }

    /// Does the same for the STS called `endpoint`.
    pub fn set_sts_up(&self, endpoint: String, is_up: bool) {
        let up = self.sts_up.get_or_create_owned(&EndpointLabel { endpoint });
        up.set(i64::from(is_up));
    }

    /// Creates the series of the STS called `endpoint`: 0 until its first answer.
    pub fn add_sts(&self, endpoint: String) {
        drop(self.sts_up.get_or_create_owned(&EndpointLabel { endpoint }));
    }

    /// Drops the state of the STS called `endpoint`, which a reload has removed.
    pub fn remove_sts(&self, endpoint: String) {
        self.health.remove_sts(&endpoint);
        self.sts_up.remove(&EndpointLabel { endpoint });
    }

    /// Counts an exchange as running until the result is dropped.
    pub fn exchange_started(&self) -> RunningExchange {
        self.exchanges_in_flight.inc();
        RunningExchange(self.exchanges_in_flight.clone())
    }

    /// Sets how long the cached credentials that expire first remain valid; `None` if there are
    /// no credentials, in which case the metric has no sample.
    pub fn set_earliest_expiry(&self, remaining: Option<Duration>) {
        let seconds = remaining.map_or(NO_EXPIRY, |remaining| {
            i64::try_from(remaining.as_secs()).unwrap_or(i64::MAX)
        });
        self.earliest_expiry.0.store(seconds, Ordering::Relaxed);
    }

    /// Records that the configuration with this digest took effect at `at`.
    pub fn config_loaded(&self, sha256: String, at: SystemTime) {
        self.config_info.clear();
        self.config_info
            .get_or_create(&ConfigLabel { sha256 })
            .set(1);
        self.reload_successful.set(1);
        let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.reload_success_timestamp
            .set(i64::try_from(seconds).unwrap_or(i64::MAX));
    }

    /// Records that a reload failed, so that the previous configuration stays in effect.
    pub fn config_rejected(&self) {
        self.reload_successful.set(0);
    }

    /// Renders all metrics in both formats.
    pub fn exposition(&self) -> Exposition {
        let mut registry = Registry::default();
        let own = registry.sub_registry_with_prefix("awsvid");
        self.register_requests(own);
        self.register_upstreams(own);
        self.register_cache(own);
        self.register_daemon(own);
        self.register_config(own);
        self.process
            .register(registry.sub_registry_with_prefix("process"));
        Exposition::encode(&registry)
    }

    /// Renders all metrics as OpenMetrics 1.0.
    pub fn encode(&self) -> String {
        self.exposition().openmetrics
    }

    fn register_requests(&self, own: &mut Registry) {
        own.register(
            "requests",
            "Requests by listener, protocol, outcome and reason",
            self.requests.clone(),
        );
        own.register_with_unit(
            "request_duration",
            "Time from a request's head to its answer",
            Unit::Seconds,
            self.request_duration.clone(),
        );
        own.register(
            "connections",
            "Connections open now",
            self.connections.clone(),
        );
        own.register(
            "connections_dropped",
            "Connections that ended without an answer",
            self.connections_dropped.clone(),
        );
    }

    fn register_upstreams(&self, own: &mut Registry) {
        own.register(
            "source_calls",
            "Calls to the identity source",
            self.source_calls.clone(),
        );
        own.register_with_unit(
            "source_call_duration",
            "Time of a call to the identity source",
            Unit::Seconds,
            self.source_call_duration.clone(),
        );
        own.register(
            "source_up",
            "1 if the identity source answered the latest call",
            self.source_up.clone(),
        );
        own.register("sts_calls", "Calls to STS", self.sts_calls.clone());
        own.register_with_unit(
            "sts_call_duration",
            "Time of a call to STS",
            Unit::Seconds,
            self.sts_call_duration.clone(),
        );
        own.register(
            "sts_up",
            "1 if this STS answered the latest call",
            self.sts_up.clone(),
        );
        own.register(
            "exchanges",
            "Exchanges of a JWT-SVID for credentials",
            self.exchanges.clone(),
        );
        own.register(
            "exchanges_in_flight",
            "Exchanges that run now",
            self.exchanges_in_flight.clone(),
        );
    }

    fn register_cache(&self, own: &mut Registry) {
        own.register(
            "cache_requests",
            "Lookups of credentials in the cache",
            self.cache_requests.clone(),
        );
        own.register(
            "cache_entries",
            "Cache entries by state",
            self.cache_entries.clone(),
        );
        own.register(
            "cache_evictions",
            "Credentials removed from the cache",
            self.cache_evictions.clone(),
        );
        let seconds = self.earliest_expiry.0.load(Ordering::Relaxed);
        if seconds != NO_EXPIRY {
            own.register_with_unit(
                "credentials_earliest_expiry",
                "Time until the earliest expiry of cached credentials",
                Unit::Seconds,
                ConstGauge::new(seconds),
            );
        }
    }

    fn register_daemon(&self, own: &mut Registry) {
        own.register(
            "audit_records_dropped",
            "Audit records that could not be written",
            self.audit_records_dropped.clone(),
        );
        own.register(
            "log_lines_dropped",
            "Lines of the log that could not be written",
            self.log_lines_dropped.clone(),
        );
        own.register(
            "pod_listeners",
            "Network namespaces of pods in which awsvid listens",
            self.pod_listeners.clone(),
        );
        own.register(
            "pod_listener_failures",
            "Network namespaces of pods in which awsvid could not listen",
            self.pod_listener_failures.clone(),
        );
        own.register(
            "imds_namespaces",
            "Network namespaces in which 169.254.169.254 is served",
            self.imds_namespaces.clone(),
        );
        own.register(
            "unknown_accounts",
            "Users and groups in rules without a known number",
            self.unknown_accounts.clone(),
        );
        own.register(
            "ready",
            "1 once the daemon has been ready",
            self.ready.clone(),
        );
    }

    fn register_config(&self, own: &mut Registry) {
        own.register(
            "config_last_reload_successful",
            "1 if the latest reload took effect",
            self.reload_successful.clone(),
        );
        own.register_with_unit(
            "config_last_reload_success_timestamp",
            "Time of the latest load that took effect",
            Unit::Seconds,
            self.reload_success_timestamp.clone(),
        );
        own.register(
            "config_info",
            "The configuration in effect",
            self.config_info.clone(),
        );
        let build = Family::<BuildLabel, Gauge>::default();
        build.get_or_create(&BuildLabel::of_this_build()).set(1);
        own.register("build_info", "The build that runs", build);
    }
}

#[cfg(test)]
mod tests;
