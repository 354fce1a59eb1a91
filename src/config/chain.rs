//! `[[role.chain]]`: the roles of a chain after the first one.

use std::time::Duration;

use super::role::{RoleNameRules, role_arn, whole_seconds};
use super::templates::{
    LocatedTemplate, check_count, check_segment, check_values, distinct_template, policy,
    policy_arns, template,
};
use super::toml_reader::{Location, Table};
use crate::identity::{InvalidName, SessionName, SpiffeIdPattern, Template};
use crate::role::parameters::{
    MAX_TAGS, check_external_id, check_source_identity, check_tag_key, check_tag_value,
};
use crate::role::{ChainedRole, MAX_CHAINED_DURATION, MAX_CHAINED_ROLES};

/// The range of `DurationSeconds` at STS, where another session's credentials sign the call.
const DURATION: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(900)..=MAX_CHAINED_DURATION;

/// Reads all `[[role.chain]]` of a role. `None` if one lacks a part, which is an error.
pub(super) fn read(
    role: &Table<'_>,
    pattern: Option<&SpiffeIdPattern>,
    names: RoleNameRules,
) -> Option<Vec<ChainedRole>> {
    let tables = role.tables("chain");
    if let Some(extra) = tables.get(MAX_CHAINED_ROLES) {
        let what = format!("a chain has at most {MAX_CHAINED_ROLES} roles after the first one");
        role.report
            .error(&extra.at(), what, "remove this [[role.chain]]");
    }
    let chain: Vec<Option<ChainedRole>> = tables
        .iter()
        .map(|table| {
            let chained = chained_role(table, names)?;
            if let Some(pattern) = pattern {
                check(table, pattern, &chained);
            }
            Some(chained)
        })
        .collect();
    check_inherited(&tables, &chain);
    chain.into_iter().collect()
}

fn chained_role(table: &Table<'_>, names: RoleNameRules) -> Option<ChainedRole> {
    table.require("role_arn", "add the ARN of the role");
    let duration = table.duration("duration", DURATION);
    let tags = tags(table);
    let transitive_tags = transitive_tags(table, &tags);
    let session_name = table.parse(
        "session_name",
        "leave it out to get the first session's name",
        |text| template(text, |text| SessionName::parse(text).map(drop)),
    );
    let source_identity = table.parse(
        "source_identity",
        "use {path[N]}, {trust_domain}, {session_name} and these characters",
        |text| template(text, check_source_identity),
    );
    let external_id = table.parse(
        "external_id",
        "write the ID that the role's trust policy compares",
        |text| distinct_template(text, check_external_id),
    );
    let (policy, policy_arns) = (policy(table), policy_arns(table, names));
    Some(ChainedRole {
        duration: whole_seconds(table, duration),
        role_arn: role_arn(table, names)?,
        external_id,
        // The default is a template without an error.
        session_name: session_name.or_else(|| Template::parse("{session_name}").ok())?,
        source_identity,
        tags: tags
            .into_iter()
            .map(|(_, key, value)| (key, value))
            .collect(),
        transitive_tags,
        policy,
        policy_arns,
    })
}

/// Reads the tags, without those that have an error.
fn tags(table: &Table<'_>) -> Vec<(Location, String, Template)> {
    const FIX: &str = "write tags as in { \"team\" = \"{path[1]}\" }";
    let listed = table.string_map("tags").unwrap_or_default();
    check_count(table, "tags", listed.len(), MAX_TAGS);
    let mut tags: Vec<(Location, String, Template)> = Vec::with_capacity(listed.len());
    for (at, key, text) in listed {
        if let Err(error) = check_tag_key(&key) {
            table.report.error(&at, format!("{key:?}: {error}"), FIX);
        }
        if let Some((_, same, _)) = tags.iter().find(|(_, other, _)| is_same_key(other, &key)) {
            let what = format!("STS takes {key:?} and {same:?} for one key");
            table.report.error(&at, what, "remove one of the two");
        }
        match distinct_template(text, check_tag_value) {
            Ok(value) => tags.push((at, key, value)),
            Err(error) => table.report.error(&at, format!("{text:?}: {error}"), FIX),
        }
    }
    tags
}

/// Returns whether two texts are one key of a tag. STS ignores the case of ASCII.
fn is_same_key(one: &str, other: &str) -> bool {
    one.to_lowercase() == other.to_lowercase()
}

fn transitive_tags(table: &Table<'_>, tags: &[(Location, String, Template)]) -> Vec<String> {
    const KEY: &str = "transitive_tags";
    let listed = table.strings(KEY).unwrap_or_default();
    check_count(table, KEY, listed.len(), MAX_TAGS);
    let is_tag = |text: &str| tags.iter().any(|(_, key, _)| key == text);
    for (at, text) in listed.iter().filter(|(_, text)| !is_tag(text)) {
        let what = format!("no key in `tags` of this role is {text:?}");
        let fix = "add it to `tags`, or remove it here";
        table.report.error(at, what, fix);
    }
    listed
        .into_iter()
        .map(|(_, text)| text.to_owned())
        .collect()
}

/// Checks the templates of one role by the SPIFFE IDs that have them.
fn check(table: &Table<'_>, pattern: &SpiffeIdPattern, chained: &ChainedRole) {
    for index in chained.role_arn.segments() {
        check_segment(table, &table.location("role_arn"), pattern, index);
    }
    let located = |(key, name, template)| match name {
        Some(name) => (table.location_in(key, name), template),
        None => (table.location(key), template),
    };
    let located: Vec<LocatedTemplate<'_>> = chained.templates().map(located).collect();
    check_values(table, pattern, &located);
    let source_identity = chained.source_identity.iter();
    for (key, template) in source_identity
        .map(|template| ("source_identity", template))
        .chain([("session_name", &chained.session_name)])
    {
        if let Err(InvalidName(error)) = template.check_separators() {
            table.warn(
                key,
                error,
                "use {session_name}, which no two SPIFFE IDs share",
            );
        }
    }
    if pattern.exact().is_none() && chained.session_name.is_constant() {
        let what = "all workloads of this role have the same name in CloudTrail";
        let fix = "leave it out to get one from the SPIFFE ID";
        table.warn("session_name", what, fix);
    }
}

/// Checks what a session keeps of those before it: STS rejects a call that would change it.
fn check_inherited(tables: &[Table<'_>], chain: &[Option<ChainedRole>]) {
    let roles = || {
        let pairs = tables.iter().zip(chain);
        pairs.filter_map(|(table, chained)| Some((table, chained.as_ref()?)))
    };
    let mut has_source_identity = false;
    let mut inherited: Vec<&String> = Vec::new();
    for (table, chained) in roles() {
        if chained.source_identity.is_some() && has_source_identity {
            let what = "a session before it has set the source identity, which stays";
            table.error("source_identity", what, "set it in one role of the chain");
        }
        has_source_identity |= chained.source_identity.is_some();
        for (key, _) in &chained.tags {
            if let Some(before) = inherited.iter().find(|before| is_same_key(before, key)) {
                let what = format!("the transitive tag {before:?} of a session before it stays");
                let fix = "remove it here, or from `transitive_tags` before";
                table
                    .report
                    .error(&table.location_in("tags", key), what, fix);
            }
        }
        inherited.extend(&chained.transitive_tags);
    }
}
