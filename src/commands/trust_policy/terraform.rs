//! The plan of one account as resources of Terraform's AWS provider.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde_json::Value;

use super::plan::{
    ChainedStatement, PERMISSION_NAME, Plan, PlannedAccount, PlannedAccountName, PlannedProvider,
    PlannedRole, Statement,
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
    let labels: BTreeMap<&str, String> = account
        .roles
        .iter()
        .map(|(arn, role)| (arn.as_str(), label(&role.name, &mut used)))
        .collect();
    for (arn, role) in &account.roles {
        let label = &labels[arn.as_str()];
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "\nresource \"aws_iam_role\" {} {{\n{}}}\n",
            string(label),
            body(plan, role) + &depends_on(role, &labels)
        );
        if let Some(policy) = role.permission_policy() {
            let _ = write!(
                text,
                "\nresource \"aws_iam_role_policy\" {} {{\n  name   = \"{PERMISSION_NAME}\"\n  role   = aws_iam_role.{label}.name\n  \
                 policy = jsonencode({})\n}}\n",
                string(label),
                expression(&policy)
            );
        }
    }
    text
}

/// Renders the provider. Terraform's `apply` fails for a resource that exists already.
fn provider(plan: &Plan, name: &PlannedAccountName, account: &PlannedAccount) -> String {
    if account.audiences.is_empty() {
        return String::new();
    }
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

/// Renders the order of creation: IAM accepts a role as principal once that role exists.
fn depends_on(role: &PlannedRole, labels: &BTreeMap<&str, String>) -> String {
    let principals = role.chained.iter();
    let principals: BTreeSet<String> = principals
        .filter_map(|statement| labels.get(statement.principal.as_str()))
        .map(|label| format!("aws_iam_role.{label}"))
        .collect();
    match principals.is_empty() {
        true => String::new(),
        false => {
            let principals: Vec<String> = principals.into_iter().collect();
            format!("\n  depends_on = [{}]\n", principals.join(", "))
        }
    }
}

fn body(plan: &Plan, role: &PlannedRole) -> String {
    let chained = role.chained.iter().map(chained_statement);
    let statements: String = role
        .statements
        .iter()
        .map(|one| statement(plan, one))
        .chain(chained)
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

/// Renders a statement for the sessions of another role.
fn chained_statement(statement: &ChainedStatement) -> String {
    format!("      {},\n", expression(&statement.json()))
}

/// Renders a JSON value as an expression. Objects and lists have the same form there, with
/// templates in strings.
fn expression(value: &Value) -> String {
    match value {
        Value::String(text) => string(text),
        Value::Array(elements) => {
            let elements: Vec<String> = elements.iter().map(expression).collect();
            format!("[{}]", elements.join(", "))
        }
        Value::Object(members) => {
            let members = members.iter();
            let members =
                members.map(|(key, value)| format!("{} = {}", string(key), expression(value)));
            format!("{{ {} }}", members.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
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
