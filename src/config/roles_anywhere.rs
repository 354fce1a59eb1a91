//! `[roles_anywhere]`: the IAM Roles Anywhere that exchanges X.509-SVIDs for credentials.

use std::path::PathBuf;
use std::sync::Arc;

use super::aws;
use super::error::InvalidValue;
use super::role::{Defaults, ParsedRole};
use super::toml_reader::Table;
use crate::role::{FirstExchange, RolesAnywhereTarget};

const KEYS: [&str; 4] = ["trust_anchor_arn", "profile_arn", "endpoint", "ca_file"];

/// The table `[roles_anywhere]` of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RolesAnywhereConfig {
    /// Trust anchor, profile and endpoint. `None` if the file has no such table.
    pub target: Option<Arc<RolesAnywhereTarget>>,
    /// PEM certificates of the authority that signed the endpoint's certificate.
    pub ca_file: Option<PathBuf>,
}

/// Reads the table `[roles_anywhere]`.
pub(super) fn read(table: &Table<'_>) -> RolesAnywhereConfig {
    let ca_file = table.path("ca_file");
    if !KEYS.iter().any(|key| table.contains(key)) {
        return RolesAnywhereConfig::default();
    }
    table.require("trust_anchor_arn", "add the ARN of the trust anchor");
    table.require("profile_arn", "add the ARN of the profile");
    let trust_anchor = table.parse(
        "trust_anchor_arn",
        "write it as in \"arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/<id>\"",
        |text| RegionalArn::parse(text, "trust-anchor"),
    );
    let profile = table.parse(
        "profile_arn",
        "write it as in \"arn:aws:rolesanywhere:eu-central-1:123456789012:profile/<id>\"",
        |text| RegionalArn::parse(text, "profile"),
    );
    let endpoint = table.parse(
        "endpoint",
        "write a URL as in \"https://vpce-1.rolesanywhere.eu-central-1.vpce.amazonaws.com\"",
        endpoint,
    );
    check_ca_file(table, endpoint.as_deref());
    RolesAnywhereConfig {
        target: target(table, trust_anchor, profile, endpoint),
        ca_file,
    }
}

fn target(
    table: &Table<'_>,
    trust_anchor: Option<RegionalArn>,
    profile: Option<RegionalArn>,
    endpoint: Option<String>,
) -> Option<Arc<RolesAnywhereTarget>> {
    let (trust_anchor, profile) = (trust_anchor?, profile?);
    if trust_anchor.region != profile.region {
        let what = format!(
            "the profile is in {}, and the trust anchor in {}",
            profile.region, trust_anchor.region
        );
        table.error(
            "profile_arn",
            what,
            "use a trust anchor and a profile of one region",
        );
        return None;
    }
    (!table.is_wrong("endpoint")).then(|| {
        Arc::new(RolesAnywhereTarget {
            trust_anchor_arn: trust_anchor.text,
            profile_arn: profile.text,
            region: trust_anchor.region,
            endpoint,
        })
    })
}

/// Checks that the file verifies an endpoint outside AWS. The holder of its key could pass for AWS.
fn check_ca_file(table: &Table<'_>, endpoint: Option<&str>) {
    let host = endpoint.and_then(|url| url.strip_prefix("https://"));
    let is_aws = !table.contains("endpoint") || host.is_some_and(aws::is_aws_roles_anywhere_host);
    if table.contains("ca_file") && is_aws {
        let what = "AWS's IAM Roles Anywhere is trusted by the system's certificates alone";
        table.error("ca_file", what, "remove it, or set `endpoint`");
    }
}

/// Warns if no role uses the table.
pub(super) fn check_use(table: &Table<'_>, roles: &[ParsedRole]) {
    let is_used = roles
        .iter()
        .any(|parsed| parsed.role.exchange.roles_anywhere().is_some());
    if table.contains("trust_anchor_arn") && !is_used {
        table.warn(
            "trust_anchor_arn",
            "no role uses IAM Roles Anywhere",
            "set exchange = \"roles-anywhere\" or \"both\" in a role, or remove the table",
        );
    }
}

/// Returns the exchange of a role; `None` if it is wrong, or if `[roles_anywhere]` is.
pub(super) fn exchange(table: &Table<'_>, defaults: &Defaults<'_>) -> Option<FirstExchange> {
    const KEY: &str = "exchange";
    let is_kind: &[(&str, Option<TargetedExchange>)] = &[
        ("web-identity", None),
        ("roles-anywhere", Some(FirstExchange::RolesAnywhere)),
        ("both", Some(FirstExchange::Both)),
    ];
    let Some(kind) = table.word(KEY, is_kind).flatten() else {
        return (!table.is_wrong(KEY)).then(FirstExchange::default);
    };
    let Some(target) = &defaults.roles_anywhere.target else {
        if !defaults.roles_anywhere_table.contains("trust_anchor_arn") {
            table.error(
                KEY,
                "no trust anchor is set",
                "add [roles_anywhere] with `trust_anchor_arn` and `profile_arn`",
            );
        }
        return None;
    };
    for key in ["policy", "policy_arns"] {
        if !table.missing(key) {
            table.error(
                key,
                "IAM Roles Anywhere takes no session policy with a call",
                "set it in the profile, and remove it here",
            );
        }
    }
    let exchange = kind(target.clone());
    if !exchange.uses_jwt() && table.contains("audience") {
        let what = "no JWT-SVID is fetched for this role";
        table.error("audience", what, "remove it");
    }
    // Unlike the endpoint, the region also has the workload's metadata service.
    if !exchange.uses_jwt() && table.contains("sts_endpoint") && table.missing("chain") {
        let what = "no STS is called for this role";
        table.error("sts_endpoint", what, "remove it, or add a [[role.chain]]");
    }
    Some(exchange)
}

/// Constructor of an exchange that has a target.
type TargetedExchange = fn(Arc<RolesAnywhereTarget>) -> FirstExchange;

/// Returns the region of a role that is assumed by a certificate alone.
pub(super) fn own_region(exchange: &Option<FirstExchange>) -> Option<String> {
    match exchange {
        Some(FirstExchange::RolesAnywhere(target)) => Some(target.region.clone()),
        _ => None,
    }
}

/// The ARN of a trust anchor or a profile.
struct RegionalArn {
    text: String,
    region: String,
}

impl RegionalArn {
    fn parse(text: &str, kind: &str) -> Result<Self, InvalidValue> {
        let parts: Vec<&str> = text.split(':').collect();
        let ["arn", partition, "rolesanywhere", region, account, resource] = parts[..] else {
            return Err("it is not an ARN of IAM Roles Anywhere".into());
        };
        let id = resource
            .strip_prefix(kind)
            .and_then(|rest| rest.strip_prefix('/'));
        let is_id = id.is_some_and(|id| {
            let is_allowed = |c: u8| c.is_ascii_alphanumeric() || c == b'-';
            !id.is_empty() && id.bytes().all(is_allowed)
        });
        if !is_id {
            return Err(format!("it is not the ARN of a {kind}").into());
        }
        if account.len() != 12 || !account.bytes().all(|c| c.is_ascii_digit()) {
            return Err("its account is not 12 digits".into());
        }
        let region = aws::region(region)?;
        if !aws::is_aws_region(&region) || partition != aws::partition(&region) {
            return Err(format!("AWS has no region {region:?} in `{partition}`").into());
        }
        Ok(Self {
            text: text.to_owned(),
            region,
        })
    }
}

/// Parses the endpoint. AWS's own client signs the path `/sessions` alone, so no path may stand
/// before it.
fn endpoint(text: &str) -> Result<String, InvalidValue> {
    let url = aws::sts_endpoint(text)?;
    let host = url.split("://").nth(1).unwrap_or_default();
    if host.contains('/') {
        return Err("it has a path".into());
    }
    Ok(url)
}

#[cfg(test)]
mod tests;
