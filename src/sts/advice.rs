//! Advice on failed STS calls, for the daemon's log and for `awsvid check`.

use super::error::{CallProof, FailedCall};
use super::reason::StsReason;
use crate::role::{Grant, required_actions};
use crate::svid::{JwtSvid, one_line};

/// The STS that a call goes to, for error messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StsDestination {
    /// Name for messages, as in `STS at https://sts.example.org`.
    pub(crate) name: String,
    /// True if AWS runs it.
    pub(crate) is_aws: bool,
    /// The proxy in between, as messages print it.
    pub(crate) proxy: Option<String>,
}

/// Returns advice for the operator. `answer` has the code and the message of STS; `call` is the
/// exchange that failed.
pub(super) fn of(
    reason: StsReason,
    answer: &str,
    at: &StsDestination,
    call: Option<FailedCall<'_>>,
) -> Option<String> {
    let by_call = call.and_then(|FailedCall { grant, proof }| match proof {
        CallProof::Token(token) => {
            let failed = FailedExchange {
                grant,
                token,
                at,
                answer,
            };
            failed.advice(reason)
        }
        CallProof::Session(_) => of_chain(reason, grant, at),
    });
    by_call.or_else(|| general(reason).map(str::to_owned))
}

/// Returns the advice that does not depend on the exchange.
fn general(reason: StsReason) -> Option<&'static str> {
    match reason {
        StsReason::Unreachable => Some(
            "check the path from this node to STS: DNS, the firewall, HTTPS_PROXY and NO_PROXY, the CA certificates and `ca_file`",
        ),
        StsReason::Misconfigured => Some(
            "set `region`, or `endpoint` in [sts], to an STS that takes AssumeRoleWithWebIdentity without a signature",
        ),
        StsReason::Refused => Some(
            "find out what answers there, which may be a proxy, a load balancer or another service",
        ),
        StsReason::ExpiredToken => {
            Some("set this node's clock and the SPIRE server's: timedatectl")
        }
        StsReason::BadPolicy => Some("correct `policy` or `policy_arns` of this role"),
        StsReason::Busy => Some("raise `max_concurrent` in [sts]"),
        StsReason::AccessDenied
        | StsReason::BadAnswer
        | StsReason::BadRequest
        | StsReason::InvalidToken
        | StsReason::IssuerUnreachable
        | StsReason::NoCa
        | StsReason::RegionDisabled
        | StsReason::Throttled
        | StsReason::Unavailable => None,
    }
}

/// Returns the advice for a call that the credentials of another session signed.
fn of_chain(reason: StsReason, grant: &Grant, at: &StsDestination) -> Option<String> {
    let session = grant.chain().last()?;
    let arn = &session.role_arn;
    let previous = grant.previous()?;
    let previous = previous.issued_role_arn();
    match reason {
        StsReason::AccessDenied => {
            let chain = grant.role.chain.get(..grant.chain().len())?;
            let external_id = match session.external_id {
                Some(_) => ", with this `external_id`",
                None => "",
            };
            let written = if at.is_aws {
                "; awsvid trust-policy writes both"
            } else {
                ""
            };
            Some(format!(
                "the trust policy of {arn} has to allow {} to {previous}{external_id}, and a policy of {previous} has to \
                 allow the same on {arn}{written}",
                required_actions(&grant.role.exchange, chain).join(", ")
            ))
        }
        StsReason::BadRequest => Some(format!(
            "correct the [[role.chain]] with {arn}: the session is {}, for {} s",
            session.session_name.as_str(),
            session.duration.as_secs()
        )),
        StsReason::Misconfigured => Some(
            "this STS has to take AssumeRole with a signature; compare this node's clock with STS's"
                .to_owned(),
        ),
        _ => None,
    }
}

struct FailedExchange<'a> {
    grant: &'a Grant,
    token: &'a JwtSvid,
    at: &'a StsDestination,
    answer: &'a str,
}

impl FailedExchange<'_> {
    fn advice(&self, reason: StsReason) -> Option<String> {
        let issuer = issuer(self.token);
        let by_answer = || {
            self.by_message(&issuer)
                .or_else(|| self.of_other_sts(&issuer))
        };
        match reason {
            StsReason::IssuerUnreachable => Some(format!(
                "STS cannot read the keys of {issuer}; check the issuer's documents with awsvid check, and from outside this \
                 network with --resolve or --url"
            )),
            StsReason::RegionDisabled => Some(format!(
                "activate STS in {} in the account's IAM settings, or set `region` in [sts] to one that is active",
                self.grant.role.sts.region
            )),
            StsReason::InvalidToken => {
                Some(by_answer().unwrap_or_else(|| self.of_provider(&issuer)))
            }
            StsReason::AccessDenied => {
                Some(by_answer().unwrap_or_else(|| self.of_trust_policy(&issuer)))
            }
            StsReason::BadRequest => Some(by_answer().unwrap_or_else(|| self.of_parameters())),
            StsReason::BadAnswer
            | StsReason::BadPolicy
            | StsReason::Busy
            | StsReason::ExpiredToken
            | StsReason::Misconfigured
            | StsReason::NoCa
            | StsReason::Refused
            | StsReason::Throttled
            | StsReason::Unavailable
            | StsReason::Unreachable => None,
        }
    }

    /// Returns the advice for a message that AWS, MinIO or another STS is known to send.
    fn by_message(&self, issuer: &str) -> Option<String> {
        let answer = self.answer.to_ascii_lowercase();
        let has = |fragments: &[&str]| fragments.iter().any(|word| answer.contains(word));
        if has(&["no openidconnect provider"]) {
            return Some(format!(
                "in account {} make the IAM OIDC provider with just this URL: {issuer} (awsvid trust-policy prints the command); \
                 compare with aws iam list-open-id-connect-providers",
                self.grant.role_arn.account().unwrap_or("of the role")
            ));
        }
        if has(&["audience", "client id", "client_id", "aud claim", "azp"]) {
            return Some(format!(
                "the token's audience is {:?}: add it to the provider of {issuer} (aws iam add-client-id-to-open-id-connect-provider; \
                 at MinIO client_id), or set `audience` of role {:?} to one that is there",
                self.token.audience(),
                self.grant.role.name
            ));
        }
        has(&["timestamp"]).then(|| {
            "STS takes whole seconds in `iat` and `exp` only: upgrade SPIRE to 1.9.5, or change the credential composer".to_owned()
        })
    }

    /// Returns the advice for an STS that is neither AWS's nor uses AWS's names of roles. One that
    /// uses them mostly has AWS's policies as well.
    fn of_other_sts(&self, issuer: &str) -> Option<String> {
        let (arn, audience) = (&self.grant.role_arn, self.token.audience());
        (!self.at.is_aws && !arn.is_aws()).then(|| {
            format!(
                "that STS has to trust the issuer {issuer}, the audience {audience:?} and the role {arn}; at MinIO check \
                 MINIO_IDENTITY_OPENID_CONFIG_URL, _CLIENT_ID and the ARN that it prints at its start, elsewhere its OIDC provider"
            )
        })
    }

    fn of_trust_policy(&self, issuer: &str) -> String {
        let (arn, audience) = (&self.grant.role_arn, self.token.audience());
        let key = issuer.split_once("://").map_or(issuer, |(_, rest)| rest);
        let written = if self.at.is_aws {
            "; awsvid trust-policy writes it"
        } else {
            ""
        };
        format!(
            "the trust policy of {arn} has to compare \"{key}:aud\" with {audience:?} and \"{key}:sub\" with \"{}\" \
             (without https://){written}",
            self.grant.spiffe_id
        )
    }

    fn of_parameters(&self) -> String {
        let role = &self.grant.role;
        format!(
            "correct `role_arn`, `duration` or `session_name` of role {:?}: the session is {}, for {} s",
            role.name,
            self.grant.session_name.as_str(),
            role.duration.as_secs()
        )
    }

    fn of_provider(&self, issuer: &str) -> String {
        if self.at.is_aws && self.token.algorithm().starts_with("PS") {
            return "AWS does not accept signatures of the PS family; use RS256 or ES256"
                .to_owned();
        }
        format!(
            "compare the IAM provider's URL with {issuer}, its audiences with {:?}",
            self.token.audience()
        )
    }
}

/// Returns the token's `iss` for display.
fn issuer(token: &JwtSvid) -> String {
    let issuer = token.issuer();
    issuer.map_or_else(|| "(none)".to_owned(), |issuer| one_line(&issuer))
}

#[cfg(test)]
mod tests;
