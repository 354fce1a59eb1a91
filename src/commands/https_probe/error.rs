//! The reasons why a server has not answered.

use std::error::Error;
use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::http_client::ClientError;
use crate::sts::InvalidSetting;

/// Reason why a server has not responded. The URL precedes the text.
#[derive(Debug, Error)]
pub(in crate::commands) enum ProbeError {
    #[error("not a URL")]
    InvalidUrl,
    #[error("it has no host")]
    WithoutHost,
    #[error("it begins neither with https:// nor with http://")]
    OtherScheme,
    /// The variable of a proxy is invalid.
    #[error(transparent)]
    Network(#[from] InvalidSetting),
    #[error("{0} needs TLS, which awsvid check does not support; try it with curl")]
    ProxyNeedsTls(String),
    #[error("through {hop}: {error}")]
    Proxy { hop: String, error: Box<ProbeError> },
    #[error("{hop}: it does not let through to {target}: {error}")]
    Tunnel {
        hop: String,
        target: String,
        error: Box<dyn Error + Send + Sync>,
    },
    #[error("the name {0} does not resolve: {1}")]
    Unresolved(String, #[source] io::Error),
    #[error("no connection to {0}: {1}")]
    NotConnected(String, #[source] io::Error),
    #[error("{0} is not the name of a server")]
    InvalidName(String),
    #[error("this machine trusts no CA certificates; install its package of CA certificates")]
    NoRoots,
    #[error(transparent)]
    TlsVersions(#[from] rustls::Error),
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
    #[error(transparent)]
    Request(#[from] hyper::http::Error),
    #[error("no HTTP answer: {0}")]
    Response(#[from] ClientError),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
}
