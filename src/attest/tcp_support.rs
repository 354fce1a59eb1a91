//! Tests whether callers over TCP can be distinguished, and repeats the test when the result may
//! have changed.
//!
//! It changes when a kernel module is loaded or unloaded, or a cgroup v1 controller is mounted. The
//! daemon does not need a restart for that.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::time::Instant;

use crate::attest::Unattested;
use crate::attest::host::Host;
use crate::attest::kernel::{TcpUnsupported, no_sock_diag, try_tcp_of, unix_support};
use crate::attest::sock_diag::SockDiag;
use crate::attest::tcp::{SocketProof, TcpAttestor};
use crate::caller::AttestError;
use crate::limits::FairSemaphore;

/// The shortest interval between two tests, whatever the number of requests.
const RETRY: Duration = Duration::from_secs(2);

/// The attestor of callers over TCP in the daemon's own network namespace, while the kernel
/// supports it.
#[derive(Debug)]
pub(crate) struct TcpSupport {
    host: Arc<Host>,
    attestor: ArcSwapOption<TcpAttestor>,
    attempt: Mutex<SupportCheck>,
}

#[derive(Debug)]
struct SupportCheck {
    at: Instant,
    /// The interface that the kernel lacks, and the fix. `None` while there is an attestor.
    missing: Option<String>,
}

impl SupportCheck {
    fn current(result: Result<(), &TcpUnsupported>) -> Self {
        Self {
            at: Instant::now(),
            missing: result
                .err()
                .map(|error| format!("{error}; {}", error.fix(unix_support()))),
        }
    }
}

impl TcpSupport {
    /// Tests the support, and logs what is missing.
    pub(crate) fn new(host: Arc<Host>) -> Self {
        let attestor = attestor(&host);
        if let Err(error) = &attestor {
            let fix = error.fix(unix_support());
            tracing::warn!(%error, %fix, "callers over TCP are refused (unsupported_kernel)");
        }
        let attempt = Mutex::new(SupportCheck::current(attestor.as_ref().map(drop)));
        Self {
            host,
            attestor: ArcSwapOption::new(attestor.ok().map(Arc::new)),
            attempt,
        }
    }

    /// Returns what callers over TCP lack, and the fix, by the latest test. `None` if they are
    /// attested.
    pub(crate) fn missing(&self) -> Option<String> {
        self.attempt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .missing
            .clone()
    }

    pub(crate) fn attestor(&self) -> Option<TcpAttestor> {
        self.attestor.load().as_deref().cloned()
    }

    /// Finds the socket of a peer, as [`TcpAttestor::find_socket`] does.
    pub(crate) async fn check(
        &self,
        addresses: (SocketAddr, SocketAddr),
        on_wait: impl FnOnce(),
    ) -> Result<SocketProof, Unattested> {
        if self.attestor.load().is_none() {
            self.retry();
        }
        let Some(attestor) = self.attestor() else {
            return Err(AttestError::Unsupported(
                "it lacks an interface for TCP; see the warning in awsvid's log",
            )
            .into());
        };
        let found = attestor.find_socket(addresses, on_wait).await;
        // The socket does not exist, or has lost its cgroup. It is the same for all callers once
        // the kernel reports nothing any more.
        let is_suspect = match &found {
            Err(unattested) => unattested.refusal == AttestError::CallerGone,
            Ok(proof) => proof.is_in_root_cgroup(),
        };
        if is_suspect {
            self.retry();
        }
        found
    }

    fn retry(&self) {
        let mut attempt = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
        if attempt.at.elapsed() < RETRY {
            return;
        }
        let before = self.attestor.load();
        let result = match before.as_deref() {
            Some(attestor) => attestor.test_support(),
            None => {
                attestor(&self.host).map(|attestor| self.attestor.store(Some(Arc::new(attestor))))
            }
        };
        *attempt = SupportCheck::current(result.as_ref().copied());
        match (result, before.is_some()) {
            (Ok(()), false) => tracing::info!("callers over TCP are attested again"),
            (Err(error), true) => {
                let fix = error.fix(unix_support());
                tracing::warn!(%error, %fix, "callers over TCP are refused (unsupported_kernel)");
                self.attestor.store(None);
            }
            _ => {}
        }
    }
}

fn attestor(host: &Arc<Host>) -> Result<TcpAttestor, TcpUnsupported> {
    let cgroups = host.cgroups.clone().ok_or(TcpUnsupported::NoCgroups)?;
    let diag = SockDiag::open_per_cpu().map_err(no_sock_diag)?;
    try_tcp_of(host, &diag)?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    // Half of the CPUs remain for short work, whatever the number of searches.
    let searches = FairSemaphore::new(processors.div_ceil(2), 1);
    Ok(TcpAttestor::new(host.clone(), diag, cgroups, searches))
}
