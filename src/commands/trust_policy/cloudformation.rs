//! The plan of one account as a CloudFormation template, in JSON: YAML could read a string as
//! another type.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::anywhere::{NAME, PlannedAnywhere, certified_roles};
use super::plan::{
    PERMISSION_NAME, Plan, PlannedAccount, PlannedAccountName, PlannedProvider, PlannedRole,
};

/// Logical id of the provider's resource.
const PROVIDER: &str = "OidcProvider";
/// Logical ids of the resources of IAM Roles Anywhere.
const TRUST_ANCHOR: &str = "TrustAnchor";
const PROFILE: &str = "Profile";

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
    if account.audiences.is_empty() {
        resources.remove(PROVIDER);
    }
    let anywhere = plan
        .anywhere
        .as_ref()
        .filter(|anywhere| anywhere.is_in(name));
    let pem = anywhere.and_then(PlannedAnywhere::pem);
    // Without the CAs, the trust anchor is that of the configuration.
    let anchor = match &pem {
        Some(_) => json!({ "Fn::GetAtt": [TRUST_ANCHOR, "TrustAnchorArn"] }),
        None => plan.anchor_arn(),
    };
    let mut used = BTreeSet::from([PROVIDER, TRUST_ANCHOR, PROFILE].map(str::to_owned));
    let ids: BTreeMap<&str, String> = account
        .roles
        .iter()
        .map(|(arn, role)| (arn.as_str(), logical_id(&role.name, &mut used)))
        .collect();
    let mut certified = Vec::new();
    for (arn, role) in &account.roles {
        let mut resource = resource(plan, role, &provider, &anchor);
        let principals = principals(role, &ids);
        if !principals.is_empty() {
            resource["DependsOn"] = json!(principals);
        }
        let id = &ids[arn.as_str()];
        if !role.certified.is_empty() {
            certified.push(json!({ "Fn::GetAtt": [id, "Arn"] }));
        }
        resources.insert(id.clone(), resource);
    }
    if anywhere.is_some() {
        resources.extend(pem.map(|pem| (TRUST_ANCHOR.to_owned(), trust_anchor(&pem))));
        let (_, seconds) = certified_roles(account);
        resources.insert(PROFILE.to_owned(), profile(&certified, seconds));
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

/// Returns the logical IDs of the roles whose sessions assume this one. IAM accepts a role as
/// principal once that role exists.
fn principals<'a>(role: &PlannedRole, ids: &'a BTreeMap<&str, String>) -> BTreeSet<&'a String> {
    let principals = role.chained.iter();
    principals
        .filter_map(|statement| ids.get(statement.principal.as_str()))
        .collect()
}

fn oidc_provider(plan: &Plan, account: &PlannedAccount, thumbprint: Option<&str>) -> Value {
    let mut properties = json!({ "Url": plan.issuer.url(), "ClientIdList": account.audiences });
    if let Some(thumbprint) = thumbprint {
        properties["ThumbprintList"] = json!([thumbprint]);
    }
    json!({ "Type": "AWS::IAM::OIDCProvider", "Properties": properties })
}

fn trust_anchor(pem: &str) -> Value {
    json!({
        "Type": "AWS::RolesAnywhere::TrustAnchor",
        "Properties": {
            "Name": NAME,
            "Enabled": true,
            "Source": {
                "SourceType": "CERTIFICATE_BUNDLE",
                "SourceData": { "X509CertificateData": pem },
            },
        },
    })
}

fn profile(roles: &[Value], seconds: u64) -> Value {
    json!({
        "Type": "AWS::RolesAnywhere::Profile",
        "Properties": {
            "Name": NAME,
            "Enabled": true,
            "AcceptRoleSessionName": true,
            "DurationSeconds": seconds,
            "RoleArns": roles,
        },
    })
}

fn resource(plan: &Plan, role: &PlannedRole, provider: &Value, anchor: &Value) -> Value {
    let mut resource = json!({
        "Type": "AWS::IAM::Role",
        "Properties": {
            "RoleName": role.name,
            "Path": role.path,
            "MaxSessionDuration": role.max_session.as_secs(),
            "AssumeRolePolicyDocument": role.policy(&plan.issuer, provider, anchor),
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
