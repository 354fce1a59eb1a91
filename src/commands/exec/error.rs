//! Reasons why `awsvid exec` does not start the command.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::over_tcp::TcpRejected;
use super::profile::UnreplacedProfile;
use crate::config::ConfigErrors;

/// Reason why the command is not started.
#[derive(Debug, Error)]
pub(super) enum ExecError {
    #[error("{0}\ngive --url http://127.0.0.1:974 if this user may not read the configuration")]
    Config(#[from] ConfigErrors),
    #[error(
        "the configuration has no `tcp` address, and SDKs cannot use the unix socket; \
         add one, or use `awsvid credential-process` in ~/.aws/config"
    )]
    NoTcpAddress,
    #[error("the configuration has port 0, so only the daemon's log knows the port; give --url")]
    UnknownPort,
    /// SDKs would reject the URL.
    #[error("--url {text:?}: {what}; write it as http://127.0.0.1:974")]
    Url { text: String, what: &'static str },
    #[error(transparent)]
    Role(#[from] InvalidRoleName),
    #[error(
        "the token file {}: {error}; awsvid writes it at its start; is it running, and is this its --token-file?",
        path.display()
    )]
    TokenFile { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Profile(#[from] UnreplacedProfile),
    #[error(transparent)]
    Tcp(#[from] TcpRejected),
}

/// A text that is not the name of a role.
#[derive(Debug, Error)]
#[error("--role {0:?} is not the name of a role")]
pub(in crate::commands) struct InvalidRoleName(pub(super) String);
