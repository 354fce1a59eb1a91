//! Chains and the values in them, those that a workload would like to choose included.

use super::*;
use crate::identity::InvalidName;

const ARN: &str = "arn:aws:iam::222222222222:role/";

fn template(text: &str) -> Template {
    Template::parse(text).unwrap()
}

/// A role of a chain with this name.
pub(super) fn chained(name: &str) -> ChainedRole {
    ChainedRole {
        role_arn: ArnTemplate::parse(&format!("{ARN}{name}")).unwrap(),
        external_id: None,
        session_name: template("{session_name}"),
        source_identity: None,
        tags: Vec::new(),
        transitive_tags: Vec::new(),
        policy: None,
        policy_arns: Vec::new(),
        duration: Duration::from_secs(3600),
    }
}

fn with_chain(chain: impl Into<Vec<ChainedRole>>) -> Role {
    Role {
        chain: chain.into(),
        ..role("reports", "ns/*/sa/*", "hop")
    }
}

fn grant_with(role: Role, path: &str, facts: &AttestedFacts) -> Result<Grant, RoleDenied> {
    roles([role]).select(&identities(&[path]), facts, &RequestedRole::Default)
}

fn granted(role: &Role, path: &str) -> Grant {
    grant_with(role.clone(), path, &AttestedFacts::default()).unwrap()
}

fn tagged(tags: &[(&str, &str)]) -> Role {
    let tags = tags.iter();
    with_chain([ChainedRole {
        tags: tags
            .map(|(key, text)| ((*key).to_owned(), template(text)))
            .collect(),
        ..chained("reports")
    }])
}

#[test]
fn actions_are_those_of_the_session_and_of_what_it_keeps() {
    let tagged = |is_transitive: bool| ChainedRole {
        tags: vec![("team".to_owned(), template("a"))],
        transitive_tags: is_transitive
            .then(|| "team".to_owned())
            .into_iter()
            .collect(),
        ..chained("x")
    };
    let named = ChainedRole {
        source_identity: Some(template("ab")),
        ..chained("x")
    };
    let (assume, tag, name) = ("sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity");
    let certificate = Arc::new(RolesAnywhereTarget {
        trust_anchor_arn: "anchor".to_owned(),
        profile_arn: "profile".to_owned(),
        region: "eu-central-1".to_owned(),
        endpoint: None,
    });
    let token = FirstExchange::WebIdentity;
    for (first, chain, actions) in [
        (&token, vec![], vec![]),
        (&token, vec![chained("x")], vec![assume]),
        (&token, vec![tagged(false)], vec![assume, tag]),
        (&token, vec![tagged(false), chained("y")], vec![assume]),
        (&token, vec![tagged(true), chained("y")], vec![assume, tag]),
        (&token, vec![named, tagged(false)], vec![assume, tag, name]),
        // The common name of a certificate is the source identity of its session.
        (
            &FirstExchange::RolesAnywhere(certificate.clone()),
            vec![chained("x")],
            vec![assume, name],
        ),
        (
            &FirstExchange::Both(certificate),
            vec![tagged(false), chained("y")],
            vec![assume, name],
        ),
    ] {
        assert_eq!(
            required_actions(first, &chain),
            actions,
            "{first:?} {chain:?}"
        );
    }
}

#[test]
fn chain_is_rendered_for_each_workload() {
    let role = with_chain([
        ChainedRole {
            role_arn: ArnTemplate::parse(&format!("{ARN}{{path[1]}}-reports")).unwrap(),
            external_id: Some(template("id-{path[1]}")),
            source_identity: Some(template("{path[1]}={path[3]}")),
            tags: vec![("spiffe-id".to_owned(), template("{spiffe_id}"))],
            transitive_tags: vec!["spiffe-id".to_owned()],
            ..chained("x")
        },
        ChainedRole {
            session_name: (template("{path[3]}@{path[1]}")),
            policy: Template::parse_json(r#"{"Resource": "arn:aws:s3:::{path[1]}/*"}"#).ok(),
            policy_arns: vec![template("arn:aws:iam::aws:policy/{path[3]}")],
            ..chained("last")
        },
    ]);
    let grant = granted(&role, "ns/shop/sa/billing");
    let [one, two] = grant.chain() else {
        panic!("{grant:?}")
    };
    assert_eq!(one.role_arn.as_str(), format!("{ARN}shop-reports"));
    assert_eq!(one.external_id.as_deref(), Some("id-shop"));
    assert_eq!(one.source_identity.as_deref(), Some("shop=billing"));
    assert_eq!(one.session_name, grant.session_name);
    let id = "spiffe://example.org/ns/shop/sa/billing";
    assert_eq!(one.tags, [("spiffe-id".to_owned(), id.to_owned())]);
    assert_eq!(two.session_name.as_str(), "billing@shop");
    assert_eq!(
        two.policy.as_deref(),
        Some(r#"{"Resource": "arn:aws:s3:::shop/*"}"#)
    );
    assert_eq!(two.policy_arns, ["arn:aws:iam::aws:policy/billing"]);
    assert_eq!(grant.issued_role_arn(), &two.role_arn);
    assert_eq!(grant.issued_session_name(None), two.session_name.as_str());
}

#[test]
fn sessions_before_the_last_are_shared_by_roles_with_the_same_beginning() {
    let one = with_chain([chained("middle"), chained("last")]);
    let two = Role {
        name: "other".to_owned(),
        spiffe_id: SpiffeIdPattern::parse("spiffe://example.org/**").unwrap(),
        ..with_chain([chained("middle"), chained("another")])
    };
    let (one_grant, two_grant) = (granted(&one, "ns/a/sa/b"), granted(&two, "ns/a/sa/b"));
    let (middle, first) = (
        one_grant.previous().unwrap(),
        one_grant.previous().unwrap().previous().unwrap(),
    );
    assert_eq!(Some(&middle), two_grant.previous().as_ref());
    assert_eq!(
        (first.previous(), first.hop_number(), middle.hop_number()),
        (None, 1, 2)
    );
    assert!(first.is_hop() && middle.is_hop() && !one_grant.is_hop());
    assert!(first.comes_before(&middle) && first.comes_before(&two_grant));
    assert!(middle.comes_before(&one_grant) && !middle.comes_before(&first));
    assert!(!one_grant.comes_before(&one_grant) && !middle.comes_before(&middle));
    // A role for the same first role is not its session within a chain.
    let direct = granted(&role("reports", "ns/*/sa/*", "hop"), "ns/a/sa/b");
    assert!(direct != first && !direct.is_hop());
    // Another workload, another first role and another name of the session share nothing.
    let other = Role {
        session_name: Some(SessionName::parse("fixed").unwrap()),
        ..one.clone()
    };
    for other in [granted(&one, "ns/a/sa/c"), granted(&other, "ns/a/sa/b")] {
        assert!(!first.comes_before(&other) && !middle.comes_before(&other));
    }
    let all = roles([one.clone(), two]);
    assert!(all.can_grant(&one_grant) && all.can_grant(&middle) && all.can_grant(&first));
    let shorter = roles([with_chain([chained("middle")])]);
    assert!(shorter.can_grant(&first) && !shorter.can_grant(&middle));
    assert!(!shorter.can_grant(&one_grant));
    assert!(!roles([role("reports", "ns/*/sa/*", "hop")]).can_grant(&first));
}

#[test]
fn facts_are_part_of_the_sessions_that_use_them() {
    let role = with_chain([
        chained("middle"),
        ChainedRole {
            tags: vec![("pod".to_owned(), template("{pod_uid}"))],
            ..chained("last")
        },
    ]);
    assert_eq!(role.facts_used(), [AttestedFact::PodUid]);
    let facts = |uid: &str| AttestedFacts {
        pod_uid: Some(uid.into()),
        user: Some("alice".into()),
        ..AttestedFacts::default()
    };
    let [one, two] =
        ["1", "2"].map(|uid| grant_with(role.clone(), "ns/a/sa/b", &facts(uid)).unwrap());
    assert!(one != two && one.previous() == two.previous());
    assert_eq!(one.details().facts.user, None);
    assert!(roles([role.clone()]).can_grant(&one));
    let none = grant_with(role, "ns/a/sa/b", &AttestedFacts::default()).unwrap_err();
    assert_eq!(none.reason(), "invalid_parameter");
    let text = none.to_string();
    assert!(
        text.ends_with("hop 3, `tags.pod`: {pod_uid} has no value for this caller"),
        "{text}"
    );
}

/// The order of the segments counts (T48).
#[test]
fn segments_that_swap_give_other_values() {
    let role = tagged(&[
        ("kubernetes-namespace", "{path[1]}"),
        ("kubernetes-service-account", "{path[3]}"),
        ("both", "{path[1]}/{path[3]}"),
        ("spiffe-id", "{spiffe_id}"),
    ]);
    let paths = [
        "ns/a/sa/b",
        "ns/b/sa/a",
        "ns/a.b/sa/c",
        "ns/a/sa/b.c",
        "ns/sa/sa/ns",
    ];
    let mut seen = std::collections::HashSet::new();
    for path in paths {
        let grant = granted(&role, path);
        assert!(seen.insert(grant.chain()[0].tags.clone()), "{path}");
        let both = &grant.chain()[0].tags[2].1;
        assert_eq!(both.split('/').count(), 2, "{both}");
    }
}

/// A value that STS would cut, fold or reject never reaches it (T47).
#[test]
fn values_beyond_the_limits_are_denied_with_their_key() {
    let long = "x".repeat(257);
    let unit = |unit: &str| AttestedFacts {
        systemd_unit: Some(unit.into()),
        ..AttestedFacts::default()
    };
    let one = |role: &ChainedRole| with_chain([role.clone()]);
    let tag = |text: &str| tagged(&[("t", text)]);
    let base = chained("x");
    let source = ChainedRole {
        source_identity: Some(template("{path[1]}")),
        ..base.clone()
    };
    let session = ChainedRole {
        session_name: (template("{path[1]}")),
        ..base.clone()
    };
    let external = ChainedRole {
        external_id: Some(template("{path[1]}")),
        ..base.clone()
    };
    let arn = ChainedRole {
        role_arn: ArnTemplate::parse(&format!("{ARN}{{path[1]}}")).unwrap(),
        ..base.clone()
    };
    let policy = ChainedRole {
        policy: Template::parse_json(&format!(r#"{{"{}": "{{path[1]}}"}}"#, "x".repeat(1900))).ok(),
        ..base
    };
    let table = [
        (
            tag("{path[1]}"),
            long.as_str(),
            "",
            "`tags.t`: STS takes at most 256 characters",
        ),
        (
            tag("{systemd_unit}"),
            "a",
            r"a\x2d.service",
            "`tags.t`: a tag cannot have '\\\\'",
        ),
        (
            tag("{systemd_unit}"),
            "a",
            "a*.service",
            "has a character other than",
        ),
        (
            tag("{systemd_unit}"),
            "a",
            "b\u{ed}.service",
            "has a character other than",
        ),
        (
            tag("{systemd_unit}"),
            "a",
            "{user}.service",
            "has a character other than",
        ),
        (
            one(&source),
            "a",
            "",
            "`source_identity`: a source identity has 2 to 64",
        ),
        (
            one(&source),
            &long[..65],
            "",
            "`source_identity`: a source identity has 2 to 64",
        ),
        (
            one(&session),
            "a",
            "",
            "`session_name`: a session name has 2 to 64",
        ),
        (
            one(&session),
            &long[..65],
            "",
            "`session_name`: a session name has 2 to 64",
        ),
        (
            one(&external),
            "a",
            "",
            "`external_id`: an external ID has 2 to 1224",
        ),
        (one(&arn), &long[..65], "", "`role_arn`: it is too long"),
        (
            one(&policy),
            &long[..200],
            "",
            "`policy`: a session policy has at most 2048",
        ),
    ];
    for (role, segment, fact, words) in table {
        let denied = grant_with(role, &format!("ns/{segment}/sa/b"), &unit(fact)).unwrap_err();
        let text = denied.to_string();
        assert!(text.contains("hop 2, ") && text.contains(words), "{text}");
    }
    let longest = granted(&tag("{path[1]}"), &format!("ns/{}/sa/b", &long[..256]));
    assert_eq!(longest.chain()[0].tags[0].1.len(), 256);
}

#[test]
fn parameters_have_the_limits_of_sts() {
    use parameters::*;
    let error = |result: LimitResult| result.map_err(|InvalidName(error)| error);
    for good in [
        "a",
        "kubernetes-namespace",
        "\u{e9}t\u{e9} 1",
        "a:b/c=d+e-f@g_h.i",
        "\u{3000}",
    ] {
        assert_eq!(error(check_tag_key(good)), Ok(()), "{good}");
        assert_eq!(error(check_tag_value(good)), Ok(()), "{good}");
    }
    assert!(check_tag_value("").is_ok() && check_tag_key("").is_err());
    for wrong in [
        "a*",
        "~",
        "%",
        "a\tb",
        "a\n",
        "\u{85}",
        "{",
        "\"",
        "\\",
        "a,b",
        "\u{1f600}",
    ] {
        assert!(
            check_tag_key(wrong).is_err() && check_tag_value(wrong).is_err(),
            "{wrong:?}"
        );
    }
    assert!(check_tag_key("AWS:x").is_err() && check_tag_key(&"k".repeat(129)).is_err());
    assert!(check_source_identity("ab=c@d").is_ok() && check_source_identity("aws:x").is_err());
    assert!(check_source_identity("a/b").is_err() && check_source_identity("a b").is_err());
    assert!(check_external_id("ab:/c").is_ok() && check_external_id("a b").is_err());
    assert!(check_external_id(&"x".repeat(1225)).is_err() && check_external_id("x").is_err());
    assert!(check_policy("\u{ff}\t\n").is_ok() && check_policy("\u{100}").is_err());
    assert!(is_aws_policy_arn("arn:aws:iam::aws:policy/ReadOnlyAccess"));
    assert!(!is_aws_policy_arn(
        "arn:aws:iam::123456789012:role/xxxxxxxx"
    ));
}

/// Session names of the workloads of one role never collide, whatever their paths (T48).
#[test]
fn default_session_names_of_a_chain_do_not_collide() {
    let role = with_chain([chained("x")]);
    let long = "x".repeat(60);
    let paths = [
        "ns/a/sa/b".to_owned(),
        "ns/a.b/sa/c".to_owned(),
        "ns/a-b/sa/c".to_owned(),
        "ns/b/sa/a".to_owned(),
        format!("ns/{long}/sa/b"),
        format!("ns/{long}/sa/c"),
        format!("ns/{long}y/sa/b"),
    ];
    let names: std::collections::HashSet<String> = paths
        .iter()
        .map(|path| {
            granted(&role, path).chain()[0]
                .session_name
                .as_str()
                .to_owned()
        })
        .collect();
    assert_eq!(names.len(), paths.len());
    assert!(names.iter().all(|name| name.len() <= 64));
}
