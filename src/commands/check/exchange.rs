//! STS itself: its clock, and a real exchange.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::report::Report;
use crate::commands::live::Live;
use crate::commands::web::Web;
use crate::role::{Grant, Identity, Role, Roles, Wanted};
use crate::sts::{AssumeRole, Sts, StsError};

const STEP: &str = "sts";
const CLOCK: &str = "clock";
/// More than that, and tokens are from the future or expired for one of the two.
const SKEW_MAX: Duration = Duration::from_secs(60);

/// What STS's clock shows, by the `Date` of whatever it answers.
pub(super) async fn clock(role: &Role, web: &Web, report: &mut Report) {
    let default = format!("https://sts.{}.amazonaws.com/", role.sts.region);
    let url = role.sts.endpoint.as_deref().unwrap_or(&default);
    report.waiting(&format!("STS's clock, at {url}"));
    let before = SystemTime::now();
    let date = match web.get(url).await {
        Ok(answer) => answer.date,
        Err(error) => {
            report.note(
                CLOCK,
                format!("STS's clock cannot be read: {url}: {error}"),
                "the exchange shows whether it matters",
            );
            return;
        }
    };
    let Some(theirs) = date.as_deref().and_then(from_http_date) else {
        report.note(CLOCK, format!("{url} does not tell the time"), "compare this node's clock with another one");
        return;
    };
    let skew = theirs.duration_since(before).unwrap_or_else(|error| error.duration());
    let way = if theirs > before { "behind" } else { "ahead of" };
    match skew > SKEW_MAX {
        true => report.failed(
            CLOCK,
            format!("this node's clock is {} s {way} STS's", skew.as_secs()),
            "set it: timedatectl set-ntp true, or chronyc makestep",
        ),
        false => report.pass(CLOCK, "this node's clock and STS's agree"),
    }
}

/// `Tue, 24 Nov 2026 22:15:00 GMT`, the one form that is sent.
pub(super) fn from_http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split(' ').collect();
    let [_, day, month, year, time, "GMT"] = words[..] else { return None };
    let month = MONTHS.iter().position(|known| *known == month)? + 1;
    humantime::parse_rfc3339(&format!("{year}-{month:02}-{day:0>2}T{time}Z")).ok()
}

/// Assumes the role, as the daemon would for this token's workload, and throws the credentials away.
pub(super) async fn exchange(sts: &Sts, role: &Arc<Role>, live: &Live, report: &mut Report) {
    report.waiting(&format!("STS, for role {:?}", role.name));
    let roles = Roles { defined: vec![role.clone()], requested: None };
    let identity = Identity { spiffe_id: live.svid.spiffe_id().clone(), hint: None };
    let Ok(grant) = roles.choose(&[identity], &Wanted::First) else {
        match sts.answers(&role.sts).await {
            Ok(()) => report.note(
                STEP,
                format!(
                    "STS answers; role {:?} was not assumed, since it is not for {}",
                    role.name,
                    live.svid.spiffe_id()
                ),
                "where the agent attests callers, name a running workload that it is for: awsvid check --pid PID, or --pod UID",
            ),
            Err(error) => refused(&error, None, live, report),
        }
        return;
    };
    match sts.assume(&grant, &live.svid).await {
        Ok(credentials) => report.pass(
            STEP,
            format!(
                "{} assumed by {}: access key {}, until {}",
                grant.role_arn,
                grant.spiffe_id,
                credentials.access_key_id,
                humantime::format_rfc3339_seconds(credentials.expiration)
            ),
        ),
        Err(error) => refused(&error, Some(&grant), live, report),
    }
}

fn refused(error: &StsError, grant: Option<&Grant>, live: &Live, report: &mut Report) {
    let fix =
        grant.map_or_else(|| "look at [sts] and at the way there".to_owned(), |grant| explain(error, grant, live));
    report.failed(STEP, error.message.clone(), fix);
}

/// The words that AWS and MinIO use, by what has to be changed.
fn explain(error: &StsError, grant: &Grant, live: &Live) -> String {
    // Without the advice that is added to it.
    let said = error.message.split("; ").next().unwrap_or_default().to_ascii_lowercase();
    let aws = grant.role_arn.is_aws();
    let issuer = live.issuer().unwrap_or("(none)");
    let (audience, subject) = (live.svid.audience(), live.svid.spiffe_id());
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if has(&["no openidconnect provider"]) {
        return format!(
            "in account {} make the IAM OIDC provider with just this URL: {issuer} (awsvid trust-policy prints the command); \
             compare with aws iam list-open-id-connect-providers",
            grant.role_arn.account().unwrap_or_default()
        );
    }
    if has(&["audience", "client id", "client_id", "aud claim", "azp"]) {
        return format!(
            "the token's audience is {audience:?}: add it to the provider of {issuer} (aws iam add-client-id-to-open-id-connect-provider; \
             at MinIO client_id), or set `audience` of role {:?} to one that is there",
            grant.role.name
        );
    }
    if has(&["retrieve verification key"]) {
        return format!(
            "STS cannot read the keys of {issuer}: look at the steps \"discovery\" and \"keys\" above, and from outside this \
             network with --resolve or --url"
        );
    }
    if has(&["timestamp"]) {
        return "STS takes whole seconds in `iat` and `exp` only: upgrade SPIRE to 1.9.5, or change the credential composer".to_owned();
    }
    match error.reason {
        "sts_access_denied" => {
            let key = issuer.split_once("://").map_or(issuer, |(_, rest)| rest);
            format!(
                "the trust policy of {} has to compare \"{key}:aud\" with \"{audience}\" and \"{key}:sub\" with \"{subject}\" \
                 (without https://); awsvid trust-policy writes it",
                grant.role_arn
            )
        }
        "sts_region_disabled" => format!(
            "activate STS in {} in the account's IAM settings, or set `region` in [sts] to one that is active",
            grant.role.sts.region
        ),
        "sts_unreachable" => "look at DNS, the firewall, HTTPS_PROXY and `ca_file`".to_owned(),
        _ if !aws => format!(
            "the endpoint {} has to trust the issuer {issuer}, the audience {audience:?} and the role {}: at MinIO look at \
             MINIO_IDENTITY_OPENID_CONFIG_URL, _CLIENT_ID and the ARN that it prints at its start",
            grant.role.sts.endpoint.as_deref().unwrap_or_default(),
            grant.role_arn
        ),
        "sts_bad_request" => format!(
            "correct `role_arn`, `duration` or `session_name` of role {:?}: the session is {}, for {} s",
            grant.role.name,
            grant.session_name.as_str(),
            grant.role.duration.as_secs()
        ),
        "sts_expired_token" => "set this node's clock and the SPIRE server's: timedatectl".to_owned(),
        _ => format!("compare the IAM provider's URL with {issuer}, its audiences with {audience:?}"),
    }
}
