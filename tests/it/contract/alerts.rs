//! The alerts of metrics-and-alerts.md use metrics, labels and values that exist, and Prometheus
//! reads the rules.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use super::lists::{METRICS, documented_labels, table};
use crate::harness::counterparts::tool;
use crate::harness::documents::block;

/// The labels of each documented metric, with their values as far as the table lists them.
type Metrics = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

fn metrics() -> Metrics {
    let rows = table(METRICS, "\n## Metrics\n").into_iter();
    rows.map(|row| {
        (
            row[0].trim_matches('`').to_owned(),
            documented_labels(row[2]),
        )
    })
    .collect()
}

/// An alerting rule: its expression, and all of its text.
struct AlertRule {
    expression: String,
    text: String,
}

fn rules() -> Vec<AlertRule> {
    let text = block("metrics-and-alerts.md", "Alerts", "groups:");
    let rules = text.split("- alert: ").skip(1);
    rules
        .map(|rule| {
            let line = rule
                .lines()
                .find_map(|line| line.trim().strip_prefix("expr: "));
            AlertRule {
                expression: line
                    .unwrap_or_else(|| panic!("no expression: {rule}"))
                    .to_owned(),
                text: rule.to_owned(),
            }
        })
        .collect()
}

/// Returns the metrics in an expression, each with the matchers that follow in braces.
fn selectors(expression: &str) -> Vec<(String, Vec<(String, String)>)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let starts = expression.match_indices("awsvid_").map(|(at, _)| at);
    starts
        .map(|at| {
            let rest = &expression[at..];
            let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            let (name, rest) = rest.split_at(end);
            let matchers = rest
                .strip_prefix('{')
                .and_then(|rest| rest.split_once('}'))
                .map_or("", |(matchers, _)| matchers);
            let matchers = matchers.split(", ").filter(|matcher| !matcher.is_empty());
            let matchers = matchers.map(|matcher| {
                let (label, value) = matcher.split_once('=').expect("a matcher");
                let value = value.trim_start_matches('~').trim_matches('"');
                (label.trim_end_matches('!').to_owned(), value.to_owned())
            });
            (name.to_owned(), matchers.collect())
        })
        .collect()
}

/// Returns the labels by which an expression groups.
fn grouped_by(expression: &str) -> BTreeSet<&str> {
    let groups = expression.split(" by (").skip(1);
    groups
        .filter_map(|rest| rest.split(')').next())
        .flat_map(|labels| labels.split(", "))
        .collect()
}

/// Returns the labels that a text of a rule names.
fn named_labels(text: &str) -> impl Iterator<Item = &str> {
    text.split("$labels.")
        .skip(1)
        .filter_map(|rest| rest.split(' ').next())
}

/// Returns the faults of a rule.
fn faults(rule: &AlertRule, metrics: &Metrics) -> Vec<String> {
    let mut faults = Vec::new();
    // A label that the scrape adds.
    let mut known: BTreeSet<&str> = ["instance"].into();
    let selectors = selectors(&rule.expression);
    for (name, matchers) in &selectors {
        let Some(labels) = metrics.get(name) else {
            faults.push(format!("no metric {name}"));
            continue;
        };
        known.extend(labels.keys().map(String::as_str));
        for (label, value) in matchers {
            let Some(values) = labels.get(label) else {
                faults.push(format!("{name} has no label {label}"));
                continue;
            };
            for value in value.split('|') {
                let fits = |known: &String| match value.strip_suffix(".*") {
                    Some(begin) => known.starts_with(begin),
                    None => known == value,
                };
                // `ok` is a value of each `result`, which the text below the table explains.
                let is_known = values.is_empty() && value == "ok" || values.iter().any(fits);
                if !is_known {
                    faults.push(format!("{name} has no {label}={value}"));
                }
            }
        }
    }
    let groups = grouped_by(&rule.expression);
    let unknown = groups.iter().filter(|label| !known.contains(*label));
    faults.extend(unknown.map(|label| format!("no label {label} to group by")));
    let shown = if groups.is_empty() { &known } else { &groups };
    let unknown = named_labels(&rule.text).filter(|label| !shown.contains(label));
    faults.extend(unknown.map(|label| format!("the result has no label {label}")));
    faults
}

#[test]
fn rules_use_existing_metrics_and_labels() {
    let metrics = metrics();
    let rules = rules();
    assert!(rules.len() >= 15, "{} rules", rules.len());
    for rule in &rules {
        assert!(
            !selectors(&rule.expression).is_empty(),
            "{}",
            rule.expression
        );
        assert_eq!(faults(rule, &metrics), [""; 0], "{}", rule.text);
    }
    // The table of the same page explains each rule.
    let rows = table(METRICS, "\n## Alerts\n");
    let documented: Vec<String> = rows
        .iter()
        .map(|row| {
            row[1]
                .split('`')
                .nth(1)
                .expect("an expression")
                .replace("\\|", "|")
        })
        .collect();
    let expressions: Vec<&String> = rules.iter().map(|rule| &rule.expression).collect();
    assert_eq!(documented.iter().collect::<Vec<_>>(), expressions);
}

#[test]
fn faults_of_a_rule_are_found() {
    let metrics = metrics();
    let of = |expression: &str, text: &str| {
        let (expression, text) = (expression.to_owned(), text.to_owned());
        faults(&AlertRule { expression, text }, &metrics)
    };
    assert_eq!(of("awsvid_redy == 0", ""), ["no metric awsvid_redy"]);
    assert_eq!(
        of("awsvid_requests_total{outcom=\"failed\"} > 0", ""),
        ["awsvid_requests_total has no label outcom"]
    );
    assert_eq!(
        of("awsvid_cache_entries{state=~\"failing|gone\"} > 0", ""),
        ["awsvid_cache_entries has no state=gone"]
    );
    assert_eq!(
        of(
            "sum by (instance) (awsvid_requests_total)",
            "{{ $labels.reason }}"
        ),
        ["the result has no label reason"]
    );
}

#[test]
fn prometheus_reads_the_rules() {
    let Some(promlint) = tool("promlint") else {
        return;
    };
    let text = block("metrics-and-alerts.md", "Alerts", "groups:");
    let read = |text: &str| {
        let mut linter = Command::new(&promlint)
            .arg("rules")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = linter.stdin.take().unwrap();
        input.write_all(text.as_bytes()).unwrap();
        drop(input);
        linter.wait_with_output().unwrap()
    };
    let output = read(&text);
    assert!(output.status.success(), "{output:?}");
    let wrong = read(&text.replacen("sum by (", "sum by ((", 1));
    assert!(!wrong.status.success(), "{wrong:?}");
}
