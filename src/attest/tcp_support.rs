//! Tests whether callers over TCP can be distinguished, and repeats the test when the result may
//! have changed.
//!
//! It changes when a kernel module is loaded or unloaded, or a cgroup hierarchy is mounted or
//! unmounted. The daemon does not need a restart for that.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout};

use crate::attest::host::Host;
use crate::attest::kernel::{TcpUnsupported, no_sock_diag, try_tcp_of, unix_support};
use crate::attest::rejection::Rejection;
use crate::attest::sock_diag::SockDiag;
use crate::attest::tcp::{SocketProof, TcpAttestor};
use crate::caller::{AttestError, PeerFacts};
use crate::limits::FairSemaphore;
use crate::listen::PendingPermit;

/// The shortest interval between two tests, whatever the number of requests.
const TEST_INTERVAL: Duration = Duration::from_secs(2);
/// The longest time that the caller that causes a test waits for it. A test takes 1 ms, except if
/// it has to search many cgroups, or a packet filter drops its connection.
const TEST_WAIT: Duration = Duration::from_secs(1);

/// The attestor of callers over TCP in the daemon's own network namespace, while the kernel
/// supports it.
#[derive(Debug)]
pub(crate) struct TcpSupport(Arc<TestedHost>);

#[derive(Debug)]
struct TestedHost {
    host: Arc<Host>,
    attestor: ArcSwapOption<TcpAttestor>,
    latest: Mutex<SupportCheck>,
}

/// The result of the latest test, and the state of the next one.
#[derive(Debug)]
struct SupportCheck {
    at: Instant,
    /// Whether the next test runs.
    is_running: bool,
    /// The interface that the kernel lacks. `None` while there is an attestor.
    missing: Option<TcpUnsupported>,
    /// Whether it showed nothing, so that the result before it counts.
    is_inconclusive: bool,
}

impl TcpSupport {
    /// Tests the support, and logs what is missing. Blocks.
    pub(crate) fn new(host: Arc<Host>) -> Self {
        let (attestor, missing) = match attestor(&host) {
            Ok(attestor) => (Some(Arc::new(attestor)), None),
            Err(error) => {
                log_missing(&error);
                (None, Some(error))
            }
        };
        Self(Arc::new(TestedHost {
            host,
            attestor: ArcSwapOption::new(attestor),
            latest: Mutex::new(SupportCheck {
                at: Instant::now(),
                is_running: false,
                missing,
                is_inconclusive: false,
            }),
        }))
    }

    /// Returns what callers over TCP lacked at the latest test, and the fix. `None` if they are
    /// attested. Starts another test if the latest one has failed; its result is that of a later
    /// call. Call it within a runtime.
    pub(crate) fn missing(&self) -> Option<String> {
        if self.0.attestor.load().is_none() {
            drop(self.start_test());
        }
        self.0.latest().missing.as_ref().map(described)
    }

    /// Repeats the test if the latest one has failed, and waits for it, but not for long.
    pub(crate) async fn retry_failed(&self) {
        if self.0.attestor.load().is_none() {
            self.retry().await;
        }
    }

    pub(crate) fn attestor(&self) -> Option<TcpAttestor> {
        self.0.attestor.load().as_deref().cloned()
    }

    /// Finds the socket of a peer, as [`TcpAttestor::find_socket`] does.
    pub(crate) async fn find_socket(
        &self,
        addresses: (SocketAddr, SocketAddr),
        pending: PendingPermit,
    ) -> Result<(PeerFacts, SocketProof), Rejection> {
        let attestor = self.current().await?;
        let found = attestor.find_socket(addresses, pending).await;
        // The socket does not exist, or its cgroup is unknown or the root. It is the same for all
        // callers once the kernel reports nothing any more.
        let is_suspect = match &found {
            Err(rejection) => matches!(
                rejection.error,
                AttestError::CallerGone | AttestError::UnreadableCgroup
            ),
            Ok((_, socket)) => socket.is_in_root_cgroup(),
        };
        if is_suspect && self.retry().await {
            self.current().await?;
        }
        found
    }

    /// Returns the attestor, or the rejection that names what is missing.
    async fn current(&self) -> Result<TcpAttestor, AttestError> {
        self.retry_failed().await;
        if let Some(attestor) = self.attestor() {
            return Ok(attestor);
        }
        let latest = self.0.latest();
        let missing = latest.missing.as_ref();
        Err(missing.map_or_else(
            || AttestError::kernel("test of sock_diag(7)", None),
            TcpUnsupported::rejection,
        ))
    }

    /// Repeats the test on another thread. Returns whether this test has found that the support has
    /// gone.
    ///
    /// Any caller can cause a test, and other callers go on with the latest result meanwhile (T25).
    /// So does this one if the test takes longer than [`TEST_WAIT`], runs already, or was repeated
    /// just before.
    pub(crate) async fn retry(&self) -> bool {
        let Some(test) = self.start_test() else {
            return false;
        };
        matches!(timeout(TEST_WAIT, test).await, Ok(Ok(true)))
    }

    /// Starts a test, unless one runs or the latest one is too recent.
    fn start_test(&self) -> Option<JoinHandle<bool>> {
        let mut latest = self.0.latest();
        if latest.is_running || latest.at.elapsed() < TEST_INTERVAL {
            return None;
        }
        latest.is_running = true;
        drop(latest);
        let test = RunningTest(self.0.clone());
        Some(spawn_blocking(move || test.0.test()))
    }
}

/// A test that runs. It has ended when this is dropped, also after a panic.
struct RunningTest(Arc<TestedHost>);

impl Drop for RunningTest {
    fn drop(&mut self) {
        let mut latest = self.0.latest();
        latest.is_running = false;
        latest.at = Instant::now();
    }
}

impl TestedHost {
    fn latest(&self) -> MutexGuard<'_, SupportCheck> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tests the support again. Returns whether it has gone. Blocks, without a lock.
    fn test(&self) -> bool {
        self.host.find_cgroups_again();
        let before = self.attestor.load_full();
        let result = match &before {
            Some(attestor) => attestor.test_support(),
            None => {
                attestor(&self.host).map(|attestor| self.attestor.store(Some(Arc::new(attestor))))
            }
        };
        let mut latest = self.latest();
        match (&result, before.is_some()) {
            (Ok(()), false) => tracing::info!("callers over TCP are attested again"),
            (Err(error), true) if !error.is_conclusive() => {
                if !std::mem::replace(&mut latest.is_inconclusive, true) {
                    tracing::warn!(%error, "callers over TCP are attested as before: the test of that did not run");
                }
                return false;
            }
            (Err(error), true) => {
                log_missing(error);
                self.attestor.store(None);
            }
            _ => {}
        }
        latest.is_inconclusive = false;
        latest.missing = result.err();
        before.is_some() && latest.missing.is_some()
    }
}

fn described(missing: &TcpUnsupported) -> String {
    format!("{missing}; {}", missing.fix(unix_support()))
}

fn log_missing(missing: &TcpUnsupported) {
    let fix = missing.fix(unix_support());
    tracing::warn!(error = %missing, %fix, "callers over TCP are rejected (unsupported_kernel)");
}

fn attestor(host: &Arc<Host>) -> Result<TcpAttestor, TcpUnsupported> {
    let diag = SockDiag::open_per_cpu().map_err(no_sock_diag)?;
    try_tcp_of(host, &diag)?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    // Half of the CPUs remain for short work, whatever the number of searches.
    let searches = FairSemaphore::new(processors.div_ceil(2), 1);
    Ok(TcpAttestor::new(host.clone(), diag, searches))
}

#[cfg(test)]
mod tests;
