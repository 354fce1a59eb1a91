//! `[[role.chain]]`: each mistake with its line, and each thing that is allowed but not wise.

use super::errors::rejected;
use super::*;

/// A configuration whose role covers IDs of four segments. A chain begins in line 10.
const ROLE: &str = "\
[sts]
region = \"eu-central-1\"
[[workload]]
spiffe_id = \"spiffe://example.org/ns/shop/sa/billing\"
uid = 1001
[[role]]
name = \"billing\"
spiffe_id = \"spiffe://example.org/ns/*/sa/*\"
role_arn = \"arn:aws:iam::123456789012:role/hop\"
[[role.chain]]
role_arn = \"arn:aws:iam::222222222222:role/{path[1]}\"
";

fn warnings(text: &str) -> Vec<(Option<usize>, String, String)> {
    let warning = |problem: &Problem| (line_of(problem), problem.key.clone(), problem.to_string());
    loaded(text).warnings.iter().map(warning).collect()
}

#[test]
fn each_mistake_has_its_line() {
    let long = "x".repeat(2100);
    let many: Vec<String> = (0..51).map(|number| format!("t{number} = \"x\"")).collect();
    let table = [
        (
            "duration = \"61m\"".to_owned(),
            "role.chain.duration",
            "from \"15m\" to \"1h\"",
        ),
        (
            "duration = \"15m 1ms\"".to_owned(),
            "role.chain.duration",
            "whole seconds",
        ),
        (
            "session_name = \"a b\"".to_owned(),
            "role.chain.session_name",
            "2 to 64",
        ),
        (
            "session_name = \"{spiffe_id}\"".to_owned(),
            "role.chain.session_name",
            "2 to 64",
        ),
        (
            "session_name = \"{label}\"".to_owned(),
            "role.chain.session_name",
            "is not known",
        ),
        (
            "session_name = \"{path[4]}\"".to_owned(),
            "role.chain.session_name",
            "{path[4]} is not in every",
        ),
        (
            "source_identity = \"a/b\"".to_owned(),
            "role.chain.source_identity",
            "2 to 64",
        ),
        (
            "source_identity = \"aws:x\"".to_owned(),
            "role.chain.source_identity",
            "2 to 64",
        ),
        (
            "external_id = \"a b\"".to_owned(),
            "role.chain.external_id",
            "2 to 1224",
        ),
        (
            "external_id = \"{path[1]}-{path[3]}\"".to_owned(),
            "role.chain.external_id",
            "could give one value",
        ),
        (
            "tags = { a = \"*\" }".to_owned(),
            "role.chain.tags.a",
            "a tag cannot have '*'",
        ),
        (
            "tags = { \"aws:a\" = \"x\" }".to_owned(),
            "role.chain.tags.aws:a",
            "AWS's own",
        ),
        (
            "tags = { \"%\" = \"x\" }".to_owned(),
            "role.chain.tags.%",
            "a tag cannot have '%'",
        ),
        (
            "tags = { a = \"x\", A = \"x\" }".to_owned(),
            "role.chain.tags.a",
            "for one key",
        ),
        (
            "tags = { a = \"{path[1]}{path[3]}\" }".to_owned(),
            "role.chain.tags.a",
            "could give one value",
        ),
        (
            "tags = { a = \"{path[9]}\" }".to_owned(),
            "role.chain.tags.a",
            "{path[9]} is not in every",
        ),
        (
            "tags = { a = 1 }".to_owned(),
            "role.chain.tags.a",
            "where a string is wanted",
        ),
        (
            "tags = [\"a\"]".to_owned(),
            "role.chain.tags",
            "a table of strings is wanted",
        ),
        (
            format!("tags = {{ {} }}", many.join(", ")),
            "role.chain.tags",
            "at most 50, these are 51",
        ),
        (
            "transitive_tags = [\"b\"]".to_owned(),
            "role.chain.transitive_tags",
            "no key in `tags`",
        ),
        (
            format!("policy = '{{\"a\": \"{long}\"}}'"),
            "role.chain.policy",
            "at most 2048",
        ),
        (
            "policy = '{\"a\": \"{b}\"}'".to_owned(),
            "role.chain.policy",
            "`{b}` is not known",
        ),
        (
            "policy = '{\"a\": \"{path[1]}-{path[3]}\"}'".to_owned(),
            "role.chain.policy",
            "could give one value",
        ),
        (
            "policy = '[]'".to_owned(),
            "role.chain.policy",
            "not a JSON object",
        ),
        (
            "policy_arns = [\"x-{path[1]}\"]".to_owned(),
            "role.chain.policy_arns",
            "not the ARN of a policy",
        ),
        (
            "tag = {}".to_owned(),
            "role.chain.tag",
            "did you mean `tags`?",
        ),
        (
            "audience = \"x\"".to_owned(),
            "role.chain.audience",
            "it belongs to [identity]",
        ),
    ];
    for (line, key, words) in table {
        rejected(&format!("{ROLE}{line}\n"), &[(12, key, words)]);
    }
}

#[test]
fn all_mistakes_of_a_chain_are_reported_together() {
    let text = format!(
        "{ROLE}duration = \"2h\"\nexternal_id = \"?\"\nsource_identity = \"ab\"\n\
         tags = {{ a = \"1\" }}\ntransitive_tags = [\"a\"]\n\
         [[role.chain]]\nduration = \"1m\"\nsource_identity = \"cd\"\n\
         [[role.chain]]\nrole_arn = \"{{user}}\"\n"
    );
    let expected = [
        (12, "role.chain.duration", "out of range"),
        (13, "role.chain.external_id", "2 to 1224"),
        (17, "role.chain.role_arn", "it is missing"),
        (18, "role.chain.duration", "out of range"),
        (20, "role.chain", "at most 2 roles"),
        (
            21,
            "role.chain.role_arn",
            "{user} cannot be part of a role's name",
        ),
    ];
    rejected(&text, &expected);
}

#[test]
fn later_role_cannot_change_what_stays() {
    let text = format!(
        "{ROLE}source_identity = \"ab\"\ntags = {{ Team = \"1\" }}\ntransitive_tags = [\"Team\"]\n\
         [[role.chain]]\nrole_arn = \"arn:aws:iam::123456789012:role/x\"\n\
         source_identity = \"ab\"\ntags = {{ team = \"2\" }}\n"
    );
    let expected = [
        (
            17,
            "role.chain.source_identity",
            "has set the source identity",
        ),
        (
            18,
            "role.chain.tags.team",
            "the transitive tag \"Team\" of a session before it stays",
        ),
    ];
    rejected(&text, &expected);
}

#[test]
fn risky_values_have_a_warning() {
    for (line, key, words) in [
        (
            "tags = { a = \"{pod_uid}\" }",
            "role.chain.tags.a",
            "{pod_uid} differs between callers",
        ),
        (
            "source_identity = \"x{user}\"",
            "role.chain.source_identity",
            "{user} differs",
        ),
        (
            "session_name = \"{systemd_unit}\"",
            "role.chain.session_name",
            "{systemd_unit} differs",
        ),
        (
            "session_name = \"fixed\"",
            "role.chain.session_name",
            "the same name in CloudTrail",
        ),
        (
            "source_identity = \"{path[1]}.{path[3]}\"",
            "role.chain.source_identity",
            "could give one value",
        ),
    ] {
        let found = warnings(&format!("{ROLE}{line}\n"));
        let [(Some(12), of, text)] = &found[..] else {
            panic!("{line}: {found:#?}")
        };
        assert!(of == key && text.contains(words), "{line}: {text}");
    }
    let table = format!("{ROLE}[role.chain.tags]\na = \"x\"\nb = \"{{user}}\"\n");
    let found = warnings(&table);
    assert!(
        found[0].0 == Some(14) && found[0].1 == "role.chain.tags.b",
        "{found:?}"
    );
    let policy = ROLE.replace(
        "[[role.chain]]",
        "policy = '{\"a\": \"{user}\"}'\n[[role.chain]]",
    );
    let found = warnings(&policy);
    assert!(found[0].1 == "role.policy" && found.len() == 1, "{found:?}");
    for (resource, is_widened) in [
        ("data/{path[1]}*", true),
        ("data/*{path[1]}/x", true),
        ("data/{path[1]}?", true),
        ("data/{path[1]}/*", false),
        ("{trust_domain}*", false),
    ] {
        let policy = format!("policy = '{{\"Resource\": \"arn:aws:s3:::{resource}\"}}'");
        let found = warnings(&format!("{ROLE}{policy}\n"));
        let texts = found
            .iter()
            .filter(|(_, _, text)| text.contains("a wildcard is next to {path[1]}"));
        assert_eq!(texts.count() == 1, is_widened, "{resource}: {found:?}");
        assert_eq!(
            found.len(),
            usize::from(is_widened),
            "{resource}: {found:?}"
        );
    }
    assert_eq!(warnings(ROLE), []);
    // The example of the documents has no warning.
    let page = include_str!("../../../deploy/docs/role-chaining.md");
    assert!(page.contains("source_identity = \"{path[1]}={path[3]}\""));
}
