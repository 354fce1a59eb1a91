//! The path of a request without HTTP: identify the caller, select the role, get the credentials,
//! and verify the caller once more.

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
use crate::role::{Grant, Identity, RequestedRole, RoleDenied, Roles};
use crate::svid::{IdentityBasis, IdentitySource, SourceError};

/// The service that answers attested callers.
#[derive(Debug)]
pub struct CredentialService {
    policy: ArcSwap<Policy>,
    /// The number of starts and ends of reloads. It is odd while one runs.
    reloads: AtomicU64,
    cache: CredentialCache,
}

/// The identities and roles of callers by one configuration.
#[derive(Debug)]
pub struct Policy {
    /// The source of identities.
    pub source: Arc<dyn IdentitySource>,
    /// The roles of `[[role]]` and `[requested_roles]`.
    pub roles: Roles,
}

/// The reason for which a caller gets no credentials.
#[derive(Debug, Clone, Error)]
pub enum ServiceError {
    /// The caller was not attested, or has changed since.
    #[error(transparent)]
    Refused(#[from] AttestError),
    /// The source has no identity for the caller.
    #[error("no identity is configured for this workload")]
    NoIdentity,
    /// The source did not answer.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No role is for any of its identities.
    #[error("{denied}")]
    Denied {
        /// The reason for the denial.
        denied: RoleDenied,
        /// The caller's own SPIFFE IDs.
        spiffe_ids: Vec<SpiffeId>,
    },
    /// The cache has no credentials, and no exchange succeeded.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl CredentialService {
    /// Returns a service. `cache` and `policy` have to be of the same configuration.
    pub fn new(policy: Policy, cache: CredentialCache) -> Self {
        Self {
            policy: ArcSwap::from_pointee(policy),
            reloads: AtomicU64::new(0),
            cache,
        }
    }

    /// Returns credentials for `caller` and the requested role, and records the selection.
    pub async fn credentials_for(
        &self,
        caller: &Arc<Caller>,
        requested: &RequestedRole,
        record: &mut Record,
    ) -> Result<(Arc<CachedCredentials>, CacheResult), ServiceError> {
        // The deadline of the wait for the cache includes the time of `identify`: clients give up
        // by then.
        let until = Instant::now() + REQUEST_HOLD;
        loop {
            let begun = self.reloads.load(Ordering::SeqCst);
            let policy = self.policy.load_full();
            let answer = self
                .try_once(&policy, (caller, requested), until, record)
                .await;
            let under_way = !begun.is_multiple_of(2);
            if !under_way && self.reloads.load(Ordering::SeqCst) == begun {
                return answer;
            }
            // No decision of the old configuration is released under the new one, not even a
            // denial.
            record.clear_decision();
            tokio::task::yield_now().await;
        }
    }

    async fn try_once(
        &self,
        policy: &Policy,
        (caller, requested): (&Arc<Caller>, &RequestedRole),
        until: Instant,
        record: &mut Record,
    ) -> Result<(Arc<CachedCredentials>, CacheResult), ServiceError> {
        let identities = policy.source.identify(caller).await?;
        if identities.is_empty() {
            return Err(ServiceError::NoIdentity);
        }
        let grant = policy.roles.select(&identities, requested);
        let grant = grant.map_err(|denied| {
            // An identity with several entries comes several times.
            let mut spiffe_ids: Vec<SpiffeId> = Vec::new();
            for Identity { spiffe_id, .. } in &identities {
                if !spiffe_ids.contains(spiffe_id) {
                    spiffe_ids.push(spiffe_id.clone());
                }
            }
            record.set_spiffe_ids(&spiffe_ids);
            ServiceError::Denied { denied, spiffe_ids }
        })?;
        record.set_grant(&grant);
        let credentials = timeout_at(until, self.cache.get(&grant, caller))
            .await
            .unwrap_or(Err(CacheError::Pending))?;
        caller.verify_unchanged().await?;
        Ok(credentials)
    }

    /// Returns the facts about the caller's process that a decision needs; `None` if it needs none.
    pub fn facts_needed(&self, caller: &Caller) -> Option<ProcessFacts> {
        self.policy.load().source.facts_needed(caller)
    }

    /// Changes the configuration. Call it for one reload at a time.
    ///
    /// Credentials are kept if the rules of their SPIFFE ID are unchanged and the new roles grant
    /// exactly the same. All others are never served again (T17).
    pub fn reload(&self, policy: Policy, exchanger: TokenExchanger, limits: Limits) {
        self.reloads.fetch_add(1, Ordering::SeqCst);
        let (old, new) = (self.policy.load_full(), Arc::new(policy));
        let swept = Arc::new(AtomicBool::new(false));
        let keep = {
            let (new, swept) = (new.clone(), swept.clone());
            // The cache also checks new entries, which have no identity of the old source.
            move |grant: &Grant| {
                new.allows(grant)
                    && (swept.load(Ordering::SeqCst) || new.has_same_basis(&old, &grant.spiffe_id))
            }
        };
        self.cache.reconfigure(exchanger, limits, keep);
        swept.store(true, Ordering::SeqCst);
        self.policy.store(new);
        self.reloads.fetch_add(1, Ordering::SeqCst);
    }
}

impl Policy {
    /// Returns whether a caller could get exactly this grant.
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
