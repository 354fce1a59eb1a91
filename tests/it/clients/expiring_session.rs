//! A session that nears its end, with an STS that does not renew it. Only in `tests/run slow`,
//! which has the time.

use std::thread;
use std::time::{Duration, SystemTime};

use super::catalogue::Start;
use super::reading::{ReadSettings, for_each, read};
use super::stage::{ClientSetting, ClientStage};
use super::table::{self, Cell, Column, Table};
use crate::harness::counterparts::folder;
use crate::harness::is_slow;
use crate::harness::slow_proxy::SlowProxy;

/// The remaining minutes of the session at each read of the clients. At the first it is new.
const REMAINING_MINUTES: [u64; 4] = [25, 14, 9, 4];
const READS: u32 = 9;
/// Most clients send one request. Some repeat it at each call, or every few seconds, as Java's v2.
const REPEATED_REQUESTS: usize = 2;
/// Most of the time they wait for their next read.
const MAX_CONCURRENT: usize = 4;

#[test]
fn clients_refetch_near_session_end_as_documented() {
    if !is_slow() {
        return;
    }
    let folder = folder();
    let Some(stage) = ClientStage::start(folder.path(), &Table::committed()) else {
        return;
    };
    let (way, address) = SlowProxy::tcp(stage.sts(), Duration::ZERO);
    let role = format!("duration = \"{}m\"", REMAINING_MINUTES[0]);
    let setting = ClientSetting {
        role: &role,
        sts: Some(format!("http://{address}")),
        ..ClientSetting::default()
    };
    let serving = stage.daemon("ending", &setting);
    let request_counts = |remaining: u64| {
        for_each(&stage.members(), MAX_CONCURRENT, |_, member| {
            let before = serving.issued(member).len();
            let reading = ReadSettings {
                times: READS,
                pause: Duration::from_secs(1),
                ..ReadSettings::single_read(member, &serving)
            };
            let reads = read(&stage, member, &serving, &reading);
            let requests = serving.issued(member).len() - before;
            eprintln!(
                "{}, {remaining} min left: {requests} requests for {READS} reads",
                member.client.name
            );
            assert!(
                reads.all_equal(&member.content()),
                "{} with {remaining} min left: {reads:?}",
                member.client.name
            );
            requests
        })
    };
    let began = SystemTime::now();
    let mut all = vec![request_counts(REMAINING_MINUTES[0])];
    // No refresh succeeds from here on.
    drop(way);
    for remaining in &REMAINING_MINUTES[1..] {
        // The clients' starts take their time; a minute is left for them in each direction.
        let at = began + Duration::from_secs((REMAINING_MINUTES[0] - remaining) * 60);
        thread::sleep(at.duration_since(SystemTime::now()).unwrap_or_default());
        all.push(request_counts(*remaining));
    }
    let cells = stage
        .members()
        .into_iter()
        .enumerate()
        .map(|(number, member)| {
            let each = REMAINING_MINUTES
                .iter()
                .zip(&all)
                .find(|(_, requests)| requests[number] >= REPEATED_REQUESTS);
            let text = match (&member.client.start, each) {
                (Start::Command(_), _) => "each run".to_owned(),
                (Start::Program(_), Some((remaining, _))) => format!("at {remaining} min"),
                (Start::Program(_), None) => "never".to_owned(),
            };
            Cell::new(member.client.name, Column::EachCall, text)
        });
    table::settle(&cells.collect::<Vec<_>>());
}
