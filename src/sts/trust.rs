//! CA certificates that verify an STS: the system's, or those of a file.
//!
//! Either may be missing when the daemon starts: a mount can be late, or certificates are installed
//! later. Missing certificates are loaded again at a call and in the background. Calls that need
//! them fail until then. Certificates that were late may still be written when they are first read.
//! So they are read again until two reads agree.
//!
//! A user that can write such a file decides which server the daemon takes for STS. So a file that
//! another user could change or replace is not used (T38), like a configuration of that kind.

use std::ffi::OsString;
use std::fmt::Write;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use aws_smithy_http_client::tls::TrustStore;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::config::exposures;
use crate::file_threads::FileThreads;

/// Name of the file in error messages.
const NOUN: &str = "CA file";
/// Minimum time between two attempts to load missing certificates.
const RELOAD_PAUSE: Duration = Duration::from_secs(1);
/// Time between two attempts in the background.
const BACKGROUND_PAUSE: Duration = Duration::from_secs(5);
/// The first of the paths that `rustls-native-certs` reads.
const SYSTEM_PATHS: &str = "/etc/ssl/certs/ca-certificates.crt, /etc/pki/tls/certs/ca-bundle.crt, /etc/ssl/cert.pem, /etc/ssl/certs and other usual paths";
/// The path by which [`FileThreads`] knows the system's certificates.
const SYSTEM_STORE: &str = "/etc/ssl/certs";
const SYSTEM_VARIABLES: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// Reason why there are no certificates. The text is for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NoRoots {
    /// The certificates do not exist yet, or are not readable yet.
    Missing(String),
    /// The file does not contain valid certificates, or another user could change it.
    Invalid(String),
}

impl NoRoots {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Missing(text) | Self::Invalid(text) => text,
        }
    }
}

/// One set of certificates.
#[derive(Debug)]
pub(super) struct Roots {
    /// Path of the file. `None` stands for the system's certificates.
    file: Option<PathBuf>,
    threads: FileThreads,
    state: Mutex<RootsState>,
    /// The number of times that other certificates replaced those in use.
    replaced: AtomicUsize,
}

#[derive(Debug, Default)]
struct RootsState {
    /// Valid certificates in PEM. The SDK panics at an invalid one.
    pem: Option<Arc<[u8]>>,
    problem: Option<(NoRoots, Instant)>,
    /// The read that is running. It outlives the call that started it, since a file system may
    /// respond late or never.
    read: Option<AbortOnDropHandle<Result<Vec<u8>, NoRoots>>>,
    is_watched: bool,
}

impl Roots {
    /// Creates the certificates of a file, without I/O.
    pub(super) fn of_file(path: &Path, threads: FileThreads) -> Arc<Self> {
        Self::new(Some(path.to_owned()), threads)
    }

    /// Creates the certificates that this system trusts, without I/O.
    pub(super) fn of_system(threads: FileThreads) -> Arc<Self> {
        Self::new(None, threads)
    }

    fn new(file: Option<PathBuf>, threads: FileThreads) -> Arc<Self> {
        Arc::new(Self {
            file,
            threads,
            state: Mutex::default(),
            replaced: AtomicUsize::new(0),
        })
    }

    /// Returns the certificates, which are loaded once and then kept. If they are missing, the
    /// error is logged once, and a background task keeps loading them. Within [`RELOAD_PAUSE`] of a
    /// failure the same error is returned without I/O. Waits for the file system; dropping the
    /// future is safe.
    pub(super) async fn store(self: &Arc<Self>) -> Result<TrustStore, NoRoots> {
        let mut state = self.state.lock().await;
        if state.pem.is_none() {
            if let Some((problem, _)) = state
                .problem
                .as_ref()
                .filter(|(_, at)| at.elapsed() < RELOAD_PAUSE)
            {
                return Err(problem.clone());
            }
            let found = self.load(&mut state).await;
            self.note(&mut state, found)?;
        }
        let pem = state.pem.as_deref().unwrap_or_default();
        Ok(TrustStore::empty().with_pem_certificate(pem))
    }

    /// Returns the number of times that the certificates were replaced. A client with earlier ones
    /// is outdated.
    pub(super) fn replaced(&self) -> usize {
        self.replaced.load(Ordering::Acquire)
    }

    async fn load(&self, state: &mut RootsState) -> Result<Vec<u8>, NoRoots> {
        let read = state.read.get_or_insert_with(|| self.start_read());
        let found = read.await;
        state.read = None;
        found.unwrap_or_else(|error| Err(NoRoots::Missing(error.to_string())))
    }

    fn start_read(&self) -> AbortOnDropHandle<Result<Vec<u8>, NoRoots>> {
        let (file, threads) = (self.file.clone(), self.threads.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let path = file.clone().unwrap_or_else(|| SYSTEM_STORE.into());
            let read = move || file.map_or_else(read_system, |file| read_file(&file));
            let read = threads.run(&path, read).await;
            read.unwrap_or_else(|error| Err(NoRoots::Missing(error.to_string())))
        }))
    }

    /// Reads certificates that were late once more. Returns whether they are still the same.
    async fn confirm(&self) -> bool {
        // Calls do not wait for this read, which may block.
        let Ok(Ok(pem)) = self.start_read().await else {
            return false;
        };
        let mut state = self.state.lock().await;
        if state.pem.as_deref() == Some(&*pem) {
            return true;
        }
        state.pem = Some(pem.into());
        self.replaced.fetch_add(1, Ordering::Release);
        tracing::info!(file = ?self.file, "[sts] CA certificates have changed and were loaded again");
        false
    }

    fn note(
        self: &Arc<Self>,
        state: &mut RootsState,
        found: Result<Vec<u8>, NoRoots>,
    ) -> Result<(), NoRoots> {
        match found {
            Ok(pem) => {
                if state.problem.take().is_some() {
                    tracing::info!(file = ?self.file, "[sts] CA certificates were loaded");
                }
                state.pem = Some(pem.into());
                Ok(())
            }
            Err(problem) => {
                let is_new = state
                    .problem
                    .as_ref()
                    .is_none_or(|(before, _)| *before != problem);
                if is_new {
                    tracing::warn!(
                        error = problem.text(),
                        "[sts] CA certificates are missing: calls to STS fail until they are there"
                    );
                }
                state.problem = Some((problem.clone(), Instant::now()));
                if !std::mem::replace(&mut state.is_watched, true) {
                    tokio::spawn(watch(Arc::downgrade(self)));
                }
                Err(problem)
            }
        }
    }
}

/// Loads the certificates until they exist and are complete, or no STS client needs them any more.
async fn watch(roots: Weak<Roots>) {
    loop {
        sleep(BACKGROUND_PAUSE).await;
        let Some(roots) = roots.upgrade() else { return };
        let was_loaded = roots.state.lock().await.pem.is_some();
        if was_loaded {
            if roots.confirm().await {
                return;
            }
        } else {
            // The error was logged, and is returned to calls.
            let _ = roots.store().await;
        }
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, NoRoots> {
    let at = |text: &str| format!("`ca_file` {}: {text}", path.display());
    let (pem, exposed) =
        read_unexposed(path).map_err(|error| NoRoots::Missing(at(&error.to_string())))?;
    let invalid = |text: &str| NoRoots::Invalid(at(text));
    if let Some(exposed) = exposed {
        return Err(invalid(&exposed));
    }
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = certificates.map_err(|_| invalid("it is not a valid PEM file"))?;
    if certificates.is_empty() {
        return Err(invalid(
            "it has no certificate (`-----BEGIN CERTIFICATE-----`)",
        ));
    }
    let mut store = RootCertStore::empty();
    for certificate in certificates {
        store
            .add(certificate)
            .map_err(|_| invalid("one of its certificates cannot be read"))?;
    }
    Ok(pem)
}

/// Reads the file, and returns each way in which another user could change it. The file that is
/// checked is the one that is read.
fn read_unexposed(path: &Path) -> io::Result<(Vec<u8>, Option<String>)> {
    let mut file = File::open(path)?;
    let exposed: Vec<_> = exposures(path, &file.metadata()?, NOUN)
        .iter()
        .map(ToString::to_string)
        .collect();
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    Ok((content, (!exposed.is_empty()).then(|| exposed.join(", "))))
}

fn read_system() -> Result<Vec<u8>, NoRoots> {
    // The default paths are the system's own. A variable can name any other.
    check_variables(|name| std::env::var_os(name))?;
    let loaded = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    let usable: Vec<_> = loaded
        .certs
        .into_iter()
        .filter(|found| store.add(found.clone()).is_ok())
        .collect();
    if !usable.is_empty() {
        return Ok(usable
            .iter()
            .map(|certificate| to_pem(certificate))
            .collect::<String>()
            .into_bytes());
    }
    let variables = SYSTEM_VARIABLES.iter().filter_map(|name| {
        let value = std::env::var_os(name)?;
        Some(format!("{} ({name})", value.display()))
    });
    let variables: Vec<String> = variables.collect();
    let paths = if variables.is_empty() {
        SYSTEM_PATHS.to_owned()
    } else {
        variables.join(", ")
    };
    Err(NoRoots::Missing(format!(
        "this system trusts no CA certificates: there are none in {paths}; install its CA package (ca-certificates), or set \
         SSL_CERT_FILE"
    )))
}

/// Checks each file that `rustls-native-certs` reads because of a variable. A missing file is not a
/// fault here.
fn check_variables(env: impl Fn(&str) -> Option<OsString>) -> Result<(), NoRoots> {
    for name in SYSTEM_VARIABLES {
        let value = env(name).unwrap_or_default();
        for path in std::env::split_paths(&value) {
            let entries = std::fs::read_dir(&path)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path());
            for path in entries.chain([path.clone()]) {
                let Ok(found) = std::fs::metadata(&path) else {
                    continue;
                };
                if let Some(exposed) = exposures(&path, &found, NOUN).first() {
                    let what = format!("{name} leads to {}: {exposed}", path.display());
                    return Err(NoRoots::Invalid(what));
                }
            }
        }
    }
    Ok(())
}

/// Encodes a certificate as PEM (RFC 7468, section 3).
pub(crate) fn to_pem(certificate: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        // Base64 is ASCII, and writing to a string cannot fail.
        let _ = writeln!(pem, "{}", String::from_utf8_lossy(line));
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests;
