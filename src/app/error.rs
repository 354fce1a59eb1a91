//! The reasons why the daemon does not start.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::attest::StartError;
use crate::exit_status::ExitStatus;
use crate::listen::ListenError;
use crate::pod_listeners::PodsError;
use crate::sts::InvalidSetting;
use crate::svid::SourceError;

/// Reason why the daemon does not start, or keeps its old configuration.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Error)]
pub enum AppError {
    /// The attestor cannot be started.
    #[error(transparent)]
    Attest(#[from] StartError),
    /// An address cannot be bound.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The audit file cannot be opened.
    #[error("[audit] file {path}: {source}", path = path.display())]
    Audit { path: PathBuf, source: io::Error },
    /// The token file cannot be read or written.
    #[error("[listen] token_file {path}: {source}", path = path.display())]
    Token { path: PathBuf, source: io::Error },
    /// The instance metadata service cannot be served.
    #[error("[imds] key_file {path}: {source}", path = path.display())]
    ImdsKey { path: PathBuf, source: io::Error },
    /// The daemon's own network namespace is not known.
    #[error("[imds] own network namespace: {0}; give the daemon the host's /proc")]
    OwnNetns(io::Error),
    /// Pods' network namespaces cannot be served.
    #[error(transparent)]
    Pods(#[from] PodsError),
    /// The identity source is misconfigured and cannot work.
    #[error("[identity] {0}")]
    Source(SourceError),
    /// The STS client cannot be built.
    #[error(transparent)]
    Sts(#[from] InvalidSetting),
}

impl AppError {
    /// Returns the exit status of a daemon that does not start because of this error.
    pub fn exit_status(&self) -> ExitStatus {
        match self {
            // Another start would fail too: an environment variable, or a lack of the unit or the
            // container.
            Self::Sts(_)
            | Self::Attest(StartError::UserNamespace)
            | Self::Pods(PodsError::Denied(_)) => ExitStatus::Config,
            Self::Attest(StartError::Proc { .. })
            | Self::Pods(_)
            | Self::Listen(_)
            | Self::Audit { .. }
            | Self::Token { .. }
            | Self::ImdsKey { .. }
            | Self::OwnNetns(_)
            | Self::Source(_) => ExitStatus::Failure,
        }
    }
}
