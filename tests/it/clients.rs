//! Every AWS SDK and client, real and unmodified, gets its credentials from the real daemon, SPIRE
//! and MinIO.
//!
//! Each runs as a user of its own behind `awsvid exec`. A table in deploy/docs/sdks.md has the
//! results, and these tests compare it; with `AWSVID_WRITE_TABLE=1` they write it. `tests/run`
//! tries one read and one rejection each, `tests/run slow` all columns.

pub(crate) mod catalogue;
mod expiring_session;
mod instance_metadata;
mod long_session;
mod matrix;
mod reading;
mod stage;
pub(crate) mod table;

use serde_json::Value;

use crate::harness::counterparts::folder;
use reading::{ReadSettings, for_each, read};
use stage::{ClientSetting, ClientStage, Member};
use table::{Cell, Column, Table};

/// As many as the machine has processors, since most of their work is to start.
const MAX_CONCURRENT: usize = 2;

#[test]
fn each_client_reads_only_its_own_object() {
    table::settle_rows();
    let folder = folder();
    let Some(stage) = ClientStage::start(folder.path(), &Table::committed()) else {
        return;
    };
    let serving = stage.daemon("short", &ClientSetting::default());
    let others: Vec<String> = stage
        .members()
        .into_iter()
        .map(Member::key)
        .cycle()
        .skip(1)
        .take(stage.members().len())
        .collect();
    let failed: Vec<String> = for_each(&stage.members(), MAX_CONCURRENT, |number, member| {
        let own = read(
            &stage,
            member,
            &serving,
            &ReadSettings::single_read(member, &serving),
        );
        if !own.all_equal(&member.content()) {
            return Some(format!(
                "{} does not read its own object: {own:?}",
                member.client.name
            ));
        }
        let other = ReadSettings {
            key: others[number].clone(),
            ..ReadSettings::single_read(member, &serving)
        };
        let other = read(&stage, member, &serving, &other);
        let rejected = other
            .each
            .iter()
            .all(|read| read.as_ref().is_err_and(|message| is_denied(message)));
        (!rejected).then(|| {
            format!(
                "{} is not denied another's object: {other:?}",
                member.client.name
            )
        })
    })
    .into_iter()
    .flatten()
    .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    for member in stage.members() {
        // On a busy machine a client may have closed its first connection and sent a second
        // request.
        let mut requests = serving.requests(member.uid);
        requests.retain(|record| record["outcome"] != "aborted");
        let is_right = |record: &Value| {
            record["outcome"] == "issued" && record["spiffe_id"] == member.spiffe_id()
        };
        assert!(
            !requests.is_empty() && requests.iter().all(is_right),
            "{}: {requests:?}",
            member.client.name
        );
    }
    table::settle(
        &stage
            .members()
            .into_iter()
            .flat_map(facts)
            .collect::<Vec<_>>(),
    );
}

/// Returns the facts about a client that need no run.
fn facts(member: &Member) -> [Cell; 2] {
    let client = &member.client;
    [
        Cell::new(
            client.name,
            Column::Version,
            format!("{} {}", client.registry, member.version),
        ),
        Cell::new(client.name, Column::Note, client.note),
    ]
}

/// Returns whether S3 has denied access with these credentials, in each client's words.
fn is_denied(message: &str) -> bool {
    [
        "AccessDenied",
        "Access Denied",
        "ACCESS_DENIED",
        "403",
        "Forbidden",
        "Insufficient permissions",
    ]
    .iter()
    .any(|word| message.contains(word))
}
