//! Opening the file of the audit log, which may be on a file system that is mounted later.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::AppError;
use crate::audit::Audit;
use crate::clock::Clock;
use crate::config::{AuditConfig, AuditFile};
use crate::metrics::Metrics;

/// Interval between attempts to open the file.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Time for which a start or a reload waits for the file's server.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);

/// Opens the audit file, or retries in the background until it can be opened.
///
/// Until then records wait in a bounded queue, and with `required` the daemon returns no
/// credentials.
pub(super) async fn open_audit(config: &AuditConfig, clock: Clock, metrics: Metrics) -> Arc<Audit> {
    let audit = Audit::unopened(config.required, clock, metrics);
    if let Err(source) = reopen(&audit, config).await {
        let error = audit_error(&config.file, source);
        tracing::error!(%error, "the audit file cannot be opened yet: retrying every 5 seconds");
        tokio::spawn(open_later(audit.clone(), config.clone()));
    }
    audit
}

/// Opens the file and directs the records to it. Fails if the file's server does not respond.
pub(super) async fn reopen(audit: &Audit, config: &AuditConfig) -> io::Result<()> {
    let opened = timeout(OPEN_TIMEOUT, open(config)).await;
    let opened = opened.map_err(|_| {
        let text = "the server of its file system does not respond";
        io::Error::new(io::ErrorKind::TimedOut, text)
    })??;
    audit.redirect(&config.file, opened, config.required)
}

/// Opens the file on a thread that may block.
async fn open(config: &AuditConfig) -> io::Result<File> {
    let file = config.file.clone();
    spawn_blocking(move || Audit::open(&file)).await?
}

async fn open_later(audit: Arc<Audit>, config: AuditConfig) {
    // A reload may open this file, or another one.
    while audit.is_unopened() {
        sleep(RETRY_INTERVAL).await;
        // Waits for a server that does not respond, so that only one thread does.
        let Ok(opened) = open(&config).await else {
            continue;
        };
        if !audit.is_unopened() {
            return;
        }
        let redirected = audit.redirect(&config.file, opened, config.required);
        if redirected.is_ok() {
            tracing::info!("audit file opened");
        }
    }
}

pub(super) fn audit_error(file: &AuditFile, source: io::Error) -> AppError {
    let path = match file {
        AuditFile::Path(path) => path.clone(),
        AuditFile::Stdout => PathBuf::from("standard output"),
    };
    AppError::Audit { path, source }
}
