//! The plan as commands of the AWS CLI, with their documents as JSON: a script that can be read, and run.

use std::fmt::Write;

use serde_json::{Value, json};

use super::plan::{Account, Plan, TrustedRole};

/// All accounts, each under a heading: the commands of one are for credentials of that account.
pub(super) fn render(plan: &Plan) -> String {
    let mut text = String::new();
    for (number, account) in &plan.accounts {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# Account {number}: the OIDC provider, once.\n{}", provider(plan, account));
        let arn = Value::from(account.provider_arn(number, &plan.issuer));
        for (role_arn, role) in &account.roles {
            let policy = role.policy(&plan.issuer, &arn);
            let _ = writeln!(text, "\n# {role_arn}\n{}", create(role, &policy));
            let _ = writeln!(text, "# If there is that role already:\n{}", commented(&update(role, &policy)));
        }
        text.push('\n');
    }
    text.truncate(text.trim_end().len() + 1);
    text
}

fn provider(plan: &Plan, account: &Account) -> String {
    let mut document = json!({ "Url": plan.issuer.url(), "ClientIDList": account.audiences });
    if let Some(thumbprint) = &plan.thumbprint {
        document["ThumbprintList"] = json!([thumbprint]);
    }
    format!("aws iam create-open-id-connect-provider --cli-input-json {}", quoted(&document))
}

fn create(role: &TrustedRole, policy: &Value) -> String {
    format!(
        "aws iam create-role --role-name {} --path {} --max-session-duration {} --assume-role-policy-document {}",
        word(&role.name),
        word(&role.path),
        role.max_session.as_secs(),
        quoted(policy)
    )
}

fn update(role: &TrustedRole, policy: &Value) -> String {
    let policy = quoted(policy);
    format!("aws iam update-assume-role-policy --role-name {} --policy-document {policy}", word(&role.name))
}

fn commented(text: &str) -> String {
    text.lines().map(|line| format!("# {line}")).collect::<Vec<_>>().join("\n")
}

fn quoted(document: &Value) -> String {
    word(&format!("{document:#}"))
}

/// A word of a POSIX shell.
fn word(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
