//! What happens to a request, without HTTP: identify, choose, take from the cache, look at the caller once more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use thiserror::Error;
use tokio::time::{Instant, timeout_at};

use crate::audit::{CacheResult, Record};
use crate::cache::{CacheError, CachedCredentials, CredentialCache, Limits};
use crate::caller::{AttestError, Caller, ProcessFacts};
use crate::clock::REQUEST_HOLD;
use crate::exchange::TokenExchanger;
use crate::identity::SpiffeId;
use crate::role::{Grant, RequestedRole, RoleDenied, Roles};
use crate::svid::{IdentityBasis, IdentitySource, SourceError};

/// The request path.
#[derive(Debug)]
pub struct CredentialService {
    policy: ArcSwap<Policy>,
    /// How often a reload has begun or ended: odd while one is under way.
    reloads: AtomicU64,
    cache: CredentialCache,
}

/// Who has which identity and which role, by one configuration.
#[derive(Debug)]
pub struct Policy {
    /// Who identifies callers.
    pub source: Arc<dyn IdentitySource>,
    /// `[[role]]` and `[requested_roles]`.
    pub roles: Roles,
}

/// Why a caller gets nothing.
#[derive(Debug, Clone, Error)]
pub enum ServiceError {
    /// It was not attested, or is no longer what it was.
    #[error(transparent)]
    Refused(#[from] AttestError),
    /// The source has no identity for it.
    #[error("no identity is configured for this workload")]
    NoIdentity,
    /// The source could not say.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No role is for it.
    #[error(transparent)]
    Denied(#[from] RoleDenied),
    /// There are no credentials to be had.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl CredentialService {
    /// Puts the parts together. `cache` was made by the same configuration as `policy`.
    pub fn new(policy: Policy, cache: CredentialCache) -> Self {
        Self {
            policy: ArcSwap::from_pointee(policy),
            reloads: AtomicU64::new(0),
            cache,
        }
    }

    /// Answers `caller`, who asks for `wanted`; notes in `record` what it turned out to be for.
    pub async fn credentials_for(
        &self,
        caller: &Arc<Caller>,
        wanted: &RequestedRole,
        record: &mut Record,
    ) -> Result<(Arc<CachedCredentials>, CacheResult), ServiceError> {
        // For all that it waits for together: whoever it is has given up by then.
        let until = Instant::now() + REQUEST_HOLD;
        loop {
            let begun = self.reloads.load(Ordering::SeqCst);
            let policy = self.policy.load_full();
            let answer = self.decide(&policy, (caller, wanted), until, record).await;
            let under_way = !begun.is_multiple_of(2);
            if !under_way && self.reloads.load(Ordering::SeqCst) == begun {
                return answer;
            }
            // Nothing that was decided by the old configuration, a refusal neither, is released under the new one.
            record.clear_decision();
            tokio::task::yield_now().await;
        }
    }

    async fn decide(
        &self,
        policy: &Policy,
        (caller, wanted): (&Arc<Caller>, &RequestedRole),
        until: Instant,
        record: &mut Record,
    ) -> Result<(Arc<CachedCredentials>, CacheResult), ServiceError> {
        let identities = policy.source.identify(caller).await?;
        if identities.is_empty() {
            return Err(ServiceError::NoIdentity);
        }
        let grant = policy.roles.select(&identities, wanted)?;
        record.granted(&grant);
        let issued = timeout_at(until, self.cache.get(&grant, caller))
            .await
            .unwrap_or(Err(CacheError::Pending))?;
        caller.still_same().await?;
        Ok(issued)
    }

    /// What a decision about this caller needs to know of its process; `None` if it needs nothing more.
    pub fn facts_needed(&self, caller: &Caller) -> Option<ProcessFacts> {
        self.policy.load().source.facts_needed(caller)
    }

    /// Goes on with another configuration, by one caller at a time. Credentials are kept where the rules for their SPIFFE
    /// ID are the same as before, and the new roles give just the same; all others are never handed out again (attack 17).
    pub fn reload(&self, policy: Policy, issuer: TokenExchanger, limits: Limits) {
        self.reloads.fetch_add(1, Ordering::SeqCst);
        let (old, new) = (self.policy.load_full(), Arc::new(policy));
        let swept = Arc::new(AtomicBool::new(false));
        let keep = {
            let (new, swept) = (new.clone(), swept.clone());
            // The cache also asks for entries that are yet to be made, which have nothing of the old source.
            move |grant: &Grant| {
                new.allows(grant)
                    && (swept.load(Ordering::SeqCst) || new.has_same_basis(&old, &grant.spiffe_id))
            }
        };
        self.cache.reconfigure(issuer, limits, keep);
        swept.store(true, Ordering::SeqCst);
        self.policy.store(new);
        self.reloads.fetch_add(1, Ordering::SeqCst);
    }
}

impl Policy {
    /// Whether a caller could be given just this.
    fn allows(&self, grant: &Grant) -> bool {
        self.source.basis(&grant.spiffe_id) != IdentityBasis::Rules(Vec::new())
            && self.roles.can_grant(grant)
    }

    fn has_same_basis(&self, other: &Self, id: &SpiffeId) -> bool {
        self.source.basis(id) == other.source.basis(id)
    }
}

#[cfg(test)]
mod tests;
