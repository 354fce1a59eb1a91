//! Connections to a broker socket, and the errors of failed ones.

use std::future::ready;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use rustls::pki_types::{ServerName, UnixTime};
use rustls::{AlertDescription, CertificateError, Error, OtherError};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::Channel;

use super::server::{NotTheAgent, tls};
use crate::attest::shares_pid_namespace_with_peer;
use crate::identity::SpiffeIdPattern;
use crate::socket_endpoint::Endpoint;
use crate::svid::channel::{Connector, open, unreachable};
use crate::svid::own_svid::{OwnSvid, OwnSvidSource};
use crate::svid::spire_delegated::pid_namespace_error;
use crate::svid::{SourceError, certificate_text, one_line};

/// Timeout of a TLS handshake with a process on this node.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Wait for the server's first bytes. gRPC servers send first.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(1);

/// Factory of connections to the broker socket: its path, the daemon's SVID, and the expected
/// server.
pub(super) struct BrokerConnector {
    pub(super) socket: PathBuf,
    pub(super) own: Arc<OwnSvidSource>,
    pub(super) server: Option<SpiffeIdPattern>,
    /// True if callers in pods are referred to by pod. Then the agent may be in another pid
    /// namespace.
    pub(super) refers_to_pods: bool,
    /// True if the agent at the other end of the latest connection shares the daemon's pid
    /// namespace.
    pub(super) shares_pids: Arc<AtomicBool>,
}

#[async_trait]
impl Connector for BrokerConnector {
    async fn open(&self) -> Result<Channel, SourceError> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|error| {
            SourceError::Unavailable(broker_socket_error(&self.endpoint(), &error))
        })?;
        let shares_pids = shares_pid_namespace_with_peer(&stream);
        self.shares_pids.store(shares_pids, Ordering::Relaxed);
        if !shares_pids && !self.refers_to_pods {
            return Err(SourceError::Misconfigured(pid_namespace_error(
                &self.endpoint(),
            )));
        }
        let own = self.own()?;
        let handshake_result = timeout(HANDSHAKE_TIMEOUT, self.handshake(stream, &own)).await;
        let stream = handshake_result
            .unwrap_or_else(|late| Err(late.into()))
            .map_err(|error| self.handshake_error(&own, &error))?;
        let channel = open(ready(Ok(stream))).await;
        channel.map_err(|error| {
            SourceError::Unavailable(unreachable(&self.endpoint(), "broker_socket", &error))
        })
    }

    /// Returns the version of the daemon's SVID, because a new one needs a new connection.
    fn generation(&self) -> u64 {
        self.own.latest().map_or(0, |own| own.version)
    }
}

impl BrokerConnector {
    fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.socket.clone())
    }

    /// Returns an SVID of the daemon that is valid now.
    fn own(&self) -> Result<Arc<OwnSvid>, SourceError> {
        let own = self.own.latest().map_err(|error| match error {
            // That awsvid has no identity is not evidence about the workload.
            SourceError::Denied(text) => SourceError::Unavailable(text),
            other => other,
        })?;
        if own.is_expired(UnixTime::now()) {
            let why = self
                .own
                .failure()
                .map_or(String::new(), |failure| format!(": {failure}"));
            return Err(SourceError::Unavailable(format!(
                "awsvid's own X.509-SVID has expired, and the SPIFFE agent has not sent a new one{why}"
            )));
        }
        Ok(own)
    }

    /// Returns the pattern that the server's SPIFFE ID has to match.
    fn expected_server_id(&self, own: &OwnSvid) -> Result<SpiffeIdPattern, Error> {
        if let Some(pattern) = &self.server {
            return Ok(pattern.clone());
        }
        let agents = format!("spiffe://{}/spire/agent/**", own.spiffe_id.trust_domain());
        SpiffeIdPattern::parse(&agents).map_err(|error| Error::General(error.to_string()))
    }

    async fn handshake(
        &self,
        stream: UnixStream,
        own: &OwnSvid,
    ) -> io::Result<BufReader<TlsStream<UnixStream>>> {
        let config = self
            .expected_server_id(own)
            .and_then(|expected| tls(own, expected))
            .map_err(io::Error::other)?;
        let placeholder_name = ServerName::from(std::net::Ipv4Addr::LOCALHOST);
        let stream = TlsConnector::from(Arc::new(config))
            .connect(placeholder_name, stream)
            .await?;
        let mut stream = BufReader::new(stream);
        // With TLS 1.3 the client finishes before the server has checked its certificate. A
        // rejection is the first data to read. A write before that would fail first, with an
        // unclear error.
        match timeout(FIRST_BYTES_TIMEOUT, stream.fill_buf()).await {
            Ok(Ok([])) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Err(error)) => Err(error),
            // A server that waits for the client's first bytes has not rejected it.
            Ok(Ok(_)) | Err(_) => Ok(stream),
        }
    }

    /// Converts a failed handshake to an error with a fix.
    fn handshake_error(&self, own: &OwnSvid, error: &io::Error) -> SourceError {
        let endpoint = self.endpoint();
        let Some(error) = error
            .get_ref()
            .and_then(|error| error.downcast_ref::<Error>())
        else {
            return SourceError::Unavailable(format!(
                "the server at {endpoint} did not finish the TLS handshake: {}",
                one_line(&error.to_string())
            ));
        };
        match error {
            Error::AlertReceived(alert) => self.alert_error(own, *alert),
            Error::InvalidCertificate(CertificateError::Other(OtherError(other)))
                if other.is::<NotTheAgent>() =>
            {
                SourceError::Misconfigured(format!(
                    "the server at {endpoint} is not the SPIFFE agent: {other}; if it is the right one, write its SPIFFE \
                     ID as `broker_server_id` in [identity]"
                ))
            }
            // A trust domain with new CAs fails in the same way until the agent has sent them.
            Error::InvalidCertificate(bad) => SourceError::Unavailable(format!(
                "the server at {endpoint} has no certificate of awsvid's trust domain, {}, that is valid now; check that it is \
                 the agent that gives awsvid its own X.509-SVID ({})",
                own.spiffe_id.trust_domain(),
                certificate_text(bad)
            )),
            Error::InvalidMessage(_) => SourceError::Misconfigured(format!(
                "the server at {endpoint} does not speak TLS, so it is not the broker socket of a SPIFFE agent: write the \
                 `socket_path` of its `experimental {{ broker {{ ... }} }}` block as `broker_socket` in [identity]"
            )),
            other => SourceError::Misconfigured(format!(
                "the server at {endpoint} and awsvid do not agree on TLS; check that it is the broker socket of a SPIFFE agent \
                 ({other})"
            )),
        }
    }

    /// Converts the server's alert to an error. Go's servers send the same alert for every
    /// certificate that they reject.
    fn alert_error(&self, own: &OwnSvid, alert: AlertDescription) -> SourceError {
        use AlertDescription as A;
        let (endpoint, id) = (self.endpoint(), &own.spiffe_id);
        match (alert, self.own.failure()) {
            (
                A::NoApplicationProtocol
                | A::ProtocolVersion
                | A::HandshakeFailure
                | A::InsufficientSecurity,
                _,
            ) => SourceError::Misconfigured(format!(
                "the server at {endpoint} and awsvid do not agree on TLS; check that it is the broker socket of a SPIFFE agent \
                     ({alert:?})"
            )),
            (A::InternalError | A::CloseNotify | A::UserCanceled, _) => SourceError::Unavailable(
                format!("the server at {endpoint} did not finish the TLS handshake ({alert:?})"),
            ),
            (_, None) => SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} does not let awsvid in: add awsvid's SPIFFE ID, {id}, to `brokers` in the \
                 `experimental {{ broker {{ ... }} }}` block of the agent's configuration ({alert:?})"
            )),
            // The daemon's SVID may be of a trust domain that has other CAs by now.
            (_, Some(failure)) => SourceError::Unavailable(format!(
                "the SPIFFE agent at {endpoint} does not let {id} in ({alert:?}), and awsvid's own X.509-SVID may be outdated: \
                 {failure}"
            )),
        }
    }
}

/// Describes a failed connection. The socket has mode 0770, and exists only if the agent's
/// configuration enables it.
fn broker_socket_error(endpoint: &Endpoint, error: &io::Error) -> String {
    let text = unreachable(endpoint, "broker_socket", error);
    match error.kind() {
        io::ErrorKind::NotFound => format!(
            "{text} (a SPIRE agent makes it where its configuration has `experimental {{ broker {{ socket_path = ... }} }}`)"
        ),
        io::ErrorKind::PermissionDenied => {
            format!(
                "{text} (the agent makes it with mode 0770: awsvid has to run as root or in the agent's group)"
            )
        }
        _ => text,
    }
}
