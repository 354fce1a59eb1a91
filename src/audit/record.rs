//! The record of one request, from its head to its answer.

use std::sync::Arc;

use tokio::time::Instant;

use crate::audit::flood::{AggregateKey, RefusalAggregator};
use crate::audit::line::{DisplayAsStr, JsonLine, moment, render, second};
use crate::audit::{ABORTED, Audit, CacheResult, IssuedFields, Outcome, RequestId};
use crate::caller::{Caller, ListenerKind, PeerFacts, WorkloadKey};
use crate::cgroup::{CgroupPath, Pod};
use crate::metrics::{CacheLabel, RequestLabel};
use crate::role::Grant;
use crate::writer::{self, Priority};

/// The record of one request. Dropped without [`Record::finish`], it is `aborted`. However it ends, the metrics count it once.
#[derive(Debug)]
pub struct Record {
    audit: Arc<Audit>,
    started: Instant,
    request_id: RequestId,
    listener: ListenerKind,
    caller: Option<Arc<Caller>>,
    stranger: Option<PeerFacts>,
    grant: Option<Grant>,
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

/// What the socket or the connector told.
#[derive(Clone, Copy)]
struct AuditedPeer<'a> {
    uid: u32,
    cgroup: Option<&'a CgroupPath>,
    pod: Option<&'a Pod>,
    namespace: Option<u64>,
}

/// How a request ended.
#[derive(Clone, Copy)]
struct End<'a> {
    outcome: &'static str,
    reason: &'static str,
    issued: Option<IssuedFields<'a>>,
    seconds: f64,
}

impl End<'_> {
    fn counted(&self) -> RequestEnd {
        RequestEnd {
            outcome: self.outcome,
            reason: self.reason,
            cache: match self.issued.map(|issued| issued.freshness) {
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
        listener: ListenerKind,
        caller: Option<Arc<Caller>>,
    ) -> Self {
        let started = Instant::now();
        Self {
            audit,
            started,
            request_id,
            listener,
            caller,
            stranger: None,
            grant: None,
            ended: None,
        }
    }

    /// Names the request in answers and logs.
    pub fn request_id(&self) -> RequestId {
        self.request_id
    }

    /// Notes what the socket of a caller that was not attested has told.
    pub fn unattested(&mut self, peer: Option<PeerFacts>) {
        self.stranger = peer;
    }

    /// Notes what the request was found to be for.
    pub fn granted(&mut self, grant: &Grant) {
        self.grant = Some(grant.clone());
    }

    /// Takes that back: a reload came between.
    pub fn clear_decision(&mut self) {
        self.grant = None;
    }

    /// Writes the record. `false`: it could not be written, and the configuration requires it, so no credentials may be released.
    ///
    /// A record that stands for this request alone is written when this returns, unless the destination stalls; with
    /// `required` it is then `false`. One that stands for several is written later, but never the first of its kind, and not
    /// while the destination fails where it is required.
    pub async fn finish(
        mut self,
        outcome: Outcome,
        reason: &'static str,
        issued: Option<IssuedFields<'_>>,
    ) -> bool {
        let end = self.end(outcome.name(), reason, issued);
        // hyper drops this future if the client disconnects while the record is written.
        self.ended = Some(end.counted());
        let written = match issued.map(|issued| issued.freshness) {
            // Very few of these come, since each costs an exchange.
            Some(CacheResult::Miss) => self.write_alone(end, Priority::High).await,
            Some(CacheResult::Hit | CacheResult::Stale)
                if self.audit.is_required() && self.audit.sink.load().is_failing() =>
            {
                self.write_alone(end, Priority::Ordinary).await
            }
            Some(CacheResult::Hit | CacheResult::Stale) => {
                self.write_few(end, |audit| &audit.hits).await
            }
            None => self.write_few(end, |audit| &audit.refusals).await,
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
    ) -> End<'a> {
        End {
            outcome,
            reason,
            issued,
            seconds: self.started.elapsed().as_secs_f64(),
        }
    }

    async fn write_alone(&self, end: End<'_>, priority: Priority) -> bool {
        let owner = Some(self.owner());
        self.audit
            .write(writer::Line {
                bytes: self.line(end, true),
                stands_for: 1,
                owner,
                priority,
            })
            .await
    }

    /// A record of a request of which there may be very many: of those beyond a number one stands for the rest.
    async fn write_few(&self, end: End<'_>, floods: fn(&Audit) -> &RefusalAggregator) -> bool {
        !self.count_in(end, floods) || self.write_alone(end, Priority::Ordinary).await
    }

    /// Whether this request has a record of its own.
    fn count_in(&self, end: End<'_>, floods: fn(&Audit) -> &RefusalAggregator) -> bool {
        let issued = end
            .issued
            .map(|issued| (issued.access_key_id.to_owned(), issued.freshness));
        let key = AggregateKey {
            owner: Some(self.owner()),
            listener: self.listener,
            reason: end.reason,
            issued,
        };
        let turn = floods(&self.audit).take(key, Instant::now(), |of_one| self.line(end, of_one));
        self.audit.put(turn.before);
        if turn.begin_sweep {
            self.audit.sweep(floods);
        }
        turn.singly
    }

    fn owner(&self) -> WorkloadKey {
        match (self.caller.as_deref(), &self.stranger) {
            (Some(caller), _) => WorkloadKey::of(caller),
            (None, Some(stranger)) => stranger.owner(),
            (None, None) => WorkloadKey::unknown(),
        }
    }

    /// What is known of the caller, attested or refused.
    fn seen(&self) -> Option<AuditedPeer<'_>> {
        match (self.caller.as_deref(), &self.stranger) {
            (
                Some(Caller {
                    uid,
                    cgroup,
                    pod,
                    namespace,
                    ..
                }),
                _,
            )
            | (
                None,
                Some(PeerFacts {
                    uid,
                    cgroup,
                    pod,
                    namespace,
                }),
            ) => Some(AuditedPeer {
                uid: *uid,
                cgroup: cgroup.as_ref(),
                pod: pod.as_ref(),
                namespace: *namespace,
            }),
            (None, None) => None,
        }
    }

    /// Renders the record; without what names the caller, if it stands for several callers.
    fn line(&self, end: End<'_>, of_one: bool) -> Vec<u8> {
        let grant = self.grant.as_ref().filter(|_| of_one);
        let caller = self.caller.as_deref().filter(|_| of_one);
        let seen = self.seen().filter(|_| of_one);
        let (cgroup, pod) = (
            seen.and_then(|seen| seen.cgroup),
            seen.and_then(|seen| seen.pod),
        );
        let process = caller.and_then(|caller| caller.process.as_ref());
        let issued = end.issued;
        render(&JsonLine {
            time: moment(self.audit.clock.now()),
            target: "audit",
            request_id: DisplayAsStr(self.request_id),
            outcome: end.outcome,
            reason: end.reason,
            listener: self.listener.name(),
            uid: seen.map(|seen| seen.uid),
            cgroup: cgroup.map(|cgroup| cgroup.as_str()),
            systemd_unit: cgroup.and_then(|cgroup| cgroup.systemd_unit()),
            pod_uid: pod.map(|pod| pod.uid.as_str()),
            container_id: pod.and_then(|pod| pod.container.as_deref()),
            network_namespace: seen.and_then(|seen| seen.namespace),
            pid: process.map(|process| process.pid),
            gid: process.map(|process| process.gid),
            exe: process.and_then(|process| process.program.as_ref()?.exe.as_ref()?.path.to_str()),
            spiffe_id: grant.map(|grant| grant.spiffe_id.as_str()),
            role_arn: grant.map(|grant| grant.role_arn.as_str()),
            session_name: grant.map(|grant| grant.session_name.as_str()),
            access_key_id: issued.map(|issued| issued.access_key_id),
            expiration: issued.map(|issued| second(issued.expiration)),
            cache: issued.map(|issued| issued.freshness),
            milliseconds: (end.seconds * 1e6).round() / 1e3,
        })
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let ended = self.ended.take().unwrap_or_else(|| {
            let end = self.end(ABORTED, ABORTED, None);
            if self.count_in(end, |audit| &audit.refusals) {
                let (bytes, owner) = (self.line(end, true), Some(self.owner()));
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
        let label = RequestLabel::new(self.listener, ended.outcome, ended.reason);
        metrics.requests.get_or_create(&label).inc();
        let duration = metrics.request_duration.get_or_create(&ended.cache);
        duration.observe(ended.seconds);
    }
}
