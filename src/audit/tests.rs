use super::*;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use crate::caller::constant_proof::constant_caller;
use crate::cgroup::{Pod, PodUid};
use crate::clock::{LAST_TIME, printable};

const UNKNOWN: RequestPeer = RequestPeer::Rejected(None);
const REQUEST: RequestId = RequestId { boot: 0, number: 0 };

fn open(path: &Path) -> Arc<Audit> {
    open_at(&AuditFile::Path(path.to_owned()), false)
}

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test]
async fn records_go_to_new_file_after_rotation() {
    let folder = tempfile::tempdir().unwrap();
    let (path, moved) = (
        folder.path().join("audit.log"),
        folder.path().join("audit.log.1"),
    );
    let audit = open(&path);
    audit
        .begin(REQUEST, (ListenerKind::Unix, Protocol::Container), UNKNOWN)
        .finish(Outcome::Refused, "host", None)
        .await;
    std::fs::rename(&path, &moved).unwrap();
    audit
        .begin(REQUEST, (ListenerKind::Unix, Protocol::Container), UNKNOWN)
        .finish(Outcome::Refused, "path", None)
        .await;
    audit.reopen(&AuditFile::Path(path.clone()), false).unwrap();
    audit
        .begin(REQUEST, (ListenerKind::Unix, Protocol::Container), UNKNOWN)
        .finish(Outcome::Refused, "method", None)
        .await;
    let reasons = |path| {
        lines(path)
            .iter()
            .map(|line| line["reason"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(reasons(&moved), ["host", "path"]);
    assert_eq!(reasons(&path), ["method"]);
    // One that can't be opened leaves everything as it was.
    assert!(
        audit
            .reopen(
                &AuditFile::Path(folder.path().join("none/audit.log")),
                false
            )
            .is_err()
    );
    audit
        .begin(REQUEST, (ListenerKind::Unix, Protocol::Container), UNKNOWN)
        .finish(Outcome::Refused, "browser", None)
        .await;
    assert_eq!(reasons(&path), ["method", "browser"]);
}

#[tokio::test]
async fn queue_is_written_when_audit_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Opened for both directions, since a pipe without a reader cannot be opened for writes.
    let both = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let audit = open(&path);
    let mut reader = std::fs::File::open(&path).unwrap();
    drop(both);
    for _ in 0..3 {
        audit.begin(REQUEST, (ListenerKind::Tcp, Protocol::Container), UNKNOWN);
    }
    drop(audit);
    let mut text = String::new();
    std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
    assert_eq!(text.lines().count(), 3);
}

#[test]
fn pipe_without_reader_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = Audit::open(&AuditFile::Path(path)).unwrap_err().to_string();
    assert!(error.contains("no process reads from this pipe"), "{error}");
}

fn issued(cache_result: CacheResult) -> IssuedFields<'static> {
    IssuedFields {
        access_key_id: "ASIAX",
        first_session_name: None,
        expiration: UNIX_EPOCH,
        cache_result,
    }
}

async fn issue(audit: &Arc<Audit>, cache_result: CacheResult) -> bool {
    audit
        .begin(REQUEST, (ListenerKind::Tcp, Protocol::Container), UNKNOWN)
        .finish(Outcome::Issued, "ok", Some(issued(cache_result)))
        .await
}

/// Rejections, hits, issues and cancellations of one caller, `count` of each.
async fn flood(audit: &Arc<Audit>, count: usize) {
    for _ in 0..count {
        audit
            .begin(REQUEST, (ListenerKind::Tcp, Protocol::Container), UNKNOWN)
            .finish(Outcome::Refused, "host", None)
            .await;
        issue(audit, CacheResult::Hit).await;
        issue(audit, CacheResult::Miss).await;
        drop(audit.begin(REQUEST, (ListenerKind::Tcp, Protocol::Container), UNKNOWN));
    }
}

/// How many requests the records stand for of which this is true, and how many records those are.
fn counted(
    lines: &[serde_json::Value],
    is_one: impl Fn(&serde_json::Value) -> bool,
) -> (usize, usize) {
    let these: Vec<_> = lines.iter().filter(|line| is_one(line)).collect();
    let sum: u64 = these
        .iter()
        .map(|line| line["repeated"].as_u64().unwrap_or(1))
        .sum();
    (sum.try_into().unwrap(), these.len())
}

/// Each of those, of `count` requests that took so long.
fn check(lines: &[serde_json::Value], count: usize, started: Instant) {
    let seconds = usize::try_from(started.elapsed().as_secs()).unwrap();
    let kinds = [
        ("outcome", "refused"),
        ("cache", "hit"),
        ("outcome", "aborted"),
    ];
    for (field, kind) in kinds {
        let (requests, records) = counted(lines, |line| line[field] == kind);
        assert_eq!(requests, count, "{kind}");
        assert!(
            records <= 11 * (seconds + 2),
            "{records} records of {kind} in {seconds} s"
        );
    }
    assert_eq!(
        counted(lines, |line| line["cache"] == "miss"),
        (count, count)
    );
}

#[tokio::test]
async fn flood_is_counted_in_few_records() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let (audit, started) = (open(&path), Instant::now());
    flood(&audit, 1000).await;
    // Without further requests a task writes what was counted.
    let all = loop {
        let lines = lines(&path);
        if ["refused", "aborted", "issued"]
            .iter()
            .map(|kind| counted(&lines, |line| line["outcome"] == *kind).0)
            .sum::<usize>()
            == 4000
        {
            break lines;
        }
        sleep(Duration::from_millis(10)).await;
    };
    check(&all, 1000, started);
    let summary = all
        .iter()
        .find(|line| line["repeated"].is_u64() && line["outcome"] == "issued")
        .unwrap();
    assert_eq!(
        (&summary["access_key_id"], &summary["cache"]),
        (&"ASIAX".into(), &"hit".into())
    );
    // At the daemon's end, too.
    flood(&audit, 30).await;
    drop(audit);
    check(&lines(&path), 1030, started);
}

/// A rejection has the same facts of the peer as an attested request.
#[tokio::test]
async fn rejected_peer_has_the_fields_of_an_attested_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let audit = open(&path);
    let mut caller = constant_caller(
        ListenerKind::Pod,
        1001,
        Some("/system.slice/shop.service"),
        None,
    );
    caller.peer.netns_inode = Some(7);
    caller.peer.pod = Some(Pod {
        uid: PodUid::parse("72f7f152-440c-66ac-9084-e0fc1d8a910c").unwrap(),
        container: Some("c0ffee".into()),
    });
    let rejected = RequestPeer::Rejected(Some(caller.peer.clone()));
    for peer in [rejected, RequestPeer::Attested(Arc::new(caller))] {
        audit
            .begin(REQUEST, (ListenerKind::Pod, Protocol::Container), peer)
            .finish(Outcome::Refused, "no_role", None)
            .await;
    }
    let [rejected, attested] = &lines(&path)[..] else {
        panic!("not two records")
    };
    for (field, value) in [
        ("uid", 1001.into()),
        ("cgroup", "/system.slice/shop.service".into()),
        ("systemd_unit", "shop.service".into()),
        ("pod_uid", "72f7f152-440c-66ac-9084-e0fc1d8a910c".into()),
        ("container_id", "c0ffee".into()),
        ("network_namespace", serde_json::Value::from(7)),
    ] {
        assert_eq!((&rejected[field], &attested[field]), (&value, &value));
    }
}

/// The first release of a key to a caller is in the audit, whatever others do.
#[tokio::test]
async fn first_hit_of_each_key_is_written_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let audit = open(&path);
    for number in 0..3000 {
        let access_key_id = format!("ASIA{number}");
        let issued = IssuedFields {
            access_key_id: &access_key_id,
            ..issued(CacheResult::Hit)
        };
        let request = audit.next_request();
        let record = audit.begin(request, (ListenerKind::Tcp, Protocol::Container), UNKNOWN);
        let id = request.to_string();
        assert!(record.finish(Outcome::Issued, "ok", Some(issued)).await);
        // Some of them, since reading all of it each time takes long.
        if number % 500 == 0 {
            let last = lines(&path).pop().unwrap();
            assert_eq!(
                (&last["access_key_id"], &last["request_id"]),
                (&access_key_id.into(), &id.into())
            );
        }
    }
    assert_eq!(lines(&path).len(), 3000);
}

fn open_at(to: &AuditFile, required: bool) -> Arc<Audit> {
    let audit = Audit::unopened(required, Clock::system(), Metrics::default());
    audit.reopen(to, required).unwrap();
    audit
}

#[tokio::test]
async fn required_record_that_fails_prevents_release() {
    let full = AuditFile::Path("/dev/full".into());
    for required in [true, false] {
        let audit = open_at(&full, required);
        for (count, cache_result) in [CacheResult::Miss, CacheResult::Hit, CacheResult::Stale]
            .into_iter()
            .enumerate()
        {
            assert_eq!(issue(&audit, cache_result).await, !required);
            let dropped = &audit.metrics.audit_records_dropped;
            let expected = u64::try_from(count).unwrap() + 1;
            // On a busy machine an answer without `required` is sent before its record is lost.
            while !required && dropped.get() < expected {
                tokio::task::yield_now().await;
            }
            assert_eq!(dropped.get(), expected);
        }
        // Credentials that were not released do not count as issued.
        let text = audit.metrics.encode();
        let issued = text.contains("outcome=\"issued\"");
        assert_eq!(
            (issued, text.contains("not_audited")),
            (!required, required),
            "{text}"
        );
    }
}

/// Hits that would only be counted are not released while the destination fails.
#[tokio::test]
async fn required_record_is_retried_while_destination_fails() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let audit = open_at(&AuditFile::Path(path), true);
    for _ in 0..100 {
        assert!(issue(&audit, CacheResult::Hit).await);
    }
    let full = AuditFile::Path("/dev/full".into());
    audit.reopen(&full, true).unwrap();
    // The one that finds it out.
    assert!(!issue(&audit, CacheResult::Miss).await);
    for _ in 0..100 {
        assert!(!issue(&audit, CacheResult::Hit).await);
    }
}

/// The repair of a full disk may be another file.
#[tokio::test]
async fn next_file_has_number_of_lost_records() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let audit = open_at(&AuditFile::Path("/dev/full".into()), false);
    for _ in 0..3 {
        issue(&audit, CacheResult::Miss).await;
    }
    audit.reopen(&AuditFile::Path(path.clone()), false).unwrap();
    issue(&audit, CacheResult::Miss).await;
    let found = lines(&path);
    assert_eq!(
        (&found[0]["outcome"], &found[0]["repeated"]),
        (&"lost".into(), &3.into())
    );
    assert_eq!(counted(&found, |_| true), (4, 2));
}

/// A client that disconnects while its record is written counts once.
#[tokio::test]
async fn request_is_counted_when_client_closes_during_write() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _reader = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let audit = open_at(&AuditFile::Path(path), true);
    // Until the pipe is full.
    while issue(&audit, CacheResult::Miss).await {}
    let count = |text: &str| {
        let line = audit
            .metrics
            .encode()
            .lines()
            .find(|line| line.contains(text))
            .map(str::to_owned);
        line.map_or(0, |line| {
            line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
        })
    };
    let before = count("outcome=\"issued\"");
    let mut waiting = Box::pin(issue(&audit, CacheResult::Miss));
    assert!(futures_are_pending(&mut waiting));
    drop(waiting);
    assert_eq!(
        (count("outcome=\"issued\""), count("outcome=\"aborted\"")),
        (before + 1, 0)
    );
}

fn futures_are_pending(future: &mut std::pin::Pin<Box<impl Future>>) -> bool {
    future
        .as_mut()
        .poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
        .is_pending()
}

/// A pipe without a reader: credentials that require a record are not released, others are not held
/// up for long.
#[tokio::test]
async fn stalled_reader_blocks_no_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Open for both directions: there is a reader, and it reads nothing.
    let reader = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let audit = open_at(&AuditFile::Path(path.clone()), false);
    for _ in 0..20_000 {
        assert!(issue(&audit, CacheResult::Miss).await);
    }
    assert!(audit.metrics.audit_records_dropped.get() > 0);
    let lost = audit.metrics.audit_records_dropped.get();
    let strict = open_at(&AuditFile::Path(path), true);
    assert!(!issue(&strict, CacheResult::Miss).await);
    // The reader reads again, to the end: the sum is the number of requests.
    let reading = std::thread::spawn(move || {
        use std::io::BufRead;
        let mut sum = 0;
        for line in std::io::BufReader::new(reader).lines() {
            let line: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
            sum += line["repeated"].as_u64().unwrap_or(1);
            if line["outcome"] == "lost" {
                // The very last may be one of them.
                assert!(
                    line["repeated"].as_u64().unwrap().wrapping_sub(lost) <= 1,
                    "{line}, not {lost}"
                );
            }
            if sum == 20_002 {
                return sum;
            }
        }
        sum
    });
    assert!(issue(&audit, CacheResult::Miss).await);
    assert_eq!(
        tokio::task::spawn_blocking(|| reading.join().unwrap())
            .await
            .unwrap(),
        20_002
    );
}

#[test]
fn time_outside_rfc_3339_is_clamped() {
    let shown = |time| humantime::format_rfc3339_seconds(printable(time)).to_string();
    assert_eq!(
        shown(UNIX_EPOCH - Duration::from_secs(1)),
        "1970-01-01T00:00:00Z"
    );
    assert_eq!(shown(UNIX_EPOCH + LAST_TIME * 2), "9999-12-31T23:59:59Z");
}
