//! The plan as commands of the AWS CLI, with their documents as JSON: a script that can be read, and run.

use std::fmt::Write;

use serde_json::{Value, json};

use super::plan::{Plan, PlannedAccount, PlannedAccountName, PlannedProvider, PlannedRole};

/// All accounts, each under a heading: the commands of one are for credentials of that account.
pub(super) fn render(plan: &Plan) -> String {
    let mut text = String::new();
    for (name, account) in &plan.accounts {
        let PlannedAccountName { partition, number } = name;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "# Account {number}, partition {partition}: run this with credentials of that account.\n"
        );
        text.push_str(&provider(plan, name, account));
        let arn = Value::from(plan.provider_arn(name));
        for (role_arn, role) in &account.roles {
            let policy = role.policy(&plan.issuer, &arn);
            let _ = writeln!(text, "\n# {role_arn}\n{}", create(role, &policy));
            let _ = writeln!(
                text,
                "# If there is that role already:\n{}",
                commented(&update(role, &policy))
            );
        }
        text.push('\n');
    }
    text.truncate(text.trim_end().len() + 1);
    text
}

/// An existing provider is kept. Adding an audience that it has already is not an error in IAM.
fn provider(plan: &Plan, name: &PlannedAccountName, account: &PlannedAccount) -> String {
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

fn commented(text: &str) -> String {
    text.lines()
        .map(|line| format!("# {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn quoted(document: &Value) -> String {
    word(&format!("{document:#}"))
}

/// A word of a POSIX shell.
fn word(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
