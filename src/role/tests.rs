mod chains;
mod properties;

use super::*;

fn role(name: &str, spiffe_id: &str, arn: &str) -> Role {
    Role {
        name: name.to_owned(),
        spiffe_id: SpiffeIdPattern::parse(&format!("spiffe://example.org/{spiffe_id}")).unwrap(),
        role_arn: ArnTemplate::parse(&format!("arn:aws:iam::123456789012:role/{arn}")).unwrap(),
        duration: Duration::from_secs(900),
        ..Role::example()
    }
}

fn roles(defined: impl IntoIterator<Item = Role>) -> Roles {
    Roles {
        defined: defined.into_iter().map(Arc::new).collect(),
        requested: None,
    }
}

/// Returns identities from texts of the form `path` or `path hint`.
fn identities(list: &[&str]) -> Vec<Identity> {
    let one = |text: &&str| {
        let (path, hint) = text
            .split_once(' ')
            .map_or((*text, None), |(path, hint)| (path, Some(hint.to_owned())));
        Identity {
            spiffe_id: SpiffeId::parse(&format!("spiffe://example.org/{path}")).unwrap(),
            hint,
        }
    };
    list.iter().map(one).collect()
}

/// Returns the selected role's name and the SPIFFE ID's path, or the reason of the denial.
fn choice(roles: &Roles, callers: &[&str], requested: &RequestedRole) -> String {
    match roles.select(&identities(callers), &AttestedFacts::default(), requested) {
        Ok(grant) => {
            format!(
                "{} as {}",
                grant.role.name,
                grant
                    .spiffe_id
                    .as_str()
                    .replace("spiffe://example.org/", "")
            )
        }
        Err(denied) => denied.reason().to_owned(),
    }
}

#[test]
fn select_returns_the_first_or_the_named_role() {
    let roles = roles([
        role("reader", "shop/reader", "reader"),
        role("billing", "shop/billing", "billing"),
        role("any", "shop/*", "any"),
        role("admin", "admin", "admin"),
    ]);
    let named = |name: &str| RequestedRole::ByName(name.to_owned());
    let table = [
        (
            "shop/reader",
            RequestedRole::Default,
            "reader as shop/reader",
        ),
        (
            "shop/billing",
            RequestedRole::Default,
            "billing as shop/billing",
        ),
        ("shop/other", RequestedRole::Default, "any as shop/other"),
        ("shop", RequestedRole::Default, "no_role"),
        ("shop/billing/x", RequestedRole::Default, "no_role"),
        ("shop/billing", named("any"), "any as shop/billing"),
        ("shop/billing", named("billing"), "billing as shop/billing"),
        // Without a match, or without such a role: both have one error, so that names cannot be
        // probed.
        ("shop/billing", named("reader"), "not_this_role"),
        ("shop/billing", named("admin"), "not_this_role"),
        ("shop/billing", named("missing"), "not_this_role"),
        ("shop/billing", named("Billing"), "not_this_role"),
        ("shop/billing", named(""), "not_this_role"),
    ];
    for (caller, requested, expected) in table {
        assert_eq!(
            choice(&roles, &[caller], &requested),
            expected,
            "{caller} {requested:?}"
        );
    }
    assert_eq!(choice(&roles, &[], &RequestedRole::Default), "no_role");
    assert_eq!(choice(&roles, &[], &named("billing")), "not_this_role");
    assert_eq!(
        choice(
            &Roles::default(),
            &["shop/billing"],
            &RequestedRole::Default
        ),
        "no_role"
    );
}

#[test]
fn select_ignores_the_position_of_identities() {
    let roles = roles([
        role("billing", "shop/*", "billing"),
        role("reader", "read/*", "reader"),
        role("exact", "shop/a", "exact"),
    ]);
    let named = |name: &str| RequestedRole::ByName(name.to_owned());
    let table: [(&[&str], RequestedRole, &str); 20] = [
        (
            &["shop/a", "shop/b"],
            RequestedRole::Default,
            "several_identities",
        ),
        (
            &["shop/b", "shop/a"],
            RequestedRole::Default,
            "several_identities",
        ),
        (
            &["shop/a", "shop/b"],
            named("billing"),
            "several_identities",
        ),
        // Only one of them matches the role.
        (
            &["shop/a", "read/b"],
            RequestedRole::Default,
            "billing as shop/a",
        ),
        (
            &["read/b", "shop/a"],
            RequestedRole::Default,
            "billing as shop/a",
        ),
        (&["shop/a", "read/b"], named("reader"), "reader as read/b"),
        (
            &["other/a", "other/b", "read/c"],
            RequestedRole::Default,
            "reader as read/c",
        ),
        (&["other/a", "other/b"], RequestedRole::Default, "no_role"),
        (&["shop/a", "shop/b"], named("exact"), "exact as shop/a"),
        // The hint is the role's name.
        (
            &["shop/a", "shop/b billing"],
            RequestedRole::Default,
            "billing as shop/b",
        ),
        (
            &["shop/a billing", "shop/b reader"],
            named("billing"),
            "billing as shop/a",
        ),
        (
            &["shop/a billing", "shop/b billing"],
            RequestedRole::Default,
            "several_identities",
        ),
        (
            &["shop/a reader", "shop/b other"],
            RequestedRole::Default,
            "several_identities",
        ),
        // An identity with several entries counts once, and has each of its hints.
        (
            &["shop/a", "shop/a"],
            RequestedRole::Default,
            "billing as shop/a",
        ),
        (
            &["shop/a x", "shop/a y", "read/b"],
            RequestedRole::Default,
            "billing as shop/a",
        ),
        (
            &["shop/a x", "shop/b", "shop/a billing"],
            RequestedRole::Default,
            "billing as shop/a",
        ),
        (
            &["shop/a billing", "shop/b", "shop/a x"],
            RequestedRole::Default,
            "billing as shop/a",
        ),
        (
            &["shop/a billing", "shop/a billing", "shop/b"],
            RequestedRole::Default,
            "billing as shop/a",
        ),
        (
            &["shop/a billing", "shop/b billing", "shop/a"],
            RequestedRole::Default,
            "several_identities",
        ),
        // A hint does not grant a role that does not match.
        (&["other/a billing"], RequestedRole::Default, "no_role"),
    ];
    for (callers, requested, expected) in table {
        assert_eq!(
            choice(&roles, callers, &requested),
            expected,
            "{callers:?} {requested:?}"
        );
    }
}

#[test]
fn grant_has_everything_that_is_requested() {
    let templated = role("shop", "ns/*/sa/*", "{path[1]}={path[3]}");
    let named = Role {
        session_name: Some(SessionName::parse("fixed").unwrap()),
        ..role("fixed", "ns/**", "fixed")
    };
    let roles = roles([templated.clone(), named]);
    let callers = identities(&["ns/pay/sa/billing"]);
    let grant = roles
        .select(&callers, &AttestedFacts::default(), &RequestedRole::Default)
        .unwrap();
    let expected = Grant {
        spiffe_id: callers[0].spiffe_id.clone(),
        role: Arc::new(templated),
        role_arn: RoleArn::parse("arn:aws:iam::123456789012:role/pay=billing").unwrap(),
        session_name: SessionName::parse("example.org=ns=pay=sa=billing").unwrap(),
        details: None,
    };
    assert_eq!(grant, expected);
    let fixed = roles
        .select(
            &callers,
            &AttestedFacts::default(),
            &RequestedRole::ByName("fixed".to_owned()),
        )
        .unwrap();
    assert_eq!(
        (fixed.session_name.as_str(), fixed.role_arn.as_str()),
        ("fixed", "arn:aws:iam::123456789012:role/fixed")
    );
}

#[test]
fn template_that_does_not_fit_denies_the_role() {
    let roles = roles([
        role("long", "**", "{path[0]}"),
        role("missing", "**", "{path[3]}"),
        role("last", "**", "last"),
    ]);
    let long = "x".repeat(65);
    assert_eq!(
        choice(&roles, &[&long], &RequestedRole::Default),
        format!("last as {long}")
    );
    assert_eq!(
        choice(
            &roles,
            &[&long],
            &RequestedRole::ByName("missing".to_owned())
        ),
        "not_this_role"
    );
}

/// Grants that differ in any part do not share credentials (T17).
#[test]
fn grant_differs_in_every_part_of_a_role() {
    let plain = role("a", "x", "r");
    let policy = |text: &str| Role {
        policy: Template::parse_json(text).ok(),
        ..plain.clone()
    };
    let sts = |region: &str, endpoint: Option<&str>| Role {
        sts: StsTarget {
            region: region.to_owned(),
            endpoint: endpoint.map(str::to_owned),
        },
        ..plain.clone()
    };
    let all = [
        plain.clone(),
        role("b", "x", "r"),
        role("a", "*", "r"),
        role("a", "x", "s"),
        Role {
            audience: "other".to_owned(),
            ..plain.clone()
        },
        Role {
            duration: Duration::from_secs(901),
            ..plain.clone()
        },
        Role {
            session_name: Some(SessionName::parse("s1").unwrap()),
            ..plain.clone()
        },
        sts("eu-west-1", None),
        sts("eu-central-1", Some("https://minio")),
        policy("{}"),
        policy("{\"a\":1}"),
        Role {
            policy_arns: vec![Template::parse("arn:aws:iam::aws:policy/ReadOnlyAccess").unwrap()],
            ..plain.clone()
        },
        Role {
            chain: vec![chains::chained("next")],
            ..plain.clone()
        },
        Role {
            chain: vec![chains::chained("next"), chains::chained("last")],
            ..plain.clone()
        },
    ];
    let keys: std::collections::HashSet<_> = all
        .iter()
        .map(|role| {
            roles([role.clone()])
                .select(
                    &identities(&["x"]),
                    &AttestedFacts::default(),
                    &RequestedRole::Default,
                )
                .unwrap()
        })
        .collect();
    assert_eq!(keys.len(), all.len());
}

fn requesting(allowed: &[&str]) -> Roles {
    let requested = RequestedRoles {
        allowed: allowed
            .iter()
            .map(|text| glob::Pattern::new(text).unwrap())
            .collect(),
        audience: "sts.amazonaws.com".to_owned(),
        sts: StsTarget {
            region: "eu-central-1".to_owned(),
            endpoint: None,
        },
    };
    Roles {
        requested: Some(requested),
        ..roles([role("billing", "shop/*", "billing")])
    }
}

fn arn(text: &str) -> RequestedRole {
    RequestedRole::ByArn(RoleArn::parse(text).unwrap())
}

#[test]
fn requested_arn_must_match_the_list() {
    let all = requesting(&[
        "arn:aws:iam::123456789012:role/app-*",
        "arn:aws:iam::123456789012:role/team/**",
    ]);
    let table = [
        ("arn:aws:iam::123456789012:role/app-x", true),
        ("arn:aws:iam::123456789012:role/team/a", true),
        ("arn:aws:iam::123456789012:role/team/a/b", true),
        ("arn:aws:iam::123456789012:role/APP-x", false),
        ("arn:aws:iam::123456789012:role/other", false),
        // `*` stays within a segment.
        ("arn:aws:iam::123456789012:role/app-x/admin", false),
        ("arn:aws:iam::999999999999:role/app-x", false),
        ("arn:aws-cn:iam::123456789012:role/app-x", false),
    ];
    for (text, allowed) in table {
        let expected = if allowed {
            format!("{text} as ns/a")
        } else {
            "arn_not_allowed".to_owned()
        };
        assert_eq!(choice(&all, &["ns/a"], &arn(text)), expected);
    }
    let requested = arn("arn:aws:iam::123456789012:role/app-x");
    assert_eq!(
        choice(&all, &["ns/a", "ns/b"], &requested),
        "several_identities"
    );
    assert_eq!(choice(&all, &[], &requested), "no_role");
    assert_eq!(choice(&roles([]), &["ns/a"], &requested), "arn_not_allowed");
    assert_eq!(
        choice(&requesting(&[]), &["ns/a"], &requested),
        "arn_not_allowed"
    );
    // A pattern that is too wide still allows only ARNs at AWS.
    let elsewhere = RequestedRole::ByArn(RoleArn::opaque("arn:minio:iam:::role/x").unwrap());
    assert_eq!(
        choice(&requesting(&["**"]), &["ns/a"], &elsewhere),
        "arn_not_allowed"
    );
    // An ARN does not bypass a [[role]], and a [[role]] does not bypass the list.
    assert_eq!(
        choice(
            &all,
            &["shop/a"],
            &arn("arn:aws:iam::123456789012:role/billing")
        ),
        "arn_not_allowed"
    );
    assert_eq!(choice(&all, &["ns/a"], &RequestedRole::Default), "no_role");
}

#[test]
fn requested_arn_is_not_a_template() {
    let caller = identities(&["admin"]);
    let all = requesting(&["arn:aws:iam::123456789012:role/*/x"]);
    // As a template, it would render a role that was never compared with the list.
    let written = "arn:aws:iam::123456789012:role/{path[0]}/x";
    let grant = all
        .select(&caller, &AttestedFacts::default(), &arn(written))
        .unwrap();
    assert_eq!(
        (grant.role_arn.as_str(), grant.session_name.as_str()),
        (written, "example.org=admin")
    );
    assert_eq!(
        grant.role.spiffe_id.exact().as_ref(),
        Some(&caller[0].spiffe_id)
    );
    assert_eq!(
        (grant.role.audience.as_str(), grant.role.sts.region.as_str()),
        ("sts.amazonaws.com", "eu-central-1")
    );
    assert_eq!(grant.role.duration, Duration::from_secs(3600));
    assert!(grant.role.policy.is_none() && grant.role.policy_arns.is_empty());
}

#[test]
fn can_grant_needs_the_same_definition() {
    let caller = identities(&["shop/billing"]);
    let before = Roles {
        requested: requesting(&["arn:aws:iam::123456789012:role/app-*"]).requested,
        ..roles([
            role("any", "shop/*", "any"),
            role("billing", "shop/billing", "billing"),
        ])
    };
    let billing = before
        .select(
            &caller,
            &AttestedFacts::default(),
            &RequestedRole::ByName("billing".to_owned()),
        )
        .unwrap();
    let by_arn = before
        .select(
            &caller,
            &AttestedFacts::default(),
            &arn("arn:aws:iam::123456789012:role/app-1"),
        )
        .unwrap();
    assert!(before.can_grant(&billing) && before.can_grant(&by_arn));
    // At another position of the list, and next to others.
    let moved = roles([
        role("billing", "shop/billing", "billing"),
        role("new", "**", "new"),
    ]);
    assert!(moved.can_grant(&billing) && !moved.can_grant(&by_arn));
    let narrowed = Role {
        policy: Template::parse_json("{}").ok(),
        ..role("billing", "shop/billing", "billing")
    };
    for other in [
        narrowed,
        role("billing", "shop/billing", "other"),
        role("billing", "shop/other", "billing"),
        role("renamed", "shop/billing", "billing"),
    ] {
        assert!(!roles([other.clone()]).can_grant(&billing), "{other:?}");
    }
    let fewer = Roles {
        requested: requesting(&["arn:aws:iam::123456789012:role/web-*"]).requested,
        ..Roles::default()
    };
    assert!(!fewer.can_grant(&by_arn));
}

#[test]
fn denial_has_its_own_reason() {
    let all = [
        RoleDenied::NoRole,
        RoleDenied::NotThisRole,
        RoleDenied::ArnNotAllowed,
        RoleDenied::SeveralIdentities,
    ];
    let reasons: std::collections::HashSet<_> = all.iter().map(RoleDenied::reason).collect();
    assert_eq!(reasons.len(), all.len());
    assert!(all.iter().all(|denied| !denied.to_string().is_empty()));
}
