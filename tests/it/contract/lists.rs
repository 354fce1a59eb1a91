//! The lists of metrics and audit fields in the documents are those of the daemon, and Prometheus
//! can read both formats.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, tool};
use crate::harness::daemon::{Daemon, imds_table};
use crate::harness::upstream::{ME, Upstream, my_rule};

pub(super) const METRICS: &str = include_str!("../../../deploy/docs/metrics-and-alerts.md");
const AUDIT: &str = include_str!("../../../deploy/docs/audit-log.md");
const AUDIT_LINE: &str = include_str!("../../../src/audit/line.rs");
const LOG_FORMAT: &str = include_str!("../../../src/telemetry/format.rs");
const OPENMETRICS: &str = "application/openmetrics-text";

/// A metric family: its type, and the values of each label.
#[derive(Debug, Default, PartialEq, Eq)]
struct MetricFamily {
    kind: String,
    labels: BTreeMap<String, BTreeSet<String>>,
}

/// Starts a daemon that has issued credentials, so that no family is without a sample.
pub(super) fn issued() -> (tempfile::TempDir, Daemon, Upstream) {
    let folder = folder();
    let upstream = Upstream::start_for_me();
    let configuration = imds_table(folder.path()) + &upstream.configuration() + &my_rule();
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    let answer = super::exchange(
        std::os::unix::net::UnixStream::connect(daemon.unix()).unwrap(),
        super::GOOD,
    );
    assert_eq!(answer.status, 200, "{}", answer.body);
    (folder, daemon, upstream)
}

/// Returns the cells of the first table below `heading`, without its head.
pub(super) fn table<'a>(page: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let (_, section) = page.split_once(heading).expect("the heading");
    let rows = section.lines().skip_while(|line| !line.starts_with('|'));
    rows.take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split(" |").map(str::trim).collect())
        .collect()
}

/// Returns the words in backticks.
pub(super) fn code(text: &str) -> BTreeSet<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// Reads `name` (`value`, `value`), `name`.
pub(super) fn documented_labels(cell: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut labels = BTreeMap::new();
    let mut rest = cell;
    while let Some((_, after)) = rest.split_once('`') {
        let (name, after) = after.split_once('`').expect("the end of a name");
        let values = after
            .strip_prefix(" (")
            .and_then(|list| list.split_once(')'));
        labels.insert(
            name.to_owned(),
            values.map(|(values, _)| code(values)).unwrap_or_default(),
        );
        rest = values.map_or(after, |(_, rest)| rest);
    }
    labels
}

/// Returns the families in the text format.
fn families(text: &str) -> BTreeMap<String, MetricFamily> {
    let mut families: BTreeMap<String, MetricFamily> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|typed| typed.split_once(' '))
        {
            name.clone_into(&mut current);
            families.entry(current.clone()).or_default().kind = kind.to_owned();
        } else if let Some((_, labels)) = line.split_once('{').filter(|_| !line.starts_with('#')) {
            let (labels, _) = labels.rsplit_once('}').expect("the end of the labels");
            let family = families.get_mut(&current).expect("a type before samples");
            for label in labels.split(',') {
                let (name, value) = label.split_once('=').expect("a label");
                if name != "le" {
                    let values = family.labels.entry(name.to_owned()).or_default();
                    values.insert(value.trim_matches('"').to_owned());
                }
            }
        }
    }
    families
}

#[test]
fn metrics_are_those_of_the_document() {
    let (_folder, daemon, _upstream) = issued();
    let mut found = families(&daemon.metrics());
    let rows = table(METRICS, "\n## Metrics\n");
    assert!(rows.len() > 25, "{rows:?}");
    for row in rows {
        let [name, kind, labels, ..] = &row[..] else {
            panic!("{row:?}")
        };
        let name = name.trim_matches('`');
        let family = found
            .remove(name)
            .unwrap_or_else(|| panic!("{name} is documented and does not exist"));
        assert_eq!(family.kind, *kind, "{name}");
        let documented = documented_labels(labels);
        let names = |labels: &BTreeMap<String, _>| labels.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&family.labels), names(&documented), "{name}");
        for (label, values) in documented.iter().filter(|(_, values)| !values.is_empty()) {
            assert_eq!(&family.labels[label], values, "{name}: {label}");
        }
    }
    assert!(found.is_empty(), "not documented: {found:?}");
}

#[test]
fn audit_fields_are_those_of_the_document() {
    let (_, line) = AUDIT_LINE
        .split_once("struct JsonLine")
        .expect("the record");
    let (fields, _) = line.split_once("\n}").expect("its end");
    let fields = fields.lines().filter_map(|line| {
        let (name, kind) = line.trim().strip_prefix("pub(super) ")?.split_once(": ")?;
        let kind = match kind.trim_end_matches(',') {
            "Option<u32>" | "Option<u64>" => "integer",
            "f64" => "number",
            "&'a [String]" | "Vec<HopFields<'a>>" => "array",
            _ => "string",
        };
        Some((name, kind))
    });
    // A record that stands for several gets the last field when it is written.
    let fields: Vec<_> = fields.chain([("repeated", "integer")]).collect();
    let rows = table(AUDIT, "\n## Fields\n");
    let documented: Vec<_> = rows
        .iter()
        .map(|row| (row[0].trim_matches('`'), row[1]))
        .collect();
    assert_eq!(documented, fields);
}

/// The fields `outcome`, `listener` and `cache` have the values of labels, which another test
/// compares with the daemon's.
#[test]
fn audit_values_are_those_of_the_metrics() {
    let metrics = table(METRICS, "\n## Metrics\n");
    let labels = |name: &str| {
        let row = metrics.iter().find(|row| row[0].trim_matches('`') == name);
        documented_labels(row.expect(name)[2])
    };
    let (requests, lookups) = (
        labels("awsvid_requests_total"),
        labels("awsvid_cache_requests_total"),
    );
    let fields = table(AUDIT, "\n## Fields\n");
    let values = |name: &str| {
        let row = fields.iter().find(|row| row[0].trim_matches('`') == name);
        code(row.expect(name)[2])
    };
    let mut outcomes = requests["outcome"].clone();
    // The record that stands for others is not a request.
    outcomes.insert("lost".to_owned());
    assert_eq!(values("outcome"), outcomes);
    assert_eq!(values("listener"), requests["listener"]);
    assert_eq!(values("protocol"), requests["protocol"]);
    assert_eq!(values("cache"), lookups["result"]);
}

/// Returns the words in backticks between two phrases of a document.
fn code_between(page: &str, begin: &str, end: &str) -> BTreeSet<String> {
    let text = page.replace('\n', " ");
    let (_, rest) = text.split_once(begin).expect(begin);
    code(rest.split_once(end).expect(end).0)
}

#[test]
fn log_fields_are_those_of_the_document() {
    let every = code_between(METRICS, "each line is an object with", "and the fields");
    let of_request = code_between(METRICS, "belongs to a request also has", "with the names");
    let folder = folder();
    let upstream = Upstream::start_for_me();
    let configuration = upstream.configuration() + &my_rule();
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    let path = super::GOOD.replace("/v1/credentials", "/v1/credentials/nothing");
    assert_eq!(super::fetch(daemon.tcp(), &path).status, 403);
    daemon.await_line(&["request without credentials"]);
    let mut seen = BTreeSet::new();
    for line in daemon.log().lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        let keys: Vec<&String> = line.as_object().expect("an object").keys().collect();
        for field in &every {
            assert!(keys.contains(&field), "{field} is not in {line}");
        }
        let is_of_request = line["request_id"].is_string();
        seen.extend(keys.into_iter().filter(|_| is_of_request).cloned());
    }
    // Only a caller in a pod has that field.
    let missing: Vec<&String> = of_request.difference(&seen).collect();
    assert_eq!(missing, ["pod_uid"]);
    let (_, code) = LOG_FORMAT
        .split_once("fn request_fields()")
        .expect("the fields");
    let fields = code
        .split_once("\n}")
        .expect("its end")
        .0
        .split("(\"")
        .skip(1);
    let fields = fields.filter_map(|rest| rest.split('"').next());
    assert_eq!(
        fields.map(str::to_owned).collect::<BTreeSet<_>>(),
        of_request
    );
}

/// Returns the metrics in the format that `accept` requests, and their content type.
fn scrape(daemon: &Daemon, accept: &str) -> (String, String) {
    let mut stream = std::net::TcpStream::connect(daemon.admin()).unwrap();
    write!(stream, "GET /metrics HTTP/1.0\r\nAccept: {accept}\r\n\r\n").unwrap();
    let answer = std::io::read_to_string(stream).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let kind = head
        .lines()
        .find_map(|line| line.strip_prefix("content-type: "));
    (kind.expect("a content type").to_owned(), body.to_owned())
}

#[test]
fn prometheus_reads_both_formats() {
    let Some(promlint) = tool("promlint") else {
        return;
    };
    let (_folder, daemon, _upstream) = issued();
    for (accept, kind, format) in [
        ("*/*", "text/plain; version=0.0.4; charset=utf-8", "text"),
        (
            OPENMETRICS,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            "openmetrics",
        ),
    ] {
        let (found, metrics) = scrape(&daemon, accept);
        assert_eq!(found, kind);
        let mut linter = Command::new(&promlint)
            .arg(format)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        linter
            .stdin
            .take()
            .unwrap()
            .write_all(metrics.as_bytes())
            .unwrap();
        let output = linter.wait_with_output().unwrap();
        let problems = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{format}: {problems}\n{metrics}");
    }
}

#[test]
fn own_probes_are_neither_counted_nor_audited() {
    let folder = folder();
    let upstream = Upstream::start_for_me();
    let daemon = Daemon::start(folder.path(), "", &(upstream.configuration() + &my_rule())).ready();
    let metrics = daemon.metrics();
    let counted = metrics
        .lines()
        .filter(|line| line.starts_with("awsvid_requests_total{") && !line.ends_with(" 0"));
    assert_eq!(counted.count(), 0, "{metrics}");
    // The same path by another process is a request like any other.
    let probe = super::GOOD.replace("/v1/credentials", "/probe");
    assert_eq!(super::fetch(daemon.tcp(), &probe).status, 404);
    let records = daemon.audit_after(0);
    assert_eq!(records.len(), 1, "{records:?}");
    assert_eq!(records[0]["reason"], "path");
}

/// A denied caller learns its own facts, and the operator finds them by the same number.
/// `several_identities` needs an agent: `agent_sources::several` asserts the same of it.
#[test]
fn denial_has_the_ids_and_the_requested_role_everywhere() {
    let folder = folder();
    let upstream = Upstream::start_for_me();
    let configuration = upstream.configuration() + &my_rule();
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    let arn = "arn:aws:iam::123456789012:role/other";
    let of_others = configuration.replace("spiffe://example.org/user/*", "spiffe://example.org/x");
    assert_ne!(of_others, configuration);
    for (role, code) in [
        ("nothing", "not_this_role"),
        (arn, "arn_not_allowed"),
        ("", "no_role"),
    ] {
        if code == "no_role" {
            assert!(daemon.reload("", &of_others));
        }
        let known = daemon.audit().len();
        let (path, requested) = match role {
            "" => (String::new(), String::new()),
            role => (format!("/{role}"), format!(", and requested {role}")),
        };
        let path = format!("/v1/credentials{path}");
        let answer = super::fetch(daemon.tcp(), &super::GOOD.replace("/v1/credentials", &path));
        assert_eq!((answer.status, &answer.body["code"]), (403, &code.into()));
        let message = answer.body["message"].as_str().unwrap();
        let facts = format!("it has {ME}{requested}");
        assert!(message.contains(&facts), "{message}");
        let record = &daemon.audit_after(known)[0];
        let recorded = record["requested_role"].as_str().unwrap_or_default();
        assert_eq!(recorded, role);
        assert_eq!(record["spiffe_ids"][0], ME);
        let id = record["request_id"].as_str().unwrap();
        assert!(message.contains(&format!("(request {id})")), "{message}");
        let line = await_some("the line of the log", Duration::from_secs(60), || {
            let log = daemon.log();
            let is_of_request =
                |line: &&str| line.contains("request without credentials") && line.contains(id);
            log.lines().find(is_of_request).map(str::to_owned)
        });
        for fact in [role, ME, code] {
            assert!(line.contains(fact), "{fact} is not in {line}");
        }
    }
}
