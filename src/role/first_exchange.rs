//! The first exchange of a role: which kind of SVID it takes, and where.

use std::fmt;
use std::sync::Arc;

/// Exchange of an SVID for credentials of a role.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum FirstExchange {
    /// A JWT-SVID, by `AssumeRoleWithWebIdentity` at STS.
    #[default]
    WebIdentity,
    /// An X.509-SVID, by `CreateSession` at IAM Roles Anywhere.
    RolesAnywhere(Arc<RolesAnywhereTarget>),
    /// A JWT-SVID, and an X.509-SVID while that exchange is unavailable.
    Both(Arc<RolesAnywhereTarget>),
}

impl FirstExchange {
    /// Returns the target of an X.509-SVID, if the role may use one.
    pub fn roles_anywhere(&self) -> Option<&Arc<RolesAnywhereTarget>> {
        match self {
            Self::WebIdentity => None,
            Self::RolesAnywhere(target) | Self::Both(target) => Some(target),
        }
    }

    /// Returns true if the role may use a JWT-SVID.
    pub fn uses_jwt(&self) -> bool {
        matches!(self, Self::WebIdentity | Self::Both(_))
    }

    /// Returns the value of `exchange` in a file.
    pub fn word(&self) -> &'static str {
        match self {
            Self::WebIdentity => "web-identity",
            Self::RolesAnywhere(_) => "roles-anywhere",
            Self::Both(_) => "both",
        }
    }
}

/// An IAM Roles Anywhere: `[roles_anywhere]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RolesAnywhereTarget {
    /// ARN of the trust anchor, which holds the CAs of the SVIDs.
    pub trust_anchor_arn: String,
    /// ARN of the profile, which lists the roles.
    pub profile_arn: String,
    /// AWS region of both.
    pub region: String,
    /// Endpoint instead of AWS's of that region: `scheme://host[:port]`.
    pub endpoint: Option<String>,
}

/// Prints the name in metrics and `/status`.
impl fmt::Display for RolesAnywhereTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Some(endpoint) => f.write_str(endpoint),
            None => write!(f, "Roles Anywhere in {}", self.region),
        }
    }
}
