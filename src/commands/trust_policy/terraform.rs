//! The plan of one account as resources of Terraform's AWS provider.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde_json::Value;

use super::anywhere::{self, NAME, PlannedAnywhere, certified_roles};
use super::plan::{
    ChainedStatement, Condition, PERMISSION_NAME, Plan, PlannedAccount, PlannedAccountName,
    PlannedProvider, PlannedRole, Statement,
};
use crate::identity::SpiffeIdPattern;

/// Address of the trust anchor.
const TRUST_ANCHOR: &str = "aws_rolesanywhere_trust_anchor.awsvid";
/// Address of the provider, as a resource or a data source.
const PROVIDER: &str = "aws_iam_openid_connect_provider.awsvid";

pub(super) fn render(plan: &Plan, name: &PlannedAccountName, account: &PlannedAccount) -> String {
    let PlannedAccountName { partition, number } = name;
    let mut text = format!("# Account {number}, partition {partition}.\n");
    if !account.audiences.is_empty() {
        let _ = write!(text, "\n{}", provider(plan, name, account));
    }
    let anywhere = plan
        .anywhere
        .as_ref()
        .filter(|anywhere| anywhere.is_in(name));
    let pem = anywhere.and_then(PlannedAnywhere::pem);
    text.extend(pem.as_deref().map(trust_anchor));
    // Without the CAs, the trust anchor is that of the configuration.
    let anchor = match &pem {
        Some(_) => format!("{TRUST_ANCHOR}.arn"),
        None => plan.anchor_arn().to_string(),
    };
    let (mut used, mut certified) = (BTreeSet::new(), Vec::new());
    let labels: BTreeMap<&str, String> = account
        .roles
        .iter()
        .map(|(arn, role)| (arn.as_str(), label(&role.name, &mut used)))
        .collect();
    for (arn, role) in &account.roles {
        let label = &labels[arn.as_str()];
        if !role.certified.is_empty() {
            certified.push(format!("aws_iam_role.{label}.arn"));
        }
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "\nresource \"aws_iam_role\" {} {{\n{}}}\n",
            string(label),
            body(plan, role, &anchor) + &depends_on(role, &labels)
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
    if anywhere.is_some() {
        let (_, seconds) = certified_roles(account);
        text.push_str(&profile(&certified, seconds));
    }
    text
}

fn trust_anchor(pem: &str) -> String {
    let pem = string(pem).replace('\n', "\\n");
    format!(
        "\nresource \"aws_rolesanywhere_trust_anchor\" \"awsvid\" {{\n  name    = \"{NAME}\"\n  enabled = true\n\n  \
         source {{\n    source_type = \"CERTIFICATE_BUNDLE\"\n    source_data {{\n      \
         x509_certificate_data = {pem}\n    }}\n  }}\n}}\n"
    )
}

fn profile(roles: &[String], seconds: u64) -> String {
    format!(
        "\nresource \"aws_rolesanywhere_profile\" \"awsvid\" {{\n  name                     = \"{NAME}\"\n  \
         enabled                  = true\n  accept_role_session_name = true\n  \
         duration_seconds         = {seconds}\n  role_arns                = [{}]\n}}\n",
        roles.join(", ")
    )
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

fn body(plan: &Plan, role: &PlannedRole, anchor: &str) -> String {
    let by_token = role.statements.iter().map(|one| statement(plan, one));
    let certified = role.certified.iter();
    let statements: String = by_token
        .chain(certified.map(|subject| certified_statement(subject, anchor)))
        .chain(role.chained.iter().map(chained_statement))
        .collect();
    format!(
        "  name                 = {}\n  path                 = {}\n  max_session_duration = {}\n\n  \
         assume_role_policy = jsonencode({{\n    Version   = \"2012-10-17\"\n    Statement = [\n{statements}    ]\n  }})\n",
        string(&role.name),
        string(&role.path),
        role.max_session.as_secs(),
    )
}

/// Renders a condition. Values are expressions of Terraform.
fn condition(condition: Vec<(&str, Vec<(String, String)>)>) -> String {
    let mut text = String::new();
    for (operator, keys) in condition {
        let _ = writeln!(text, "          {operator} = {{");
        for (key, value) in keys {
            let _ = writeln!(text, "            {} = {value}", string(&key));
        }
        text.push_str("          }\n");
    }
    text
}

/// Returns a condition with its values as strings of Terraform.
fn quoted(condition: Condition) -> Condition {
    let quote = |(key, value): (String, String)| (key, string(&value));
    let operators = condition.into_iter();
    operators
        .map(|(operator, keys)| (operator, keys.into_iter().map(quote).collect()))
        .collect()
}

fn certified_statement(subject: &SpiffeIdPattern, anchor: &str) -> String {
    let mut conditions = quoted(anywhere::condition(subject));
    conditions.push((
        "ArnEquals",
        vec![("aws:SourceArn".to_owned(), anchor.to_owned())],
    ));
    let condition = condition(conditions);
    format!(
        "      {{\n        Effect    = \"Allow\"\n        Principal = {{ Service = \"rolesanywhere.amazonaws.com\" }}\n        \
         Action    = [\"sts:AssumeRole\", \"sts:TagSession\", \"sts:SetSourceIdentity\"]\n        \
         Condition = {{\n{condition}        }}\n      }},\n"
    )
}

fn statement(plan: &Plan, statement: &Statement) -> String {
    let condition = condition(quoted(statement.condition(&plan.issuer)));
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
