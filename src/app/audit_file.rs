//! The file of the audit log, which may come to be there later.

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

/// How often a file is tried again that could not be opened.
const RETRY: Duration = Duration::from_secs(5);

/// A file that can't be opened yet, as on a file system that is mounted later, is opened as soon as it can be. Until then
/// records wait, as many as there is room for, and with `required` no credentials are issued.
pub(super) fn open_audit(config: &AuditConfig, clock: Clock, metrics: Metrics) -> Arc<Audit> {
    let audit = Audit::unopened(config.required, clock, metrics);
    if let Err(source) = audit.reopen(&config.file, config.required) {
        let error = audit_error(&config.file, source);
        tracing::error!(%error, "no audit record can be written yet: opening the file is retried every few seconds");
        tokio::spawn(open_later(audit.clone(), config.clone()));
    }
    audit
}

async fn open_later(audit: Arc<Audit>, config: AuditConfig) {
    // A reload may open it, too, or another one.
    while audit.is_unopened() {
        sleep(RETRY).await;
        let (opening, config) = (audit.clone(), config.clone());
        let opened = spawn_blocking(move || {
            opening.is_unopened() && opening.reopen(&config.file, config.required).is_ok()
        });
        if opened.await.unwrap_or(false) {
            tracing::info!("the audit file is open");
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
