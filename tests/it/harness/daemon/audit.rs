//! The audit of a daemon that a test has started.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Daemon, TIMEOUT, answer_of, requests};

impl Daemon {
    /// Returns the audit records of all requests that have been answered.
    pub(crate) fn audit(&self) -> Vec<Value> {
        self.audit_where(|_, _| true)
    }

    /// Returns the audit records that match. `expected` gets the number of each, from 0, and its
    /// text.
    pub(crate) fn audit_where(&self, mut expected: impl FnMut(usize, &str) -> bool) -> Vec<Value> {
        let text = self.audit_text();
        let lines = text
            .lines()
            .enumerate()
            .filter(|(i, line)| expected(*i, line));
        lines
            .map(|(_, line)| serde_json::from_str(line).expect("an audit record is a line of JSON"))
            .collect()
    }

    /// Returns the text of the audit once it has each request that the daemon has counted. The
    /// daemon counts a request before its response, and a thread of its own writes the record.
    fn audit_text(&self) -> String {
        let counted = self.counted_requests().unwrap_or(0);
        let began = Instant::now();
        loop {
            let text = std::fs::read_to_string(self.folder.join("audit.log")).unwrap_or_default();
            let whole_lines = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
            // After a rotation the file has only a part of them.
            if recorded_requests(whole_lines) >= counted || began.elapsed() > TIMEOUT {
                return whole_lines.to_owned();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns the number of requests by the daemon's counters, or `None` if it has ended.
    fn counted_requests(&self) -> Option<u64> {
        let stream = self.connect_to_status_socket().ok()?;
        stream.set_read_timeout(Some(TIMEOUT)).ok()?;
        let (_, metrics) = answer_of(stream, "/metrics").ok()?;
        Some(requests(&metrics, ""))
    }

    /// Returns the audit records after the first `count`, once there is at least one.
    pub(crate) fn audit_after(&self, count: usize) -> Vec<Value> {
        self.process.await_some("an audit record", TIMEOUT, || {
            let records = self.audit_where(|i, _| i >= count);
            (!records.is_empty()).then_some(records)
        })
    }

    /// Returns the SPIFFE ID for which these credentials were issued first, by the audit.
    pub(crate) fn first_issued_to(&self, access_key_id: &str) -> String {
        let mut issued = self.issued.lock().unwrap();
        let first = || {
            let mut found = false;
            let records = self.audit_where(|_, line| {
                let is_first = !found && line.contains(access_key_id);
                found |= is_first;
                is_first
            });
            let record = records.first().expect("each issue is in the audit");
            assert_eq!(record["access_key_id"], access_key_id);
            record["spiffe_id"].as_str().expect("an ID").to_owned()
        };
        issued
            .entry(access_key_id.to_owned())
            .or_insert_with(first)
            .clone()
    }
}

/// Returns the number of requests that these audit records stand for.
fn recorded_requests(lines: &str) -> u64 {
    let requests = |line: &str| {
        if !line.contains("\"repeated\":") {
            return 1;
        }
        let record: Value = serde_json::from_str(line).expect("a line of JSON");
        record["repeated"].as_u64().unwrap_or(1)
    };
    lines.lines().map(requests).sum()
}
