//! Tests whether callers over TCP can be distinguished, and repeats the test when the result may
//! have changed.
//!
//! It changes when a kernel module is loaded or unloaded, or a cgroup hierarchy is mounted or
//! unmounted. The daemon does not need a restart for that.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
const TEST_INTERVAL: Duration = Duration::from_secs(2);

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
    /// The interface that the kernel lacks. `None` while there is an attestor.
    missing: Option<TcpUnsupported>,
}

impl TcpSupport {
    /// Tests the support, and logs what is missing.
    pub(crate) fn new(host: Arc<Host>) -> Self {
        let (attestor, missing) = match attestor(&host) {
            Ok(attestor) => (Some(Arc::new(attestor)), None),
            Err(error) => {
                log_missing(&error);
                (None, Some(error))
            }
        };
        Self {
            host,
            attestor: ArcSwapOption::new(attestor),
            attempt: Mutex::new(SupportCheck {
                at: Instant::now(),
                missing,
            }),
        }
    }

    /// Returns what callers over TCP lack, and the fix. `None` if they are attested. Repeats the
    /// test if the latest one has failed.
    pub(crate) fn missing(&self) -> Option<String> {
        if self.attestor.load().is_none() {
            self.retry();
        }
        self.attempt().missing.as_ref().map(described)
    }

    pub(crate) fn attestor(&self) -> Option<TcpAttestor> {
        self.attestor.load().as_deref().cloned()
    }

    /// Finds the socket of a peer, as [`TcpAttestor::find_socket`] does.
    pub(crate) async fn find_socket(
        &self,
        addresses: (SocketAddr, SocketAddr),
        on_wait: impl FnOnce(),
    ) -> Result<SocketProof, Unattested> {
        let attestor = self.current()?;
        let found = attestor.find_socket(addresses, on_wait).await;
        // The socket does not exist, or its cgroup is unknown or the root. It is the same for all
        // callers once the kernel reports nothing any more.
        let is_suspect = match &found {
            Err(unattested) => matches!(
                unattested.refusal,
                AttestError::CallerGone | AttestError::UnreadableCgroup
            ),
            Ok(proof) => proof.is_in_root_cgroup(),
        };
        if is_suspect && self.retry() {
            self.current()?;
        }
        found
    }

    /// Returns the attestor, or the refusal that names what is missing.
    fn current(&self) -> Result<TcpAttestor, AttestError> {
        if let Some(attestor) = self.attestor() {
            return Ok(attestor);
        }
        self.retry();
        let attempt = self.attempt();
        match &attempt.missing {
            Some(missing) => Err(missing.refusal()),
            None => self.attestor().ok_or(AttestError::Kernel),
        }
    }

    fn attempt(&self) -> MutexGuard<'_, SupportCheck> {
        self.attempt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Repeats the test, if the latest one is not too recent. Returns whether this test has found
    /// that the support has gone.
    pub(crate) fn retry(&self) -> bool {
        let mut attempt = self.attempt();
        if attempt.at.elapsed() < TEST_INTERVAL {
            return false;
        }
        self.host.find_cgroups_again();
        let before = self.attestor.load();
        let result = match before.as_deref() {
            Some(attestor) => attestor.test_support(),
            None => {
                attestor(&self.host).map(|attestor| self.attestor.store(Some(Arc::new(attestor))))
            }
        };
        match (&result, before.is_some()) {
            (Ok(()), false) => tracing::info!("callers over TCP are attested again"),
            (Err(error), true) => {
                log_missing(error);
                self.attestor.store(None);
            }
            _ => {}
        }
        *attempt = SupportCheck {
            at: Instant::now(),
            missing: result.err(),
        };
        before.is_some() && attempt.missing.is_some()
    }
}

fn described(missing: &TcpUnsupported) -> String {
    format!("{missing}; {}", missing.fix(unix_support()))
}

fn log_missing(missing: &TcpUnsupported) {
    let fix = missing.fix(unix_support());
    tracing::warn!(error = %missing, %fix, "callers over TCP are refused (unsupported_kernel)");
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
