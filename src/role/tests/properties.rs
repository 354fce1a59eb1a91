//! The selection of a role, compared with a model that works on texts.

use std::collections::BTreeSet;

use super::*;
use crate::random_cases::for_random_cases;

const CASES: u64 = 3000;
const NAMES: [&str; 4] = ["a", "b", "c", "missing"];
const PATTERNS: [&str; 7] = ["a", "a/b", "a/c", "a/*", "*/b", "**", "x"];
const PATHS: [&str; 6] = ["a", "a/b", "a/c", "b/b", "a/b/c", "x"];
const ARNS: [&str; 3] = ["fixed", "app-{path[0]}", "app-{path[1]}"];

/// One role of the model: name, pattern, and template.
type ModelRole = (&'static str, &'static str, &'static str);
/// One identity of the model: path and hint.
type ModelIdentity = (&'static str, Option<&'static str>);

fn choose(random: &mut fastrand::Rng, list: &[&'static str]) -> &'static str {
    list[random.usize(..list.len())]
}

/// Returns up to three roles with different names.
fn model_roles(random: &mut fastrand::Rng) -> Vec<ModelRole> {
    let mut names = NAMES[..3].to_vec();
    random.shuffle(&mut names);
    names.truncate(random.usize(..4));
    let role = |name| (name, choose(random, &PATTERNS), choose(random, &ARNS));
    names.into_iter().map(role).collect()
}

fn matches(pattern: &str, path: &str) -> bool {
    match (pattern.split_once('/'), path.split_once('/')) {
        _ if pattern == "**" => true,
        (Some((first, pattern)), Some((segment, path))) => {
            (first == "*" || first == segment) && matches(pattern, path)
        }
        (None, None) => pattern == "*" || pattern == path,
        _ => false,
    }
}

/// Returns the ARN's last part for this path, or `None` if the path has too few segments.
fn render(template: &str, path: &str) -> Option<String> {
    let segments: Vec<&str> = path.split('/').collect();
    let mut name = template.to_owned();
    for index in 0..2 {
        let placeholder = format!("{{path[{index}]}}");
        if name.contains(&placeholder) {
            name = name.replace(&placeholder, segments.get(index)?);
        }
    }
    Some(name)
}

/// Returns the path and ARN that a role grants, the reason of a denial, or `None` without a match.
fn model_grant(
    (name, pattern, template): ModelRole,
    identities: &[ModelIdentity],
) -> Option<Result<(String, String), &'static str>> {
    let paths = |hint: Option<&str>| -> BTreeSet<&str> {
        identities
            .iter()
            .filter(|(path, _)| matches(pattern, path))
            .filter(|(_, own)| hint.is_none() || *own == hint)
            .map(|(path, _)| *path)
            .collect()
    };
    let (all, hinted) = (paths(None), paths(Some(name)));
    let path = match (all.len(), hinted.len()) {
        (0, _) => return None,
        (1, _) => all.first()?,
        (_, 1) => hinted.first()?,
        _ => return Some(Err("several_identities")),
    };
    Some(Ok(((*path).to_owned(), render(template, path)?)))
}

fn model(
    roles: &[ModelRole],
    identities: &[ModelIdentity],
    requested: Option<&str>,
) -> Result<(String, String), &'static str> {
    let mut candidates = roles
        .iter()
        .filter(|(name, ..)| requested.is_none_or(|requested| requested == *name))
        .filter_map(|role| model_grant(*role, identities));
    let denied = if requested.is_some() {
        "not_this_role"
    } else {
        "no_role"
    };
    candidates.next().unwrap_or(Err(denied))
}

#[test]
fn select_agrees_with_a_model() {
    for_random_cases(CASES, |random| {
        let model_roles = model_roles(random);
        let mut callers: Vec<ModelIdentity> = (0..random.usize(..5))
            .map(|_| {
                let hint = random.bool().then(|| choose(random, &NAMES));
                (choose(random, &PATHS), hint)
            })
            .collect();
        let name = random.bool().then(|| choose(random, &NAMES));
        let expected = model(&model_roles, &callers, name);
        let roles = roles(
            model_roles
                .iter()
                .map(|(name, pattern, arn)| role(name, pattern, arn)),
        );
        let requested = name.map_or(RequestedRole::Default, |name| {
            RequestedRole::ByName(name.to_owned())
        });
        // The order of the identities means nothing.
        for _ in 0..3 {
            random.shuffle(&mut callers);
            let identities: Vec<_> = callers
                .iter()
                .map(|(path, hint)| Identity {
                    hint: hint.map(str::to_owned),
                    ..identities(&[path]).remove(0)
                })
                .collect();
            let granted = roles.select(&identities, &AttestedFacts::default(), &requested);
            let selected = granted.as_ref().map(|grant| {
                let path = grant
                    .spiffe_id
                    .as_str()
                    .replace("spiffe://example.org/", "");
                let arn = grant
                    .role_arn
                    .as_str()
                    .rsplit('/')
                    .next()
                    .unwrap_or_default();
                (path, arn.to_owned())
            });
            assert_eq!(
                selected.map_err(|denied| denied.reason()),
                expected,
                "{model_roles:?} {callers:?} {requested:?}"
            );
            // A reload keeps what the same roles grant.
            assert!(granted.is_err() || granted.is_ok_and(|grant| roles.can_grant(&grant)));
        }
    });
}
