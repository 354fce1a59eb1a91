//! The response of `/status` as a table for people.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::commands::terminal_style::{BOLD, GREEN, RED, TerminalStyle, YELLOW};

const HEADER: [&str; 7] = [
    "SPIFFE ID",
    "ROLE",
    "SESSION",
    "EXPIRES",
    "NEXT TRY",
    "CALLERS",
    "STATE",
];

/// Renders the whole status, with times relative to `now`.
pub(super) fn render(status: &Value, now: SystemTime, style: TerminalStyle) -> String {
    let mut text = summary(status, style);
    neighbour(&mut text, "identities", &status["source"], now, style);
    for endpoint in status["sts"].as_array().into_iter().flatten() {
        neighbour(&mut text, "STS", endpoint, now, style);
    }
    let entries = status["credentials"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if entries.is_empty() {
        text.push_str("\nNo credentials are cached: no workload has requested any yet.\n");
    } else {
        text.push('\n');
        credentials(&mut text, entries, now, style);
    }
    text
}

/// Renders the state of the daemon itself.
fn summary(status: &Value, style: TerminalStyle) -> String {
    let mut text = String::new();
    let ready = if status["ready"] == true {
        style.paint(GREEN, "ready")
    } else {
        style.paint(RED, "not ready")
    };
    let connections = match status["connections"].as_u64() {
        None => String::new(),
        Some(1) => ", 1 connection open".to_owned(),
        Some(open) => format!(", {open} connections open"),
    };
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "awsvid {}, {ready}{connections}",
        plain(&status["version"])
    );
    for missing in status["unsupported_kernel"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let _ = writeln!(
            text,
            "{} {}",
            style.paint(RED, "unsupported_kernel:"),
            plain(missing)
        );
    }
    match status["counts_executions"].as_bool() {
        None => {}
        Some(true) => text.push_str("executions of programs: counted\n"),
        Some(false) => {
            let not = style.paint(RED, "not counted");
            let _ = writeln!(
                text,
                "executions of programs: {not}: callers are rejected (unseen_program)"
            );
        }
    }
    text
}

/// Renders the cached credentials in columns, each with its last error in a line below.
fn credentials(text: &mut String, entries: &[Value], now: SystemTime, style: TerminalStyle) {
    let rows: Vec<_> = entries.iter().map(|entry| row(entry, now)).collect();
    let widths: Vec<usize> = (0..HEADER.len())
        .map(|column| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .chain([HEADER[column].len()])
                .max()
                .unwrap_or(0)
        })
        .collect();
    let line = |cells: &[String]| {
        let cells = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let _ = writeln!(
        text,
        "{}",
        style.paint(BOLD, &line(&HEADER.map(str::to_owned)))
    );
    for (entry, row) in entries.iter().zip(&rows) {
        if entry["last_error"].is_null() {
            let _ = writeln!(text, "{}", line(row));
            chain(text, entry);
            continue;
        }
        let colour = if entry["refused_since"].is_null() {
            YELLOW
        } else {
            RED
        };
        let _ = writeln!(
            text,
            "{}\n    {}: {} ({})",
            style.paint(colour, &line(row)),
            ago(&entry["last_error_at"], now),
            plain(&entry["last_error"]),
            plain(&entry["last_error_reason"])
        );
        chain(text, entry);
    }
}

/// Renders the roles of a chain in a line below the entry that a workload gets.
fn chain(text: &mut String, entry: &Value) {
    let roles = entry["chain"].as_array().filter(|_| entry["hop"].is_null());
    if let Some(roles) = roles {
        let roles: Vec<String> = roles.iter().map(plain).collect();
        let _ = writeln!(text, "    roles: {}", roles.join(" > "));
    }
}

/// Renders the state of a source or an STS.
fn neighbour(text: &mut String, what: &str, health: &Value, now: SystemTime, style: TerminalStyle) {
    if health.is_null() {
        return;
    }
    let state = match health["state"].as_str() {
        Some("ok") => style.paint(GREEN, "ok"),
        Some("failing") => style.paint(RED, "failing"),
        _ => "no request yet".to_owned(),
    };
    let _ = write!(text, "{what} from {}: {state}", plain(&health["name"]));
    if !health["last_success_at"].is_null() {
        let _ = write!(
            text,
            ", last success {}",
            ago(&health["last_success_at"], now)
        );
    }
    if !health["last_error"].is_null() {
        let at = ago(&health["last_error_at"], now);
        let _ = write!(
            text,
            "\n    {at}: {} ({})",
            plain(&health["last_error"]),
            plain(&health["last_error_reason"])
        );
    }
    text.push('\n');
}

fn row(entry: &Value, now: SystemTime) -> [String; 7] {
    let latest = match (entry["latest_uid"].as_u64(), entry["latest_pid"].as_u64()) {
        (Some(uid), Some(pid)) => Some(format!("uid {uid}, pid {pid}")),
        (Some(uid), None) => Some(format!("uid {uid}")),
        (None, _) => None,
    };
    // The workload-api source keeps no callers for a refresh. The latest caller is known with every
    // source.
    let callers = match (entry["callers"].as_u64().filter(|count| *count > 0), latest) {
        (Some(count), Some(latest)) => format!("{count} ({latest})"),
        (Some(count), None) => count.to_string(),
        (None, Some(latest)) => latest,
        (None, None) => "-".to_owned(),
    };
    let state = match (
        &entry["refused_since"],
        &entry["last_error"],
        &entry["access_key_id"],
    ) {
        (since, ..) if !since.is_null() => format!("refused {}", ago(since, now)),
        (_, error, key) if !error.is_null() && key.is_null() => "failed".to_owned(),
        (_, error, _) if !error.is_null() => "refresh fails".to_owned(),
        (_, _, key) if key.is_null() => "being issued".to_owned(),
        _ => "ok".to_owned(),
    };
    let role = match entry["hop"].as_u64() {
        Some(hop) => format!("(hop {hop})"),
        None => plain(&entry["role"]),
    };
    [
        plain(&entry["spiffe_id"]),
        role,
        plain(&entry["session_name"]),
        until(&entry["expiration"], now),
        until(&entry["next_try"], now),
        callers,
        state,
    ]
}

/// Returns the text without characters that would move a terminal's cursor.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.replace(char::is_control, " "),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

fn time(value: &Value) -> Option<SystemTime> {
    humantime::parse_rfc3339(value.as_str()?).ok()
}

fn until(value: &Value, now: SystemTime) -> String {
    match time(value).map(|at| at.duration_since(now)) {
        None => "-".to_owned(),
        Some(Ok(left)) => format!("in {}", rounded(left)),
        Some(Err(_)) => "now".to_owned(),
    }
}

fn ago(value: &Value, now: SystemTime) -> String {
    match time(value) {
        None => "-".to_owned(),
        Some(at) => format!(
            "{} ago",
            rounded(now.duration_since(at).unwrap_or_default())
        ),
    }
}

/// Formats a duration with at most two units: "59m 7s", "11h 3m".
fn rounded(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m {rest}s"),
        _ => format!("{hours}h {minutes}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn now() -> SystemTime {
        humantime::parse_rfc3339("2026-01-02T03:00:00Z").unwrap()
    }

    fn status() -> Value {
        let entry = |name: &str| {
            json!({
                "spiffe_id": format!("spiffe://example.org/{name}"), "role": name, "session_name": name,
                "access_key_id": "ASIA1", "expiration": "2026-01-02T03:59:07Z", "next_try": "2026-01-02T03:29:00Z",
                "last_error": null, "last_error_at": null, "refused_since": null, "callers": 0,
            })
        };
        let mut failing = entry("reports");
        failing["last_error"] = json!("STS is unavailable\u{1b}[2J");
        failing["last_error_reason"] = json!("sts_unavailable");
        failing["last_error_at"] = json!("2026-01-02T02:59:50Z");
        failing["callers"] = json!(1);
        failing["latest_uid"] = json!(1001);
        failing["latest_pid"] = json!(77);
        let mut by_rules = entry("billing");
        by_rules["latest_uid"] = json!(1002);
        json!({
            "version": "1.2.3", "ready": true, "connections": 4,
            "source": {"name": "workload-api", "state": "ok", "last_success_at": "2026-01-02T02:58:00Z"},
            "sts": [{"name": "eu-central-1", "state": "failing", "last_error": "no answer",
                     "last_error_reason": "sts_unavailable", "last_error_at": "2026-01-02T02:59:50Z"}],
            "credentials": [by_rules, failing, entry("unasked")],
        })
    }

    #[test]
    fn table_shows_state_errors_and_callers() {
        let text = render(&status(), now(), TerminalStyle::plain());
        let expected = "\
awsvid 1.2.3, ready, 4 connections open
identities from workload-api: ok, last success 2m 0s ago
STS from eu-central-1: failing
    10s ago: no answer (sts_unavailable)

SPIFFE ID                     ROLE     SESSION  EXPIRES    NEXT TRY   CALLERS               STATE
spiffe://example.org/billing  billing  billing  in 59m 7s  in 29m 0s  uid 1002              ok
spiffe://example.org/reports  reports  reports  in 59m 7s  in 29m 0s  1 (uid 1001, pid 77)  refresh fails
    10s ago: STS is unavailable [2J (sts_unavailable)
spiffe://example.org/unasked  unasked  unasked  in 59m 7s  in 29m 0s  -                     ok
";
        assert_eq!(text, expected);
        let mut rejecting = status();
        rejecting["unsupported_kernel"] = json!(["callers over TCP are rejected: no\u{1b}"]);
        rejecting["counts_executions"] = json!(false);
        let line = "\nunsupported_kernel: callers over TCP are rejected: no \nexecutions of programs: not counted: callers are rejected";
        assert!(render(&rejecting, now(), TerminalStyle::plain()).contains(line));
        let mut chained = status();
        chained["credentials"] = json!([
            {"spiffe_id": "spiffe://a/b", "role": "", "hop": 1, "chain": ["r1"], "access_key_id": "ASIA1"},
            {"spiffe_id": "spiffe://a/b", "role": "c", "chain": ["r1", "r2"], "access_key_id": "ASIA2"},
        ]);
        let text = render(&chained, now(), TerminalStyle::plain());
        assert!(text.contains("spiffe://a/b  (hop 1)  "), "{text}");
        assert!(
            text.contains("\n    roles: r1 > r2\n") && !text.contains("roles: r1\n"),
            "{text}"
        );
        rejecting["counts_executions"] = json!(true);
        assert!(
            render(&rejecting, now(), TerminalStyle::plain())
                .contains("\nexecutions of programs: counted\n")
        );
        assert!(
            render(&json!({"ready": false}), now(), TerminalStyle::plain()).contains("not ready")
        );
    }
}
