//! Advice on failed STS calls, for the daemon's log and for `awsvid check`.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

use crate::role::Grant;
use crate::svid::{JwtSvid, one_line};

/// The STS that a call goes to, for error messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StsDestination {
    /// Name for messages, as in `STS at https://sts.example.org`.
    pub(super) name: String,
    /// True if AWS runs it.
    pub(super) is_aws: bool,
    /// The proxy in between, as messages print it.
    pub(super) proxy: Option<String>,
}

/// Returns advice for the operator. `answer` has the code and the message of STS; `call` is the
/// exchange that failed.
pub(super) fn of(
    reason: &str,
    answer: &str,
    at: &StsDestination,
    call: Option<(&Grant, &JwtSvid)>,
) -> Option<String> {
    let by_call = call.and_then(|(grant, token)| {
        FailedCall {
            grant,
            token,
            at,
            answer,
        }
        .advice(reason)
    });
    by_call.or_else(|| general(reason).map(str::to_owned))
}

/// Returns the advice that does not depend on the exchange.
fn general(reason: &str) -> Option<&'static str> {
    Some(match reason {
        "sts_unreachable" => {
            "check the path from this node to STS: DNS, the firewall, HTTPS_PROXY and NO_PROXY, the CA certificates and `ca_file`"
        }
        "sts_misconfigured" => {
            "set `region`, or `endpoint` in [sts], to an STS that takes AssumeRoleWithWebIdentity without a signature"
        }
        "sts_refused" => {
            "find out what answers there, which may be a proxy, a load balancer or another service"
        }
        "sts_expired_token" => "set this node's clock and the SPIRE server's: timedatectl",
        "sts_bad_policy" => "correct `policy` or `policy_arns` of this role",
        "sts_busy" => "raise `max_concurrent` in [sts]",
        _ => return None,
    })
}

struct FailedCall<'a> {
    grant: &'a Grant,
    token: &'a JwtSvid,
    at: &'a StsDestination,
    answer: &'a str,
}

impl FailedCall<'_> {
    fn advice(&self, reason: &str) -> Option<String> {
        let issuer = issuer(self.token);
        match reason {
            "sts_issuer_unreachable" => Some(format!(
                "STS cannot read the keys of {issuer}; check the issuer's documents with awsvid check, and from outside this \
                 network with --resolve or --url"
            )),
            "sts_region_disabled" => Some(format!(
                "activate STS in {} in the account's IAM settings, or set `region` in [sts] to one that is active",
                self.grant.role.sts.region
            )),
            "sts_invalid_token" | "sts_access_denied" | "sts_bad_request" => self
                .by_message(&issuer)
                .or_else(|| self.by_reason(reason, &issuer)),
            _ => None,
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

    fn by_reason(&self, reason: &str, issuer: &str) -> Option<String> {
        let (role, arn, audience) = (
            &self.grant.role,
            &self.grant.role_arn,
            self.token.audience(),
        );
        // An STS that uses AWS's names of roles mostly has AWS's policies as well.
        if !self.at.is_aws && !arn.is_aws() {
            return Some(format!(
                "that STS has to trust the issuer {issuer}, the audience {audience:?} and the role {arn}; at MinIO check \
                 MINIO_IDENTITY_OPENID_CONFIG_URL, _CLIENT_ID and the ARN that it prints at its start, elsewhere its OIDC provider"
            ));
        }
        Some(match reason {
            "sts_access_denied" => {
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
            "sts_bad_request" => format!(
                "correct `role_arn`, `duration` or `session_name` of role {:?}: the session is {}, for {} s",
                role.name,
                self.grant.session_name.as_str(),
                role.duration.as_secs()
            ),
            _ if self.at.is_aws && self.token.algorithm().starts_with("PS") => {
                "AWS does not accept signatures of the PS family; use RS256 or ES256".to_owned()
            }
            _ => format!(
                "compare the IAM provider's URL with {issuer}, its audiences with {audience:?}"
            ),
        })
    }
}

/// Returns the token's `iss`, or `(none)`.
fn issuer(token: &JwtSvid) -> String {
    let payload = token
        .secret()
        .split('.')
        .nth(1)
        .and_then(|part| URL_SAFE_NO_PAD.decode(part).ok());
    let claims: Value = payload
        .and_then(|payload| serde_json::from_slice(&payload).ok())
        .unwrap_or_default();
    claims["iss"]
        .as_str()
        .filter(|issuer| !issuer.is_empty())
        .map_or_else(|| "(none)".to_owned(), one_line)
}

#[cfg(test)]
mod tests;
