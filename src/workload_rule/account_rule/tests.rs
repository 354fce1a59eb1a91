use super::*;
use crate::caller::unchanged::unchanged;
use crate::caller::{GroupDetail, Groups, ListenerKind, Process};

fn caller(uid: u32, groups: Option<(u32, &[u32])>) -> Caller {
    let process = groups.map(|(gid, groups)| Process {
        pid: 4711,
        gid,
        groups: Some(Groups::new(groups.to_vec(), GroupDetail::List).unwrap()),
        in_container: false,
        program: None,
        started: None,
    });
    unchanged(
        ListenerKind::Unix,
        uid,
        Some("/system.slice/app.service"),
        process,
    )
}

fn user(name: &str) -> AccountName {
    AccountName::User(name.to_owned())
}

fn group(name: &str) -> AccountName {
    AccountName::Group(name.to_owned())
}

fn named(path: &str) -> NamedRule {
    let rule = WorkloadRule {
        spiffe_id: SpiffeId::parse(&format!("spiffe://example.org/{path}")).unwrap(),
        uid: None,
        gid: None,
        supplementary_group: None,
        exe: None,
        systemd_unit: None,
        cgroup: None,
    };
    rule.into()
}

fn of_user(name: &str) -> NamedRule {
    NamedRule {
        user: Some(user(name)),
        ..named(name)
    }
}

fn of_unit(path: &str, unit: &str) -> NamedRule {
    let named = named(path);
    NamedRule {
        rule: WorkloadRule {
            systemd_unit: Some(unit.to_owned()),
            ..named.rule.clone()
        },
        ..named
    }
}

/// Returns 1001 for alice and 2001 for ops. The user ghost does not exist, and all other names are
/// unanswered.
fn known(name: &AccountName) -> AccountState {
    match (name, name.as_str()) {
        (AccountName::User(_), "alice") => AccountState::Id(1001),
        (AccountName::Group(_), "ops") => AccountState::Id(2001),
        (_, "ghost") => AccountState::Absent,
        _ => AccountState::Unanswered,
    }
}

/// Returns whether root has another name. Other users and groups may have any name.
fn is_other(name: &AccountName, id: u32) -> bool {
    (id == 0) != (name.as_str() == "root")
}

/// Returns the path of the rule that matches, and the names that could change that.
#[track_caller]
fn decide_with_missing(rules: &[NamedRule], caller: &Caller) -> (Option<String>, MissingNames) {
    let resolved = ResolvedRules::new(rules, known);
    let since = Instant::now();
    let decision = resolved.decide(caller, since);
    let missing = resolved
        .missing(caller, &decision, is_other, since)
        .unwrap();
    let path = match decision {
        Decision::Matched(rule) => Some(rule.spiffe_id.segments().collect::<Vec<_>>().join("/")),
        Decision::NoMatch => None,
        Decision::NeedsProcess => Some("needs the process".to_owned()),
        Decision::NeedsFile(_) => Some("needs a file".to_owned()),
    };
    (path, missing)
}

fn rule_path(path: &str) -> Option<String> {
    Some(path.to_owned())
}

fn unanswered(names: &[AccountName]) -> MissingNames {
    MissingNames {
        absent: Vec::new(),
        unanswered: names.to_vec(),
    }
}

fn absent(names: &[AccountName]) -> MissingNames {
    MissingNames {
        absent: names.to_vec(),
        unanswered: Vec::new(),
    }
}

#[test]
fn known_name_matches_its_number() {
    let in_ops = NamedRule {
        group: Some(group("ops")),
        ..named("by-group")
    };
    let also_ops = NamedRule {
        supplementary_group: Some(group("ops")),
        ..named("by-groups")
    };
    let rules = [of_user("alice"), in_ops, also_ops];
    let table = [
        (caller(1001, None), rule_path("alice")),
        (caller(7, Some((2001, &[]))), rule_path("by-group")),
        (caller(7, Some((7, &[2001]))), rule_path("by-groups")),
        (caller(7, Some((7, &[7]))), None),
        (caller(7, None), rule_path("needs the process")),
    ];
    for (caller, expected) in table {
        assert_eq!(
            decide_with_missing(&rules, &caller),
            (expected, MissingNames::default()),
            "{caller:?}"
        );
    }
}

#[test]
fn unknown_name_matches_no_caller() {
    for name in ["ghost", "stranger"] {
        let rules = [
            of_user(name),
            NamedRule {
                group: Some(group(name)),
                ..named("by-group")
            },
            NamedRule {
                supplementary_group: Some(group(name)),
                ..named("by-groups")
            },
        ];
        for uid in [1, 1001, OVERFLOW_ID] {
            for gid in [1, OVERFLOW_ID] {
                assert_eq!(
                    decide_with_missing(&rules, &caller(uid, Some((gid, &[1, gid])))).0,
                    None,
                    "{name} {uid} {gid}"
                );
            }
        }
        // The process is read for a group as for a known one, and never for a user.
        let resolved = ResolvedRules::new(&rules, known);
        assert_eq!(
            resolved.decide(&caller(1001, None), Instant::now()),
            Decision::NeedsProcess
        );
        let by_user = ResolvedRules::new(&rules[..1], known);
        assert_eq!(
            by_user.decide(&caller(1001, None), Instant::now()),
            Decision::NoMatch
        );
    }
}

#[test]
fn unanswered_names_matter_to_callers_that_could_match() {
    let rules = [
        of_user("stranger"),
        of_unit("app", "app.service"),
        of_user("late"),
    ];
    // Any caller in the unit could be the first rule's user, except root. The last rule comes after
    // the one that matches.
    assert_eq!(
        decide_with_missing(&rules, &caller(1001, None)),
        (rule_path("app"), unanswered(&[user("stranger")]))
    );
    assert_eq!(
        decide_with_missing(&rules, &caller(0, None)),
        (rule_path("app"), MissingNames::default())
    );
    let rules = [of_user("stranger"), of_user("late")];
    assert_eq!(
        decide_with_missing(&rules, &caller(1001, None)),
        (None, unanswered(&[user("stranger"), user("late")]))
    );
    // A rule that excludes the caller in another way does not depend on its name.
    let elsewhere = NamedRule {
        user: Some(user("stranger")),
        ..of_unit("other", "other.service")
    };
    assert_eq!(
        decide_with_missing(&[elsewhere], &caller(1001, None)),
        (None, MissingNames::default())
    );
    let here = NamedRule {
        user: Some(user("stranger")),
        ..of_unit("other", "app.service")
    };
    assert_eq!(
        decide_with_missing(&[here], &caller(1001, None)),
        (None, unanswered(&[user("stranger")]))
    );
    // The overflow id identifies no user, so it is not a user of unknown number.
    assert_eq!(
        decide_with_missing(&rules, &caller(OVERFLOW_ID, None)),
        (None, MissingNames::default())
    );
}

#[test]
fn unanswered_groups_matter_unless_all_groups_have_other_names() {
    let primary = [
        NamedRule {
            group: Some(group("strangers")),
            ..named("by-group")
        },
        of_unit("app", "app.service"),
    ];
    let other = [
        NamedRule {
            supplementary_group: Some(group("strangers")),
            ..named("by-groups")
        },
        of_unit("app", "app.service"),
    ];
    let missing = || (rule_path("app"), unanswered(&[group("strangers")]));
    assert_eq!(
        decide_with_missing(&primary, &caller(0, Some((5, &[0])))),
        missing()
    );
    assert_eq!(
        decide_with_missing(&primary, &caller(0, Some((0, &[5])))),
        (rule_path("app"), MissingNames::default())
    );
    assert_eq!(
        decide_with_missing(&other, &caller(0, Some((5, &[0])))),
        (rule_path("app"), MissingNames::default())
    );
    assert_eq!(
        decide_with_missing(&other, &caller(0, Some((0, &[0, 5])))),
        missing()
    );
    // No facts of the process were read, so nothing is excluded.
    let (decision, names) = decide_with_missing(&primary, &caller(0, None));
    assert_eq!(
        (decision, names),
        (
            rule_path("needs the process"),
            unanswered(&[group("strangers")])
        )
    );
}

#[test]
fn absent_name_is_distinguished_from_an_unanswered_one() {
    let rules = [of_user("ghost"), of_unit("app", "app.service")];
    assert_eq!(
        decide_with_missing(&rules, &caller(1001, None)),
        (rule_path("app"), absent(&[user("ghost")]))
    );
    // With a group that does not exist, the rule matches no caller, whatever the user.
    let both = NamedRule {
        user: Some(user("stranger")),
        group: Some(group("ghost")),
        ..named("both")
    };
    assert_eq!(
        decide_with_missing(&[both], &caller(1001, Some((5, &[])))),
        (None, absent(&[group("ghost")]))
    );
}

#[test]
fn process_facts_are_needed_for_a_user_of_unknown_name() {
    let over_tcp = |uid| Caller {
        listener: ListenerKind::Tcp,
        ..caller(uid, None)
    };
    let with_program = |rule: NamedRule| NamedRule {
        rule: WorkloadRule {
            exe: Some(ExeMatcher::new("/usr/bin/app".into())),
            ..rule.rule.clone()
        },
        ..rule
    };
    let by_unit = |name: &str| NamedRule {
        user: Some(user(name)),
        ..of_unit("app", "app.service")
    };
    let program = ProcessFacts {
        program: true,
        ..ProcessFacts::default()
    };
    for name in ["ghost", "stranger"] {
        let needs = |rule: NamedRule, caller: &Caller| {
            ResolvedRules::new(&[rule], known).facts_needed(caller, is_other)
        };
        assert_eq!(
            needs(of_user(name), &over_tcp(1001)),
            Some(ProcessFacts::default())
        );
        assert_eq!(
            needs(with_program(of_user(name)), &over_tcp(1001)),
            Some(program)
        );
        assert_eq!(
            needs(with_program(by_unit(name)), &caller(1001, None)),
            Some(program)
        );
        // Root has another name, the unit decides alone, and on the unix socket the kernel provides
        // the process.
        assert_eq!(needs(of_user(name), &over_tcp(0)), None);
        assert_eq!(needs(by_unit(name), &over_tcp(1001)), None);
        assert_eq!(needs(of_user(name), &caller(1001, None)), None);
    }
    // The facts that other rules need are read, too.
    let rules = [
        with_program(of_user("stranger")),
        NamedRule {
            supplementary_group: Some(group("ops")),
            ..named("ops")
        },
    ];
    let both = ProcessFacts {
        groups: GroupDetail::List,
        ..program
    };
    assert_eq!(
        ResolvedRules::new(&rules, known).facts_needed(&over_tcp(1001), is_other),
        Some(both)
    );
}
