//! systemd's watchdog, which ends a daemon with threads that do not work any more.

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};

use super::{Content, TCP, TIMEOUT, assert_answered, install, restarts, start};
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;

/// The name of the runtime's worker threads.
const WORKER: &str = "tokio-rt-worker";

#[test]
fn daemon_without_working_threads_is_restarted() {
    let directory = folder();
    let drop_in = "[Service]\nWatchdogSec=2s\n";
    let more = [(
        "/etc/systemd/system/awsvid.service.d/watchdog.conf",
        Content::Text(drop_in),
    )];
    let Some(machine) = install(directory.path(), &more) else {
        return;
    };
    start(&machine);
    let notified = || machine.property("awsvid.service", "WatchdogTimestampMonotonic");
    for _ in 0..8 {
        let before = notified();
        await_some("systemd is notified", TIMEOUT, || {
            (notified() != before).then_some(())
        });
    }
    assert_eq!(restarts(&machine), 0);

    // A tracer can stop single threads. The others go on: the main thread, the log's, the audit's.
    // An idle worker that is stopped is not blocked, so all of them are.
    let workers = machine.threads("awsvid.service", WORKER);
    assert!(!workers.is_empty());
    for worker in &workers {
        ptrace::seize(*worker, ptrace::Options::empty()).expect("trace the thread");
        ptrace::interrupt(*worker).expect("stop the thread");
    }
    await_some("systemd restarts the daemon", TIMEOUT, || {
        // The daemon's end is visible only after its tracer has seen that of the threads.
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
        for worker in &workers {
            let _ = waitpid(*worker, Some(flags));
        }
        (restarts(&machine) == 1).then_some(())
    });
    let journal = machine.journal();
    assert!(journal.contains("Watchdog timeout"), "{journal}");
    assert_answered(&machine, TCP);
}
