//! The policy of one configuration: everything that decides on a caller's credentials, as one value
//! that a reload replaces.

use std::sync::Arc;
use std::time::Duration;

use crate::exchange::TokenExchanger;
use crate::role::{Grant, Roles};
use crate::svid::{IdentityBasis, IdentitySource};

/// The policy of one configuration.
#[derive(Debug)]
pub struct Policy {
    /// The source of identities.
    pub source: Arc<dyn IdentitySource>,
    /// The roles of `[[role]]` and `[requested_roles]`.
    pub roles: Roles,
    /// The client of exchanges, with `source`.
    pub exchanger: TokenExchanger,
    /// The bounds of the cache.
    pub limits: CacheLimits,
}

/// Bounds of the cache, from `[cache]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLimits {
    /// Maximum number of entries, thus of sets of credentials.
    pub max_entries: usize,
    /// Time for which cached credentials are still served after STS first rejects their refresh.
    pub revocation_grace: Duration,
}

impl Policy {
    /// Returns whether credentials that `previous` granted may still be served: the rules of their
    /// SPIFFE ID are unchanged, and the roles grant exactly the same (T17).
    pub fn keeps(&self, grant: &Grant, previous: &Self) -> bool {
        let basis = self.source.basis(&grant.spiffe_id);
        basis != IdentityBasis::Rules(Vec::new())
            && basis == previous.source.basis(&grant.spiffe_id)
            && self.roles.can_grant(grant)
    }
}
