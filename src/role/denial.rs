//! Reasons why no role was selected.

use thiserror::Error;

/// Reason why no role was selected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RoleDenied {
    /// No role matches this caller.
    #[error("no role is configured for this workload")]
    NoRole,
    /// The named role does not exist, or does not match this caller. The two have one error, so
    /// that a caller cannot probe for names.
    #[error("this workload has no role of that name")]
    NotThisRole,
    /// The ARN in the path is not in `[requested_roles] allow`, or the STS is not AWS's.
    #[error("this role ARN is not one that workloads on this node may request")]
    ArnNotAllowed,
    /// Several identities of the caller match the role.
    #[error(
        "several SPIFFE IDs of this workload match the role; give one of them the role's name as hint"
    )]
    SeveralIdentities,
    /// STS would reject a parameter of the role's sessions, or an attested fact is not known.
    #[error("this role cannot be assumed for this workload: {0}")]
    InvalidParameter(String),
}

impl RoleDenied {
    /// All reasons for a denial.
    pub const ALL: [Self; 5] = [
        Self::NoRole,
        Self::NotThisRole,
        Self::ArnNotAllowed,
        Self::SeveralIdentities,
        Self::InvalidParameter(String::new()),
    ];

    /// Returns the label in metrics and audit records.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoRole => "no_role",
            Self::NotThisRole => "not_this_role",
            Self::ArnNotAllowed => "arn_not_allowed",
            Self::SeveralIdentities => "several_identities",
            Self::InvalidParameter(_) => "invalid_parameter",
        }
    }
}
