//! The plan as a script with commands of the AWS CLI and their documents as JSON.

use std::borrow::Cow;
use std::fmt::Write;

use serde_json::{Value, json};

use super::anywhere::{NAME, PlannedAnywhere, certified_roles};
use super::plan::{
    PERMISSION_NAME, Plan, PlannedAccount, PlannedAccountName, PlannedProvider, PlannedRole,
};

/// Renders all accounts, each under a heading, because its commands need credentials of that
/// account.
pub(super) fn render(plan: &Plan) -> String {
    let mut text = String::new();
    for (name, account) in &plan.accounts {
        let PlannedAccountName { partition, number } = name;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "# Account {number}, partition {partition}: run this with credentials of that account.\n"
        );
        if !account.audiences.is_empty() {
            text.push_str(&provider(plan, name, account));
        }
        let anywhere = plan
            .anywhere
            .as_ref()
            .filter(|anywhere| anywhere.is_in(name));
        text.extend(anywhere.map(trust_anchor));
        let (arn, anchor) = (Value::from(plan.provider_arn(name)), plan.anchor_arn());
        if account.roles.values().any(|role| !role.chained.is_empty()) {
            text.push_str(
                "\n# IAM accepts a role as principal of a trust policy once that role exists. So begin with the first role of \
                 a chain.\n",
            );
        }
        for (role_arn, role) in &account.roles {
            let policy = role.policy(&plan.issuer, &arn, &anchor);
            let _ = writeln!(text, "\n# {role_arn}\n{}", create(role, &policy));
            if let Some(permission) = role.permission_policy() {
                let _ = writeln!(text, "{}", permit(role, &permission));
            }
            let _ = writeln!(
                text,
                "# If the role exists already (this replaces its whole trust policy):\n{}",
                commented(&update(role, &policy))
            );
        }
        text.extend(anywhere.map(|anywhere| profile(anywhere, account)));
        text.push('\n');
    }
    text.truncate(text.trim_end().len() + 1);
    text
}

/// Keeps an existing provider. IAM accepts an audience that it already has.
fn provider(plan: &Plan, name: &PlannedAccountName, account: &PlannedAccount) -> String {
    if account.audiences.is_empty() {
        return String::new();
    }
    let arn = word(&plan.provider_arn(name));
    let mut text = match &plan.provider {
        PlannedProvider::Existing => {
            "# The OIDC provider exists; only its audiences are added.\n".to_owned()
        }
        PlannedProvider::New { thumbprint } => {
            let mut document =
                json!({ "Url": plan.issuer.url(), "ClientIDList": account.audiences });
            if let Some(thumbprint) = thumbprint {
                document["ThumbprintList"] = json!([thumbprint]);
            }
            format!(
                "# The OIDC provider, if the account has none for this issuer yet.\n\
                 aws iam get-open-id-connect-provider --open-id-connect-provider-arn {arn} >/dev/null 2>&1 ||\n  \
                 aws iam create-open-id-connect-provider --cli-input-json {}\n",
                quoted(&document)
            )
        }
    };
    for audience in &account.audiences {
        let audience = word(audience);
        let _ = writeln!(
            text,
            "aws iam add-client-id-to-open-id-connect-provider --open-id-connect-provider-arn {arn} --client-id {audience}"
        );
    }
    text
}

/// Creates the trust anchor, which has no name that could be checked for.
fn trust_anchor(anywhere: &PlannedAnywhere) -> String {
    let Some(pem) = anywhere.pem() else {
        return String::new();
    };
    let region = word(&anywhere.target.region);
    let source = json!({
        "sourceType": "CERTIFICATE_BUNDLE",
        "sourceData": { "x509CertificateData": pem },
    });
    let [id, _] = anywhere.ids();
    let update = format!(
        "aws rolesanywhere update-trust-anchor --region {region} --trust-anchor-id {} --source {}",
        word(id),
        quoted(&source)
    );
    format!(
        "# The trust anchor of IAM Roles Anywhere. This prints its ARN, for `trust_anchor_arn` in [roles_anywhere].\n\
         aws rolesanywhere create-trust-anchor --region {region} --name {NAME} --enabled \\\n  \
         --query trustAnchor.trustAnchorArn --source {}\n\
         # If that of the configuration exists already:\n{}\n",
        quoted(&source),
        commented(&update)
    )
}

/// Creates the profile, which lists roles that exist.
fn profile(anywhere: &PlannedAnywhere, account: &PlannedAccount) -> String {
    let (roles, seconds) = certified_roles(account);
    let region = word(&anywhere.target.region);
    let roles: Vec<String> = roles.into_iter().map(word).collect();
    let roles = roles.join(" ");
    let [_, id] = anywhere.ids();
    let settings =
        format!("--accept-role-session-name --duration-seconds {seconds} --role-arns {roles}");
    let update = format!(
        "aws rolesanywhere update-profile --region {region} --profile-id {} {settings}",
        word(id)
    );
    format!(
        "\n# The profile of IAM Roles Anywhere. This prints its ARN, for `profile_arn` in [roles_anywhere].\n\
         aws rolesanywhere create-profile --region {region} --name {NAME} --enabled \\\n  \
         --query profile.profileArn {settings}\n\
         # If that of the configuration exists already:\n{}\n",
        commented(&update)
    )
}

fn create(role: &PlannedRole, policy: &Value) -> String {
    format!(
        "aws iam create-role --role-name {} --path {} --max-session-duration {} --assume-role-policy-document {}",
        word(&role.name),
        word(&role.path),
        role.max_session.as_secs(),
        quoted(policy)
    )
}

fn update(role: &PlannedRole, policy: &Value) -> String {
    let policy = quoted(policy);
    format!(
        "aws iam update-assume-role-policy --role-name {} --policy-document {policy}",
        word(&role.name)
    )
}

/// Returns the command that permits the role to assume the next one of a chain.
fn permit(role: &PlannedRole, policy: &Value) -> String {
    format!(
        "aws iam put-role-policy --role-name {} --policy-name {PERMISSION_NAME} --policy-document {}",
        word(&role.name),
        quoted(policy)
    )
}

fn commented(text: &str) -> String {
    text.lines()
        .map(|line| format!("# {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn quoted(document: &Value) -> String {
    word(&format!("{document:#}"))
}

/// Quotes a word for a POSIX shell. Only a NUL cannot be quoted, which neither JSON nor an ARN has.
fn word(text: &str) -> String {
    shlex::try_quote(text).map_or_else(|_| String::new(), Cow::into_owned)
}
