//! The path of a request without HTTP: identify the caller, select the role, get the credentials,
//! and verify the caller once more.

use std::sync::Arc;

use thiserror::Error;
use tokio::time::{Instant, timeout_at};

use crate::audit::{CacheResult, Record};
use crate::cache::{CacheError, CachedCredentials, CredentialCache};
use crate::caller::{AttestError, Caller, CallerFacts, ProcessFacts, WorkloadKey};
use crate::clock::REQUEST_HOLD;
use crate::identity::SpiffeId;
use crate::limits::FairSemaphore;
use crate::policy::Policy;
use crate::role::{Grant, Identity, RequestedRole, Role, RoleDenied};
use crate::svid::SourceError;
use crate::telemetry::in_current_request;

/// Bound of the exchanges that start ahead of a request, before the source has named the identity.
const MAX_STARTS: usize = 256;
/// The part of [`MAX_STARTS`] that one workload may use: one for the token, and one for the role
/// that its program then requests by name.
const MAX_STARTS_PER_WORKLOAD: usize = 2;

/// The service that answers attested callers.
#[derive(Debug)]
pub struct CredentialService {
    cache: CredentialCache,
    starts: FairSemaphore<WorkloadKey>,
}

/// The reason for which a caller gets no credentials.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, Error)]
pub enum ServiceError {
    /// The caller was not attested, or has changed since.
    #[error(transparent)]
    Rejected(#[from] AttestError),
    /// The source has no identity for the caller.
    #[error("no identity is configured for this workload")]
    NoIdentity {
        /// The way to give it one, from its source.
        fix: &'static str,
    },
    /// The source did not answer.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No role is for any of its identities.
    #[error("{denied}")]
    Denied {
        denied: RoleDenied,
        /// The caller's own SPIFFE IDs.
        spiffe_ids: Vec<SpiffeId>,
    },
    /// The cache has no credentials, and no exchange succeeded.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl CredentialService {
    /// Returns a service that decides by the policy of `cache`.
    pub fn new(cache: CredentialCache) -> Self {
        Self {
            cache,
            starts: FairSemaphore::new(MAX_STARTS, MAX_STARTS_PER_WORKLOAD),
        }
    }

    /// Returns credentials for `caller` and the requested role, and records the selection.
    ///
    /// Waits for at most [`REQUEST_HOLD`]. Fails if the caller has no identity or role, if it has
    /// changed meanwhile, and if neither the cache nor an exchange has credentials by then.
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
            let policy = self.cache.policy();
            let answer = self
                .try_once(&policy, caller, requested, until, record)
                .await;
            // No decision of an old policy is released under a new one, not even a denial. See
            // `CredentialCache::reload` for the reason why this one check is enough.
            if self.cache.is_current(&policy) {
                return answer;
            }
            record.clear_decision();
        }
    }

    async fn try_once(
        &self,
        policy: &Arc<Policy>,
        caller: &Arc<Caller>,
        requested: &RequestedRole,
        until: Instant,
        record: &mut Record,
    ) -> Result<(Arc<CachedCredentials>, CacheResult), ServiceError> {
        let grant = decide(policy, (caller, requested), record).await?;
        let credentials = timeout_at(until, self.cache.get(policy, &grant, caller))
            .await
            .unwrap_or(Err(CacheError::Pending))?;
        caller.verify_unchanged().await?;
        Ok(credentials)
    }

    /// Returns the first role of `caller`, and records its selection. It fails like a request for
    /// credentials that ends before the cache.
    pub async fn first_role(
        &self,
        caller: &Arc<Caller>,
        record: &mut Record,
    ) -> Result<Arc<Role>, ServiceError> {
        loop {
            let policy = self.cache.policy();
            let granted = async {
                let grant = decide(&policy, (caller, &RequestedRole::Default), record).await?;
                caller.verify_unchanged().await?;
                Ok(grant.role)
            };
            let role = granted.await;
            if self.cache.is_current(&policy) {
                return role;
            }
            record.clear_decision();
        }
    }

    /// Starts the exchange for this role of `caller` in the background, so that its next request
    /// finds the credentials. A workload has few such tasks at a time. A failure shows only in that
    /// request.
    pub fn start_exchange(self: &Arc<Self>, caller: Arc<Caller>, requested: RequestedRole) {
        let Ok(permit) = self.starts.try_acquire(&caller.peer.workload_key()) else {
            return;
        };
        let service = self.clone();
        tokio::spawn(in_current_request(async move {
            let _permit = permit;
            let policy = service.cache.policy();
            let identities = policy.source.identify(&caller).await.unwrap_or_default();
            let facts = policy.attested_facts(caller.facts()).await;
            if let Ok(grant) = policy.roles.select(&identities, &facts, &requested) {
                service.cache.start(&policy, &grant, &caller);
            }
        }));
    }

    /// Returns the facts about the caller's process that a decision needs; `None` if it needs none.
    pub fn facts_needed(&self, caller: CallerFacts<'_>) -> Option<ProcessFacts> {
        self.cache.policy().facts_needed(caller)
    }

    /// Changes the policy; see [`CredentialCache::reload`].
    pub fn reload(&self, policy: Policy) {
        self.cache.reload(policy);
    }
}

/// Identifies the caller and selects its role, and records both.
async fn decide(
    policy: &Policy,
    (caller, requested): (&Arc<Caller>, &RequestedRole),
    record: &mut Record,
) -> Result<Grant, ServiceError> {
    let identities = policy.source.identify(caller).await?;
    if identities.is_empty() {
        let fix = policy.source.identity_fix();
        return Err(ServiceError::NoIdentity { fix });
    }
    let facts = policy.attested_facts(caller.facts()).await;
    let grant = policy.roles.select(&identities, &facts, requested);
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
    Ok(grant)
}

#[cfg(test)]
mod tests;
