//! The plan of one account as Terraform: resources of the AWS provider.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::plan::{Account, Plan, Statement, TrustedRole};

/// Of the provider's resource.
const PROVIDER: &str = "aws_iam_openid_connect_provider.awsvid";

pub(super) fn render(plan: &Plan, account: &Account) -> String {
    let audiences: Vec<String> = account.audiences.iter().map(|audience| string(audience)).collect();
    let mut text = String::from("resource \"aws_iam_openid_connect_provider\" \"awsvid\" {\n");
    // Writing to a string cannot fail.
    let _ = writeln!(text, "  url            = {}", string(plan.issuer.url()));
    let _ = writeln!(text, "  client_id_list = [{}]", audiences.join(", "));
    if let Some(thumbprint) = &plan.thumbprint {
        let _ = writeln!(text, "  thumbprint_list = [{}]", string(thumbprint));
    }
    text.push_str("}\n");
    let mut taken = BTreeSet::new();
    for role in account.roles.values() {
        let label = label(&role.name, &mut taken);
        let _ = write!(text, "\nresource \"aws_iam_role\" {} {{\n{}}}\n", string(&label), body(plan, role));
    }
    text
}

fn body(plan: &Plan, role: &TrustedRole) -> String {
    let statements: String = role.statements.iter().map(|one| statement(plan, one)).collect();
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
            let _ = writeln!(condition, "            {} = {}", string(&key), string(&value));
        }
        condition.push_str("          }\n");
    }
    format!(
        "      {{\n        Effect    = \"Allow\"\n        Principal = {{ Federated = {PROVIDER}.arn }}\n        \
         Action    = \"sts:AssumeRoleWithWebIdentity\"\n        Condition = {{\n{condition}        }}\n      }},\n"
    )
}

/// A name of a resource: letters, digits and `_`, another one for each role.
fn label(name: &str, taken: &mut BTreeSet<String>) -> String {
    let mut label: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if !label.starts_with(|c: char| c.is_ascii_alphabetic()) {
        label.insert_str(0, "role_");
    }
    while !taken.insert(label.clone()) {
        label.push('_');
    }
    label
}

/// A quoted string, in which nothing is a template.
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
