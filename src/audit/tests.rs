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
