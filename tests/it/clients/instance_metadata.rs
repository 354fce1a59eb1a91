//! Each client with the address of the instance metadata service alone. The short form has two
//! clients, `tests/run slow` has all.

use std::net::TcpListener;

use super::MAX_CONCURRENT;
use super::reading::{ReadSettings, for_each, read};
use super::stage::{ClientSetting, ClientStage, Member, StagedDaemon};
use super::table::{self, Cell, Column, Table};
use crate::harness::counterparts::folder;
use crate::harness::is_slow;

const SHORT: [&str; 2] = ["boto3", "Go v2"];
/// On a busy machine a client may give up early by itself. One that does so each time waits for
/// less than a hold.
const TRIES: u32 = 3;

#[test]
fn clients_find_credentials_by_metadata_as_documented() {
    let folder = folder();
    let Some(stage) = ClientStage::start(folder.path(), &Table::committed()) else {
        return;
    };
    let setting = ClientSetting {
        serves_metadata: true,
        ..ClientSetting::default()
    };
    let serving = stage.daemon("metadata", &setting);
    let members = members(&stage);
    let cells = for_each(&members, MAX_CONCURRENT, |_, member: &Member| {
        Cell::new(
            member.client.name,
            Column::Metadata,
            found(&stage, member, &serving),
        )
    });
    if !cells.is_empty() {
        table::settle(&cells);
    }
}

/// While STS does not answer, each client gets a 503 before it gives up.
#[test]
fn clients_wait_for_the_end_of_a_hold() {
    let folder = folder();
    let Some(stage) = ClientStage::start(folder.path(), &Table::committed()) else {
        return;
    };
    // It accepts connections, and answers none.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let setting = ClientSetting {
        serves_metadata: true,
        sts: Some(format!("http://{}", silent.local_addr().unwrap())),
        ..ClientSetting::default()
    };
    let serving = stage.unready_daemon("holds", &setting);
    for_each(&members(&stage), 1, |_, member| {
        let mut reading = ReadSettings {
            by_metadata: true,
            ..ReadSettings::single_read(member, &serving)
        };
        reading.url += "/";
        let is_held = (0..TRIES).any(|_| {
            read(&stage, member, &serving, &reading);
            let requests = serving.requests(member.uid);
            let ends = |name: &str, value: &str| {
                let ended = requests.iter().filter(|record| record[name] == value);
                ended.count()
            };
            let (held, aborted) = (ends("reason", "pending"), ends("outcome", "aborted"));
            eprintln!("{}: {held} x 503, {aborted} x aborted", member.client.name);
            // Some do not send a request to that address.
            held > 0 || requests.is_empty()
        });
        assert!(is_held, "{}", member.client.name);
    });
}

fn members(stage: &ClientStage) -> Vec<&Member> {
    let mut members = stage.members();
    members.retain(|member| is_slow() || SHORT.contains(&member.client.name));
    members
}

/// Returns whether the client reads its object, with each form of the address. Before, it may fail
/// once: SPIRE and STS may take longer than the client waits for its first credentials.
fn found(stage: &ClientStage, member: &Member, serving: &StagedDaemon) -> &'static str {
    let name = member.client.name;
    let works = |end: &str| {
        let mut reading = ReadSettings {
            by_metadata: true,
            ..ReadSettings::single_read(member, serving)
        };
        reading.url += end;
        let reads = read(stage, member, serving, &reading);
        eprintln!("{name}, {:?}: {reads:?}", reading.url);
        reads.all_equal(&member.content())
    };
    let first = works("");
    eprintln!("{name}, nothing cached: {first}");
    let forms = ["", "/"].map(works);
    let requests = serving.requests(member.uid);
    assert!(
        requests.iter().all(|record| record["protocol"] == "imds"),
        "{name}: {requests:#?}"
    );
    let was_issued = !serving.issued(member).is_empty();
    assert_eq!(forms != [false; 2], was_issued, "{name}: {requests:#?}");
    match forms {
        [true, true] => "yes",
        [false, true] => "with `/` at its end",
        [true, false] => "without `/` at its end",
        [false, false] => {
            assert!(requests.is_empty(), "{name}: {requests:#?}");
            "no"
        }
    }
}
