//! Each client by each way to the daemon, cold, and refused. Only in `tests/run slow`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::reading::{PATIENCE, Reading, Reads, for_each, read};
use super::stage::{Member, ROLE, Serving, Setting, Stage};
use super::table::{self, Cell, Column, Table};
use super::{AT_ONCE, facts};
use crate::harness::counterparts::{folder, minio};
use crate::harness::delay::Delay;
use crate::harness::is_slow;

#[test]
fn the_whole_matrix() {
    if !is_slow() {
        return;
    }
    table::settle_rows();
    let folder = folder();
    let Some(stage) = Stage::start(folder.path(), &Table::committed()) else {
        return;
    };
    let mut cells: Vec<Cell> = stage.members().into_iter().flat_map(facts).collect();
    cells.extend(ways(&stage));
    cells.extend(cold(&stage));
    cells.extend(refused(&stage));
    cells.extend(unavailable(&stage));
    table::settle(&cells);
}

/// A cell for each client, made of what it has seen.
fn cells<T>(stage: &Stage, column: Column, seen: Vec<T>, text: impl Fn(T) -> String) -> Vec<Cell> {
    stage
        .members()
        .into_iter()
        .zip(seen)
        .map(|(member, seen)| Cell::new(member.client.name, column, text(seen)))
        .collect()
}

/// With a token that has to be right, from its file alone; over IPv6, by name, and for a role by its name.
fn ways(stage: &Stage) -> Vec<Cell> {
    let serving = stage.daemon(
        "ways",
        &Setting {
            listen: "authorization = \"token\"",
            ..Setting::default()
        },
    );
    let (tcp, tcp6) = (serving.daemon.tcp(), serving.daemon.tcp6());
    let failed = for_each(&stage.members(), AT_ONCE, |_, member| {
        let once = Reading::once(member, &serving);
        let url = |host: &str, port: u16| format!("http://{host}:{port}");
        let ways = [
            ("", once.clone()),
            (
                "token file alone",
                Reading {
                    file_alone: true,
                    ..once.clone()
                },
            ),
            (
                "`[::1]`",
                Reading {
                    url: url("[::1]", tcp6.port()),
                    ..once.clone()
                },
            ),
            (
                "`localhost`",
                Reading {
                    url: url("localhost", tcp.port()),
                    ..once.clone()
                },
            ),
            (
                "a role's name",
                Reading {
                    role: Some(ROLE),
                    ..once
                },
            ),
        ];
        let failed = ways.into_iter().filter_map(|(name, reading)| {
            let reads = read(stage, member, &serving, &reading);
            let failed = !reads.are(&member.content());
            failed.then(|| {
                let asked = serving.requests(member.uid).pop();
                eprintln!(
                    "{}, {name:?}: {reads:?}, last asked: {asked:?}",
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

/// On a busy machine a client may be late by itself. Who is too slow every time is too slow.
const TRIES: u32 = 3;

/// The first read of all, with nothing cached; then a second one.
fn cold(stage: &Stage) -> Vec<Cell> {
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

/// Whether the first read of each of these came to its object.
fn with_delay(stage: &Stage, seconds: f64, number: u32, members: &[&Member]) -> Vec<bool> {
    let (each, name) = (
        Duration::from_secs_f64(seconds / 2.0),
        format!("cold-{seconds}-{number}"),
    );
    let socket = stage.path(&format!("{name}.sock"));
    let _source = Delay::unix(&socket, stage.spire.agent_socket(), each);
    let (_sts, address) = Delay::tcp(stage.sts(), each);
    let setting = Setting {
        source: Some(socket),
        sts: Some(format!("http://{address}")),
        ..Setting::default()
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
    let reads = for_each(members, AT_ONCE, |_, member| {
        // Its next try comes when what the first one started has come to its end.
        let pause = Duration::from_secs_f64(seconds.ceil());
        let reading = Reading {
            times: 2,
            pause,
            ..Reading::once(member, &serving)
        };
        read(stage, member, &serving, &reading)
    });
    for ((member, reads), before) in members.iter().zip(&reads).zip(before.1) {
        let name = member.client.name;
        eprintln!(
            "{name}, cold, {seconds} s: {} requests, {reads:?}",
            serving.asked(member.uid)
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
const WAITING_AT_ONCE: usize = 6;

/// From so many tries on their number is no part of what is compared: who has tries within tries, or an end in time, does not
/// come to the same number each time.
const MANY: u64 = 7;

/// Users without an identity: a 403.
fn refused(stage: &Stage) -> Vec<Cell> {
    let serving = stage.daemon("refused", &Setting::default());
    let seen = for_each(&stage.members(), WAITING_AT_ONCE, |_, member| {
        let reading = Reading {
            uid: member.stranger,
            ..Reading::once(member, &serving)
        };
        let said = format!(
            "no SPIFFE identity: this node has none for uid {}",
            member.stranger
        );
        told(stage, member, &serving, &reading, &said)
    });
    cells(stage, Column::Refused, seen, |text| text)
}

/// While STS is away: a 503.
fn unavailable(stage: &Stage) -> Vec<Cell> {
    let (way, address) = Delay::tcp(stage.sts(), Duration::ZERO);
    let setting = Setting {
        sts: Some(format!("http://{address}")),
        ..Setting::default()
    };
    let serving = stage.daemon("unavailable", &setting);
    drop(way);
    let seen = for_each(&stage.members(), WAITING_AT_ONCE, |_, member| {
        told(
            stage,
            member,
            &serving,
            &Reading::once(member, &serving),
            "awsvid: ",
        )
    });
    cells(stage, Column::Unavailable, seen, |text| text)
}

/// Whether the client shows what the daemon has said, and how often and how long it has asked.
fn told(
    stage: &Stage,
    member: &Member,
    serving: &Serving,
    reading: &Reading<'_>,
    said: &str,
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
    let tries = serving.asked(reading.uid);
    eprintln!("{name}, {said:?}: {tries} tries, {took:?}, {printed}");
    let why = if printed.contains(said) {
        "shows why"
    } else {
        "hides why"
    };
    let seconds = took.as_secs();
    match tries {
        _ if took >= PATIENCE => format!("does not give up ({tries} tries, {seconds} s)"),
        1 => format!("{why}, 1 try ({seconds} s)"),
        2..MANY => format!("{why}, {tries} tries ({seconds} s)"),
        _ => format!("{why}, many tries ({tries}, {seconds} s)"),
    }
}
