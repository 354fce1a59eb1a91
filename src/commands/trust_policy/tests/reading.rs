//! Real readers of the three languages, and an evaluator of IAM's conditions. Used by the unit
//! tests and, included as a file, by the tests with a real SPIRE.

use std::collections::BTreeMap;
use std::process::Command;

use hcl::eval::{Context, FuncArgs, FuncDef, ParamType};
use serde_json::{Value, json};

/// The claims of a token that STS evaluates.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Token<'a> {
    pub(crate) issuer: &'a str,
    pub(crate) audience: &'a str,
    pub(crate) subject: &'a str,
}

/// Evaluates whether a trust policy admits a token, by the parts of IAM's condition language in
/// use. STS finds the token's provider, with the ARN `provider`, by the issuer. The names of the
/// claims begin with that.
pub(crate) fn allows(policy: &Value, token: &Token<'_>, provider: &str) -> bool {
    let issuer = token.issuer.split_once("://").expect("a URL").1;
    let claims = BTreeMap::from([
        (format!("{issuer}:aud"), token.audience),
        (format!("{issuer}:sub"), token.subject),
    ]);
    policy["Statement"]
        .as_array()
        .unwrap()
        .iter()
        .any(|statement| {
            assert_eq!(statement["Effect"], "Allow");
            assert_eq!(statement["Action"], "sts:AssumeRoleWithWebIdentity");
            assert_eq!(statement["Principal"], json!({ "Federated": provider }));
            provider.ends_with(&format!(":oidc-provider/{issuer}"))
                && statement["Condition"]
                    .as_object()
                    .unwrap()
                    .iter()
                    .all(|(operator, keys)| {
                        keys.as_object().unwrap().iter().all(|(key, expected)| {
                            let (claim, expected) = (claims.get(key), expected.as_str().unwrap());
                            match operator.as_str() {
                                "StringEquals" => claim.is_some_and(|claim| *claim == expected),
                                "StringLike" => claim.is_some_and(|claim| {
                                    like(expected.as_bytes(), claim.as_bytes())
                                }),
                                // By IAM's rules also true if the claim is missing.
                                "StringNotLike" => claim.is_none_or(|claim| {
                                    !like(expected.as_bytes(), claim.as_bytes())
                                }),
                                other => panic!("{other}"),
                            }
                        })
                    })
        })
}

/// Matches a pattern: `*` is any number of any characters, `?` any one.
fn like(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skipped| like(rest, &text[skipped..])),
        Some((b'?', rest)) => text.split_first().is_some_and(|(_, text)| like(rest, text)),
        Some((byte, rest)) => text
            .split_first()
            .is_some_and(|(first, text)| first == byte && like(rest, text)),
    }
}

/// Content of an output: the provider, and each role by its name.
#[derive(Debug, PartialEq)]
pub(crate) struct Read {
    pub(crate) provider: Value,
    pub(crate) roles: BTreeMap<String, (String, u64, Value)>,
    /// The inline policies of roles for the next role of a chain.
    pub(crate) permissions: BTreeMap<String, Value>,
}

/// Returns the provider by the names of its three properties. The last one may be missing.
fn provider_of(input: &Value, [url, audiences, thumbprints]: [&str; 3]) -> Value {
    json!({ "Url": input[url], "ClientIDList": input[audiences], "ThumbprintList": input[thumbprints] })
}

/// Runs the script in a shell, with a program `aws` that records its arguments.
pub(crate) fn by_a_shell(script: &str) -> Read {
    // An account without resources.
    let stub = "aws() {\n[ \"$2\" != get-open-id-connect-provider ] || return 254\n\
                for word; do printf '%s\\0' \"$word\"; done; printf 'END\\0'; }\n";
    let output = Command::new("sh")
        .arg("-euc")
        .arg(format!("{stub}{script}"))
        .output()
        .unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}\n{script}"
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = text.split_terminator('\0').collect();
    let mut read = Read {
        provider: Value::Null,
        roles: BTreeMap::new(),
        permissions: BTreeMap::new(),
    };
    for command in words
        .split(|word| *word == "END")
        .filter(|command| !command.is_empty())
    {
        let option = |name: &str| {
            let at = command
                .iter()
                .position(|word| *word == name)
                .unwrap_or_else(|| panic!("{name} in {command:?}"));
            command[at + 1]
        };
        match command[..2] {
            ["iam", "create-open-id-connect-provider"] => {
                let input: Value = serde_json::from_str(option("--cli-input-json")).unwrap();
                read.provider = provider_of(&input, ["Url", "ClientIDList", "ThumbprintList"]);
            }
            ["iam", "create-role"] => {
                let policy = serde_json::from_str(option("--assume-role-policy-document")).unwrap();
                let session = option("--max-session-duration").parse().unwrap();
                let role = (option("--path").to_owned(), session, policy);
                assert!(
                    read.roles
                        .insert(option("--role-name").to_owned(), role)
                        .is_none()
                );
            }
            // The provider is followed by each of its own audiences.
            ["iam", "add-client-id-to-open-id-connect-provider"] => {
                let audiences = read.provider["ClientIDList"].as_array().unwrap();
                assert!(
                    audiences
                        .iter()
                        .any(|audience| *audience == option("--client-id")),
                    "{command:?}"
                );
            }
            ["iam", "put-role-policy"] => {
                let policy = serde_json::from_str(option("--policy-document")).unwrap();
                let role = option("--role-name").to_owned();
                assert!(read.permissions.insert(role, policy).is_none());
            }
            _ => panic!("{command:?}"),
        }
    }
    read
}

/// Evaluates the HCL, with the function that Terraform adds.
fn by_hcl(text: &str, provider: &str) -> Read {
    fn jsonencode(arguments: FuncArgs) -> Result<hcl::Value, String> {
        Ok(hcl::Value::from(
            serde_json::to_string(&arguments[0]).map_err(|error| error.to_string())?,
        ))
    }
    let mut context = Context::new();
    context.declare_func(
        "jsonencode",
        FuncDef::builder().param(ParamType::Any).build(jsonencode),
    );
    context.declare_var(
        "aws_iam_openid_connect_provider",
        hcl::value!({ awsvid = { arn = provider } }),
    );
    // Each role by its label, for references to it.
    let labels = text
        .lines()
        .filter_map(|line| line.strip_prefix("resource \"aws_iam_role\" \""))
        .filter_map(|rest| rest.split('"').next());
    let roles: hcl::Map<String, hcl::Value> = labels
        .map(|label| (label.to_owned(), hcl::value!({ name = label })))
        .collect();
    context.declare_var("aws_iam_role", hcl::Value::Object(roles));
    let document: Value =
        hcl::eval::from_str(text, &context).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let resources = document["resource"].as_object().unwrap();
    let provider_resource = &resources["aws_iam_openid_connect_provider"]["awsvid"];
    let roles = resources["aws_iam_role"]
        .as_object()
        .unwrap()
        .values()
        .map(|role| {
            let policy =
                serde_json::from_str(role["assume_role_policy"].as_str().unwrap()).unwrap();
            let text = |name: &str| role[name].as_str().unwrap().to_owned();
            (
                text("name"),
                (
                    text("path"),
                    role["max_session_duration"].as_u64().unwrap(),
                    policy,
                ),
            )
        });
    let policies = resources.get("aws_iam_role_policy");
    let policies = policies.and_then(Value::as_object).into_iter().flatten();
    let permissions = policies.map(|(_, policy)| {
        let role = &resources["aws_iam_role"][policy["role"].as_str().unwrap()];
        let name = role["name"].as_str().unwrap().to_owned();
        let policy = serde_json::from_str(policy["policy"].as_str().unwrap()).unwrap();
        (name, policy)
    });
    Read {
        provider: provider_of(
            provider_resource,
            ["url", "client_id_list", "thumbprint_list"],
        ),
        roles: roles.collect(),
        permissions: permissions.collect(),
    }
}

/// Resolves the template as CloudFormation does.
fn by_cloudformation(text: &str, provider: &str) -> Read {
    let resolved = text.replace("\n", "").replace("  ", "");
    let template: Value = serde_json::from_str(&resolved).unwrap();
    assert_eq!(template["AWSTemplateFormatVersion"], "2010-09-09");
    let mut read = Read {
        provider: Value::Null,
        roles: BTreeMap::new(),
        permissions: BTreeMap::new(),
    };
    for (id, resource) in template["Resources"].as_object().unwrap() {
        assert!(id.bytes().all(|c| c.is_ascii_alphanumeric()), "{id}");
        let properties = &resource["Properties"];
        match resource["Type"].as_str().unwrap() {
            "AWS::IAM::OIDCProvider" => {
                assert_eq!(id, "OidcProvider");
                read.provider = provider_of(properties, ["Url", "ClientIdList", "ThumbprintList"]);
            }
            "AWS::IAM::Role" => {
                let mut policy = properties["AssumeRolePolicyDocument"].clone();
                let statements = policy["Statement"].as_array_mut().unwrap();
                let is_of_token = |statement: &&mut Value| statement["Principal"]["AWS"].is_null();
                for statement in statements.iter_mut().filter(is_of_token) {
                    assert_eq!(
                        statement["Principal"],
                        json!({ "Federated": { "Ref": "OidcProvider" } })
                    );
                    statement["Principal"]["Federated"] = Value::from(provider);
                }
                let text = |name: &str| properties[name].as_str().unwrap().to_owned();
                let role = (
                    text("Path"),
                    properties["MaxSessionDuration"].as_u64().unwrap(),
                    policy,
                );
                assert!(read.roles.insert(text("RoleName"), role).is_none());
                if let Some(policies) = properties["Policies"].as_array() {
                    let permission = policies[0]["PolicyDocument"].clone();
                    read.permissions.insert(text("RoleName"), permission);
                }
            }
            other => panic!("{other}"),
        }
    }
    read
}

/// Returns the content of all three outputs, in the order of `awsvid trust-policy --format`. Panics
/// if they differ. `provider` is the ARN that the provider will have.
pub(crate) fn same([aws_cli, terraform, cloudformation]: [&str; 3], provider: &str) -> Read {
    let read = by_a_shell(aws_cli);
    assert_eq!(by_hcl(terraform, provider), read);
    assert_eq!(by_cloudformation(cloudformation, provider), read);
    read
}
