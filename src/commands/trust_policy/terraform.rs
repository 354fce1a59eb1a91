//! The plan of one account as resources of Terraform's AWS provider.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::plan::{
    Plan, PlannedAccount, PlannedAccountName, PlannedProvider, PlannedRole, Statement,
};

/// Address of the provider, as a resource or a data source.
const PROVIDER: &str = "aws_iam_openid_connect_provider.awsvid";

pub(super) fn render(plan: &Plan, name: &PlannedAccountName, account: &PlannedAccount) -> String {
    let PlannedAccountName { partition, number } = name;
    let mut text = format!(
        "# Account {number}, partition {partition}.\n\n{}",
        provider(plan, name, account)
    );
    let mut used = BTreeSet::new();
    for role in account.roles.values() {
        let label = label(&role.name, &mut used);
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "\nresource \"aws_iam_role\" {} {{\n{}}}\n",
            string(&label),
            body(plan, role)
        );
    }
    text
}

/// Renders the provider. Terraform's `apply` fails for a resource that exists already.
fn provider(plan: &Plan, name: &PlannedAccountName, account: &PlannedAccount) -> String {
    let audiences: Vec<String> = account
        .audiences
        .iter()
        .map(|audience| string(audience))
        .collect();
    let (url, audiences) = (string(plan.issuer.url()), audiences.join(", "));
    let PlannedProvider::New { thumbprint } = &plan.provider else {
        return format!(
            "# The account's provider, which has to list the audiences {audiences}.\n\
             data \"aws_iam_openid_connect_provider\" \"awsvid\" {{\n  url = {url}\n}}\n"
        );
    };
    let thumbprints = thumbprint
        .as_ref()
        .map(|thumbprint| format!("  thumbprint_list = [{}]\n", string(thumbprint)));
    format!(
        "# If the account has this provider already, use awsvid trust-policy --existing-provider, or\n\
         # terraform import {PROVIDER} {}\n\
         resource \"aws_iam_openid_connect_provider\" \"awsvid\" {{\n  url            = {url}\n  client_id_list = [{audiences}]\n{}}}\n",
        plan.provider_arn(name),
        thumbprints.unwrap_or_default()
    )
}

fn body(plan: &Plan, role: &PlannedRole) -> String {
    let statements: String = role
        .statements
        .iter()
        .map(|one| statement(plan, one))
        .collect();
    format!(
        "  name                 = {}\n  path                 = {}\n  max_session_duration = {}\n\n  \
         assume_role_policy = jsonencode({{\n    Version   = \"2012-10-17\"\n    Statement = [\n{statements}    ]\n  }})\n",
        string(&role.name),
        string(&role.path),
        role.max_session.as_secs(),
    )
}

fn statement(plan: &Plan, statement: &Statement) -> String {
    let mut condition = String::new();
    for (operator, keys) in statement.condition(&plan.issuer) {
        let _ = writeln!(condition, "          {operator} = {{");
        for (key, value) in keys {
            let _ = writeln!(
                condition,
                "            {} = {}",
                string(&key),
                string(&value)
            );
        }
        condition.push_str("          }\n");
    }
    let data = if plan.provider == PlannedProvider::Existing {
        "data."
    } else {
        ""
    };
    format!(
        "      {{\n        Effect    = \"Allow\"\n        Principal = {{ Federated = {data}{PROVIDER}.arn }}\n        \
         Action    = \"sts:AssumeRoleWithWebIdentity\"\n        Condition = {{\n{condition}        }}\n      }},\n"
    )
}

/// Returns a resource name of letters, digits and `_`, unique among the roles.
fn label(name: &str, used: &mut BTreeSet<String>) -> String {
    let mut label: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    if !label.starts_with(|c: char| c.is_ascii_alphabetic()) {
        label.insert_str(0, "role_");
    }
    while !used.insert(label.clone()) {
        label.push('_');
    }
    label
}

/// Quotes a string, with templates escaped.
fn string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for (i, c) in text.char_indices() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '$' | '%' if text[i + 1..].starts_with('{') => quoted.extend([c, c]),
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}
