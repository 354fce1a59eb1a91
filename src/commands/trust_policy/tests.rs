//! Each output is read by a real reader of its language, and what it then says is asked for tokens and their neighbours.

use std::collections::BTreeMap;
use std::process::Command;

use hcl::eval::{Context, FuncArgs, FuncDef, ParamType};
use serde_json::{Value, json};

use super::plan::{Issuer, Plan};
use super::*;
use crate::config::Accounts;

const ISSUER: &str = "https://oidc.example.org/tenant";
const PROVIDER: &str = "arn:aws:iam::123456789012:oidc-provider/oidc.example.org/tenant";
const THUMBPRINT: &str = "0123456789abcdef0123456789abcdef01234567";
const HEAD: &str = "[identity]\naudience = \"sts.amazonaws.com\"\n[sts]\nregion = \"eu-central-1\"\n\
                    [[workload]]\nspiffe_id = \"spiffe://example.org/any\"\nuid = 1\n";

fn roles(text: &str) -> crate::role::Roles {
    let known = Accounts { user: &|_| Ok(None), group: &|_| Ok(None) };
    let parsed = Config::parse(&format!("{HEAD}{text}"), &|_| None, known);
    parsed.unwrap_or_else(|problems| panic!("{problems:?}")).config.roles
}

fn plan(text: &str) -> Plan {
    Plan::new(&roles(text), &[], Issuer::parse(ISSUER).unwrap(), Some(THUMBPRINT.to_owned()))
}

fn role(name: &str, id: &str, arn: &str) -> String {
    format!("[[role]]\nname = \"{name}\"\nspiffe_id = \"{id}\"\nrole_arn = \"{arn}\"\n")
}

/// Whether a trust policy lets a token in: IAM's condition language, as far as it is used.
fn allows(policy: &Value, audience: &str, subject: &str) -> bool {
    let claims = BTreeMap::from([("oidc.example.org/tenant:aud", audience), ("oidc.example.org/tenant:sub", subject)]);
    policy["Statement"].as_array().unwrap().iter().any(|statement| {
        assert_eq!(statement["Effect"], "Allow");
        assert_eq!(statement["Action"], "sts:AssumeRoleWithWebIdentity");
        assert_eq!(statement["Principal"], json!({ "Federated": PROVIDER }));
        statement["Condition"].as_object().unwrap().iter().all(|(operator, keys)| {
            keys.as_object().unwrap().iter().all(|(key, wanted)| {
                let (claim, wanted) = (claims.get(key.as_str()), wanted.as_str().unwrap());
                match operator.as_str() {
                    "StringEquals" => claim.is_some_and(|claim| *claim == wanted),
                    "StringLike" => claim.is_some_and(|claim| like(wanted.as_bytes(), claim.as_bytes())),
                    // As IAM has it: true also if there is no such claim.
                    "StringNotLike" => claim.is_none_or(|claim| !like(wanted.as_bytes(), claim.as_bytes())),
                    other => panic!("{other}"),
                }
            })
        })
    })
}

/// `*` is any number of any characters, `?` any one.
fn like(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skipped| like(rest, &text[skipped..])),
        Some((b'?', rest)) => text.split_first().is_some_and(|(_, text)| like(rest, text)),
        Some((byte, rest)) => text.split_first().is_some_and(|(first, text)| first == byte && like(rest, text)),
    }
}

/// What an output comes to: the provider, and each role by its name.
#[derive(Debug, PartialEq)]
struct Read {
    provider: Value,
    roles: BTreeMap<String, (String, u64, Value)>,
}

/// By a shell, with a program `aws` that says what it was given.
fn by_a_shell(script: &str) -> Read {
    let stub = "aws() { for word; do printf '%s\\0' \"$word\"; done; printf 'END\\0'; }\n";
    let output = Command::new("sh").arg("-euc").arg(format!("{stub}{script}")).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}\n{script}");
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = text.split_terminator('\0').collect();
    let mut read = Read { provider: Value::Null, roles: BTreeMap::new() };
    for command in words.split(|word| *word == "END").filter(|command| !command.is_empty()) {
        let option = |name: &str| {
            let at = command.iter().position(|word| *word == name).unwrap_or_else(|| panic!("{name} in {command:?}"));
            command[at + 1]
        };
        match command[..2] {
            ["iam", "create-open-id-connect-provider"] => {
                read.provider = serde_json::from_str(option("--cli-input-json")).unwrap();
            }
            ["iam", "create-role"] => {
                let policy = serde_json::from_str(option("--assume-role-policy-document")).unwrap();
                let session = option("--max-session-duration").parse().unwrap();
                let role = (option("--path").to_owned(), session, policy);
                assert!(read.roles.insert(option("--role-name").to_owned(), role).is_none());
            }
            _ => panic!("{command:?}"),
        }
    }
    read
}

/// By an evaluator of HCL, with the function that Terraform adds.
fn by_hcl(text: &str) -> Read {
    fn jsonencode(arguments: FuncArgs) -> Result<hcl::Value, String> {
        Ok(hcl::Value::from(serde_json::to_string(&arguments[0]).map_err(|error| error.to_string())?))
    }
    let mut context = Context::new();
    context.declare_func("jsonencode", FuncDef::builder().param(ParamType::Any).build(jsonencode));
    context.declare_var("aws_iam_openid_connect_provider", hcl::value!({ awsvid = { arn = PROVIDER } }));
    let document: Value = hcl::eval::from_str(text, &context).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let resources = document["resource"].as_object().unwrap();
    let provider = &resources["aws_iam_openid_connect_provider"]["awsvid"];
    let roles = resources["aws_iam_role"].as_object().unwrap().values().map(|role| {
        let policy = serde_json::from_str(role["assume_role_policy"].as_str().unwrap()).unwrap();
        let text = |name: &str| role[name].as_str().unwrap().to_owned();
        (text("name"), (text("path"), role["max_session_duration"].as_u64().unwrap(), policy))
    });
    let list = |name: &str| provider[name].clone();
    Read {
        provider: json!({
            "Url": provider["url"], "ClientIDList": list("client_id_list"), "ThumbprintList": list("thumbprint_list"),
        }),
        roles: roles.collect(),
    }
}

/// As CloudFormation resolves it.
fn by_cloudformation(text: &str) -> Read {
    let resolved = text.replace("\n", "").replace("  ", "");
    let template: Value = serde_json::from_str(&resolved).unwrap();
    assert_eq!(template["AWSTemplateFormatVersion"], "2010-09-09");
    let mut read = Read { provider: Value::Null, roles: BTreeMap::new() };
    for (id, resource) in template["Resources"].as_object().unwrap() {
        assert!(id.bytes().all(|c| c.is_ascii_alphanumeric()), "{id}");
        let properties = &resource["Properties"];
        match resource["Type"].as_str().unwrap() {
            "AWS::IAM::OIDCProvider" => {
                assert_eq!(id, "OidcProvider");
                read.provider = json!({
                    "Url": properties["Url"], "ClientIDList": properties["ClientIdList"],
                    "ThumbprintList": properties["ThumbprintList"],
                });
            }
            "AWS::IAM::Role" => {
                let mut policy = properties["AssumeRolePolicyDocument"].clone();
                for statement in policy["Statement"].as_array_mut().unwrap() {
                    assert_eq!(statement["Principal"], json!({ "Federated": { "Ref": "OidcProvider" } }));
                    statement["Principal"]["Federated"] = Value::from(PROVIDER);
                }
                let text = |name: &str| properties[name].as_str().unwrap().to_owned();
                let role = (text("Path"), properties["MaxSessionDuration"].as_u64().unwrap(), policy);
                assert!(read.roles.insert(text("RoleName"), role).is_none());
            }
            other => panic!("{other}"),
        }
    }
    read
}

fn read_all(plan: &Plan) -> Read {
    let read = by_a_shell(&render(plan, Format::AwsCli).unwrap());
    assert_eq!(by_hcl(&render(plan, Format::Terraform).unwrap()), read);
    assert_eq!(by_cloudformation(&render(plan, Format::Cloudformation).unwrap()), read);
    read
}

#[test]
fn every_language_says_the_same_and_lets_in_only_who_is_meant() {
    let text = role("billing", "spiffe://example.org/ns/pay/sa/billing", "arn:aws:iam::123456789012:role/team/billing")
        + "audience = \"it's ${x} %{y} \\\\\"\nduration = \"2h\"\n"
        + &role("shop-1", "spiffe://example.org/shop/*", "arn:aws:iam::123456789012:role/shop-1")
        + &role("shop.1", "spiffe://example.org/more/**", "arn:aws:iam::123456789012:role/shop.1")
        + &role("again", "spiffe://example.org/again", "arn:aws:iam::123456789012:role/shop.1");
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
    assert_eq!((read.roles["shop-1"].0.as_str(), read.roles["shop-1"].1), ("/", 3600));
    // Two [[role]]s with one ARN are one role that trusts both.
    let both = &read.roles["shop.1"].2;
    for (subject, expected) in [("more/a/b", true), ("again", true), ("again/x", false), ("other", false)] {
        assert_eq!(
            allows(both, "sts.amazonaws.com", &format!("spiffe://example.org/{subject}")),
            expected,
            "{subject}"
        );
    }
}

#[test]
fn a_policy_lets_in_what_the_pattern_matches_and_nothing_else() {
    let segments = ["a", "b", "ab"];
    let mut paths = vec![String::new()];
    let mut ids = Vec::new();
    for _ in 0..4 {
        paths = paths.iter().flat_map(|path| segments.map(|segment| format!("{path}/{segment}"))).collect();
        ids.extend(paths.iter().map(|path| format!("spiffe://t{path}")));
    }
    for pattern in ["a", "a/b", "*", "a/*", "*/b", "a/*/b", "*/*", "*/a/*", "a/**", "a/b/**", "**", "*/*/*/*"] {
        let pattern = format!("spiffe://t/{pattern}");
        let text = role("r", &pattern, "arn:aws:iam::123456789012:role/r").replace("[[role]]", "[[role]]\n");
        let plan = plan(&text);
        assert_eq!(plan.warnings, [""; 0], "{pattern}");
        let policy = &by_a_shell(&render(&plan, Format::AwsCli).unwrap()).roles["r"].2;
        let matcher = crate::identity::SpiffeIdPattern::parse(&pattern).unwrap();
        for id in &ids {
            let expected = matcher.matches(&SpiffeId::parse(id).unwrap());
            assert_eq!(allows(policy, "sts.amazonaws.com", id), expected, "{pattern} and {id}");
            assert!(!allows(policy, "other", id), "{pattern} and {id}");
        }
    }
}

#[test]
fn what_iam_cannot_say_is_a_warning_with_an_example() {
    let plan = plan(&role("r", "spiffe://t/ns/*/sa/**", "arn:aws:iam::123456789012:role/r"));
    let [warning] = &plan.warnings[..] else { panic!("{:?}", plan.warnings) };
    let example = "spiffe://t/ns/any/thing/sa/x";
    assert!(warning.contains(example), "{warning}");
    let policy = &by_a_shell(&render(&plan, Format::AwsCli).unwrap()).roles["r"].2;
    assert!(allows(policy, "sts.amazonaws.com", example));
    let matcher = crate::identity::SpiffeIdPattern::parse("spiffe://t/ns/*/sa/**").unwrap();
    assert!(!matcher.matches(&SpiffeId::parse(example).unwrap()));
}

#[test]
fn an_arn_from_the_id_is_one_role_for_each_id_that_is_known() {
    let roles = roles(&role("r", "spiffe://t/app/*", "arn:aws:iam::123456789012:role/app-{path[1]}"));
    let ids = ["spiffe://t/app/a", "spiffe://t/app/b", "spiffe://t/other/c"].map(|id| SpiffeId::parse(id).unwrap());
    let issuer = || Issuer::parse(ISSUER).unwrap();
    let read = by_a_shell(&render(&Plan::new(&roles, &ids, issuer(), None), Format::AwsCli).unwrap());
    assert_eq!(read.roles.keys().collect::<Vec<_>>(), ["app-a", "app-b"]);
    assert!(allows(&read.roles["app-a"].2, "sts.amazonaws.com", "spiffe://t/app/a"));
    assert!(!allows(&read.roles["app-a"].2, "sts.amazonaws.com", "spiffe://t/app/b"));
    assert!(read.provider["ThumbprintList"].is_null());
    let none = Plan::new(&roles, &[], issuer(), None);
    assert!(none.accounts.is_empty() && none.warnings[0].contains("--spiffe-id"), "{:?}", none.warnings);
}

#[test]
fn accounts_and_partitions_are_kept_apart_and_others_are_left_out() {
    let text = role("a", "spiffe://t/a", "arn:aws:iam::123456789012:role/a")
        + &role("b", "spiffe://t/b", "arn:aws-cn:iam::210987654321:role/b")
        + &role("m", "spiffe://t/m", "arn:minio:iam:::role/m")
        + "endpoint = \"https://minio.internal:9000\"\naudience = \"minio\"\n";
    let text = text.replace("endpoint =", "sts_endpoint =");
    let plan = plan(&text);
    assert!(plan.warnings.iter().any(|warning| warning.contains("\"m\" is left out")), "{:?}", plan.warnings);
    let script = render(&plan, Format::AwsCli).unwrap();
    assert!(script.contains("arn:aws-cn:iam::210987654321:oidc-provider/oidc.example.org/tenant"), "{script}");
    assert!(!script.contains("minio"), "{script}");
    let error = render(&plan, Format::Terraform).unwrap_err();
    assert!(error.contains("--account (123456789012, 210987654321)"), "{error}");
}

#[test]
fn issuers() {
    for (text, words) in [
        ("https://oidc.example.org/", "ends with a slash"),
        ("http://oidc.example.org", "over https only"),
        ("https://oidc.example.org:8443", "no port"),
        ("https://OIDC.example.org", "capital letters"),
    ] {
        let plan = Plan::new(&crate::role::Roles::default(), &[], Issuer::parse(text).unwrap(), None);
        assert!(plan.warnings.iter().any(|warning| warning.contains(words)), "{text}: {:?}", plan.warnings);
    }
    for text in ["oidc.example.org", "https://", "https://a b", "https://a/?x", "https://a/\"", "https://a/${b}"] {
        assert!(Issuer::parse(text).is_err(), "{text}");
    }
}

#[test]
fn a_policy_that_iam_finds_too_long_is_a_warning() {
    let text: String = (0..9)
        .map(|i| role(&format!("r{i}"), &format!("spiffe://example.org/n/{i}"), "arn:aws:iam::123456789012:role/r"))
        .collect();
    let warnings = plan(&text).warnings;
    assert!(warnings.iter().any(|warning| warning.contains("IAM takes 2048")), "{warnings:?}");
}
