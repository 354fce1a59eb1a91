//! The policy of one configuration: everything that decides on a caller's credentials, as one value
//! that a reload replaces.

use std::sync::Arc;
use std::time::Duration;

use crate::accounts::UserNames;
use crate::caller::{CallerFacts, ListenerKind, ProcessFacts};
use crate::exchange::TokenExchanger;
use crate::identity::{AttestedFact, AttestedFacts};
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
    /// The names of local users, for `{user}`.
    pub users: UserNames,
    /// The bounds of the cache.
    pub limits: CacheLimits,
    /// The facts about a caller that any role depends on.
    facts_used: Vec<AttestedFact>,
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
    /// Returns a policy of these parts. `exchanger` has the same `source`.
    pub fn new(
        source: Arc<dyn IdentitySource>,
        roles: Roles,
        exchanger: TokenExchanger,
        users: UserNames,
        limits: CacheLimits,
    ) -> Self {
        let facts_used = roles.facts_used();
        Self {
            source,
            roles,
            exchanger,
            users,
            limits,
            facts_used,
        }
    }

    /// Returns the facts of the caller's process that a decision needs; `None` if it needs none.
    ///
    /// A role that depends on the caller's user needs a process that holds the socket: over the
    /// host's TCP listeners the socket alone shows the user of its maker (T24, T31).
    pub fn facts_needed(&self, caller: CallerFacts<'_>) -> Option<ProcessFacts> {
        self.source.facts_needed(caller).or_else(|| {
            let is_needed = self.facts_used.contains(&AttestedFact::User)
                && caller.listener == ListenerKind::Tcp
                && caller.in_container() != Some(true);
            is_needed.then(ProcessFacts::default)
        })
    }

    /// Returns the facts about a caller that any role depends on, as far as they are known. The
    /// kernel sets each of them.
    ///
    /// A user of a container may have the number of a user of this node, so it has no name here.
    /// Nor has the maker of a TCP socket for which no process was found.
    pub async fn attested_facts(&self, caller: CallerFacts<'_>) -> AttestedFacts {
        let mut facts = AttestedFacts::default();
        let peer = caller.peer;
        for fact in self.facts_used.iter().copied() {
            match fact {
                AttestedFact::PodUid => {
                    facts.pod_uid = peer.pod.as_ref().map(|pod| pod.uid.as_str().into());
                }
                AttestedFact::SystemdUnit => {
                    let unit = peer
                        .cgroup
                        .as_ref()
                        .and_then(|cgroup| cgroup.systemd_unit());
                    facts.systemd_unit = unit.map(Into::into);
                }
                AttestedFact::User => {
                    let is_known = caller.in_container() == Some(false)
                        && (caller.listener != ListenerKind::Tcp || caller.process.is_some());
                    if is_known {
                        facts.user = self.users.name(peer.uid).await;
                    }
                }
            }
        }
        facts
    }

    /// Returns whether credentials that `previous` granted may still be served: the rules of their
    /// SPIFFE ID are unchanged, and the roles grant exactly the same (T17).
    pub fn keeps(&self, grant: &Grant, previous: &Self) -> bool {
        let basis = self.source.basis(&grant.spiffe_id);
        basis != IdentityBasis::Rules(Vec::new())
            && basis == previous.source.basis(&grant.spiffe_id)
            && self.roles.can_grant(grant)
    }
}
