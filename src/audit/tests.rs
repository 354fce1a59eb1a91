use super::*;
use std::path::Path;

fn open(path: &Path) -> Arc<Audit> {
    Audit::open(&AuditFile::Path(path.to_owned()), false, Clock::system(), Metrics::default()).unwrap()
}

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn after_a_rotation_records_go_to_the_new_file() {
    let folder = tempfile::tempdir().unwrap();
    let (path, moved) = (folder.path().join("audit.log"), folder.path().join("audit.log.1"));
    let audit = open(&path);
    audit.begin(Listener::Unix, None).finish(Outcome::Refused, "host", None);
    std::fs::rename(&path, &moved).unwrap();
    audit.begin(Listener::Unix, None).finish(Outcome::Refused, "path", None);
    audit.reopen(&AuditFile::Path(path.clone()), false).unwrap();
    audit.begin(Listener::Unix, None).finish(Outcome::Refused, "method", None);
    let reasons = |path| lines(path).iter().map(|line| line["reason"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(reasons(&moved), ["host", "path"]);
    assert_eq!(reasons(&path), ["method"]);
    // One that can't be opened leaves everything as it was.
    assert!(audit.reopen(&AuditFile::Path(folder.path().join("none/audit.log")), false).is_err());
    audit.begin(Listener::Unix, None).finish(Outcome::Refused, "browser", None);
    assert_eq!(reasons(&path), ["method", "browser"]);
}

#[tokio::test]
async fn what_is_queued_is_written_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reader = {
        let path = path.clone();
        std::thread::spawn(move || std::fs::read_to_string(path).unwrap())
    };
    let audit = open(&path);
    for _ in 0..3 {
        audit.begin(Listener::Tcp, None);
    }
    drop(audit);
    assert_eq!(reader.join().unwrap().lines().count(), 3);
}

/// Refusals, issues and cancellations of one caller, `count` of each.
async fn flood(audit: &Arc<Audit>, count: usize) {
    for _ in 0..count {
        audit.begin(Listener::Tcp, None).finish(Outcome::Refused, "host", None);
        let issued = Issued { access_key_id: "ASIAX", expiration: UNIX_EPOCH, freshness: Freshness::Hit };
        audit.begin(Listener::Tcp, None).finish(Outcome::Issued, "ok", Some(issued));
        drop(audit.begin(Listener::Tcp, None));
    }
}

/// How many requests the records with this outcome stand for, and how many records those are.
fn counted(lines: &[serde_json::Value], outcome: &str) -> (u64, usize) {
    let these: Vec<_> = lines.iter().filter(|line| line["outcome"] == outcome).collect();
    (these.iter().map(|line| line["repeated"].as_u64().unwrap_or(1)).sum(), these.len())
}

#[tokio::test(start_paused = true)]
async fn of_a_flood_of_refusals_none_is_uncounted_and_few_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let audit = open(&path);
    flood(&audit, 500).await;
    // Nobody asks any more: what was counted comes by itself.
    sleep(Duration::from_millis(1600)).await;
    let written = lines(&path);
    assert_eq!(counted(&written, "refused"), (500, 11));
    assert_eq!(counted(&written, "issued"), (500, 500));
    assert_eq!(counted(&written, "aborted"), (500, 500));
    let summary = written.iter().find(|line| line["repeated"] == 490).unwrap();
    assert_eq!((&summary["reason"], &summary["listener"]), (&"host".into(), &"tcp".into()));
    // At the daemon's end, too.
    flood(&audit, 30).await;
    drop(audit);
    assert_eq!(counted(&lines(&path), "refused"), (530, 22));
}

#[tokio::test(start_paused = true)]
async fn a_flood_that_lasts_is_one_record_a_second() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("audit.log");
    let audit = open(&path);
    for _ in 0..300 {
        flood(&audit, 5).await;
        sleep(Duration::from_millis(10)).await;
    }
    drop(audit);
    let (requests, records) = counted(&lines(&path), "refused");
    assert_eq!(requests, 1500);
    assert!(records <= 4 * 11, "{records} records in three seconds");
}

#[tokio::test]
async fn what_is_required_and_cannot_be_written_says_so() {
    let full = AuditFile::Path("/dev/full".into());
    let open = |required| Audit::open(&full, required, Clock::system(), Metrics::default()).unwrap();
    let issued = || Issued { access_key_id: "ASIAX", expiration: UNIX_EPOCH, freshness: Freshness::Hit };
    let issues = |audit: &Arc<Audit>| audit.begin(Listener::Unix, None).finish(Outcome::Issued, "ok", Some(issued()));
    for required in [true, false] {
        let audit = open(required);
        // As a regular file on a full disk.
        let file = std::fs::OpenOptions::new().append(true).open("/dev/full").unwrap();
        audit.sink.store(Arc::new(Sink::File(file)));
        assert_eq!(issues(&audit), !required);
        assert_eq!(audit.metrics.audit_lost.get(), 1);

        // A character device is written to by a thread: once that has failed, which it may have done before the first of
        // these returns, nothing more is handed out.
        let audit = open(required);
        issues(&audit);
        while audit.metrics.audit_lost.get() == 0 {
            std::thread::yield_now();
        }
        assert_eq!(issues(&audit), !required);
    }
}

#[test]
fn moments_outside_the_format_are_shown_as_its_ends() {
    let shown = |time| humantime::format_rfc3339_seconds(printable(time)).to_string();
    assert_eq!(shown(UNIX_EPOCH - Duration::from_secs(1)), "1970-01-01T00:00:00Z");
    assert_eq!(shown(UNIX_EPOCH + LAST_TIME * 2), "9999-12-31T23:59:59Z");
}
