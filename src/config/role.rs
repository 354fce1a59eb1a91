//! `[[role]]` and `[requested_roles]`: roles, and the SPIFFE IDs that may have them.

use std::sync::Arc;
use std::time::Duration;

use super::error::InvalidValue;
use super::identity::{IdentityConfig, audience};
use super::roles_anywhere::{self, RolesAnywhereConfig};
use super::sts::{ENDPOINT_FIX, REGION_FIX, StsConfig};
use super::templates::{LocatedTemplate, check_segment, check_values, policy, policy_arns};
use super::toml_reader::{Location, Table};
use super::{aws, chain};
use crate::identity::{ArnTemplate, RoleArn, SessionName, SpiffeIdPattern};
use crate::role::{RequestedRoles, Role, StsTarget};

/// The range of `DurationSeconds` at STS.
const DURATION: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(900)..=Duration::from_secs(43_200);
const DEFAULT_DURATION: Duration = Duration::from_secs(3600);
/// SDKs refresh 15 minutes and more before the end. For a shorter session each of their calls is a
/// request to awsvid.
const SHORT_DURATION: Duration = Duration::from_secs(1800);
/// The region for an endpoint that is not AWS's, if the file has none.
const ANY_REGION: &str = "us-east-1";
const MAX_ROLE_NAME_BYTES: usize = 64;

/// A role, and the facts for checks across tables.
pub(super) struct ParsedRole {
    pub(super) role: Arc<Role>,
    pub(super) allow_shared_audience: bool,
    pub(super) name_at: Location,
    pub(super) audience_at: Location,
}

/// The tables that a role falls back to.
pub(super) struct Defaults<'a> {
    pub(super) identity: &'a IdentityConfig,
    pub(super) identity_table: &'a Table<'a>,
    pub(super) sts: &'a StsConfig,
    pub(super) sts_table: &'a Table<'a>,
    pub(super) roles_anywhere: &'a RolesAnywhereConfig,
    pub(super) roles_anywhere_table: &'a Table<'a>,
}

/// Reads all `[[role]]`, and leaves out each one with an error.
pub(super) fn read(
    root: &Table<'_>,
    requested: &Table<'_>,
    defaults: &Defaults<'_>,
) -> Vec<ParsedRole> {
    let tables = root.tables("role");
    let roles = tables
        .iter()
        .filter_map(|table| role(table, defaults))
        .collect();
    let by_certificate = |table: &Table<'_>| {
        let exchange = table.value("exchange").and_then(|value| value.as_str());
        exchange == Some("roles-anywhere")
    };
    let has_region = |table: &Table<'_>| {
        table.contains("region") || table.contains("sts_endpoint") || by_certificate(table)
    };
    let needs_region = !requested.missing("allow") || !tables.iter().all(has_region);
    if needs_region
        && !defaults.sts_table.contains("region")
        && !defaults.sts_table.contains("endpoint")
    {
        defaults.sts_table.error(
            "region",
            "no AWS region is set",
            "add `region = \"eu-central-1\"` (or yours)",
        );
    }
    roles
}

fn check_presence(table: &Table<'_>) {
    table.require(
        "name",
        "add the name that stands in the path /v1/credentials/<name>",
    );
    table.require("spiffe_id", "add the SPIFFE ID that may have this role");
    table.require("role_arn", "add the ARN of the role");
}

fn role(table: &Table<'_>, defaults: &Defaults<'_>) -> Option<ParsedRole> {
    check_presence(table);
    let name = table.parse("name", "use up to 64 of A-Z a-z 0-9 . _ -", role_name);
    let spiffe_id = table.parse(
        "spiffe_id",
        "write an ID as in \"spiffe://example.org/billing\", or with * for a segment, ** for the rest",
        SpiffeIdPattern::parse,
    );
    let own_audience = table.parse(
        "audience",
        "write what STS expects as the audience of a token",
        audience,
    );
    let duration = table.duration("duration", DURATION);
    let session_name = table.parse(
        "session_name",
        "leave it out to get one from the SPIFFE ID",
        SessionName::parse,
    );
    let region = table.parse("region", REGION_FIX, aws::region);
    let endpoint = table.parse("sts_endpoint", ENDPOINT_FIX, aws::sts_endpoint);
    let policy = policy(table);
    let names = RoleNameRules::of(table, endpoint.as_deref(), defaults);
    let role_arn = role_arn(table, names);
    let policy_arns = policy_arns(table, names);
    let chain = chain::read(table, spiffe_id.as_ref(), names);
    let allow_shared_audience = table.flag("allow_shared_audience").unwrap_or(false);
    let duration = whole_seconds(table, duration);
    let exchange = roles_anywhere::exchange(table, defaults);

    // If the destination of the tokens is unknown, the checks below and those across roles mean
    // nothing.
    let own_is_wrong = ["audience", "region", "sts_endpoint"]
        .iter()
        .any(|key| table.is_wrong(key));
    if own_is_wrong || (own_audience.is_none() && defaults.identity_table.is_wrong("audience")) {
        return None;
    }
    let role = Role {
        name: name?,
        spiffe_id: spiffe_id?,
        role_arn: role_arn?,
        audience: own_audience.unwrap_or_else(|| defaults.identity.audience.clone()),
        duration,
        session_name,
        sts: target(
            region.or(roles_anywhere::own_region(&exchange)),
            endpoint,
            defaults,
        )?,
        policy,
        policy_arns,
        exchange: exchange?,
        chain: chain?,
    };
    check(table, &role);
    Some(ParsedRole {
        role: Arc::new(role),
        allow_shared_audience,
        name_at: table.location("name"),
        audience_at: table.location("audience"),
    })
}

/// The rules for the names of a role and its policies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RoleNameRules {
    Aws,
    /// No rules, because the names are those of another STS, or the endpoint has an error.
    Opaque,
}

impl RoleNameRules {
    /// Returns the rules for a role, where `own` is its own endpoint.
    fn of(table: &Table<'_>, own: Option<&str>, defaults: &Defaults<'_>) -> Self {
        let own_is_wrong = table.is_wrong("sts_endpoint");
        let default_is_wrong = own.is_none() && defaults.sts_table.is_wrong("endpoint");
        let endpoint = own.or(defaults.sts.endpoint.as_deref());
        if own_is_wrong || default_is_wrong || !aws::is_aws(endpoint) {
            Self::Opaque
        } else {
            Self::Aws
        }
    }
}

/// Reads the key `role_arn`.
pub(super) fn role_arn(table: &Table<'_>, names: RoleNameRules) -> Option<ArnTemplate> {
    const AT_AWS: &str = "write the role's ARN as IAM shows it; for a role of another system set \
                          `sts_endpoint` here, or `endpoint` in [sts]";
    match names {
        RoleNameRules::Aws => table.parse("role_arn", AT_AWS, ArnTemplate::parse),
        RoleNameRules::Opaque => table.parse(
            "role_arn",
            "write the role's name as its STS has it",
            ArnTemplate::opaque,
        ),
    }
}

/// Returns the region and endpoint of a role with these of its own, or `None` if they are unknown.
fn target(
    region: Option<String>,
    endpoint: Option<String>,
    defaults: &Defaults<'_>,
) -> Option<StsTarget> {
    if endpoint.is_none() && defaults.sts_table.is_wrong("endpoint") {
        return None;
    }
    let endpoint = endpoint.or_else(|| defaults.sts.endpoint.clone());
    let fallback = endpoint.as_ref().map(|_| ANY_REGION.to_owned());
    let region = region
        .or_else(|| defaults.sts.region.clone())
        .or(fallback)?;
    Some(StsTarget { region, endpoint })
}

fn role_name(text: &str) -> Result<String, &'static str> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    match text {
        "" => Err("it is empty"),
        "." | ".." => Err("clients would take it out of the path"),
        _ if text.starts_with("arn:") => {
            Err("a name that begins with arn: would be taken for a role's ARN")
        }
        _ if text.len() > MAX_ROLE_NAME_BYTES => Err("it is too long"),
        _ if !text.bytes().all(allowed) => {
            Err("it holds a character that the path of a URL cannot hold as it is")
        }
        _ => Ok(text.to_owned()),
    }
}

/// Returns the duration of a session, by default one hour, and checks it.
pub(super) fn whole_seconds(table: &Table<'_>, duration: Option<Duration>) -> Duration {
    let duration = duration.unwrap_or(DEFAULT_DURATION);
    if duration.subsec_nanos() != 0 {
        table.error(
            "duration",
            "STS counts in whole seconds",
            "leave out what is less",
        );
    }
    if duration < SHORT_DURATION {
        table.warn(
            "duration",
            "below 30m SDKs fetch credentials for every call",
            "use \"30m\" or more",
        );
    }
    duration
}

/// Checks the keys of one role against each other.
fn check(table: &Table<'_>, role: &Role) {
    if let Some(index) = role.role_arn.highest_segment() {
        check_segment(table, &table.location("role_arn"), &role.spiffe_id, index);
    }
    let policies = role.policy.iter().map(|template| ("policy", template));
    let policy_arns = role.policy_arns.iter();
    let templates: Vec<LocatedTemplate<'_>> = policies
        .chain(policy_arns.map(|template| ("policy_arns", template)))
        .map(|(key, template)| (table.location(key), template))
        .collect();
    check_values(table, &role.spiffe_id, &templates);
    let used = role.segments_used();
    if used
        .as_ref()
        .is_some_and(|used| role.spiffe_id.has_open_wildcard(used))
    {
        let what = "a new name instead of `*` is enough to have this role";
        table.warn(
            "spiffe_id",
            what,
            "write the whole ID, or use {path[N]} for each `*` in `role_arn`",
        );
    }
    if role.spiffe_id.is_all_wildcards() && used.is_some_and(|used| used.is_empty()) {
        let what = format!(
            "every workload of {} can have this role",
            role.spiffe_id.trust_domain()
        );
        table.warn(
            "spiffe_id",
            what,
            "name the workloads, or use {path[N]} in `role_arn`",
        );
    }
    if role.session_name.is_some() && role.spiffe_id.exact().is_none() {
        let what = "all workloads of this role have the same name in CloudTrail";
        table.warn(
            "session_name",
            what,
            "leave it out to get one from the SPIFFE ID",
        );
    }
    let StsTarget { region, endpoint } = &role.sts;
    if endpoint.is_none() && table.contains("region") && !aws::is_aws_region(region) {
        table.error("region", "AWS has no region of such a name", REGION_FIX);
    }
    let arns = role.chain.iter().map(|chained| &chained.role_arn);
    for arn in std::iter::once(&role.role_arn).chain(arns) {
        let partition = arn.as_str().split(':').nth(1).unwrap_or_default();
        if endpoint.is_none() && partition != aws::partition(region) {
            let what = format!("a role in `{partition}` cannot be assumed in {region}");
            table.warn("role_arn", what, "set `region` to one of that partition");
        }
    }
}

/// Reads the table `[requested_roles]`.
pub(super) fn read_requested(table: &Table<'_>, defaults: &Defaults<'_>) -> Option<RequestedRoles> {
    const KEY: &str = "allow";
    let listed = table.strings(KEY)?;
    let mut allowed = Vec::with_capacity(listed.len());
    for (at, text) in &listed {
        match requested_pattern(text) {
            Ok(pattern) => allowed.push(pattern),
            Err(error) => {
                let fix = "write ARNs as in \"arn:aws:iam::123456789012:role/app-*\"";
                table.report.error(at, format!("{text:?}: {error}"), fix);
            }
        }
        if text
            .split(':')
            .nth(4)
            .is_some_and(|account| account.contains(['*', '?', '[']))
        {
            table.report.warn(
                at,
                "a workload may have roles of any account",
                "write the account's 12 digits",
            );
        }
    }
    if listed.is_empty() {
        return None;
    }
    let sts = target(None, None, defaults)?;
    if !aws::is_aws(sts.endpoint.as_deref()) {
        let what = "only AWS's trust policies bound what a workload may request, and [sts] endpoint is not AWS's";
        table.error(KEY, what, "remove it, and define each role as [[role]]");
    }
    Some(RequestedRoles {
        allowed,
        audience: defaults.identity.audience.clone(),
        sts,
    })
}

/// Parses a glob for role ARNs. With text instead of its wildcards it must be the ARN of a role at
/// AWS.
fn requested_pattern(text: &str) -> Result<glob::Pattern, InvalidValue> {
    let pattern = glob::Pattern::new(text).map_err(|error| error.msg)?;
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    let [arn, partition, service, region, account, resource] = parts[..] else {
        return Err("it is not the ARN of a role".into());
    };
    let digits = if account.contains(['*', '?', '[']) {
        "123456789012"
    } else {
        account
    };
    let name = resource
        .replace("**", "x")
        .replace(['*', '?', '[', ']', '!'], "x");
    RoleArn::parse(&[arn, partition, service, region, digits, &name].join(":"))
        .map_err(|error| error.to_string())?;
    Ok(pattern)
}
