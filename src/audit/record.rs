//! The record of one request, from its head to its answer.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::time::Instant;

use crate::audit::aggregate::{AggregateKey, RecordAggregator, RecordScope};
use crate::audit::line::{DisplayAsStr, HopFields, JsonLine, moment, render, second};
use crate::audit::{ABORTED, Audit, CacheResult, IssuedFields, Outcome, RequestId, RequestPeer};
use crate::caller::ListenerKind;
use crate::identity::SpiffeId;
use crate::metrics::{CacheLabel, RequestLabel};
use crate::protocol::Protocol;
use crate::role::{Grant, RequestedRole};
use crate::writer::{self, Priority};

/// The SPIFFE IDs in one record, so that no registration makes records long.
const MAX_RECORDED_SPIFFE_IDS: usize = 8;

/// The record of one request. A record that is dropped without [`Record::finish`] is `aborted`. The
/// metrics count each record once.
#[derive(Debug)]
pub struct Record {
    audit: Arc<Audit>,
    started: Instant,
    request_id: RequestId,
    listener: ListenerKind,
    protocol: Protocol,
    peer: RequestPeer,
    grant: Option<Grant>,
    /// The role that the path names.
    requested: Option<String>,
    /// The caller's SPIFFE IDs, where none was selected.
    spiffe_ids: Vec<String>,
    /// The daemon itself sent the request.
    is_own_probe: bool,
    /// The end of the request, for the metrics.
    ended: Option<RequestEnd>,
}

/// The end of a request as metrics count it.
#[derive(Debug, Clone, Copy)]
struct RequestEnd {
    outcome: &'static str,
    reason: &'static str,
    cache: CacheLabel,
    seconds: f64,
}

/// The end of a request, with the fields of its record.
#[derive(Clone, Copy)]
struct RecordEnd<'a> {
    outcome: &'static str,
    reason: &'static str,
    issued: Option<IssuedFields<'a>>,
    seconds: f64,
}

impl RecordEnd<'_> {
    fn counted(&self) -> RequestEnd {
        RequestEnd {
            outcome: self.outcome,
            reason: self.reason,
            cache: match self.issued.map(|issued| issued.cache_result) {
                Some(CacheResult::Hit | CacheResult::Stale) => CacheLabel::HIT,
                Some(CacheResult::Miss) => CacheLabel::MISS,
                None => CacheLabel::NONE,
            },
            seconds: self.seconds,
        }
    }
}

impl Record {
    pub(super) fn new(
        audit: Arc<Audit>,
        request_id: RequestId,
        (listener, protocol): (ListenerKind, Protocol),
        peer: RequestPeer,
    ) -> Self {
        let started = Instant::now();
        Self {
            audit,
            started,
            request_id,
            listener,
            protocol,
            peer,
            grant: None,
            requested: None,
            spiffe_ids: Vec::new(),
            is_own_probe: false,
            ended: None,
        }
    }

    /// Records the SPIFFE ID and the role that were selected.
    pub fn set_grant(&mut self, grant: &Grant) {
        self.grant = Some(grant.clone());
    }

    /// Records the role that the caller requested by name or by ARN.
    pub fn set_requested_role(&mut self, role: &RequestedRole) {
        self.requested = role.name().map(str::to_owned);
    }

    /// Records the SPIFFE IDs of a caller that gets no role with them, at most eight.
    pub fn set_spiffe_ids(&mut self, spiffe_ids: &[SpiffeId]) {
        let spiffe_ids = spiffe_ids.iter().take(MAX_RECORDED_SPIFFE_IDS);
        self.spiffe_ids = spiffe_ids.map(ToString::to_string).collect();
    }

    /// Marks a request that the daemon itself sent to see whether it is ready. Such a request is
    /// neither written nor counted, unless it gets credentials.
    pub fn mark_own_probe(&mut self) {
        self.is_own_probe = true;
    }

    /// Clears what was decided before a reload.
    pub fn clear_decision(&mut self) {
        self.grant = None;
        self.spiffe_ids.clear();
    }

    /// Writes the record. Returns false if it could not be written and the configuration requires
    /// it, in which case no credentials may be released.
    ///
    /// A record for this request alone is written when this returns, unless the destination stalls;
    /// with `required` the result is then false. A request that is combined with others is written
    /// later. The first of its kind is never combined. With `required`, none is combined while the
    /// destination fails.
    pub async fn finish(
        mut self,
        outcome: Outcome,
        reason: &'static str,
        issued: Option<IssuedFields<'_>>,
    ) -> bool {
        if self.is_own_probe && issued.is_none() {
            return true;
        }
        self.is_own_probe = false;
        let end = self.end(outcome.name(), reason, issued);
        if issued.is_none() {
            tracing::debug!(
                outcome = end.outcome,
                reason,
                requested_role = self.requested,
                spiffe_id = self.grant.as_ref().map(|grant| grant.spiffe_id.as_str()),
                spiffe_ids = self.spiffe_ids.join(" "),
                "request without credentials"
            );
        }
        // hyper drops this future if the client disconnects during the write.
        self.ended = Some(end.counted());
        let written = match issued.map(|issued| issued.cache_result) {
            // These are few, since each costs an exchange.
            Some(CacheResult::Miss) => self.write_alone(end, Priority::High).await,
            Some(CacheResult::Hit | CacheResult::Stale)
                if self.audit.is_required() && self.audit.sink.load().is_failing() =>
            {
                self.write_alone(end, Priority::Ordinary).await
            }
            Some(CacheResult::Hit | CacheResult::Stale) => {
                self.write_or_combine(end, |audit| &audit.hits).await
            }
            None => self.write_or_combine(end, |audit| &audit.rejections).await,
        };
        let released = issued.is_none() || written || !self.audit.is_required();
        if !released {
            self.ended = Some(RequestEnd {
                outcome: Outcome::Failed.name(),
                reason: "not_audited",
                cache: CacheLabel::NONE,
                seconds: end.seconds,
            });
        }
        released
    }

    fn end<'a>(
        &self,
        outcome: &'static str,
        reason: &'static str,
        issued: Option<IssuedFields<'a>>,
    ) -> RecordEnd<'a> {
        RecordEnd {
            outcome,
            reason,
            issued,
            seconds: self.started.elapsed().as_secs_f64(),
        }
    }

    async fn write_alone(&self, end: RecordEnd<'_>, priority: Priority) -> bool {
        let owner = Some(self.peer.workload_key());
        self.audit
            .write(writer::Line {
                bytes: self.line(end, RecordScope::OneKind),
                stands_for: 1,
                owner,
                priority,
            })
            .await
    }

    /// Writes the record, unless many requests of its kind are combined into one.
    async fn write_or_combine(
        &self,
        end: RecordEnd<'_>,
        aggregator: fn(&Audit) -> &RecordAggregator,
    ) -> bool {
        !self.count_in(end, aggregator) || self.write_alone(end, Priority::Ordinary).await
    }

    /// Counts the request among those of its kind. Returns whether it has a record of its own.
    fn count_in(&self, end: RecordEnd<'_>, aggregator: fn(&Audit) -> &RecordAggregator) -> bool {
        let issued = end
            .issued
            .map(|issued| (issued.access_key_id.to_owned(), issued.cache_result));
        let key = AggregateKey {
            owner: Some(self.peer.workload_key()),
            listener: self.listener,
            protocol: self.protocol,
            reason: end.reason,
            issued,
        };
        let emission =
            aggregator(&self.audit).take(key, Instant::now(), |scope| self.line(end, scope));
        self.audit.put(emission.before);
        if emission.begin_sweep {
            self.audit.sweep(aggregator);
        }
        emission.own_record
    }

    /// Renders the record, without the fields in which the requests of this scope differ.
    fn line(&self, end: RecordEnd<'_>, scope: RecordScope) -> Vec<u8> {
        let of_one = scope != RecordScope::ManyCallers;
        let is_exact = scope == RecordScope::OneKind;
        let grant = self.grant.as_ref().filter(|_| is_exact);
        let peer = self.peer.facts().filter(|_| of_one);
        let process = self.peer.process().filter(|_| of_one);
        let (cgroup, pod) = (
            peer.and_then(|peer| peer.cgroup.as_ref()),
            peer.and_then(|peer| peer.pod.as_ref()),
        );
        let issued = end.issued.filter(|_| is_exact);
        let chosen = issued.and_then(|issued| issued.first_session_name);
        render(&JsonLine {
            time: moment(self.audit.clock.now()),
            target: "audit",
            request_id: DisplayAsStr(self.request_id),
            outcome: end.outcome,
            reason: end.reason,
            listener: self.listener.name(),
            protocol: self.protocol.name(),
            uid: peer.map(|peer| peer.uid),
            cgroup: cgroup.map(|cgroup| cgroup.as_str()),
            systemd_unit: cgroup.and_then(|cgroup| cgroup.systemd_unit()),
            pod_uid: pod.map(|pod| pod.uid.as_str()),
            container_id: pod.and_then(|pod| pod.container.as_deref()),
            network_namespace: peer.and_then(|peer| peer.netns_inode),
            pid: process.map(|process| process.pid),
            gid: process.map(|process| process.gid),
            exe: process.and_then(|process| process.program.as_ref()?.exe.as_ref()?.path.to_str()),
            requested_role: self
                .requested
                .as_deref()
                .filter(|_| is_exact && issued.is_none()),
            spiffe_ids: if is_exact { &self.spiffe_ids } else { &[] },
            spiffe_id: grant.map(|grant| grant.spiffe_id.as_str()),
            role_arn: grant.map(|grant| grant.issued_role_arn().as_str()),
            session_name: grant.map(|grant| grant.issued_session_name(chosen)),
            chain: grant.map_or_else(Vec::new, |grant| hops(grant, chosen)),
            access_key_id: issued.map(|issued| issued.access_key_id),
            expiration: issued.map(|issued| second(issued.expiration)),
            cache: issued.map(|issued| issued.cache_result),
            milliseconds: (end.seconds * 1e6).round() / 1e3,
        })
    }
}

/// Returns each session of a chain, the first one with the name that AWS has chosen. None without a
/// chain.
fn hops<'a>(grant: &'a Grant, chosen: Option<&'a str>) -> Vec<HopFields<'a>> {
    if grant.chain().is_empty() {
        return Vec::new();
    }
    let first = HopFields {
        role_arn: grant.role_arn.as_str(),
        session_name: grant.first_session_name(chosen),
        source_identity: None,
        tags: BTreeMap::new(),
    };
    let later = grant.chain().iter().map(|session| HopFields {
        role_arn: session.role_arn.as_str(),
        session_name: session.session_name.as_str(),
        source_identity: session.source_identity.as_deref(),
        tags: session
            .tags
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect(),
    });
    std::iter::once(first).chain(later).collect()
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.is_own_probe {
            return;
        }
        let ended = self.ended.take().unwrap_or_else(|| {
            let end = self.end(ABORTED, ABORTED, None);
            if self.count_in(end, |audit| &audit.rejections) {
                let (bytes, owner) = (
                    self.line(end, RecordScope::OneKind),
                    Some(self.peer.workload_key()),
                );
                self.audit.put([writer::Line {
                    bytes,
                    stands_for: 1,
                    owner,
                    priority: Priority::Ordinary,
                }]);
            }
            end.counted()
        });
        let metrics = &self.audit.metrics;
        let label = RequestLabel::new((self.listener, self.protocol), ended.outcome, ended.reason);
        metrics.requests.get_or_create(&label).inc();
        let duration = metrics.request_duration.get_or_create(&ended.cache);
        duration.observe(ended.seconds);
    }
}
