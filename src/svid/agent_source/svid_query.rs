//! The kinds of SVIDs that prove identities, and the queries for them.

use async_trait::async_trait;

use super::AgentSourceInner;
use crate::cgroup::PodUid;
use crate::identity::SpiffeId;
use crate::svid::agent::{AgentSvid, AttestingAgent};
use crate::svid::identity_cache::Subject;
use crate::svid::{BadToken, JwtSvid, ReceivedX509Svid, SourceError, X509Svid};

/// Reply of an agent to one query, with SVIDs of one kind.
pub(super) type AgentReply<T> = Result<Vec<T>, SourceError>;

/// One SVID of a reply, not checked.
pub(super) trait ReceivedSvid: Send {
    fn claimed_id(&self) -> &str;

    fn hint(&self) -> Option<String>;

    /// Fails unless the SVID proves this identity. A token is held for the exchange that follows,
    /// if it is one of `keep`.
    fn prove(
        self,
        id: &SpiffeId,
        source: &AgentSourceInner,
        keep: Option<&Subject>,
    ) -> Result<(), BadToken>;
}

impl ReceivedSvid for AgentSvid {
    fn claimed_id(&self) -> &str {
        &self.spiffe_id
    }

    fn hint(&self) -> Option<String> {
        self.hint.clone()
    }

    /// Cached credentials of the identity are served without another check of a token. So the time
    /// of this one does not matter, unless an exchange uses it.
    fn prove(
        self,
        id: &SpiffeId,
        source: &AgentSourceInner,
        keep: Option<&Subject>,
    ) -> Result<(), BadToken> {
        JwtSvid::check_subject(&self.token, id)?;
        if let Some(subject) = keep
            && let Ok(token) = JwtSvid::check(self.token, id, &source.audience, source.clock.now())
        {
            source.tokens.hold(subject, token);
        }
        Ok(())
    }
}

impl ReceivedSvid for ReceivedX509Svid {
    fn claimed_id(&self) -> &str {
        &self.spiffe_id
    }

    fn hint(&self) -> Option<String> {
        self.hint.clone()
    }

    /// The key is cleared at once. An exchange fetches the SVID again.
    fn prove(
        self,
        id: &SpiffeId,
        source: &AgentSourceInner,
        _: Option<&Subject>,
    ) -> Result<(), BadToken> {
        X509Svid::check(self, id, source.clock.now()).map(drop)
    }
}

/// Kind of SVIDs that a query is for.
#[async_trait]
pub(super) trait SvidQuery: Sync {
    type Svid: ReceivedSvid;

    async fn for_pid(&self, agent: &dyn AttestingAgent, pid: u32) -> AgentReply<Self::Svid>;
    async fn for_pod(&self, agent: &dyn AttestingAgent, pod: &PodUid) -> AgentReply<Self::Svid>;
}

/// JWT-SVIDs for this audience.
pub(super) struct JwtQuery<'a>(pub(super) &'a str);

/// X.509-SVIDs with their keys.
pub(super) struct X509Query;

/// Kind of SVIDs that prove identities.
#[derive(Debug, Clone, Copy)]
pub(super) enum SvidKind {
    Jwt,
    X509,
}

#[async_trait]
impl SvidQuery for JwtQuery<'_> {
    type Svid = AgentSvid;

    async fn for_pid(&self, agent: &dyn AttestingAgent, pid: u32) -> AgentReply<AgentSvid> {
        agent.fetch_for_pid(pid, self.0).await
    }

    async fn for_pod(&self, agent: &dyn AttestingAgent, pod: &PodUid) -> AgentReply<AgentSvid> {
        agent.fetch_for_pod(pod, self.0).await
    }
}

#[async_trait]
impl SvidQuery for X509Query {
    type Svid = ReceivedX509Svid;

    async fn for_pid(&self, agent: &dyn AttestingAgent, pid: u32) -> AgentReply<Self::Svid> {
        agent.fetch_x509_for_pid(pid).await
    }

    async fn for_pod(&self, agent: &dyn AttestingAgent, pod: &PodUid) -> AgentReply<Self::Svid> {
        agent.fetch_x509_for_pod(pod).await
    }
}
