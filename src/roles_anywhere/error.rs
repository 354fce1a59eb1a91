//! Failed calls of `CreateSession`, as errors of the same classes as those of STS.

use crate::role::{Grant, RolesAnywhereTarget};
use crate::sts::{Failure, RetryPolicy, StsDestination, StsError, StsReason};

/// Code and message of a profile that does not accept names of sessions.
const NAME_REJECTED: (&str, &str) = ("AccessDenied", "not authorized to set rolesessionname");

/// Returns true if the profile accepts no name of a session. That one name is invalid has another
/// code.
pub(super) fn is_name_rejected(failure: &Failure) -> bool {
    let (code_part, message_part) = NAME_REJECTED;
    match failure {
        Failure::Rejected {
            code: Some(code),
            message,
            ..
        } => code.starts_with(code_part) && message.to_ascii_lowercase().contains(message_part),
        _ => false,
    }
}

/// Returns the error of a failed call for `grant`.
pub(super) fn of(
    failure: &Failure,
    to: &StsDestination,
    grant: &Grant,
    at: &RolesAnywhereTarget,
) -> StsError {
    let error = StsError::new(failure, to, None);
    let what = match failure {
        Failure::Rejected { .. } => error.what.replacen(
            "rejected",
            &format!("rejected {} to {}", grant.role_arn, grant.spiffe_id),
            1,
        ),
        _ => error.what,
    };
    StsError {
        // A certificate lives for an hour, so that the next one is hardly another.
        retry: match error.retry {
            RetryPolicy::NewToken => RetryPolicy::Never,
            retry => retry,
        },
        what,
        fix: advice(error.reason, grant, at),
        ..error
    }
}

/// Returns the advice for the operator.
fn advice(reason: StsReason, grant: &Grant, at: &RolesAnywhereTarget) -> Option<String> {
    match reason {
        StsReason::AccessDenied => Some(format!(
            "the trust anchor {} has to hold the CA of the X.509-SVID, the profile {} has to list the role, and the role's trust \
             policy has to compare \"aws:PrincipalTag/x509SAN/URI\" with \"{}\"; awsvid trust-policy writes all three",
            at.trust_anchor_arn, at.profile_arn, grant.spiffe_id
        )),
        StsReason::BadRequest => Some(format!(
            "correct `trust_anchor_arn` or `profile_arn` in [roles_anywhere], or `role_arn` or `duration` of role {:?}; both have to \
             exist and to be enabled in {}",
            grant.role.name, at.region
        )),
        StsReason::Unreachable => Some(
            "check the path from this node to IAM Roles Anywhere: DNS, the firewall, HTTPS_PROXY and NO_PROXY, the CA \
             certificates and `ca_file` in [roles_anywhere]"
                .to_owned(),
        ),
        StsReason::Misconfigured => Some(
            "correct `trust_anchor_arn`, or `endpoint` in [roles_anywhere], and compare this node's clock".to_owned(),
        ),
        StsReason::Refused => Some(
            "find out what answers there, which may be a proxy, a load balancer or another service"
                .to_owned(),
        ),
        StsReason::Busy => Some("raise `max_concurrent` in [sts]".to_owned()),
        StsReason::ExpiredToken => Some("set this node's clock: timedatectl".to_owned()),
        StsReason::BadAnswer
        | StsReason::BadPolicy
        | StsReason::InvalidToken
        | StsReason::IssuerUnreachable
        | StsReason::NoCa
        | StsReason::RegionDisabled
        | StsReason::Throttled
        | StsReason::Unavailable => None,
    }
}
