//! The label values of every metric from the start, so that `increase()` shows the first error.
//!
//! The values come from the enums and lists of the modules that count them.

use crate::admin::TOO_MANY_OPERATORS;
use crate::audit::{ABORTED, CacheResult, OK, Outcome};
use crate::caller::ListenerKind;
use crate::exchange::ExchangeError;
use crate::http;
use crate::metrics::{
    CacheLabel, CallLabel, EntryStateLabel, EvictionReason, Metrics, PodListenerFailure,
    ReasonLabel, RequestLabel,
};
use crate::protocol::Protocol;
use crate::sts::StsError;
use crate::svid::SourceError;

/// Creates each time series with a zero. Those of STS endpoints follow with each configuration
/// ([`Metrics::add_sts`]). Those of the instance metadata service exist only where it is served.
pub(super) fn create(metrics: &Metrics, serves_imds: bool) {
    create_requests(metrics, serves_imds);
    for label in CacheLabel::ALL {
        drop(metrics.request_duration.get_or_create(&label));
    }
    for reason in http::drop_reasons().chain([TOO_MANY_OPERATORS]) {
        drop(
            metrics
                .connections_dropped
                .get_or_create(&ReasonLabel { reason }),
        );
    }
    let result = |result| CallLabel { result };
    let sources = SourceError::samples()
        .into_iter()
        .map(|error| error.reason());
    for reason in sources.chain([OK]) {
        drop(metrics.source_calls.get_or_create(&result(reason)));
    }
    let sts = StsError::samples()
        .into_iter()
        .map(|error| error.reason.label());
    for reason in sts.chain([OK]) {
        drop(metrics.sts_calls.get_or_create(&result(reason)));
    }
    let exchanges = ExchangeError::samples()
        .into_iter()
        .map(|error| error.reason());
    for reason in exchanges.chain([OK]) {
        drop(metrics.exchanges.get_or_create(&result(reason)));
    }
    for lookup in CacheResult::ALL {
        drop(metrics.cache_requests.get_or_create(&result(lookup.name())));
    }
    for state in EntryStateLabel::ALL {
        drop(metrics.cache_entries.get_or_create(&state.into()));
    }
    for reason in EvictionReason::ALL {
        drop(metrics.cache_evictions.get_or_create(&reason.into()));
    }
    let metadata = PodListenerFailure::METADATA.into_iter();
    let metadata = metadata.filter(|_| serves_imds);
    for failure in PodListenerFailure::LOOPBACK.into_iter().chain(metadata) {
        drop(metrics.pod_listener_failures.get_or_create(&failure.into()));
    }
}

fn create_requests(metrics: &Metrics, serves_imds: bool) {
    for protocol in Protocol::ALL {
        let others = http::ends_without_credentials(protocol);
        for listener in ListenerKind::ALL {
            if protocol == Protocol::Imds && (!serves_imds || listener == ListenerKind::Unix) {
                continue;
            }
            let ends = [(Outcome::Issued.name(), OK), (ABORTED, ABORTED)];
            for (outcome, reason) in others.iter().copied().chain(ends) {
                let label = RequestLabel::new((listener, protocol), outcome, reason);
                drop(metrics.requests.get_or_create(&label));
            }
        }
    }
}

#[cfg(test)]
mod tests;
