use std::fs;
use std::future::poll_fn;
use std::net::{TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::pin::pin;
use std::process::Command;
use std::sync::mpsc;
use std::task::Poll;

use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::time::advance;

use super::*;
use crate::attest::cgroup_mounts::CgroupMounts;
use crate::cgroup::PodRoots;
use crate::skip::skip;

/// A daemon's view of a machine: this machine's kernel, with files of `/proc` that a test writes.
struct Machine {
    proc: tempfile::TempDir,
    support: TcpSupport,
    _listener: TcpListener,
    client: TcpStream,
}

/// Returns a file of this process's own `/proc`.
fn real(name: &str) -> String {
    fs::read_to_string(format!("/proc/{name}")).unwrap()
}

impl Machine {
    /// Starts with these mounts. `None` if this machine itself does not attest callers over TCP.
    fn start(mountinfo: &str) -> Option<Self> {
        if let Err(missing) = crate::attest::try_tcp("/proc".as_ref()) {
            skip(&format!(
                "callers over TCP are not attested here: {missing}"
            ));
            return None;
        }
        let proc = tempfile::tempdir().unwrap();
        for folder in ["self", "sys/kernel"] {
            fs::create_dir_all(proc.path().join(folder)).unwrap();
        }
        for name in ["self/cgroup", "sys/kernel/osrelease"] {
            fs::write(proc.path().join(name), real(name)).unwrap();
        }
        fs::write(proc.path().join("self/mountinfo"), mountinfo).unwrap();
        let host = Host::new(
            proc.path().to_owned(),
            CgroupMounts::find(mountinfo),
            PodRoots::defaults(),
            None,
        );
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Some(Self {
            proc,
            support: TcpSupport::new(Arc::new(host)),
            client: TcpStream::connect(listener.local_addr().unwrap()).unwrap(),
            _listener: listener,
        })
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.proc.path().join(name), text).unwrap();
    }

    /// Returns the rejection of the test's own connection, or `None` if its socket is found.
    async fn rejection(&self) -> Option<AttestError> {
        let client = self.client.local_addr().unwrap();
        self.rejection_of(client).await
    }

    async fn rejection_of(&self, client: SocketAddr) -> Option<AttestError> {
        let addresses = (client, self.client.peer_addr().unwrap());
        let found = self
            .support
            .find_socket(addresses, PendingPermit::none())
            .await;
        found.err().map(|rejection| rejection.error)
    }
}

const NO_CGROUPS: &str = "no cgroup v2 tree is mounted, which callers over TCP need";

#[tokio::test(start_paused = true)]
async fn cgroup_tree_is_found_that_was_mounted_later() {
    let Some(machine) = Machine::start("") else {
        return;
    };
    let missing = machine.support.missing().unwrap();
    assert!(
        missing.starts_with("no cgroup v2 tree is mounted; ") && !missing.contains("restart"),
        "{missing}"
    );
    assert!(machine.support.attestor().is_none());
    machine.write("self/mountinfo", &real("self/mountinfo"));
    // The next test is due after the interval, whatever the number of requests.
    for _ in 0..3 {
        let rejection = machine.rejection().await;
        assert_eq!(rejection, Some(AttestError::Unsupported(NO_CGROUPS)));
    }
    advance(TEST_INTERVAL).await;
    assert_eq!(machine.rejection().await, None);
    assert_eq!(machine.support.missing(), None);
    assert!(machine.support.0.host.cgroup_tree().is_some());
}

#[tokio::test(start_paused = true)]
async fn status_repeats_a_failed_test() {
    let Some(machine) = Machine::start("") else {
        return;
    };
    machine.write("self/mountinfo", &real("self/mountinfo"));
    assert!(machine.support.missing().is_some());
    advance(TEST_INTERVAL).await;
    machine.support.retry_failed().await;
    assert_eq!(machine.support.missing(), None);
}

/// Without an event of its own a test is started, and a later call has its result.
#[tokio::test(start_paused = true)]
async fn result_of_a_failed_test_is_repeated_in_the_background() {
    let Some(machine) = Machine::start("") else {
        return;
    };
    machine.write("self/mountinfo", &real("self/mountinfo"));
    advance(TEST_INTERVAL).await;
    // The test may have ended when this returns.
    let _ = machine.support.missing();
    while machine.support.0.latest().is_running {
        tokio::task::yield_now().await;
    }
    assert_eq!(machine.support.missing(), None);
}

/// A caller that causes a test waits for it, but not for long, and other callers do not (T25).
#[tokio::test(start_paused = true)]
async fn test_that_blocks_stops_no_caller() {
    let Some(machine) = Machine::start(&real("self/mountinfo")) else {
        return;
    };
    let gone = "127.0.0.1:1".parse().unwrap();
    // Opening it blocks until a writer opens it too, as an endless search for cgroups would.
    let mountinfo = machine.proc.path().join("self/mountinfo");
    fs::remove_file(&mountinfo).unwrap();
    mkfifo(&mountinfo, Mode::S_IRWXU).unwrap();
    let (answered, wait) = mpsc::channel();
    let writer = std::thread::spawn(move || {
        let outcome = wait.recv_timeout(Duration::from_secs(20));
        fs::write(mountinfo, real("self/mountinfo")).unwrap();
        outcome
    });
    advance(TEST_INTERVAL).await;
    let mut causing = pin!(machine.rejection_of(gone));
    let first = poll_fn(|context| Poll::Ready(causing.as_mut().poll(context))).await;
    assert!(first.is_pending(), "its test runs on another thread");
    // That test runs, so these do not wait for another one.
    assert_eq!(
        machine.rejection_of(gone).await,
        Some(AttestError::CallerGone)
    );
    assert_eq!(machine.rejection().await, None);
    assert_eq!(machine.support.missing(), None);
    advance(TEST_WAIT).await;
    assert_eq!(causing.await, Some(AttestError::CallerGone));
    answered.send(()).unwrap();
    writer
        .join()
        .unwrap()
        .expect("the callers are answered while the test blocks");
    while machine.support.0.latest().is_running {
        tokio::task::yield_now().await;
    }
    assert_eq!(machine.rejection().await, None);
}

/// Runs a test in a network namespace of its own, where `ports` are all that the kernel chooses
/// from. Needs root.
fn in_network_with(ports: RangeInclusive<u16>, test: impl AsyncFnOnce() + Send + 'static) {
    if !crate::skip::root() {
        return;
    }
    // Threads that the runtime starts are in the same namespace.
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success());
        let range = format!("{} {}", ports.start(), ports.end());
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", range).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build();
        runtime.unwrap().block_on(test());
    });
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// A user that holds all ports does not withdraw TCP from all others (T25).
#[test]
fn test_without_a_free_port_changes_nothing() {
    const PORTS: RangeInclusive<u16> = 40_000..=40_007;
    in_network_with(PORTS, async || {
        let Some(machine) = Machine::start(&real("self/mountinfo")) else {
            return;
        };
        let gone = "127.0.0.1:1".parse().unwrap();
        let hold = |address: &str| {
            let listeners = PORTS.map_while(|_| TcpListener::bind((address, 0)).ok());
            listeners.collect::<Vec<_>>()
        };
        let held = [hold("127.0.0.1"), hold("::1")];
        let failed = machine.support.attestor().unwrap().test_support();
        assert!(
            matches!(failed, Err(TcpUnsupported::NoLoopback(_))),
            "{failed:?}"
        );
        for _ in 0..3 {
            advance(TEST_INTERVAL).await;
            assert_eq!(
                machine.rejection_of(gone).await,
                Some(AttestError::CallerGone)
            );
            assert!(machine.support.0.latest().is_inconclusive);
            assert_eq!(machine.rejection().await, None);
            assert_eq!(machine.support.missing(), None);
            assert!(machine.support.attestor().is_some(), "for pods, too");
        }
        drop(held);
        advance(TEST_INTERVAL).await;
        assert_eq!(
            machine.rejection_of(gone).await,
            Some(AttestError::CallerGone)
        );
        assert!(!machine.support.0.latest().is_inconclusive);
    });
}

#[tokio::test(start_paused = true)]
async fn unmounted_cgroup_tree_is_noticed_and_found_again() {
    let Some(machine) = Machine::start(&real("self/mountinfo")) else {
        return;
    };
    assert_eq!(machine.rejection().await, None);
    machine.write("self/mountinfo", "");
    advance(TEST_INTERVAL).await;
    let gone = "127.0.0.1:1".parse().unwrap();
    let unsupported = Some(AttestError::Unsupported(NO_CGROUPS));
    assert_eq!(machine.rejection_of(gone).await, unsupported);
    assert_eq!(machine.rejection().await, unsupported);
    machine.write("self/mountinfo", &real("self/mountinfo"));
    advance(TEST_INTERVAL).await;
    assert_eq!(
        machine.rejection_of(gone).await,
        Some(AttestError::CallerGone)
    );
    assert_eq!(machine.rejection().await, None);
}

/// The kernel's netlink socket does not answer about TCP any more, as when a module is unloaded.
#[tokio::test(start_paused = true)]
async fn lost_sock_diag_is_noticed_and_opened_again() {
    let Some(machine) = Machine::start(&real("self/mountinfo")) else {
        return;
    };
    machine.support.attestor().unwrap().close();
    // The test at the start is too recent to be repeated.
    assert_eq!(machine.rejection().await, Some(AttestError::CallerGone));
    advance(TEST_INTERVAL).await;
    let rejection = machine.rejection().await;
    assert!(
        matches!(rejection, Some(AttestError::Unsupported(text)) if text.contains("tcp_diag")),
        "{rejection:?}"
    );
    assert_eq!(
        machine
            .support
            .0
            .latest()
            .missing
            .as_ref()
            .map(ToString::to_string)
            .as_deref(),
        Some("sock_diag(7) does not work for TCP: it does not find a socket that exists")
    );
    advance(TEST_INTERVAL).await;
    assert_eq!(machine.rejection().await, None);
}

/// A cgroup without processes, which is removed with this.
struct EmptyCgroup(std::path::PathBuf);

impl EmptyCgroup {
    /// Returns `None` where this process may not create it.
    fn create(host: &Host) -> Option<Self> {
        let root = crate::cgroup::CgroupPath::parse("/")?;
        let name = format!("awsvid-unit-{}", std::process::id());
        let path = host.cgroup_tree()?.directory(&root).join(name);
        fs::create_dir(&path).ok()?;
        Some(Self(path))
    }

    fn path(&self) -> String {
        format!("/{}", self.0.file_name().unwrap().to_str().unwrap())
    }
}

impl Drop for EmptyCgroup {
    fn drop(&mut self) {
        _ = fs::remove_dir(&self.0);
    }
}

/// A socket has another cgroup than its process, as on a kernel before Linux 5.15 with `net_cls`.
#[tokio::test(start_paused = true)]
async fn wrong_cgroup_is_noticed_and_passes() {
    let Some(machine) = Machine::start(&real("self/mountinfo")) else {
        return;
    };
    let own = real("self/cgroup");
    let Some(other) = EmptyCgroup::create(&machine.support.0.host) else {
        return skip("this user may not create cgroups");
    };
    machine.write("self/cgroup", &format!("0::{}\n", other.path()));
    advance(TEST_INTERVAL).await;
    let gone = "127.0.0.1:1".parse().unwrap();
    let rejection = machine.rejection_of(gone).await;
    assert_eq!(
        rejection,
        Some(AttestError::Unsupported(
            "it reports a wrong cgroup of a TCP socket"
        ))
    );
    machine.write("self/cgroup", &own);
    advance(TEST_INTERVAL).await;
    assert_eq!(machine.rejection().await, None);
}
