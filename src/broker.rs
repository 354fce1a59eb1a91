//! What happens to a request, without HTTP: identify, choose, take from the cache, look at the caller once more.

use std::sync::Arc;

use thiserror::Error;

use crate::audit::{Freshness, Record};
use crate::cache::{CacheError, CredentialCache, Issued};
use crate::caller::{Caller, Refusal};
use crate::role::{Denied, Roles, Wanted};
use crate::svid::{IdentitySource, SourceError};

/// The request path.
#[derive(Debug)]
pub struct Broker {
    source: Arc<dyn IdentitySource>,
    roles: Roles,
    cache: CredentialCache,
}

/// Why a caller gets nothing.
#[derive(Debug, Clone, Error)]
pub enum BrokerError {
    /// It was not attested, or is no longer what it was.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The source has no identity for it.
    #[error("no identity is configured for this workload")]
    NoIdentity,
    /// The source could not say.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No role is for it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// There are no credentials to be had.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

impl Broker {
    /// Puts the parts together.
    pub fn new(source: Arc<dyn IdentitySource>, roles: Roles, cache: CredentialCache) -> Self {
        Self { source, roles, cache }
    }

    /// Answers `caller`, who asks for `wanted`; notes in `record` what it turned out to be for.
    pub async fn serve(
        &self,
        caller: &Arc<Caller>,
        wanted: &Wanted,
        record: &mut Record,
    ) -> Result<(Arc<Issued>, Freshness), BrokerError> {
        let identities = self.source.identify(caller).await?;
        if identities.is_empty() {
            return Err(BrokerError::NoIdentity);
        }
        let grant = self.roles.choose(&identities, wanted)?;
        record.granted(&grant);
        let issued = self.cache.get(&grant, caller).await?;
        caller.still_same()?;
        Ok(issued)
    }

    /// What is cached, for `/status`.
    pub fn cache(&self) -> &CredentialCache {
        &self.cache
    }
}
