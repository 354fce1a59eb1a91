//! Checks across tables: rules that hide others, duplicate names and audiences, and identities or
//! roles without use.

use std::path::Path;

use super::error::Problem;
use super::role::ParsedRole;
use super::sts::StsConfig;
use super::toml_reader::{Diagnostics, Location, Table};
use super::workload::{ParsedWorkload, literal};
use super::{DEV_ACCOUNT, DEV_TRUST_DOMAIN, aws};
use crate::role::RequestedRoles;
use crate::workload_rule::{AccountName, AccountState, CGROUP_GLOB, NamedRule, WorkloadRule};

const HIDDEN_FIX: &str = "move it up, or remove one of the two";

/// Checks that there are rules and roles where the source needs them. `by_rules` is whether rules
/// identify callers, if that is known.
pub(super) fn missing(
    root: &Table<'_>,
    requested_roles: &Table<'_>,
    by_rules: Option<bool>,
    workloads: &[ParsedWorkload],
) {
    if by_rules == Some(true) && root.missing("workload") {
        root.error(
            "workload",
            "no caller has an identity, so every request would be rejected",
            "add a [[workload]]",
        );
    }
    if let (Some(false), Some(first)) = (by_rules, workloads.first()) {
        let what = "the agent itself identifies callers, so the daemon never uses rules";
        root.report.error(
            &first.at(),
            what,
            "remove every [[workload]], or set source = \"workload-api\"",
        );
    }
    if root.missing("role") && requested_roles.missing("allow") {
        root.error(
            "role",
            "no caller has a role, so every request would be rejected",
            "add a [[role]]",
        );
    }
}

/// Checks that an STS exists for which `ca_file` counts.
pub(super) fn ca_file(table: &Table<'_>, sts: &StsConfig, roles: &[ParsedRole]) {
    let is_at_aws = |parsed: &ParsedRole| aws::is_aws(parsed.role.sts.endpoint.as_deref());
    if sts.ca_file.is_some() && roles.iter().all(is_at_aws) {
        let what = "no role uses an STS endpoint of its own, and AWS's are trusted by the system's certificates alone";
        table.error("ca_file", what, "remove it, or set `endpoint`");
    }
}

/// Checks the rules against one another.
pub(super) fn rules(report: &Diagnostics<'_>, workloads: &[ParsedWorkload]) {
    for (i, later) in workloads.iter().enumerate() {
        if let Some(earlier) = workloads[..i]
            .iter()
            .find(|earlier| covers(&earlier.rule, &later.rule))
        {
            let what = format!(
                "this rule can never match: {} matches all of its callers first",
                line_ref(&earlier.at())
            );
            report.warn(&later.at(), what, HIDDEN_FIX);
        } else if let Some(other) = workloads[..i]
            .iter()
            .find(|other| differ_only_by_exe(&other.rule, &later.rule))
        {
            let what = format!(
                "only `exe` separates its callers from those of {}",
                line_ref(&other.at())
            );
            let fix =
                "give each program its own user: programs of one user can impersonate each other";
            report.warn(&later.at(), what, fix);
        }
    }
}

/// Warns of rules that are shadowed only by the numbers of users and groups on this node.
pub(super) fn shadowed(
    workloads: &[ParsedWorkload],
    number: impl Fn(&AccountName) -> AccountState,
) -> Vec<Problem> {
    let resolved: Vec<Option<NamedRule>> = workloads
        .iter()
        .map(|workload| workload.rule.resolve(&number).map(NamedRule::from))
        .collect();
    let mut warnings = Vec::new();
    for (i, later) in resolved
        .iter()
        .enumerate()
        .filter_map(|(i, rule)| Some((i, rule.as_ref()?)))
    {
        let hides = |earlier: &Option<NamedRule>| {
            earlier
                .as_ref()
                .is_some_and(|earlier| covers(earlier, later))
        };
        let by_text = |earlier: &ParsedWorkload| covers(&earlier.rule, &workloads[i].rule);
        if workloads[..i].iter().any(by_text) {
            continue;
        }
        let Some(earlier) = resolved[..i].iter().position(hides) else {
            continue;
        };
        let what = format!(
            "this rule can never match on this node: {} matches all of its callers first",
            line_ref(&workloads[earlier].at())
        );
        let Location { line, key } = workloads[i].at();
        warnings.push(Problem {
            line,
            key,
            what,
            fix: HIDDEN_FIX.to_owned(),
        });
    }
    warnings
}

fn line_ref(at: &Location) -> String {
    at.line.as_ref().map_or_else(
        || "another".to_owned(),
        |line| format!("the one in line {line}"),
    )
}

/// Returns whether every caller that `later` matches is matched by `earlier`.
fn covers(earlier: &NamedRule, later: &NamedRule) -> bool {
    fn implied<T: PartialEq>(earlier: &Option<T>, later: &Option<T>) -> bool {
        earlier.is_none() || earlier == later
    }
    let names = implied(&earlier.user, &later.user)
        && implied(&earlier.group, &later.group)
        && implied(&earlier.supplementary_group, &later.supplementary_group);
    let (earlier, later) = (&earlier.rule, &later.rule);
    let cgroup = match (&earlier.cgroup, &later.cgroup) {
        (None, None) => true,
        // Without `cgroup` a rule is for callers outside containers. The later one may be for those
        // inside.
        (None, Some(_)) | (Some(_), None) => false,
        (Some(a), Some(b)) => glob_covers(a, b),
    };
    names
        && cgroup
        && implied(&earlier.uid, &later.uid)
        && implied(&earlier.gid, &later.gid)
        && implied(&earlier.supplementary_group, &later.supplementary_group)
        && implied(&earlier.exe, &later.exe)
        && implied(&earlier.systemd_unit, &later.systemd_unit)
}

/// Returns whether `a` surely matches each path that `b` matches. It does not compare two patterns
/// in general.
fn glob_covers(a: &glob::Pattern, b: &glob::Pattern) -> bool {
    let below = a
        .as_str()
        .strip_suffix("**")
        .filter(|prefix| prefix.ends_with('/') && !prefix.contains(['*', '?', '[']));
    a == b
        || literal(b).is_some_and(|path| a.matches_with(path, CGROUP_GLOB))
        || below.is_some_and(|prefix| b.as_str().starts_with(prefix))
}

/// Returns whether the executable alone separates two identities (T7).
fn differ_only_by_exe(a: &NamedRule, b: &NamedRule) -> bool {
    let exe = WorkloadRule {
        spiffe_id: a.spiffe_id().clone(),
        exe: a.rule.exe.clone(),
        ..b.rule.clone()
    };
    let with_its_exe = NamedRule {
        rule: exe,
        ..b.clone()
    };
    a.spiffe_id() != b.spiffe_id()
        && a.rule.exe.is_some()
        && b.rule.exe.is_some()
        && *a == with_its_exe
}

/// Checks the roles against one another, and the destinations of their tokens.
pub(super) fn roles(
    report: &Diagnostics<'_>,
    roles: &[ParsedRole],
    requested: Option<&RequestedRoles>,
) {
    for (i, later) in roles.iter().enumerate() {
        if let Some(earlier) = roles[..i]
            .iter()
            .find(|earlier| earlier.role.name == later.role.name)
        {
            let what = format!("{} has this name, too", line_ref(&earlier.name_at));
            report.error(&later.name_at, what, "give each role its own name");
        } else if let Some(earlier) = roles[..i].iter().find(|earlier| hides(earlier, later)) {
            let what = format!(
                "/v1/credentials answers its workloads with {} instead, which covers all of them; this role is served by its name only",
                line_ref(&earlier.name_at)
            );
            report.warn(
                &later.name_at,
                what,
                "move it up, unless workloads request it by name",
            );
        }
    }
    audiences(report, roles, requested);
}

/// Returns whether `later` is narrower than `earlier`, so that its workloads never get it by
/// default. Two roles for the same IDs are intended: workloads request one of them by its name.
fn hides(earlier: &ParsedRole, later: &ParsedRole) -> bool {
    let (wide, narrow) = (&earlier.role.spiffe_id, &later.role.spiffe_id);
    wide.covers(narrow) && !narrow.covers(wide)
}

/// Checks that an audience belongs to one endpoint. Each STS that accepts it could use a token
/// (T8). A role that is assumed by a certificate sends none, whatever its chain.
fn audiences(report: &Diagnostics<'_>, roles: &[ParsedRole], requested: Option<&RequestedRoles>) {
    let at_aws = requested.map(|requested| (requested.audience.as_str(), "AWS"));
    let mut seen: Vec<(&str, &str)> = at_aws.into_iter().collect();
    for defined in roles
        .iter()
        .filter(|defined| !defined.allow_shared_audience && defined.role.exchange.uses_jwt())
    {
        let audience = defined.role.audience.as_str();
        let url = defined.role.sts.endpoint.as_deref();
        let is_aws = aws::is_aws(url);
        let operator = if is_aws {
            "AWS"
        } else {
            url.unwrap_or_default()
        };
        let other = if aws::is_aws_sts_host(audience) && !is_aws {
            Some("AWS")
        } else {
            seen.iter()
                .find(|(known, at)| *known == audience && *at != operator)
                .map(|(_, at)| *at)
        };
        if let Some(other) = other {
            let what = format!(
                "tokens for {audience:?} go to {operator}, and its operator could use them at {other}"
            );
            let fix = "set an `audience` that only this endpoint accepts, or `allow_shared_audience = true` in the role";
            report.error(&defined.audience_at, what, fix);
        }
        seen.push((audience, operator));
    }
}

/// Rejects the names of `awsvid dev`. Its tokens end with it, and prove nothing elsewhere.
pub(super) fn names_of_dev(
    report: &Diagnostics<'_>,
    workloads: &[ParsedWorkload],
    roles: &[ParsedRole],
) {
    const FIX: &str = "use the names of your own SPIFFE provider and AWS account";
    let what = || {
        format!(
            "{DEV_TRUST_DOMAIN} is the trust domain of `awsvid dev`, which is not a provider for production"
        )
    };
    for workload in workloads
        .iter()
        .filter(|workload| workload.spiffe_id().trust_domain() == DEV_TRUST_DOMAIN)
    {
        report.error(&workload.at(), what(), FIX);
    }
    for defined in roles {
        if defined.role.spiffe_id.trust_domain() == DEV_TRUST_DOMAIN {
            report.error(&defined.name_at, what(), FIX);
        }
        // An STS that is not AWS's may have an account of this number.
        let is_aws = aws::is_aws(defined.role.sts.endpoint.as_deref());
        let chained = defined.role.chain.iter().map(|chained| &chained.role_arn);
        let mut arns = std::iter::once(&defined.role.role_arn).chain(chained);
        if is_aws && arns.any(|arn| arn.as_str().split(':').nth(4) == Some(DEV_ACCOUNT)) {
            let what =
                format!("no AWS account has the number {DEV_ACCOUNT}: it is that of `awsvid dev`");
            report.error(&defined.name_at, what, FIX);
        }
    }
}

/// Warns of identities without a role, and of roles without an identity.
pub(super) fn coverage(
    report: &Diagnostics<'_>,
    workloads: &[ParsedWorkload],
    roles: &[ParsedRole],
    any_role: bool,
) {
    for workload in workloads.iter().filter(|_| !any_role) {
        let id = workload.spiffe_id();
        if !roles
            .iter()
            .any(|defined| defined.role.spiffe_id.matches(id))
        {
            report.warn(
                &workload.at(),
                format!("no role is for {id}"),
                "add a [[role]] with this `spiffe_id`",
            );
        }
    }
    for defined in roles {
        let pattern = &defined.role.spiffe_id;
        let ids = workloads.iter().map(ParsedWorkload::spiffe_id);
        let mut ids = ids.filter(|id| pattern.matches(id)).peekable();
        if ids.peek().is_none() {
            let what = format!("no workload on this node is {}", pattern.as_str());
            report.warn(
                &defined.name_at,
                what,
                "add a [[workload]] with such a `spiffe_id`, or remove the role",
            );
        }
        if let Some(id) = ids.find(|id| defined.role.role_arn.render(id).is_none()) {
            let what = format!(
                "{id} cannot have it: with its path `role_arn` is longer than a role's name may be"
            );
            report.warn(
                &defined.name_at,
                what,
                "add a [[role]] for this ID alone, with a shorter `role_arn`",
            );
        }
    }
}

/// A table and key, and the path of the file or socket that they name.
pub(super) type PathSetting<'a> = (&'a Table<'a>, &'a str, Option<&'a Path>);

/// Checks that no two keys name the same path.
pub(super) fn paths(report: &Diagnostics<'_>, named: &[PathSetting<'_>]) {
    for (i, (table, key, path)) in named.iter().enumerate() {
        let Some(path) = path.filter(|_| !table.is_wrong(key)) else {
            continue;
        };
        let same =
            |(other, key, known): &&PathSetting<'_>| *known == Some(path) && !other.is_wrong(key);
        let Some((other, other_key, _)) = named[..i].iter().find(same) else {
            continue;
        };
        // One of the two may be a default; then the other is the one that the file has.
        let in_file = table.contains(key) || !other.contains(other_key);
        let (at, other) = match (table.location(key), other.location(other_key)) {
            (here, there) if in_file => (here, there),
            (here, there) => (there, here),
        };
        let what = format!("{} is also what `{}` names", path.display(), other.key);
        report.error(&at, what, "give each a path of its own");
    }
}
