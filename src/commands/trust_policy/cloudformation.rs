//! The plan of one account as a CloudFormation template, in JSON: in YAML a value could be read as something else than text.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::plan::{Account, Plan, TrustedRole};

const PROVIDER: &str = "OidcProvider";

pub(super) fn render(plan: &Plan, account: &Account) -> String {
    let mut resources = Map::new();
    let mut provider = json!({ "Url": plan.issuer.url(), "ClientIdList": account.audiences });
    if let Some(thumbprint) = &plan.thumbprint {
        provider["ThumbprintList"] = json!([thumbprint]);
    }
    resources.insert(PROVIDER.to_owned(), json!({ "Type": "AWS::IAM::OIDCProvider", "Properties": provider }));
    let mut taken = BTreeSet::from([PROVIDER.to_owned()]);
    for role in account.roles.values() {
        resources.insert(logical_id(&role.name, &mut taken), resource(plan, role));
    }
    let description = format!("Lets awsvid's workloads assume their roles: tokens of {}", plan.issuer.url());
    let template = json!({
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": description,
        "Resources": resources,
    });
    format!("{template:#}\n")
}

fn resource(plan: &Plan, role: &TrustedRole) -> Value {
    json!({
        "Type": "AWS::IAM::Role",
        "Properties": {
            "RoleName": role.name,
            "Path": role.path,
            "MaxSessionDuration": role.max_session.as_secs(),
            // Of this resource a Ref is the ARN.
            "AssumeRolePolicyDocument": role.policy(&plan.issuer, &json!({ "Ref": PROVIDER })),
        },
    })
}

/// Letters and digits, another one for each role.
fn logical_id(name: &str, taken: &mut BTreeSet<String>) -> String {
    let mut id: String =
        std::iter::once("Role").flat_map(str::chars).chain(name.chars().filter(char::is_ascii_alphanumeric)).collect();
    while !taken.insert(id.clone()) {
        id.push('X');
    }
    id
}
