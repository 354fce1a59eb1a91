//! The `[[role]]` definitions, and the choice of one: pure, deny by default.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::identity::{ArnTemplate, RoleArn, SessionName, SpiffeId, SpiffeIdPattern};

/// A role as the configuration defines it, with the defaults of `[identity]` and `[sts]` filled in. The whole of it is part
/// of the cache's key, so that credentials of a definition never outlive it (attack 17).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Role {
    /// The name in the path: `/v1/credentials/<name>`.
    pub name: String,
    /// Who may have it.
    pub spiffe_id: SpiffeIdPattern,
    /// What is assumed.
    pub role_arn: ArnTemplate,
    /// The one audience of the JWT-SVID.
    pub audience: String,
    /// Of the session: 15 minutes to 12 hours.
    pub duration: Duration,
    /// A fixed session name, instead of the one made from the SPIFFE ID.
    pub session_name: Option<SessionName>,
    /// Where it is assumed.
    pub sts: StsTarget,
    /// A session policy (JSON) that narrows the role.
    pub policy: Option<String>,
    /// Managed session policies.
    pub policy_arns: Vec<String>,
}

/// An STS endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StsTarget {
    /// The AWS region; also what an endpoint of another kind is told to be in.
    pub region: String,
    /// Instead of AWS's endpoint of that region.
    pub endpoint: Option<String>,
}

/// The endpoint's URL, or AWS's region.
impl fmt::Display for StsTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Some(endpoint) => f.write_str(endpoint),
            None => write!(f, "AWS in {}", self.region),
        }
    }
}

/// An identity that the source gave a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The SPIFFE ID.
    pub spiffe_id: SpiffeId,
    /// The operator's name for it, if the source gave one.
    pub hint: Option<String>,
}

/// Which role a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestedRole {
    /// `/v1/credentials`: the first that the caller may have.
    Default,
    /// `/v1/credentials/<name>`.
    ByName(String),
    /// `/v1/credentials/<percent-encoded ARN>`.
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

/// What is to be issued: everything that distinguishes one set of credentials from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Grant {
    /// To whom.
    pub spiffe_id: SpiffeId,
    /// By which definition.
    pub role: Arc<Role>,
    /// The role's ARN for this SPIFFE ID.
    pub role_arn: RoleArn,
    /// The session's name.
    pub session_name: SessionName,
}

/// Why no role was chosen.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RoleDenied {
    /// No role is for this caller.
    #[error("no role is configured for this workload")]
    NoRole,
    /// The named role does not exist, or is not for this caller; the two are not told apart.
    #[error("this workload has no role of that name")]
    NotThisRole,
    /// The ARN in the path is not in `allow_requested_roles`, or STS is not AWS's.
    #[error("workloads on this node may not ask for that role ARN")]
    ArnNotAllowed,
    /// Several identities would do.
    #[error("the workload has several SPIFFE IDs that this role is for")]
    SeveralIdentities,
}

impl RoleDenied {
    /// All reasons for a denial.
    pub const ALL: [Self; 4] = [
        Self::NoRole,
        Self::NotThisRole,
        Self::ArnNotAllowed,
        Self::SeveralIdentities,
    ];

    /// The label in metrics and audit records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoRole => "no_role",
            Self::NotThisRole => "not_this_role",
            Self::ArnNotAllowed => "arn_not_allowed",
            Self::SeveralIdentities => "several_identities",
        }
    }
}

/// All roles of a node, in the order of the configuration.
#[derive(Debug, Clone, Default)]
pub struct Roles {
    /// `[[role]]`.
    pub defined: Vec<Arc<Role>>,
    /// For ARNs in the path, if any is allowed.
    pub requested: Option<RequestedRoles>,
}

/// `allow_requested_roles`.
#[derive(Debug, Clone)]
pub struct RequestedRoles {
    /// Which ARNs.
    pub allowed: Vec<glob::Pattern>,
    /// `[identity] audience`.
    pub audience: String,
    /// `[sts]`. Only AWS's own: with an endpoint of another kind the list is a configuration error.
    pub sts: StsTarget,
}

/// Without a `[[role]]` nothing else says how long.
const REQUESTED_DURATION: Duration = Duration::from_secs(3600);

impl Roles {
    /// Returns every STS that a role is assumed at, once each.
    pub fn sts_targets(&self) -> Vec<&StsTarget> {
        let mut targets: Vec<&StsTarget> = Vec::new();
        let requested = self.requested.iter().map(|requested| &requested.sts);
        for target in self.defined.iter().map(|role| &role.sts).chain(requested) {
            if !targets.contains(&target) {
                targets.push(target);
            }
        }
        targets
    }

    /// Chooses the role for a caller with these identities: the first that fits, or the one that was asked for.
    pub fn select(
        &self,
        identities: &[Identity],
        wanted: &RequestedRole,
    ) -> Result<Grant, RoleDenied> {
        match wanted {
            RequestedRole::Default => {
                let mut grants = self
                    .defined
                    .iter()
                    .filter_map(|role| grant(role, identities).transpose());
                grants.next().unwrap_or(Err(RoleDenied::NoRole))
            }
            RequestedRole::ByName(name) => {
                let role = self
                    .defined
                    .iter()
                    .find(|role| role.name == *name)
                    .ok_or(RoleDenied::NotThisRole)?;
                grant(role, identities)?.ok_or(RoleDenied::NotThisRole)
            }
            RequestedRole::ByArn(arn) => self.requested(identities, arn),
        }
    }

    /// Whether a caller with the grant's identity could be given just this grant.
    pub fn can_grant(&self, grant: &Grant) -> bool {
        let identity = [Identity {
            spiffe_id: grant.spiffe_id.clone(),
            hint: None,
        }];
        let wanted = [
            RequestedRole::ByName(grant.role.name.clone()),
            RequestedRole::ByArn(grant.role_arn.clone()),
        ];
        wanted.iter().any(|wanted| {
            self.select(&identity, wanted)
                .is_ok_and(|given| given == *grant)
        })
    }

    /// AWS's trust policy is the authority over who may assume this role; the list only bounds what is tried.
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
            // The workload wrote this: a `{path[0]}` in it is no template of the operator's.
            role_arn: ArnTemplate::fixed(arn),
            audience: settings.audience.clone(),
            duration: REQUESTED_DURATION,
            session_name: None,
            sts: settings.sts.clone(),
            policy: None,
            policy_arns: Vec::new(),
        };
        grant(&Arc::new(role), identities)?.ok_or(RoleDenied::ArnNotAllowed)
    }
}

/// The grant of this role to the one identity that it is for; `None` if it is for none of them.
///
/// Of several, the one that has the role's name as a hint; never one by its position in the list. For the same reason all
/// hints count of an identity that is in the list several times.
fn grant(role: &Arc<Role>, identities: &[Identity]) -> Result<Option<Grant>, RoleDenied> {
    let fitting = || {
        identities
            .iter()
            .filter(|identity| role.spiffe_id.matches(&identity.spiffe_id))
    };
    let hinted = fitting().filter(|identity| identity.hint.as_ref() == Some(&role.name));
    if fitting().next().is_none() {
        return Ok(None);
    }
    let identity = only(fitting())
        .or_else(|| only(hinted))
        .ok_or(RoleDenied::SeveralIdentities)?;
    let identity = &identity.spiffe_id;
    Ok(role.role_arn.render(identity).map(|role_arn| Grant {
        spiffe_id: identity.clone(),
        role: role.clone(),
        role_arn,
        session_name: role
            .session_name
            .clone()
            .unwrap_or_else(|| SessionName::of(identity)),
    }))
}

/// Returns the identity if all of them have the same SPIFFE ID.
fn only<'a>(mut identities: impl Iterator<Item = &'a Identity>) -> Option<&'a Identity> {
    identities
        .next()
        .filter(|only| identities.all(|other| other.spiffe_id == only.spiffe_id))
}

#[cfg(test)]
mod tests;
