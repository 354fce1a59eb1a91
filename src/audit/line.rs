//! The text of a record. Its fields are a contract, see `deploy/docs/audit-log.md`.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use serde::{Serialize, Serializer};

use crate::audit::{CacheResult, RequestId};
use crate::clock::printable;

/// The capacity of a line in bytes. Most records are shorter and need one allocation.
const LINE_CAPACITY: usize = 768;

/// The record of a request. Fields without a value are left out.
#[derive(Serialize)]
pub(super) struct JsonLine<'a> {
    pub(super) time: DisplayAsStr<humantime::Rfc3339Timestamp>,
    pub(super) target: &'static str,
    pub(super) request_id: DisplayAsStr<RequestId>,
    pub(super) outcome: &'static str,
    pub(super) reason: &'static str,
    pub(super) listener: &'static str,
    pub(super) protocol: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cgroup: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) systemd_unit: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pod_uid: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) container_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) network_namespace: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) gid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) exe: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) requested_role: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub(super) spiffe_ids: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) spiffe_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role_arn: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) session_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) chain: Vec<HopFields<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) access_key_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) expiration: Option<DisplayAsStr<humantime::Rfc3339Timestamp>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cache: Option<CacheResult>,
    pub(super) milliseconds: f64,
}

/// One session of a chain.
#[derive(Serialize)]
pub(super) struct HopFields<'a> {
    pub(super) role_arn: &'a str,
    pub(super) session_name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source_identity: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) tags: BTreeMap<&'a str, &'a str>,
}

/// The record that stands for lost records.
#[derive(Serialize)]
pub(super) struct LostRecordsLine {
    pub(super) time: DisplayAsStr<humantime::Rfc3339Timestamp>,
    pub(super) target: &'static str,
    pub(super) outcome: &'static str,
    pub(super) reason: &'static str,
    pub(super) repeated: u64,
}

/// A value that is rendered as a string without an allocation of its own.
pub(super) struct DisplayAsStr<T>(pub(super) T);

impl<T: fmt::Display> Serialize for DisplayAsStr<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// Returns the line with its line feed.
pub(super) fn render(line: &impl Serialize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(LINE_CAPACITY);
    // Strings and numbers: writing them to memory cannot fail.
    let _ = serde_json::to_writer(&mut bytes, line);
    bytes.push(b'\n');
    bytes
}

/// Returns the time in RFC 3339, to the millisecond.
pub(super) fn moment(time: SystemTime) -> DisplayAsStr<humantime::Rfc3339Timestamp> {
    DisplayAsStr(humantime::format_rfc3339_millis(printable(time)))
}

/// Returns the time in RFC 3339, to the second.
pub(super) fn second(time: SystemTime) -> DisplayAsStr<humantime::Rfc3339Timestamp> {
    DisplayAsStr(humantime::format_rfc3339_seconds(printable(time)))
}
