//! Checks which roles cover a running workload. It assumes none.

use std::sync::Arc;

use super::agent;
use super::exchange::{self, granted};
use super::report::CheckReport;
use super::target::CheckTarget;
use crate::config::Config;
use crate::role::{Role, RoleDenied};
use crate::svid::agent::AttestingAgent;

const STEP: &str = "role";

/// Reports the identities of the workload, and for each role whether it covers one of them. Returns
/// the roles that do, in the order of the configuration.
pub(super) async fn check(
    config: &Config,
    agent: &dyn AttestingAgent,
    target: &CheckTarget,
    report: &mut CheckReport,
) -> Vec<Arc<Role>> {
    let Some(identities) = agent::identities(config, agent, target, report).await else {
        return Vec::new();
    };
    let mut covering = Vec::new();
    for role in &config.roles.defined {
        let pattern = role.spiffe_id.as_str();
        let name = &role.name;
        match granted(role, &identities) {
            Ok(grant) => {
                let first = match covering.is_empty() {
                    true => ", and is the one of /v1/credentials",
                    false => "",
                };
                let (id, arn) = (&grant.spiffe_id, grant.issued_role_arn());
                report.ok(STEP, format!("role {name:?} covers {id}: {arn}{first}"));
                covering.push(role.clone());
            }
            Err(RoleDenied::NoRole) => report.info(
                STEP,
                format!("role {name:?} does not cover it: its spiffe_id is {pattern}"),
                "widen `spiffe_id` if the workload should have this role",
            ),
            Err(denied) => {
                // The daemon selects it too, and rejects the request.
                let saw = format!("role {name:?} covers it, but {denied}");
                report.info(STEP, saw, "correct the role, or the registration entry");
                covering.push(role.clone());
            }
        }
    }
    if let Some(requested) = &config.roles.requested {
        let allowed: Vec<&str> = requested
            .allowed
            .iter()
            .map(glob::Pattern::as_str)
            .collect();
        let saw = format!("it may name an ARN itself: {}", allowed.join(", "));
        report.ok(STEP, saw);
    } else if covering.is_empty() {
        let saw = "no role covers it, so awsvid rejects its requests (no_role)";
        report.failed(STEP, saw, "add a [[role]] for its SPIFFE ID, or widen one");
    }
    covering
}

/// Reports that the roles were not assumed.
pub(super) fn report_not_assumed(covering: &[Arc<Role>], report: &mut CheckReport) {
    if !covering.is_empty() {
        let fix = "add --exchange to assume each role that covers it, which CloudTrail shows";
        report.info(exchange::STEP, "no role was assumed", fix);
    }
}
