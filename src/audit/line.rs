//! The text of a record. Its fields are a contract (deploy/README.md).

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};

use crate::audit::{CacheResult, RequestId};

/// Most records are shorter, and are rendered without a second allocation.
const LINE: usize = 768;
/// The last second of the year 9999, in which the format of times ends.
pub(super) const LAST_TIME: Duration = Duration::from_secs(253_402_300_799);

/// The line of a request.
#[derive(Serialize)]
pub(super) struct JsonLine<'a> {
    pub(super) time: DisplayAsStr<humantime::Rfc3339Timestamp>,
    pub(super) target: &'static str,
    pub(super) request_id: DisplayAsStr<RequestId>,
    pub(super) outcome: &'static str,
    pub(super) reason: &'static str,
    pub(super) listener: &'static str,
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
    pub(super) spiffe_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role_arn: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) session_name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) access_key_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) expiration: Option<DisplayAsStr<humantime::Rfc3339Timestamp>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cache: Option<CacheResult>,
    pub(super) milliseconds: f64,
}

/// The line that stands for records that were lost.
#[derive(Serialize)]
pub(super) struct LostRecordsLine {
    pub(super) time: DisplayAsStr<humantime::Rfc3339Timestamp>,
    pub(super) target: &'static str,
    pub(super) outcome: &'static str,
    pub(super) reason: &'static str,
    pub(super) repeated: u64,
}

/// Rendered in place, without a string of its own.
pub(super) struct DisplayAsStr<T>(pub(super) T);

impl<T: fmt::Display> Serialize for DisplayAsStr<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// A line, with its end.
pub(super) fn render(line: &impl Serialize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(LINE);
    // Strings and numbers: writing them to memory cannot fail.
    let _ = serde_json::to_writer(&mut bytes, line);
    bytes.push(b'\n');
    bytes
}

/// To the millisecond.
pub(super) fn moment(time: SystemTime) -> DisplayAsStr<humantime::Rfc3339Timestamp> {
    DisplayAsStr(humantime::format_rfc3339_millis(printable(time)))
}

/// To the second.
pub(super) fn second(time: SystemTime) -> DisplayAsStr<humantime::Rfc3339Timestamp> {
    DisplayAsStr(humantime::format_rfc3339_seconds(printable(time)))
}

/// A moment that the format of times can show.
pub(super) fn printable(time: SystemTime) -> SystemTime {
    time.clamp(UNIX_EPOCH, UNIX_EPOCH + LAST_TIME)
}
