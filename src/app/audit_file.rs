//! Opening the file of the audit log, which may be on a file system that is mounted later.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::AppError;
use crate::audit::Audit;
use crate::clock::Clock;
use crate::config::{AuditConfig, AuditFile};
use crate::metrics::Metrics;

/// Interval between attempts to open the file.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Opens the audit file, or retries in the background until it can be opened.
///
/// Until then records wait in a bounded queue, and with `required` the daemon returns no
/// credentials.
pub(super) fn open_audit(config: &AuditConfig, clock: Clock, metrics: Metrics) -> Arc<Audit> {
    let audit = Audit::unopened(config.required, clock, metrics);
    if let Err(source) = audit.reopen(&config.file, config.required) {
        let error = audit_error(&config.file, source);
        tracing::error!(%error, "the audit file cannot be opened yet: retrying every 5 seconds");
        tokio::spawn(open_later(audit.clone(), config.clone()));
    }
    audit
}

async fn open_later(audit: Arc<Audit>, config: AuditConfig) {
    // A reload may open this file, or another one.
    while audit.is_unopened() {
        sleep(RETRY_INTERVAL).await;
        let (opening, config) = (audit.clone(), config.clone());
        let opened = spawn_blocking(move || {
            opening.is_unopened() && opening.reopen(&config.file, config.required).is_ok()
        });
        if opened.await.unwrap_or(false) {
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
