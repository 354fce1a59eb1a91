//! The alerts and the dashboard: they are those of the documents, use metrics that exist, and
//! Prometheus and Grafana accept them.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{folder, tool};
use crate::harness::documents;

const METRICS: &str = include_str!("../../../deploy/docs/metrics-and-alerts.md");
const ALERTS: &str = include_str!("../../../deploy/helm/awsvid/files/alerts.yaml");
const CASES: &str = include_str!("alerts_test.yaml");
const DASHBOARD: &str = include_str!("../../../deploy/helm/awsvid/files/dashboard.json");
const TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn alerts_are_those_of_the_document() {
    let documented = documents::block("metrics-and-alerts.md", "Alerts", "groups:");
    let (_, rules) = ALERTS.split_once('\n').unwrap();
    assert_eq!(rules, documented);
}

#[test]
fn each_alert_fires_and_has_a_case() {
    let alerts = |text: &'static str, begin: &str| -> BTreeSet<&str> {
        let named = text.split(begin).skip(1);
        named
            .map(|rest| rest.split([',', '\n']).next().unwrap().trim())
            .collect()
    };
    assert_eq!(
        alerts(CASES, "alertname: "),
        alerts(ALERTS, "- alert: "),
        "each alert has a case"
    );
    let Some(promtool) = tool("promtool") else {
        return;
    };
    let folder = folder();
    fs::write(folder.path().join("alerts.yaml"), ALERTS).unwrap();
    fs::write(folder.path().join("test.yaml"), CASES).unwrap();
    let mut command = Command::new(promtool);
    command
        .args(["test", "rules", "test.yaml"])
        .current_dir(folder.path());
    let output = run(command, b"", TIMEOUT);
    assert!(output.status.success(), "{output:?}");
}

/// Returns the metrics that an expression names.
fn metrics_in(expression: &str) -> impl Iterator<Item = &str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    expression
        .split(move |c| !is_name(c))
        .filter(|word| word.starts_with("awsvid_") || word.starts_with("process_"))
}

fn expressions(value: &Value) -> Vec<&str> {
    match value {
        Value::Object(fields) => fields
            .iter()
            .flat_map(|(key, value)| match value.as_str() {
                Some(text) if key == "expr" => vec![text],
                _ => expressions(value),
            })
            .collect(),
        Value::Array(items) => items.iter().flat_map(expressions).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn dashboard_uses_metrics_that_exist() {
    let rows = METRICS.lines().filter_map(|line| line.strip_prefix("| `"));
    let documented: BTreeSet<&str> = rows.map(|row| row.split('`').next().unwrap()).collect();
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let expressions = expressions(&dashboard);
    assert!(expressions.len() > 20, "{expressions:?}");
    for expression in &expressions {
        for metric in metrics_in(expression) {
            let family = metric.trim_end_matches("_bucket");
            assert!(documented.contains(family), "{metric}: {expression}");
        }
        assert!(
            expression.contains("instance=~\"$instance\""),
            "{expression}"
        );
    }
    let shown: BTreeSet<&str> = expressions
        .iter()
        .flat_map(|text| metrics_in(text))
        .collect();
    let alerting: BTreeSet<&str> = metrics_in(ALERTS).collect();
    // Kubernetes has no such rules.
    let missing: Vec<_> = alerting.difference(&shown).collect();
    assert_eq!(missing, [&"awsvid_unknown_accounts"]);
}

#[test]
fn dashboard_expressions_are_those_of_prometheus() {
    let Some(promtool) = tool("promtool") else {
        return;
    };
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let rules: Vec<Value> = expressions(&dashboard)
        .into_iter()
        .enumerate()
        .map(|(i, expression)| {
            // Grafana replaces its variables.
            let expression = expression.replace("$__rate_interval", "5m");
            serde_json::json!({ "record": format!("panel:{i}"), "expr": expression })
        })
        .collect();
    let groups = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
    let folder = folder();
    fs::write(folder.path().join("rules.yaml"), groups.to_string()).unwrap();
    let mut command = Command::new(promtool);
    command
        .args(["check", "rules", "rules.yaml"])
        .current_dir(folder.path());
    let output = run(command, b"", TIMEOUT);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn dashboard_fits_the_schema_of_grafana() {
    let Some(schema) = tool("dashboard-schema") else {
        return;
    };
    let output = run(Command::new(&schema), DASHBOARD.as_bytes(), TIMEOUT);
    assert!(output.status.success(), "{output:?}");
    let wrong = DASHBOARD.replace("\"gridPos\"", "\"gridPosition\"");
    let output = run(Command::new(schema), wrong.as_bytes(), TIMEOUT);
    assert!(!output.status.success(), "{output:?}");
}
