//! Opening the file of the audit log, which may be on a file system that is mounted later.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::{AppError, retry};
use crate::audit::Audit;
use crate::clock::Clock;
use crate::config::{AuditConfig, AuditFile};
use crate::file_threads::FileThreads;
use crate::metrics::Metrics;

/// Time for which a start or a reload waits for the file's server.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);

/// Opens the audit file, or retries until it can be opened: in the background, and at once for a
/// record that needs it.
///
/// Until then records wait in a bounded queue, and with `required` the daemon returns no
/// credentials.
pub(super) async fn open_audit(
    config: &AuditConfig,
    clock: Clock,
    metrics: Metrics,
    threads: &FileThreads,
) -> Arc<Audit> {
    let audit = Audit::unopened(config.required, clock, metrics);
    if let Err(source) = reopen(&audit, config, threads).await {
        let error = audit_error(&config.file, source);
        tracing::error!(%error, "the audit file cannot be opened yet: retrying every 5 seconds");
        tokio::spawn(open_later(audit.clone(), config.clone(), threads.clone()));
    }
    audit
}

/// Opens the file and directs the records to it. Fails if the file's server does not respond.
pub(super) async fn reopen(
    audit: &Audit,
    config: &AuditConfig,
    threads: &FileThreads,
) -> io::Result<()> {
    let opened = timeout(OPEN_TIMEOUT, open(config, threads)).await;
    let opened = opened.map_err(|_| {
        let text = "the server of its file system does not respond";
        io::Error::new(io::ErrorKind::TimedOut, text)
    })??;
    audit.redirect(&config.file, opened, config.required)
}

/// Opens the file on a thread that may block.
async fn open(config: &AuditConfig, threads: &FileThreads) -> io::Result<File> {
    let file = config.file.clone();
    let path = match &config.file {
        AuditFile::Path(path) => path,
        AuditFile::Stdout => Path::new("/dev/stdout"),
    };
    threads.run(path, move || Audit::open(&file)).await?
}

async fn open_later(audit: Arc<Audit>, config: AuditConfig, threads: FileThreads) {
    // A reload may open this file, or another one.
    while audit.is_unopened() {
        retry::until_needed(audit.needs_destination()).await;
        // Waits for a server that does not respond, so that only one thread does.
        if let Ok(opened) = open(&config, &threads).await
            && audit.is_unopened()
            && audit
                .redirect(&config.file, opened, config.required)
                .is_ok()
        {
            tracing::info!("audit file opened");
            return;
        }
        retry::pause().await;
    }
}

pub(super) fn audit_error(file: &AuditFile, source: io::Error) -> AppError {
    let path = match file {
        AuditFile::Path(path) => path.clone(),
        AuditFile::Stdout => PathBuf::from("standard output"),
    };
    AppError::Audit { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::{Outcome, RequestPeer};
    use crate::caller::ListenerKind;
    use crate::protocol::Protocol;

    /// Returns whether the record of a request for credentials was written.
    async fn is_written(audit: &Arc<Audit>) -> bool {
        let issued = crate::audit::IssuedFields {
            access_key_id: "ASIA1",
            first_session_name: None,
            expiration: std::time::SystemTime::now(),
            cache_result: crate::audit::CacheResult::Miss,
        };
        let record = audit.begin(
            audit.next_request(),
            (ListenerKind::Unix, Protocol::Container),
            RequestPeer::Rejected(None),
        );
        record.finish(Outcome::Issued, "ok", Some(issued)).await
    }

    #[tokio::test]
    async fn record_that_needs_the_file_opens_it_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("later").join("audit.log");
        let config = AuditConfig {
            file: AuditFile::Path(path.clone()),
            required: true,
        };
        let audit = open_audit(
            &config,
            Clock::system(),
            Metrics::default(),
            &FileThreads::default(),
        )
        .await;
        assert!(audit.is_unopened());
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        // It waits a second for its record, and the background has another try after five.
        assert!(is_written(&audit).await);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("ASIA1"), "{text}");
    }
}
