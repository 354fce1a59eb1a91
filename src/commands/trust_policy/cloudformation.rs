//! The plan of one account as a CloudFormation template, in JSON: YAML could read a string as
//! another type.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::plan::{
    PERMISSION_NAME, Plan, PlannedAccount, PlannedAccountName, PlannedProvider, PlannedRole,
};

/// Logical id of the provider's resource.
const PROVIDER: &str = "OidcProvider";

pub(super) fn render(plan: &Plan, name: &PlannedAccountName, account: &PlannedAccount) -> String {
    let mut resources = Map::new();
    let (provider, what) = match &plan.provider {
        PlannedProvider::Existing => {
            let what = "The account's OIDC provider for it has to list the audiences that are in the metadata.";
            (Value::from(plan.provider_arn(name)), what)
        }
        PlannedProvider::New { .. } if account.audiences.is_empty() => (
            Value::Null,
            "Sessions of another account's roles assume them.",
        ),
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
    let ids: BTreeMap<&str, String> = account
        .roles
        .iter()
        .map(|(arn, role)| (arn.as_str(), logical_id(&role.name, &mut used)))
        .collect();
    for (arn, role) in &account.roles {
        let mut resource = resource(plan, role, &provider);
        // IAM accepts a role as principal once that role exists.
        let principals = role.chained.iter();
        let principals: BTreeSet<&String> = principals
            .filter_map(|statement| ids.get(statement.principal.as_str()))
            .collect();
        if !principals.is_empty() {
            resource["DependsOn"] = json!(principals);
        }
        resources.insert(ids[arn.as_str()].clone(), resource);
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
    let mut resource = json!({
        "Type": "AWS::IAM::Role",
        "Properties": {
            "RoleName": role.name,
            "Path": role.path,
            "MaxSessionDuration": role.max_session.as_secs(),
            "AssumeRolePolicyDocument": role.policy(&plan.issuer, provider),
        },
    });
    if let Some(permission) = role.permission_policy() {
        resource["Properties"]["Policies"] =
            json!([{ "PolicyName": PERMISSION_NAME, "PolicyDocument": permission }]);
    }
    resource
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
