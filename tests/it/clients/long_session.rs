//! A session of an hour, to its end and on: all clients side by side, each with one client object.
//! Only in `tests/run slow`.

use std::time::Duration;

use serde_json::Value;

use super::catalogue::Start;
use super::reading::{ReadSettings, for_each, read};
use super::stage::{ClientSetting, ClientStage};
use super::table::{self, Cell, Column, Table};
use crate::harness::counterparts::folder;
use crate::harness::is_slow;

/// Between the reads of a program.
const PAUSE: Duration = Duration::from_secs(20);
/// Between the runs of a command, which keeps no credentials.
const BETWEEN_RUNS: Duration = Duration::from_secs(60);
const LENGTH: Duration = Duration::from_secs(65 * 60);
/// A client with at most this many requests in that time refreshes because its credentials get old,
/// and not by a schedule of its own.
const MAX_REFRESHES: u64 = 5;

/// With less left some SDKs fetch credentials at each call.
const EARLIEST: Duration = Duration::from_secs(15 * 60);

#[test]
fn clients_see_no_error_at_session_end() {
    if !is_slow() {
        return;
    }
    let folder = folder();
    let Some(stage) = ClientStage::start(folder.path(), &Table::committed()) else {
        return;
    };
    let serving = stage.daemon("hour", &ClientSetting::default());
    let all = for_each(&stage.members(), stage.members().len(), |_, member| {
        let pause = if matches!(member.client.start, Start::Command(_)) {
            BETWEEN_RUNS
        } else {
            PAUSE
        };
        let times = u32::try_from(LENGTH.as_secs() / pause.as_secs()).unwrap();
        let reading = ReadSettings {
            times,
            pause,
            ..ReadSettings::single_read(member, &serving)
        };
        let reads = read(&stage, member, &serving, &reading);
        let failed = reads
            .each
            .iter()
            .filter(|read| read.as_deref() != Ok(&member.content()))
            .count();
        let requests = u64::try_from(serving.issued(member).len()).unwrap();
        eprintln!(
            "{}: {} reads, {failed} failed, {requests} requests",
            member.client.name,
            reads.each.len()
        );
        if failed > 0 {
            eprintln!("{}: {}", member.client.name, reads.printed);
        }
        (failed, requests)
    });
    // An SDK that refreshes early fetches them at each call with less than this.
    let least = stage
        .members()
        .into_iter()
        .flat_map(|member| serving.issued(member))
        .map(|record| remaining_life(&record))
        .min();
    let least = least.expect("a client sent a request");
    eprintln!(
        "the least that was left of what was issued: {} min",
        least.as_secs() / 60
    );
    assert!(least > EARLIEST, "{least:?}");
    let failed: Vec<_> = stage
        .members()
        .into_iter()
        .zip(&all)
        .filter(|(_, (failed, _))| *failed > 0)
        .collect();
    assert!(
        failed.is_empty(),
        "{:?}",
        failed
            .iter()
            .map(|(member, _)| member.client.name)
            .collect::<Vec<_>>()
    );
    let cells = stage
        .members()
        .into_iter()
        .zip(&all)
        .map(|(member, (_, requests))| {
            let text = match member.client.start {
                Start::Command(_) => "each run".to_owned(),
                Start::Program(_) if *requests <= MAX_REFRESHES => format!("when due ({requests})"),
                Start::Program(_) => format!(
                    "every {} min ({requests})",
                    (LENGTH.as_secs() / 60).div_ceil(*requests)
                ),
            };
            Cell::new(member.client.name, Column::Requests, text)
        });
    table::settle(&cells.collect::<Vec<_>>());
}

/// Returns the remaining life of the credentials of an audit record.
fn remaining_life(record: &Value) -> Duration {
    let [time, expiration] = ["time", "expiration"].map(|field| {
        let text = record[field]
            .as_str()
            .unwrap_or_else(|| panic!("{field} in {record}"));
        humantime::parse_rfc3339(text).unwrap_or_else(|error| panic!("{error}: {record}"))
    });
    expiration.duration_since(time).unwrap_or_default()
}
