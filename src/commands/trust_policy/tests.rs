//! Each output is read by a real reader of its language, and the result is evaluated with tokens
//! that match or nearly match.

mod anywhere;
mod reading;

use reading::{Read, Token, by_a_shell};
use serde_json::{Value, json};

use super::plan::{InvalidIssuer, Plan, PlannedIssuer, PlannedProvider};
use super::*;

const ISSUER: &str = "https://oidc.example.org/tenant";
const PROVIDER: &str = "arn:aws:iam::123456789012:oidc-provider/oidc.example.org/tenant";
const ANCHOR: &str = "arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/1";
const THUMBPRINT: &str = "0123456789abcdef0123456789abcdef01234567";
const HEAD: &str = "[identity]\naudience = \"sts.amazonaws.com\"\n[sts]\nregion = \"eu-central-1\"\n\
                    [[workload]]\nspiffe_id = \"spiffe://example.org/any\"\nuid = 1\n";

fn roles(text: &str) -> crate::role::Roles {
    config(text).roles
}

fn config(text: &str) -> Config {
    let parsed = Config::parse(&format!("{HEAD}{text}"), &|_| None);
    let loaded = parsed.unwrap_or_else(|problems| panic!("{problems:?}"));
    loaded.config
}

fn plan(text: &str) -> Plan {
    let provider = PlannedProvider::New {
        thumbprint: Some(THUMBPRINT.to_owned()),
    };
    Plan::new(
        &roles(text),
        &[],
        PlannedIssuer::parse(ISSUER).unwrap(),
        provider,
        None,
    )
}

fn role(name: &str, id: &str, arn: &str) -> String {
    format!("[[role]]\nname = \"{name}\"\nspiffe_id = \"{id}\"\nrole_arn = \"{arn}\"\n")
}

/// Evaluates whether a role's trust policy admits a token of the plan's issuer.
fn allows(policy: &Value, audience: &str, subject: &str) -> bool {
    reading::allows(
        policy,
        &Token {
            issuer: ISSUER,
            audience,
            subject,
        },
        PROVIDER,
    )
}

fn read_all(plan: &Plan) -> Read {
    let outputs = [Format::AwsCli, Format::Terraform, Format::Cloudformation]
        .map(|format| render(plan, format).unwrap());
    reading::same(outputs.each_ref().map(String::as_str), PROVIDER, ANCHOR)
}

#[test]
fn formats_agree_and_admit_only_matching_tokens() {
    let text = role(
        "billing",
        "spiffe://example.org/ns/pay/sa/billing",
        "arn:aws:iam::123456789012:role/team/billing",
    ) + "audience = \"it's ${x} %{y} \\\\\"\nduration = \"2h\"\n"
        + &role(
            "shop-1",
            "spiffe://example.org/shop/*",
            "arn:aws:iam::123456789012:role/shop-1",
        )
        + &role(
            "shop.1",
            "spiffe://example.org/more/**",
            "arn:aws:iam::123456789012:role/shop.1",
        )
        + &role(
            "again",
            "spiffe://example.org/again",
            "arn:aws:iam::123456789012:role/shop.1",
        );
    let text = text.replace("it's ${x} %{y} ", "it's${x}%{y}");
    let read = read_all(&plan(&text));
    let odd = "it's${x}%{y}\\";
    assert_eq!(
        read.provider,
        json!({ "Url": ISSUER, "ClientIDList": [odd, "sts.amazonaws.com"], "ThumbprintList": [THUMBPRINT] })
    );
    let (path, session, billing) = &read.roles["billing"];
    assert_eq!((path.as_str(), *session), ("/team/", 7200));
    let subject = "spiffe://example.org/ns/pay/sa/billing";
    assert!(allows(billing, odd, subject));
    assert!(!allows(billing, "sts.amazonaws.com", subject));
    for other in [
        "spiffe://example.org/ns/pay/sa/billing2",
        "spiffe://example.org/ns/pay/sa/billin",
        "spiffe://example.org/ns/pay/sa/billing/x",
        "spiffe://example.org/ns/pay/sa/Billing",
        "spiffe://example.com/ns/pay/sa/billing",
        "",
    ] {
        assert!(!allows(billing, odd, other), "{other}");
    }
    assert_eq!(
        (read.roles["shop-1"].0.as_str(), read.roles["shop-1"].1),
        ("/", 3600)
    );
    // Two [[role]]s with one ARN are one role that trusts both.
    let both = &read.roles["shop.1"].2;
    for (subject, expected) in [
        ("more/a/b", true),
        ("again", true),
        ("again/x", false),
        ("other", false),
    ] {
        assert_eq!(
            allows(
                both,
                "sts.amazonaws.com",
                &format!("spiffe://example.org/{subject}")
            ),
            expected,
            "{subject}"
        );
    }
}

#[test]
fn policy_admits_exactly_the_ids_of_the_pattern() {
    let segments = ["a", "b", "ab"];
    let mut paths = vec![String::new()];
    let mut ids = Vec::new();
    for _ in 0..4 {
        paths = paths
            .iter()
            .flat_map(|path| segments.map(|segment| format!("{path}/{segment}")))
            .collect();
        ids.extend(paths.iter().map(|path| format!("spiffe://t{path}")));
    }
    for pattern in [
        "a", "a/b", "*", "a/*", "*/b", "a/*/b", "*/*", "*/a/*", "a/**", "a/b/**", "**", "*/*/*/*",
    ] {
        let pattern = format!("spiffe://t/{pattern}");
        let text = role("r", &pattern, "arn:aws:iam::123456789012:role/r")
            .replace("[[role]]", "[[role]]\n");
        let plan = plan(&text);
        assert_eq!(plan.warnings, [""; 0], "{pattern}");
        let policy = &by_a_shell(&render(&plan, Format::AwsCli).unwrap()).roles["r"].2;
        let matcher = crate::identity::SpiffeIdPattern::parse(&pattern).unwrap();
        for id in &ids {
            let expected = matcher.matches(&SpiffeId::parse(id).unwrap());
            assert_eq!(
                allows(policy, "sts.amazonaws.com", id),
                expected,
                "{pattern} and {id}"
            );
            assert!(!allows(policy, "other", id), "{pattern} and {id}");
        }
    }
}

#[test]
fn excess_of_a_policy_is_a_warning_with_an_example() {
    let plan = plan(&role(
        "r",
        "spiffe://t/ns/*/sa/**",
        "arn:aws:iam::123456789012:role/r",
    ));
    let [warning] = &plan.warnings[..] else {
        panic!("{:?}", plan.warnings)
    };
    let example = "spiffe://t/ns/any/thing/sa/x";
    assert!(warning.contains(example), "{warning}");
    let policy = &by_a_shell(&render(&plan, Format::AwsCli).unwrap()).roles["r"].2;
    assert!(allows(policy, "sts.amazonaws.com", example));
    let matcher = crate::identity::SpiffeIdPattern::parse("spiffe://t/ns/*/sa/**").unwrap();
    assert!(!matcher.matches(&SpiffeId::parse(example).unwrap()));
}

#[test]
fn arn_with_placeholders_is_one_role_per_known_id() {
    let roles = roles(&role(
        "r",
        "spiffe://t/app/*",
        "arn:aws:iam::123456789012:role/app-{path[1]}",
    ));
    let ids = ["spiffe://t/app/a", "spiffe://t/app/b", "spiffe://t/other/c"]
        .map(|id| SpiffeId::parse(id).unwrap());
    let issuer = || PlannedIssuer::parse(ISSUER).unwrap();
    let read = by_a_shell(
        &render(
            &Plan::new(
                &roles,
                &ids,
                issuer(),
                PlannedProvider::New { thumbprint: None },
                None,
            ),
            Format::AwsCli,
        )
        .unwrap(),
    );
    assert_eq!(read.roles.keys().collect::<Vec<_>>(), ["app-a", "app-b"]);
    assert!(allows(
        &read.roles["app-a"].2,
        "sts.amazonaws.com",
        "spiffe://t/app/a"
    ));
    assert!(!allows(
        &read.roles["app-a"].2,
        "sts.amazonaws.com",
        "spiffe://t/app/b"
    ));
    assert!(read.provider["ThumbprintList"].is_null());
    let none = Plan::new(&roles, &[], issuer(), PlannedProvider::Existing, None);
    assert!(
        none.accounts.is_empty() && none.warnings[0].contains("--spiffe-id"),
        "{:?}",
        none.warnings
    );
}

#[test]
fn plan_separates_accounts_and_partitions() {
    let text = role("a", "spiffe://t/a", "arn:aws:iam::123456789012:role/a")
        + &role("b", "spiffe://t/b", "arn:aws-cn:iam::210987654321:role/b")
        + &role("m", "spiffe://t/m", "arn:minio:iam:::role/m")
        + "endpoint = \"https://minio.internal:9000\"\naudience = \"minio\"\n";
    let text = text.replace("endpoint =", "sts_endpoint =");
    let plan = plan(&text);
    assert!(
        plan.warnings
            .iter()
            .any(|warning| warning.contains("\"m\" is left out")),
        "{:?}",
        plan.warnings
    );
    let script = render(&plan, Format::AwsCli).unwrap();
    assert!(
        script.contains("arn:aws-cn:iam::210987654321:oidc-provider/oidc.example.org/tenant"),
        "{script}"
    );
    assert!(!script.contains("minio"), "{script}");
    let headings: Vec<&str> = script
        .lines()
        .filter(|line| line.starts_with("# Account "))
        .collect();
    assert_eq!(headings.len(), 2, "{script}");
    assert!(
        headings[0].starts_with("# Account 123456789012, partition aws:"),
        "{headings:?}"
    );
    assert!(
        headings[1].starts_with("# Account 210987654321, partition aws-cn:"),
        "{headings:?}"
    );
    let error = render(&plan, Format::Terraform).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("--account (aws:123456789012, aws-cn:210987654321)"),
        "{error}"
    );
}

/// Account numbers are unique only within a partition.
#[test]
fn account_number_in_two_partitions_is_two_accounts() {
    let plan = plan(
        &(role("a", "spiffe://t/a", "arn:aws:iam::123456789012:role/a")
            + &role("b", "spiffe://t/b", "arn:aws-cn:iam::123456789012:role/b")),
    );
    let names: Vec<String> = plan.accounts.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["aws:123456789012", "aws-cn:123456789012"]);
    let chosen = |account: &str| plan.accounts.keys().filter(|name| name.is(account)).count();
    let table = [
        ("123456789012", 2),
        ("aws:123456789012", 1),
        ("aws-cn:123456789012", 1),
        ("aws-iso:123456789012", 0),
        ("1", 0),
    ];
    for (account, count) in table {
        assert_eq!(chosen(account), count, "{account}");
    }
    for account in plan.accounts.values() {
        assert_eq!(account.roles.len(), 1);
    }
}

#[test]
fn existing_provider_is_used_and_not_created() {
    let text =
        role("a", "spiffe://t/a", "arn:aws:iam::123456789012:role/a") + "audience = \"shop\"\n";
    let plan = Plan::new(
        &roles(&text),
        &[],
        PlannedIssuer::parse(ISSUER).unwrap(),
        PlannedProvider::Existing,
        None,
    );
    let [script, terraform, template] = [Format::AwsCli, Format::Terraform, Format::Cloudformation]
        .map(|format| render(&plan, format).unwrap());
    // The existing provider may lack the audience.
    let audience = format!(
        "aws iam add-client-id-to-open-id-connect-provider --open-id-connect-provider-arn {PROVIDER} --client-id shop"
    );
    assert!(script.contains(&audience), "{script}");
    for output in [&script, &terraform, &template] {
        assert!(
            output.contains("shop") && output.contains("123456789012"),
            "{output}"
        );
    }
    assert!(
        !script.contains("create-open-id") && !script.contains("get-open-id"),
        "{script}"
    );
    assert!(
        terraform.contains("data \"aws_iam_openid_connect_provider\" \"awsvid\""),
        "{terraform}"
    );
    assert!(
        terraform.contains("Federated = data.aws_iam_openid_connect_provider.awsvid.arn"),
        "{terraform}"
    );
    assert!(
        !terraform.contains("resource \"aws_iam_openid_connect_provider\""),
        "{terraform}"
    );
    let template: Value = serde_json::from_str(&template).unwrap();
    let resources = template["Resources"].as_object().unwrap();
    assert_eq!(resources.len(), 1, "{template}");
    let policy = &resources.values().next().unwrap()["Properties"]["AssumeRolePolicyDocument"];
    assert_eq!(
        policy["Statement"][0]["Principal"],
        json!({ "Federated": PROVIDER })
    );
    assert!(allows(policy, "shop", "spiffe://t/a"));
}

#[test]
fn script_creates_only_a_missing_provider() {
    let plan = plan(&role(
        "a",
        "spiffe://t/a",
        "arn:aws:iam::123456789012:role/a",
    ));
    let script = render(&plan, Format::AwsCli).unwrap();
    for (status, creates) in [(0, false), (254, true)] {
        let stub = format!(
            "aws() {{ echo \"$2\"; [ \"$2\" != get-open-id-connect-provider ] || return {status}; }}\n"
        );
        let output = std::process::Command::new("sh")
            .arg("-euc")
            .arg(format!("{stub}{script}"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let calls = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            calls.contains("create-open-id-connect-provider"),
            creates,
            "{calls}"
        );
        assert!(
            calls.ends_with("add-client-id-to-open-id-connect-provider\ncreate-role\n"),
            "{calls}"
        );
    }
    // The other formats cannot check this, so their output names the option.
    for format in [Format::Terraform, Format::Cloudformation] {
        let output = render(&plan, format).unwrap();
        assert!(
            output.contains("has th") && output.contains("--existing-provider"),
            "{output}"
        );
    }
}

/// Several IDs in one role (T36).
#[test]
fn ids_that_share_a_rendered_role_are_a_warning() {
    let ids = [
        "spiffe://t/ns/a/sa/x",
        "spiffe://t/ns/b/sa/x",
        "spiffe://t/ns/a/sa/y",
    ]
    .map(|id| SpiffeId::parse(id).unwrap());
    let warnings = |text: &str| {
        Plan::new(
            &roles(text),
            &ids,
            PlannedIssuer::parse(ISSUER).unwrap(),
            PlannedProvider::Existing,
            None,
        )
        .warnings
    };
    let pattern = "spiffe://t/ns/*/sa/*";
    let meeting = warnings(&role(
        "r",
        pattern,
        "arn:aws:iam::123456789012:role/{path[3]}",
    ));
    let [warning] = &meeting[..] else {
        panic!("{meeting:?}")
    };
    let words =
        "role/x: `role_arn` gives this one role to spiffe://t/ns/a/sa/x and spiffe://t/ns/b/sa/x";
    assert!(warning.contains(words), "{warning}");
    assert_eq!(
        warnings(&role(
            "r",
            pattern,
            "arn:aws:iam::123456789012:role/{path[1]}={path[3]}"
        )),
        [""; 0]
    );
    // A fixed role next to one that is made from an ID.
    let fixed = role(
        "r",
        pattern,
        "arn:aws:iam::123456789012:role/{path[1]}={path[3]}",
    ) + &role(
        "f",
        "spiffe://t/other",
        "arn:aws:iam::123456789012:role/a=x",
    );
    assert!(
        warnings(&fixed)[0]
            .contains("gives this one role to spiffe://t/ns/a/sa/x and spiffe://t/other")
    );
    // Two IDs for one role without a placeholder are intended.
    let meant = role("r", "spiffe://t/one", "arn:aws:iam::123456789012:role/f")
        + &role("f", "spiffe://t/other", "arn:aws:iam::123456789012:role/f");
    assert_eq!(warnings(&meant), [""; 0]);
}

#[test]
fn role_names_that_are_equal_in_iam_are_a_warning() {
    let both = |one: &str, other: &str| {
        let text = role(
            "r",
            "spiffe://t/one",
            &format!("arn:aws:iam::123456789012:role/{one}"),
        ) + &role(
            "f",
            "spiffe://t/other",
            &format!("arn:aws:iam::123456789012:role/{other}"),
        );
        plan(&text).warnings
    };
    for (one, other) in [
        ("shop", "Shop"),
        ("a/billing", "b/billing"),
        ("billing", "b/BILLING"),
    ] {
        let warnings = both(one, other);
        assert!(
            warnings.len() == 1 && warnings[0].contains("IAM creates only one of"),
            "{warnings:?}"
        );
    }
    assert_eq!(both("a/shop", "a/billing"), [""; 0]);
}

#[test]
fn issuer_parse_rejects_urls_that_iam_rejects() {
    for (text, words) in [
        ("https://oidc.example.org/", "ends with a slash"),
        ("http://oidc.example.org", "accepts only https"),
        ("https://oidc.example.org:8443", "no port"),
        ("https://OIDC.example.org", "capital letters"),
    ] {
        let plan = Plan::new(
            &crate::role::Roles::default(),
            &[],
            PlannedIssuer::parse(text).unwrap(),
            PlannedProvider::Existing,
            None,
        );
        assert!(
            plan.warnings.iter().any(|warning| warning.contains(words)),
            "{text}: {:?}",
            plan.warnings
        );
    }
    let no_url = "oidc.example.org".to_owned();
    assert_eq!(
        PlannedIssuer::parse(&no_url),
        Err(InvalidIssuer::NoUrl(no_url))
    );
    for text in [
        "https://",
        "https://a b",
        "https://a/?x",
        "https://a/\"",
        "https://a/${b}",
    ] {
        let bad = InvalidIssuer::BadUrl(text.to_owned());
        assert_eq!(PlannedIssuer::parse(text), Err(bad));
    }
}

#[test]
fn policy_over_iams_quota_is_a_warning() {
    let text: String = (0..9)
        .map(|i| {
            role(
                &format!("r{i}"),
                &format!("spiffe://example.org/n/{i}"),
                "arn:aws:iam::123456789012:role/r",
            )
        })
        .collect();
    let warnings = plan(&text).warnings;
    assert!(
        warnings
            .iter()
            .any(|warning| warning.contains("IAM takes 2048")),
        "{warnings:?}"
    );
}

/// Both ends of each step, with the actions that the chain needs and no others.
#[test]
fn chain_has_both_ends_of_each_step() {
    let text = role(
        "data",
        "spiffe://example.org/ns/*/sa/*",
        "arn:aws:iam::123456789012:role/hop",
    ) + "[[role.chain]]\nrole_arn = \"arn:aws:iam::123456789012:role/middle\"\n\
         external_id = \"shared-id\"\n\
         [[role.chain]]\nrole_arn = \"arn:aws:iam::123456789012:role/last\"\n\
         tags = { \"team\" = \"{path[1]}\" }\nsource_identity = \"{session_name}\"\n";
    let read = read_all(&plan(&text));
    let arn = |name: &str| format!("arn:aws:iam::123456789012:role/{name}");
    let all = ["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"];
    for (previous, next, actions, condition) in [
        (
            "hop",
            "middle",
            &all[..1],
            json!({ "StringEquals": { "sts:ExternalId": "shared-id" } }),
        ),
        ("middle", "last", &all[..], Value::Null),
    ] {
        let statement = &read.roles[next].2["Statement"][0];
        assert_eq!(statement["Principal"], json!({ "AWS": arn(previous) }));
        assert_eq!(statement["Action"], json!(actions));
        assert_eq!(statement["Condition"], condition);
        let permission = &read.permissions[previous]["Statement"];
        let expected = json!([{ "Effect": "Allow", "Action": actions, "Resource": arn(next) }]);
        assert_eq!(*permission, expected);
    }
    assert_eq!((read.roles.len(), read.permissions.len()), (3, 2));
    // The first role is that of the tokens.
    let hop = &read.roles["hop"].2["Statement"];
    assert_eq!(hop[0]["Action"], "sts:AssumeRoleWithWebIdentity");
}

/// A chain whose roles depend on the SPIFFE ID has the steps of each known ID, and each account its
/// own roles.
#[test]
fn chain_by_spiffe_id_has_a_step_for_each_known_id() {
    let text = role(
        "data",
        "spiffe://example.org/ns/*/sa/*",
        "arn:aws:iam::123456789012:role/hop",
    ) + "[[role.chain]]\nrole_arn = \"arn:aws:iam::222222222222:role/{path[1]}\"\n\
         tags = { \"team\" = \"{path[1]}\" }\ntransitive_tags = [\"team\"]\n";
    let unknown = plan(&text);
    let left_out = "the chain of role \"data\" is left out";
    assert!(unknown.warnings.iter().any(|text| text.contains(left_out)));
    let ids = ["ns/a/sa/b", "ns/c/sa/d"].map(|path| {
        crate::identity::SpiffeId::parse(&format!("spiffe://example.org/{path}")).unwrap()
    });
    let known = Plan::new(
        &roles(&text),
        &ids,
        PlannedIssuer::parse(ISSUER).unwrap(),
        PlannedProvider::New { thumbprint: None },
        None,
    );
    let accounts: Vec<String> = known
        .accounts
        .keys()
        .map(|name| name.number.clone())
        .collect();
    assert_eq!(accounts, ["123456789012", "222222222222"]);
    let script = render(&known, Format::AwsCli).unwrap();
    // The account of the teams needs no provider.
    assert_eq!(script.matches("create-open-id-connect-provider").count(), 1);
    for name in ["a", "c"] {
        assert!(
            script.contains(&format!("--role-name {name} --path / ")),
            "{script}"
        );
    }
    assert_eq!(script.matches("put-role-policy").count(), 1);
}
