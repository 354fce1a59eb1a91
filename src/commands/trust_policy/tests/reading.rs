//! Real readers of the three languages, and an evaluator of IAM's conditions. Used by the unit
//! tests and, included as a file, by the tests with a real SPIRE.

use std::collections::{BTreeMap, BTreeSet};
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
    statements(policy, "Federated").any(|statement| {
        assert_eq!(statement["Action"], "sts:AssumeRoleWithWebIdentity");
        assert_eq!(statement["Principal"], json!({ "Federated": provider }));
        provider.ends_with(&format!(":oidc-provider/{issuer}")) && holds(statement, &claims)
    })
}

/// Returns the statements for principals of this kind.
pub(super) fn statements<'a>(policy: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    let statements = policy["Statement"].as_array().unwrap().iter();
    statements.filter(move |statement| {
        assert_eq!(statement["Effect"], "Allow");
        !statement["Principal"][kind].is_null()
    })
}

/// Evaluates the condition of a statement.
pub(super) fn holds(statement: &Value, claims: &BTreeMap<String, &str>) -> bool {
    let condition = statement["Condition"].as_object().unwrap();
    condition.iter().all(|(operator, keys)| {
        keys.as_object().unwrap().iter().all(|(key, expected)| {
            let (claim, expected) = (claims.get(key), expected.as_str().unwrap());
            let is_like = |claim: &&str| like(expected.as_bytes(), claim.as_bytes());
            match operator.as_str() {
                "StringEquals" | "ArnEquals" => claim.is_some_and(|claim| *claim == expected),
                "StringLike" => claim.is_some_and(is_like),
                // By IAM's rules also true if the claim is missing.
                "StringNotLike" => claim.is_none_or(|claim| !is_like(claim)),
                other => panic!("{other}"),
            }
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
    /// The CAs of the trust anchor, in PEM.
    pub(crate) anchor: Option<String>,
    pub(crate) profile: Option<ReadProfile>,
}

/// A profile of IAM Roles Anywhere.
#[derive(Debug, PartialEq)]
pub(crate) struct ReadProfile {
    pub(crate) accepts_session_names: bool,
    pub(crate) seconds: u64,
    /// Names of the roles.
    pub(crate) roles: BTreeSet<String>,
}

impl Read {
    fn of_provider(provider: Value) -> Self {
        Self {
            provider,
            roles: BTreeMap::new(),
            permissions: BTreeMap::new(),
            anchor: None,
            profile: None,
        }
    }
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
    let mut read = Read::of_provider(Value::Null);
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
            ["rolesanywhere", "create-trust-anchor"] => {
                let source: Value = serde_json::from_str(option("--source")).unwrap();
                assert_eq!(source["sourceType"], "CERTIFICATE_BUNDLE");
                let pem = source["sourceData"]["x509CertificateData"].as_str();
                assert!(command.contains(&"--enabled"));
                read.anchor = Some(pem.unwrap().to_owned());
            }
            ["rolesanywhere", "create-profile"] => {
                let arns = command.iter().skip_while(|word| **word != "--role-arns");
                let names = arns.skip(1).map(|arn| arn.rsplit('/').next().unwrap());
                assert!(command.contains(&"--enabled"));
                read.profile = Some(ReadProfile {
                    accepts_session_names: command.contains(&"--accept-role-session-name"),
                    seconds: option("--duration-seconds").parse().unwrap(),
                    roles: names.map(str::to_owned).collect(),
                });
            }
            _ => panic!("{command:?}"),
        }
    }
    read
}

/// Evaluates the HCL, with the function that Terraform adds.
fn by_hcl(text: &str, provider: &str, anchor: &str) -> Read {
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
    context.declare_var(
        "aws_rolesanywhere_trust_anchor",
        hcl::value!({ awsvid = { arn = anchor } }),
    );
    // Each role by its label, for references to it.
    let labels = text
        .lines()
        .filter_map(|line| line.strip_prefix("resource \"aws_iam_role\" \""))
        .filter_map(|rest| rest.split('"').next());
    let roles: hcl::Map<String, hcl::Value> = labels
        .map(|label| (label.to_owned(), hcl::value!({ name = label, arn = label })))
        .collect();
    context.declare_var("aws_iam_role", hcl::Value::Object(roles));
    let document: Value =
        hcl::eval::from_str(text, &context).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let resources = document["resource"].as_object().unwrap();
    let providers = resources.get("aws_iam_openid_connect_provider");
    let provider_resource = providers.map_or(&Value::Null, |providers| &providers["awsvid"]);
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
    let name_of = |label: &Value| {
        let name = &resources["aws_iam_role"][label.as_str().unwrap()]["name"];
        name.as_str().unwrap().to_owned()
    };
    let anywhere = |kind: &str| {
        let resource = &resources.get(kind)?["awsvid"];
        assert_eq!(resource["enabled"], true);
        Some(resource)
    };
    let anchor = anywhere("aws_rolesanywhere_trust_anchor").map(|anchor| {
        assert_eq!(anchor["source"]["source_type"], "CERTIFICATE_BUNDLE");
        let pem = &anchor["source"]["source_data"]["x509_certificate_data"];
        pem.as_str().unwrap().to_owned()
    });
    let profile = anywhere("aws_rolesanywhere_profile").map(|profile| ReadProfile {
        accepts_session_names: profile["accept_role_session_name"] == true,
        seconds: profile["duration_seconds"].as_u64().unwrap(),
        roles: profile["role_arns"]
            .as_array()
            .unwrap()
            .iter()
            .map(name_of)
            .collect(),
    });
    Read {
        roles: roles.collect(),
        permissions: permissions.collect(),
        anchor,
        profile,
        ..Read::of_provider(provider_of(
            provider_resource,
            ["url", "client_id_list", "thumbprint_list"],
        ))
    }
}

/// Resolves the template as CloudFormation does.
fn by_cloudformation(text: &str, provider: &str, anchor: &str) -> Read {
    let resolved = text.replace("\n", "").replace("  ", "");
    let template: Value = serde_json::from_str(&resolved).unwrap();
    assert_eq!(template["AWSTemplateFormatVersion"], "2010-09-09");
    let mut read = Read::of_provider(Value::Null);
    let resources = template["Resources"].as_object().unwrap();
    for (id, resource) in resources {
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
                for statement in statements {
                    resolve(
                        statement.pointer_mut("/Principal/Federated"),
                        json!({ "Ref": "OidcProvider" }),
                        provider,
                    );
                    resolve(
                        statement.pointer_mut("/Condition/ArnEquals/aws:SourceArn"),
                        json!({ "Fn::GetAtt": ["TrustAnchor", "TrustAnchorArn"] }),
                        anchor,
                    );
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
            "AWS::RolesAnywhere::TrustAnchor" => {
                let source = &properties["Source"];
                assert_eq!(
                    (id.as_str(), &properties["Enabled"]),
                    ("TrustAnchor", &json!(true))
                );
                assert_eq!(source["SourceType"], "CERTIFICATE_BUNDLE");
                let pem = source["SourceData"]["X509CertificateData"].as_str();
                read.anchor = Some(pem.unwrap().to_owned());
            }
            "AWS::RolesAnywhere::Profile" => {
                assert_eq!(properties["Enabled"], true);
                let name = |arn: &Value| {
                    assert_eq!(arn["Fn::GetAtt"][1], "Arn");
                    let role = &resources[arn["Fn::GetAtt"][0].as_str().unwrap()];
                    let name = role["Properties"]["RoleName"].as_str();
                    name.unwrap().to_owned()
                };
                let arns = properties["RoleArns"].as_array().unwrap();
                read.profile = Some(ReadProfile {
                    accepts_session_names: properties["AcceptRoleSessionName"] == true,
                    seconds: properties["DurationSeconds"].as_u64().unwrap(),
                    roles: arns.iter().map(name).collect(),
                });
            }
            other => panic!("{other}"),
        }
    }
    read
}

/// Replaces a reference, which has to be this one, by the ARN that it stands for.
fn resolve(reference: Option<&mut Value>, expected: Value, arn: &str) {
    if let Some(reference) = reference {
        assert_eq!(*reference, expected);
        *reference = Value::from(arn);
    }
}

/// Returns the content of all three outputs, in the order of `awsvid trust-policy --format`. Panics
/// if they differ. `provider` and `anchor` are the ARNs that the provider and the trust anchor will
/// have.
pub(crate) fn same(
    [aws_cli, terraform, cloudformation]: [&str; 3],
    provider: &str,
    anchor: &str,
) -> Read {
    let read = by_a_shell(aws_cli);
    assert_eq!(by_hcl(terraform, provider, anchor), read);
    assert_eq!(by_cloudformation(cloudformation, provider, anchor), read);
    read
}
