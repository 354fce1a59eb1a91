//! The plan of one account as a CloudFormation template, in JSON: YAML could read a string as
//! another type.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::plan::{Plan, PlannedAccount, PlannedAccountName, PlannedProvider, PlannedRole};

/// Logical id of the provider's resource.
const PROVIDER: &str = "OidcProvider";

pub(super) fn render(plan: &Plan, name: &PlannedAccountName, account: &PlannedAccount) -> String {
    let mut resources = Map::new();
    let (provider, what) = match &plan.provider {
        PlannedProvider::Existing => {
            let what = "The account's OIDC provider for it has to list the audiences that are in the metadata.";
            (Value::from(plan.provider_arn(name)), what)
        }
        PlannedProvider::New { thumbprint } => {
            resources.insert(
                PROVIDER.to_owned(),
                oidc_provider(plan, account, thumbprint.as_deref()),
            );
            let what = "Creates the OIDC provider for it. If the account has this provider already, use awsvid trust-policy --existing-provider.";
            // A Ref to this resource is its ARN.
            (json!({ "Ref": PROVIDER }), what)
        }
    };
    let mut used = BTreeSet::from([PROVIDER.to_owned()]);
    for role in account.roles.values() {
        resources.insert(
            logical_id(&role.name, &mut used),
            resource(plan, role, &provider),
        );
    }
    let PlannedAccountName { partition, number } = name;
    let url = plan.issuer.url();
    let template = json!({
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": format!(
            "For account {number}, partition {partition}: lets awsvid's workloads assume their roles, by tokens of {url}. {what}"
        ),
        "Metadata": { "awsvid": { "account": number, "partition": partition, "audiences": account.audiences } },
        "Resources": resources,
    });
    format!("{template:#}\n")
}

fn oidc_provider(plan: &Plan, account: &PlannedAccount, thumbprint: Option<&str>) -> Value {
    let mut properties = json!({ "Url": plan.issuer.url(), "ClientIdList": account.audiences });
    if let Some(thumbprint) = thumbprint {
        properties["ThumbprintList"] = json!([thumbprint]);
    }
    json!({ "Type": "AWS::IAM::OIDCProvider", "Properties": properties })
}

fn resource(plan: &Plan, role: &PlannedRole, provider: &Value) -> Value {
    json!({
        "Type": "AWS::IAM::Role",
        "Properties": {
            "RoleName": role.name,
            "Path": role.path,
            "MaxSessionDuration": role.max_session.as_secs(),
            "AssumeRolePolicyDocument": role.policy(&plan.issuer, provider),
        },
    })
}

/// Returns an id of letters and digits, unique among the roles.
fn logical_id(name: &str, used: &mut BTreeSet<String>) -> String {
    let mut id: String = std::iter::once("Role")
        .flat_map(str::chars)
        .chain(name.chars().filter(char::is_ascii_alphanumeric))
        .collect();
    while !used.insert(id.clone()) {
        id.push('X');
    }
    id
}
