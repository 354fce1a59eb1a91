//! The `[[role]]` definitions and the selection of one. It has no I/O, and denies by default.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::identity::{
    ArnTemplate, AttestedFact, AttestedFacts, Placeholder, RoleArn, SessionName, SpiffeId,
    SpiffeIdPattern, Template,
};

mod chain;
mod denial;
mod first_exchange;
mod grant;
pub mod parameters;

pub use chain::{
    ChainedRole, ChainedSession, MAX_CHAINED_DURATION, MAX_CHAINED_ROLES, required_actions,
};
pub use denial::RoleDenied;
pub use first_exchange::{FirstExchange, RolesAnywhereTarget};
pub use grant::{Grant, GrantDetails};

/// A role as the configuration defines it, with the defaults of `[identity]` and `[sts]`. All of it
/// is part of the cache's key, so that credentials never outlive their definition (T17).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Role {
    /// Name in the path, as in `/v1/credentials/<name>`.
    pub name: String,
    /// SPIFFE IDs that may assume the role.
    pub spiffe_id: SpiffeIdPattern,
    /// ARN of the IAM role, or a template of it.
    pub role_arn: ArnTemplate,
    /// The only audience of the JWT-SVID.
    pub audience: String,
    /// Duration of the session: 15 minutes to 12 hours.
    pub duration: Duration,
    /// Fixed session name, instead of the one made from the SPIFFE ID.
    pub session_name: Option<SessionName>,
    /// The STS that the role is assumed at.
    pub sts: StsTarget,
    /// Session policy (JSON) that narrows the role.
    pub policy: Option<Template>,
    /// ARNs of managed session policies.
    pub policy_arns: Vec<Template>,
    /// The exchange by which the role is assumed.
    pub exchange: FirstExchange,
    /// The roles that are assumed one after the other with the credentials of this one. A workload
    /// gets the credentials of the last.
    pub chain: Vec<ChainedRole>,
}

impl Role {
    /// Returns the placeholders of all sessions' templates but those of ARNs of roles.
    fn placeholders(&self) -> impl Iterator<Item = Placeholder> {
        let chained = self.chain.iter().flat_map(ChainedRole::templates);
        self.policy
            .iter()
            .chain(&self.policy_arns)
            .chain(chained.map(|(_, _, template)| template))
            .flat_map(Template::placeholders)
    }

    /// Returns the attested facts that the sessions depend on, each once.
    pub fn facts_used(&self) -> Vec<AttestedFact> {
        once_each(
            self.placeholders()
                .filter_map(|placeholder| match placeholder {
                    Placeholder::Fact(fact) => Some(fact),
                    _ => None,
                }),
        )
    }

    /// Returns the indices (from 0) of the SPIFFE ID's segments that the sessions depend on. `None`
    /// if they depend on all of it.
    pub fn segments_used(&self) -> Option<Vec<usize>> {
        let mut segments = self.role_arn.segments();
        for placeholder in self.placeholders() {
            match placeholder {
                Placeholder::Segment(index) => segments.push(index),
                Placeholder::SpiffeId => return None,
                Placeholder::TrustDomain | Placeholder::SessionName | Placeholder::Fact(_) => {}
            }
        }
        segments.extend(
            self.chain
                .iter()
                .flat_map(|chained| chained.role_arn.segments()),
        );
        Some(segments)
    }
}

#[cfg(any(test, fuzzing))]
#[expect(clippy::expect_used, reason = "the texts are constant")]
impl Role {
    /// Returns a role for every SPIFFE ID of `example.org`, with the defaults of the configuration.
    pub(crate) fn example() -> Self {
        let spiffe_id = SpiffeIdPattern::parse("spiffe://example.org/**");
        let role_arn = ArnTemplate::parse("arn:aws:iam::123456789012:role/example");
        Self {
            name: "example".to_owned(),
            spiffe_id: spiffe_id.expect("a pattern"),
            role_arn: role_arn.expect("a role's ARN"),
            audience: "sts.amazonaws.com".to_owned(),
            duration: Duration::from_secs(3600),
            session_name: None,
            sts: StsTarget {
                region: "eu-central-1".to_owned(),
                endpoint: None,
            },
            policy: None,
            policy_arns: Vec::new(),
            exchange: FirstExchange::WebIdentity,
            chain: Vec::new(),
        }
    }
}

/// An STS, by region or by endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StsTarget {
    /// The AWS region. An endpoint outside AWS gets it as a parameter.
    pub region: String,
    /// Endpoint instead of AWS's endpoint of that region.
    pub endpoint: Option<String>,
}

/// Prints the endpoint's URL, or AWS's region.
impl fmt::Display for StsTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Some(endpoint) => f.write_str(endpoint),
            None => write!(f, "AWS in {}", self.region),
        }
    }
}

/// An identity that the source returned for a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The SPIFFE ID of the caller.
    pub spiffe_id: SpiffeId,
    /// The operator's name for it, if the source returned one.
    pub hint: Option<String>,
}

/// The role that a request names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestedRole {
    /// `/v1/credentials`: the first role that the caller may assume.
    Default,
    /// `/v1/credentials/<name>`: the role of this name.
    ByName(String),
    /// `/v1/credentials/<percent-encoded ARN>`: the role with this ARN.
    ByArn(RoleArn),
}

impl RequestedRole {
    /// Returns the name or the ARN in the path; `None` if the path names no role.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Default => None,
            Self::ByName(name) => Some(name),
            Self::ByArn(arn) => Some(arn.as_str()),
        }
    }
}

/// All roles of a node, in the order of the configuration.
#[derive(Debug, Clone, Default)]
pub struct Roles {
    /// The `[[role]]` tables, in their order.
    pub defined: Vec<Arc<Role>>,
    /// Settings for ARNs in the path, if any are allowed.
    pub requested: Option<RequestedRoles>,
}

/// Settings of `[requested_roles] allow`, the list of ARNs.
#[derive(Debug, Clone)]
pub struct RequestedRoles {
    /// Patterns of the allowed ARNs.
    pub allowed: Vec<glob::Pattern>,
    /// The audience of `[identity]`, for their tokens.
    pub audience: String,
    /// The STS of `[sts]`, always AWS's. With another endpoint the list is a configuration error.
    pub sts: StsTarget,
}

/// Session duration of a requested ARN, for which no `[[role]]` sets another.
const REQUESTED_DURATION: Duration = Duration::from_secs(3600);

impl Roles {
    /// Returns every STS that a role is assumed at, once each.
    pub fn sts_targets(&self) -> Vec<&StsTarget> {
        let requested = self.requested.iter().map(|requested| &requested.sts);
        let uses_sts = |role: &&Arc<Role>| role.exchange.uses_jwt() || !role.chain.is_empty();
        let defined = self.defined.iter().filter(uses_sts);
        once_each(defined.map(|role| &role.sts).chain(requested))
    }

    /// Returns every IAM Roles Anywhere that a role is assumed at, once each.
    pub fn roles_anywhere_targets(&self) -> Vec<&RolesAnywhereTarget> {
        let targets = self.defined.iter();
        once_each(targets.filter_map(|role| role.exchange.roles_anywhere().map(|target| &**target)))
    }

    /// Returns the attested facts that any role depends on, each once.
    pub fn facts_used(&self) -> Vec<AttestedFact> {
        once_each(self.defined.iter().flat_map(|role| role.facts_used()))
    }

    /// Selects the role for a caller with these identities: the first that matches, or the
    /// requested one. `facts` has those that [`Self::facts_used`] names. Fails if no role matches,
    /// or if the requested one is not for these identities.
    pub fn select(
        &self,
        identities: &[Identity],
        facts: &AttestedFacts,
        requested: &RequestedRole,
    ) -> Result<Grant, RoleDenied> {
        match requested {
            RequestedRole::Default => {
                let mut grants = self
                    .defined
                    .iter()
                    .filter_map(|role| grant(role, identities, facts).transpose());
                grants.next().unwrap_or(Err(RoleDenied::NoRole))
            }
            RequestedRole::ByName(name) => {
                let role = self
                    .defined
                    .iter()
                    .find(|role| role.name == *name)
                    .ok_or(RoleDenied::NotThisRole)?;
                grant(role, identities, facts)?.ok_or(RoleDenied::NotThisRole)
            }
            RequestedRole::ByArn(arn) => self.requested(identities, arn),
        }
    }

    /// Returns true if a caller with the grant's identity and facts could get exactly this grant,
    /// or one whose chain has this grant's session.
    pub fn can_grant(&self, grant: &Grant) -> bool {
        if grant.is_hop() {
            return self.defined.iter().any(|role| has_hop(role, grant));
        }
        let identity = [Identity {
            spiffe_id: grant.spiffe_id.clone(),
            hint: None,
        }];
        let requested = [
            RequestedRole::ByName(grant.role.name.clone()),
            RequestedRole::ByArn(grant.role_arn.clone()),
        ];
        requested.iter().any(|requested| {
            self.select(&identity, &grant.details().facts, requested)
                .is_ok_and(|granted| granted == *grant)
        })
    }

    /// Selects a role by its ARN. The list only bounds the tries; AWS's trust policy decides on the
    /// access.
    fn requested(&self, identities: &[Identity], arn: &RoleArn) -> Result<Grant, RoleDenied> {
        let options = glob::MatchOptions {
            case_sensitive: true,
            require_literal_separator: true,
            require_literal_leading_dot: false,
        };
        let settings = self.requested.as_ref().filter(|requested| {
            arn.is_aws()
                && requested
                    .allowed
                    .iter()
                    .any(|pattern| pattern.matches_with(arn.as_str(), options))
        });
        let settings = settings.ok_or(RoleDenied::ArnNotAllowed)?;
        if identities.is_empty() {
            return Err(RoleDenied::NoRole);
        }
        let identity = only(identities.iter()).ok_or(RoleDenied::SeveralIdentities)?;
        let role = Role {
            name: arn.as_str().to_owned(),
            spiffe_id: SpiffeIdPattern::parse(identity.spiffe_id.as_str())
                .map_err(|_| RoleDenied::ArnNotAllowed)?,
            // The workload chose this text, so a `{path[0]}` in it must not act as a template.
            role_arn: ArnTemplate::fixed(arn),
            audience: settings.audience.clone(),
            duration: REQUESTED_DURATION,
            session_name: None,
            sts: settings.sts.clone(),
            policy: None,
            policy_arns: Vec::new(),
            exchange: FirstExchange::WebIdentity,
            chain: Vec::new(),
        };
        grant(&Arc::new(role), identities, &AttestedFacts::default())?
            .ok_or(RoleDenied::ArnNotAllowed)
    }
}

/// Returns the grant of this role to the one identity that it matches, or `None` if it matches
/// none.
///
/// Of several identities it selects the one that has the role's name as a hint, never one by its
/// position in the list. For the same reason all hints of an identity count that is in the list
/// several times.
fn grant(
    role: &Arc<Role>,
    identities: &[Identity],
    facts: &AttestedFacts,
) -> Result<Option<Grant>, RoleDenied> {
    let matching = || {
        identities
            .iter()
            .filter(|identity| role.spiffe_id.matches(&identity.spiffe_id))
    };
    let hinted = matching().filter(|identity| identity.hint.as_ref() == Some(&role.name));
    if matching().next().is_none() {
        return Ok(None);
    }
    let identity = only(matching())
        .or_else(|| only(hinted))
        .ok_or(RoleDenied::SeveralIdentities)?;
    Grant::of(role, &identity.spiffe_id, facts)
}

/// Returns whether the chain of `role` has exactly the session of `grant`, before its last one.
fn has_hop(role: &Role, grant: &Grant) -> bool {
    let id = &grant.spiffe_id;
    let is_hop = role.spiffe_id.matches(id) && grant.chain().len() < role.chain.len();
    let hop = is_hop.then(|| role.hop(grant.chain().len(), id)).flatten();
    hop.is_some_and(|hop| {
        let rendered = Grant::of(&Arc::new(hop), id, &grant.details().facts);
        rendered.is_ok_and(|rendered| rendered.as_ref() == Some(grant))
    })
}

fn once_each<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    all.fold(Vec::new(), |mut targets, target| {
        if !targets.contains(&target) {
            targets.push(target);
        }
        targets
    })
}

/// Returns the identity if all of them have the same SPIFFE ID.
fn only<'a>(mut identities: impl Iterator<Item = &'a Identity>) -> Option<&'a Identity> {
    identities
        .next()
        .filter(|only| identities.all(|other| other.spiffe_id == only.spiffe_id))
}

#[cfg(test)]
mod tests;
