//! Checks of STS: its clock, and a real exchange.

use std::sync::Arc;
use std::time::Duration;

use super::STEP_FIX;
use super::report::CheckReport;
use crate::clock::Clock;
use crate::commands::https_probe::HttpProbe;
use crate::credentials::Credentials;
use crate::identity::{AttestedFacts, SpiffeId};
use crate::role::{Grant, Identity, RequestedRole, Role, RoleDenied, Roles, StsTarget};
use crate::sts::{AssumeRole, Sts, StsError};
use crate::svid::JwtSvid;

pub(super) const STEP: &str = "sts";
const CLOCK: &str = "clock";
/// Maximum clock difference. With a larger one, tokens are expired or from the future for one of
/// the two.
const MAX_SKEW: Duration = Duration::from_secs(60);

/// Compares this node's clock with STS's, by the `Date` header of a response from the exchange
/// host.
pub(super) async fn clock(
    sts: &Sts,
    target: &StsTarget,
    web: &HttpProbe,
    report: &mut CheckReport,
) {
    match sts.url(target).await {
        Ok(url) => compare_clocks("STS", &url, web, report).await,
        Err(error) => report.failed(CLOCK, error.to_string(), STEP_FIX),
    }
}

/// Compares this node's clock with that of `server` at `url`.
pub(super) async fn compare_clocks(
    server: &str,
    url: &str,
    web: &HttpProbe,
    report: &mut CheckReport,
) {
    report.show_progress(&format!("{server}'s clock, at {url}"));
    let before = Clock::system().now();
    let date = match web.get(url).await {
        Ok(answer) => answer.date,
        Err(error) => {
            report.info(
                CLOCK,
                format!("{server}'s clock cannot be read: {url}: {error}"),
                "if the exchange fails too, check [sts], and the proxies and firewalls on the way there",
            );
            return;
        }
    };
    let parse = |text: &str| httpdate::parse_http_date(text).ok();
    let Some(theirs) = date.as_deref().and_then(parse) else {
        report.info(
            CLOCK,
            format!("{url} answers without the time"),
            "compare this node's clock with another one",
        );
        return;
    };
    let skew = theirs
        .duration_since(before)
        .unwrap_or_else(|error| error.duration());
    let way = if theirs > before {
        "behind"
    } else {
        "ahead of"
    };
    match skew > MAX_SKEW {
        true => report.failed(
            CLOCK,
            format!(
                "this node's clock is {} s {way} {server}'s at {url}",
                skew.as_secs()
            ),
            "set it: timedatectl set-ntp true, or chronyc makestep",
        ),
        false => report.ok(
            CLOCK,
            format!("this node's clock and {server}'s agree, at {url}"),
        ),
    }
}

/// Assumes the role and those of its chain, as the daemon would for this token's workload, and
/// discards the credentials.
pub(super) async fn exchange(
    sts: &Sts,
    role: &Arc<Role>,
    token: &JwtSvid,
    report: &mut CheckReport,
) {
    report.show_progress(&format!("STS, for role {:?}", role.name));
    let id = token.spiffe_id();
    match granted(role, &[identity(id)]) {
        Ok(grant) => {
            let first = async |hop: &Grant| sts.assume(hop, token).await;
            assume(sts, &grant, id.as_str(), first, report).await;
        }
        Err(denied) => match sts.probe(&role.sts).await {
            Ok(()) => report_denied(role, id, &denied, report),
            Err(error) => rejected(&error, report),
        },
    }
}

/// Assumes one role after the other, until one fails: the first by `first`, with the SVID of
/// `holder`.
pub(super) async fn assume(
    sts: &Sts,
    grant: &Grant,
    holder: &str,
    first: impl AsyncFn(&Grant) -> Result<Credentials, StsError>,
    report: &mut CheckReport,
) {
    let mut hops: Vec<Grant> =
        std::iter::successors(Some(grant.clone()), Grant::previous).collect();
    hops.reverse();
    let mut previous: Option<Credentials> = None;
    for hop in &hops {
        let result = match &previous {
            None => first(hop).await,
            Some(credentials) => sts.assume_chained(hop, credentials).await,
        };
        let name = match hop.is_chained() {
            true => format!("hop {}: ", hop.hop_number()),
            false => String::new(),
        };
        match result {
            Ok(credentials) => {
                report.ok(
                    STEP,
                    format!(
                        "{name}{} assumed by {holder}: access key {}, until {}",
                        hop.issued_role_arn(),
                        credentials.access_key_id,
                        humantime::format_rfc3339_seconds(credentials.expiration)
                    ),
                );
                previous = Some(credentials);
            }
            Err(error) => {
                let what = format!("{name}{}", error.what);
                return rejected(&StsError { what, ..error }, report);
            }
        }
    }
}

/// Returns the grant of this role to one of these identities, if the role is for it and needs no
/// fact of a caller.
pub(super) fn granted(role: &Arc<Role>, identities: &[Identity]) -> Result<Grant, RoleDenied> {
    let roles = Roles {
        defined: vec![role.clone()],
        requested: None,
    };
    let facts = AttestedFacts::default();
    roles.select(identities, &facts, &RequestedRole::Default)
}

/// Returns an identity without a hint.
pub(super) fn identity(id: &SpiffeId) -> Identity {
    Identity {
        spiffe_id: id.clone(),
        hint: None,
    }
}

/// Reports why a role was not tried.
pub(super) fn report_denied(
    role: &Role,
    id: &SpiffeId,
    denied: &RoleDenied,
    report: &mut CheckReport,
) {
    let (reason, fix) = match denied {
        RoleDenied::InvalidParameter(error) => (
            format!(": {error}"),
            "correct the role, unless the value is a fact about a caller: then request its credentials from a workload",
        ),
        _ => (
            format!(", since it is not for {id}"),
            "where the agent attests callers, name a running workload that it is for: awsvid check --pid PID --exchange, or --pod UID --exchange",
        ),
    };
    let saw = format!("role {:?} was not assumed{reason}", role.name);
    report.info(STEP, saw, fix);
}

/// Reports the failure, with the same text as the daemon's log.
pub(super) fn rejected(error: &StsError, report: &mut CheckReport) {
    let fix = error
        .fix
        .clone()
        .unwrap_or_else(|| "check [sts] and the way there".to_owned());
    report.failed(STEP, error.what.clone(), fix);
}
