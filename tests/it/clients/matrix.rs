//! Each client with each way to configure the endpoint, cold, and rejected. Only in `tests/run
//! slow`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::reading::{ReadSettings, Reads, TIMEOUT, for_each, read};
use super::stage::{ClientSetting, ClientStage, Member, ROLE, StagedDaemon};
use super::table::{self, Cell, Column, Table};
use super::{MAX_CONCURRENT, facts};
use crate::harness::counterparts::{folder, minio};
use crate::harness::is_slow;
use crate::harness::slow_proxy::SlowProxy;

#[test]
fn clients_match_the_documented_matrix() {
    if !is_slow() {
        return;
    }
    table::settle_rows();
    let folder = folder();
    let Some(stage) = ClientStage::start(folder.path(), &Table::committed()) else {
        return;
    };
    let mut cells: Vec<Cell> = stage.members().into_iter().flat_map(facts).collect();
    cells.extend(ways(&stage));
    cells.extend(cold(&stage));
    cells.extend(rejected(&stage));
    cells.extend(unavailable(&stage));
    table::settle(&cells);
}

/// Makes a cell for each client from its results.
fn cells<T>(
    stage: &ClientStage,
    column: Column,
    results: Vec<T>,
    text: impl Fn(T) -> String,
) -> Vec<Cell> {
    stage
        .members()
        .into_iter()
        .zip(results)
        .map(|(member, results)| Cell::new(member.client.name, column, text(results)))
        .collect()
}

/// Checks a token that has to be right, from its file alone; IPv6; a host name; a role's name.
fn ways(stage: &ClientStage) -> Vec<Cell> {
    let serving = stage.daemon(
        "ways",
        &ClientSetting {
            listen: "authorization = \"token\"",
            ..ClientSetting::default()
        },
    );
    let (tcp, tcp6) = (serving.daemon.tcp(), serving.daemon.tcp6());
    let failed = for_each(&stage.members(), MAX_CONCURRENT, |_, member| {
        let single_read = ReadSettings::single_read(member, &serving);
        let url = |host: &str, port: u16| format!("http://{host}:{port}");
        let ways = [
            ("", single_read.clone()),
            (
                "token file alone",
                ReadSettings {
                    file_alone: true,
                    ..single_read.clone()
                },
            ),
            (
                "`[::1]`",
                ReadSettings {
                    url: url("[::1]", tcp6.port()),
                    ..single_read.clone()
                },
            ),
            (
                "`localhost`",
                ReadSettings {
                    url: url("localhost", tcp.port()),
                    ..single_read.clone()
                },
            ),
            (
                "a role's name",
                ReadSettings {
                    role: Some(ROLE),
                    ..single_read
                },
            ),
        ];
        let failed = ways.into_iter().filter_map(|(name, reading)| {
            let reads = read(stage, member, &serving, &reading);
            let failed = !reads.all_equal(&member.content());
            failed.then(|| {
                let request_count = serving.requests(member.uid).pop();
                eprintln!(
                    "{}, {name:?}: {reads:?}, requests at last: {request_count:?}",
                    member.client.name
                );
                name
            })
        });
        failed.collect::<Vec<_>>()
    });
    cells(stage, Column::Works, failed, |failed| match &failed[..] {
        [] => "all".to_owned(),
        ["", ..] => "no".to_owned(),
        failed => format!("all but {}", failed.join(", ")),
    })
}

/// Together, half of it each. The daemon holds a request for 4.5 s.
const UPSTREAM_TAKES: [f64; 3] = [0.3, 1.5, 4.0];

/// On a busy machine a client may be late by itself. A client that is late in every try is too
/// slow.
const TRIES: u32 = 3;

/// Measures the first read of all, with nothing cached, and then a second one.
fn cold(stage: &ClientStage) -> Vec<Cell> {
    let waited = stage.members().into_iter().map(|member| (member.uid, 0.0));
    let mut waited: BTreeMap<u32, f64> = waited.collect();
    for seconds in UPSTREAM_TAKES {
        let mut left = stage.members();
        for number in 0..TRIES {
            if left.is_empty() {
                break;
            }
            let read = with_delay(stage, seconds, number, &left);
            let (done, failed): (Vec<_>, Vec<_>) =
                left.into_iter().zip(read).partition(|(_, read)| *read);
            waited.extend(done.into_iter().map(|(member, _)| (member.uid, seconds)));
            left = failed.into_iter().map(|(member, _)| member).collect();
        }
    }
    cells(
        stage,
        Column::Waits,
        waited.into_values().collect(),
        |seconds| match seconds {
            0.0 => "not even 0.3 s".to_owned(),
            seconds => format!("{seconds} s"),
        },
    )
}

/// Returns whether the first read of each of these got its object.
fn with_delay(stage: &ClientStage, seconds: f64, number: u32, members: &[&Member]) -> Vec<bool> {
    let (each, name) = (
        Duration::from_secs_f64(seconds / 2.0),
        format!("cold-{seconds}-{number}"),
    );
    let socket = stage.path(&format!("{name}.sock"));
    let _source = SlowProxy::unix(&socket, stage.spire.agent_socket(), each);
    let (_sts, address) = SlowProxy::tcp(stage.sts(), each);
    let setting = ClientSetting {
        source: Some(socket),
        sts: Some(format!("http://{address}")),
        ..ClientSetting::default()
    };
    let serving = stage.daemon(&name, &setting);
    let trace = stage.minio.trace();
    let exchanged = || {
        trace
            .records()
            .iter()
            .filter(|record| record.api() == minio::ASSUME_ROLE)
            .count()
    };
    let fetched = |member: &&Member| stage.spire.jwt_svids_fetched(&member.spiffe_id());
    let before: (usize, Vec<usize>) = (exchanged(), members.iter().map(fetched).collect());
    let reads = for_each(members, MAX_CONCURRENT, |_, member| {
        // Its next try begins when the exchange that the first one started has ended.
        let pause = Duration::from_secs_f64(seconds.ceil());
        let reading = ReadSettings {
            times: 2,
            pause,
            ..ReadSettings::single_read(member, &serving)
        };
        read(stage, member, &serving, &reading)
    });
    for ((member, reads), before) in members.iter().zip(&reads).zip(before.1) {
        let name = member.client.name;
        eprintln!(
            "{name}, cold, {seconds} s: {} requests, {reads:?}",
            serving.request_count(member.uid)
        );
        assert_eq!(
            reads.each.last(),
            Some(&Ok(member.content())),
            "{name}'s next try, {seconds} s"
        );
        assert_eq!(
            fetched(member) - before,
            1,
            "JWT-SVIDs for {name}, {seconds} s"
        );
    }
    assert_eq!(
        exchanged() - before.0,
        members.len(),
        "one exchange for each"
    );
    reads.iter().map(|reads| reads.each[0].is_ok()).collect()
}

/// Most of the time they wait for their next try.
const MAX_CONCURRENT_WAITING: usize = 6;

/// From this number of tries on, the number is not compared: a client with tries within tries, or
/// with a deadline, does not reach the same number each time.
const MIN_UNCOMPARED_TRIES: u64 = 7;

/// Checks the 403 of users without an identity.
fn rejected(stage: &ClientStage) -> Vec<Cell> {
    let serving = stage.daemon("refused", &ClientSetting::default());
    let results = for_each(&stage.members(), MAX_CONCURRENT_WAITING, |_, member| {
        let reading = ReadSettings {
            uid: member.stranger,
            ..ReadSettings::single_read(member, &serving)
        };
        let message = format!(
            "no SPIFFE identity: this node has none for uid {}",
            member.stranger
        );
        shown_message(stage, member, &serving, &reading, &message)
    });
    cells(stage, Column::Rejected, results, |text| text)
}

/// Checks the 503 while STS is unavailable.
fn unavailable(stage: &ClientStage) -> Vec<Cell> {
    let (way, address) = SlowProxy::tcp(stage.sts(), Duration::ZERO);
    let setting = ClientSetting {
        sts: Some(format!("http://{address}")),
        ..ClientSetting::default()
    };
    let serving = stage.daemon("unavailable", &setting);
    drop(way);
    let results = for_each(&stage.members(), MAX_CONCURRENT_WAITING, |_, member| {
        shown_message(
            stage,
            member,
            &serving,
            &ReadSettings::single_read(member, &serving),
            "awsvid: ",
        )
    });
    cells(stage, Column::Unavailable, results, |text| text)
}

/// Returns whether the client shows the daemon's message, with the number of its requests and the
/// time that they took.
fn shown_message(
    stage: &ClientStage,
    member: &Member,
    serving: &StagedDaemon,
    reading: &ReadSettings<'_>,
    message: &str,
) -> String {
    let Reads {
        each,
        took,
        printed,
    } = read(stage, member, serving, reading);
    let name = member.client.name;
    assert!(
        each.iter().all(Result::is_err),
        "{name} reads without credentials: {printed}"
    );
    let requests = serving.requests(reading.uid);
    let none_issued = requests
        .iter()
        .all(|record: &Value| record["outcome"] != "issued");
    assert!(!requests.is_empty() && none_issued, "{name}: {requests:?}");
    let tries = serving.request_count(reading.uid);
    eprintln!("{name}, {message:?}: {tries} tries, {took:?}, {printed}");
    let why = if printed.contains(message) {
        "shows why"
    } else {
        "hides why"
    };
    let seconds = took.as_secs();
    match tries {
        _ if took >= TIMEOUT => format!("does not give up ({tries} tries, {seconds} s)"),
        1 => format!("{why}, 1 try ({seconds} s)"),
        2..MIN_UNCOMPARED_TRIES => format!("{why}, {tries} tries ({seconds} s)"),
        _ => format!("{why}, many tries ({tries}, {seconds} s)"),
    }
}
