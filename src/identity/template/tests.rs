use super::*;

fn id(path: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://example.org/{path}")).unwrap()
}

fn facts(unit: &str, user: &str) -> AttestedFacts {
    AttestedFacts {
        pod_uid: Some("0f1e2d3c-0000-4000-8000-000000000001".into()),
        systemd_unit: Some(unit.into()),
        user: Some(user.into()),
    }
}

/// Renders a template for the workload `ns/shop/sa/billing`.
fn rendered(template: &Template, facts: &AttestedFacts) -> Result<String, String> {
    let id = id("ns/shop/sa/billing");
    let values = TemplateValues {
        id: &id,
        session_name: "example.org=ns=shop=sa=billing",
        facts,
    };
    let text = template.render(&values);
    text.map_err(|error| error.to_string())
}

#[test]
fn template_renders_each_value_once() {
    let facts = facts("billing.service", "alice");
    let table = [
        ("", ""),
        ("plain } text", "plain } text"),
        ("{path[1]}/{path[3]}", "shop/billing"),
        ("{trust_domain}", "example.org"),
        ("<{spiffe_id}>", "<spiffe://example.org/ns/shop/sa/billing>"),
        ("{session_name}", "example.org=ns=shop=sa=billing"),
        ("{pod_uid}", "0f1e2d3c-0000-4000-8000-000000000001"),
        ("{systemd_unit},{user}", "billing.service,alice"),
    ];
    for (text, expected) in table {
        let template = Template::parse(text).unwrap();
        assert_eq!(rendered(&template, &facts).as_deref(), Ok(expected));
        assert_eq!(template.as_str(), text);
    }
    let wrong = [
        ("{", "is not closed"),
        ("{path[1]", "is not closed"),
        ("{}", "`{}` is not known"),
        ("{path[+1]}", "is not known"),
        ("{label}", "`{label}` is not known"),
        ("{ user}", "is not known"),
        ("{{user}}", "`{{user}` is not known"),
        ("{PATH[0]}", "is not known"),
    ];
    for (text, words) in wrong {
        let error = Template::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn json_keeps_its_braces_and_the_variables_of_iam() {
    let text = r#"{"Version": "2012-10-17", "a\"{": {}, "Resource": ["arn:aws:s3:::{path[1]}/${aws:PrincipalTag/x}/*", "{user}"]}"#;
    let wrong = Template::parse_json(text).unwrap_err().to_string();
    assert!(wrong.contains("is not known"), "{wrong}");
    let text = text.replace("a\\\"{", "a\\\"\\u007b");
    let template = Template::parse_json(&text).unwrap();
    assert_eq!(template.placeholders().count(), 2);
    let json = rendered(&template, &facts("x.service", r"DOMAIN\alice")).unwrap();
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        value["Resource"],
        serde_json::json!(["arn:aws:s3:::shop/${aws:PrincipalTag/x}/*", r"DOMAIN\alice"])
    );
    assert_eq!(value["a\"{"], serde_json::json!({}));
    // Outside a string nothing is a placeholder.
    let plain = r#"{"a": {"b": [{}]}, "c": "$", "d": "}"}"#;
    assert!(Template::parse_json(plain).unwrap().is_constant());
}

/// A fact cannot be a wildcard, a variable of IAM or another placeholder (T47).
#[test]
fn facts_with_a_meaning_in_policies_are_rejected() {
    let template = Template::parse_json(r#"{"a": "{user}"}"#).unwrap();
    for user in [
        "*",
        "a*",
        "?",
        "${aws:username}",
        "{spiffe_id}",
        "a\"",
        "a b",
        "a/b",
        "a=b",
        "a,b",
        "b\u{ed}lling",
        "a\n",
        "$",
        "%61",
        "~",
        "'",
        "<a>",
    ] {
        let error = rendered(&template, &facts("x.service", user)).expect_err(user);
        assert!(
            error.contains("the value of {user} has a character"),
            "{error}"
        );
    }
    let none = rendered(&template, &AttestedFacts::default()).unwrap_err();
    assert_eq!(none, "{user} has no value for this caller");
    let missing = Template::parse("{path[4]}").unwrap();
    assert!(rendered(&missing, &AttestedFacts::default()).is_err());
}

#[test]
fn separators_keep_values_apart() {
    let good = [
        "{path[0]}={path[1]}",
        "{path[0]}/{path[1]}",
        "a{path[0]},{path[1]}b",
        "{trust_domain}.{path[1]}",
        "{spiffe_id}={path[0]}",
        "{session_name}/{user}",
        "{user},{systemd_unit}",
        "{path[0]}",
        "{path[0]}-x",
    ];
    for text in good {
        let result = Template::parse(text).unwrap().check_separators();
        assert_eq!(result, Ok(()), "{text}");
    }
    let wrong = [
        "{path[0]}{path[1]}",
        "{path[0]}-{path[1]}",
        "{path[0]}.{trust_domain}.{path[1]}",
        "{path[0]}={path[1]}_{path[2]}",
        "{spiffe_id}/{path[0]}",
        "{session_name}={user}",
        "{user}@{systemd_unit}",
    ];
    for text in wrong {
        let error = Template::parse(text).unwrap().check_separators();
        let error = error.expect_err(text).to_string();
        assert!(
            error.contains("two SPIFFE IDs could give one value"),
            "{error}"
        );
    }
    let json = Template::parse_json(r#"{"a": "{path[0]}", "b": "{path[1]}"}"#).unwrap();
    assert_eq!(json.check_separators(), Ok(()));
    let json = Template::parse_json(r#"{"a": "{path[0]}-{path[1]}"}"#).unwrap();
    assert!(json.check_separators().is_err());
}

#[test]
fn only_returns_the_facts_that_are_used() {
    let all = facts("a.service", "alice");
    assert_eq!(all.only(&[]), AttestedFacts::default());
    assert_eq!(all.only(&AttestedFact::ALL), all);
    let user = all.only(&[AttestedFact::User]);
    assert_eq!(
        (user.get(AttestedFact::User), user.pod_uid.clone()),
        (Some("alice"), None)
    );
}
