//! The connection to a broker socket, and what it means if there is none.

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
use crate::endpoint::Endpoint;
use crate::identity::SpiffeIdPattern;
use crate::svid::delegated::other_pids;
use crate::svid::dial::{Connector, open, unreachable};
use crate::svid::own::{OwnSvid, OwnSvidSource};
use crate::svid::{SourceError, one_line};

/// For a handshake with a process on this machine.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long the server's first word is waited for. gRPC servers speak first.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// Where to connect, as whom, and to whom.
pub(super) struct BrokerConnector {
    pub(super) socket: PathBuf,
    pub(super) own: Arc<OwnSvidSource>,
    pub(super) server: Option<SpiffeIdPattern>,
    /// Whether the agent is told of pods too, so that it may number processes otherwise.
    pub(super) names_pods: bool,
    /// Whether the agent at the other end of the latest connection numbers processes as awsvid does.
    pub(super) names_processes: Arc<AtomicBool>,
}

#[async_trait]
impl Connector for BrokerConnector {
    async fn dial(&self) -> Result<Channel, SourceError> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream
            .map_err(|error| SourceError::Unavailable(no_broker(&self.endpoint(), &error)))?;
        let names_processes = shares_pid_namespace_with_peer(&stream);
        self.names_processes
            .store(names_processes, Ordering::Relaxed);
        if !names_processes && !self.names_pods {
            return Err(SourceError::Misconfigured(other_pids(&self.endpoint())));
        }
        let own = self.own()?;
        let shaken = timeout(HANDSHAKE, self.handshake(stream, &own)).await;
        let stream = shaken
            .unwrap_or_else(|late| Err(late.into()))
            .map_err(|error| self.handshake_error(&own, &error))?;
        let channel = open(ready(Ok(stream))).await;
        channel.map_err(|error| {
            SourceError::Unavailable(unreachable(&self.endpoint(), "broker_socket", &error))
        })
    }

    /// Whoever has a new SVID shows it.
    fn generation(&self) -> u64 {
        self.own.latest().map_or(0, |own| own.version)
    }
}

impl BrokerConnector {
    fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.socket.clone())
    }

    /// An SVID that is good at this moment.
    fn own(&self) -> Result<Arc<OwnSvid>, SourceError> {
        let own = self.own.latest().map_err(|error| match error {
            // That awsvid has no identity says nothing about the workload.
            SourceError::Denied(text) => SourceError::Unavailable(text),
            other => other,
        })?;
        if own.is_expired(UnixTime::now()) {
            let why = self
                .own
                .trouble()
                .map_or(String::new(), |trouble| format!(": {trouble}"));
            return Err(SourceError::Unavailable(format!(
                "awsvid's own X.509-SVID is over, and no other has come from the SPIFFE agent{why}"
            )));
        }
        Ok(own)
    }

    /// Whoever the server has to be.
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
        let nameless = ServerName::from(std::net::Ipv4Addr::LOCALHOST);
        let stream = TlsConnector::from(Arc::new(config))
            .connect(nameless, stream)
            .await?;
        let mut stream = BufReader::new(stream);
        // With TLS 1.3 the client is done before the server has looked at its certificate: a refusal comes as the first
        // thing to read, and nothing must be written before, for that would fail first, in words that say nothing.
        match timeout(FIRST_WORD, stream.fill_buf()).await {
            Ok(Ok([])) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Err(error)) => Err(error),
            // One that waits for the client's word has not refused it.
            Ok(Ok(_)) | Err(_) => Ok(stream),
        }
    }

    /// What a handshake that failed means.
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
            // A trust domain that has just got new CAs looks the same until the agent has told of them.
            Error::InvalidCertificate(bad) => SourceError::Unavailable(format!(
                "the server at {endpoint} has no certificate of awsvid's trust domain, {}, that is good now: is it the \
                 agent that gives awsvid its own X.509-SVID? ({bad})",
                own.spiffe_id.trust_domain()
            )),
            Error::InvalidMessage(_) => SourceError::Misconfigured(format!(
                "the server at {endpoint} does not speak TLS, so it is not the broker socket of a SPIFFE agent: write the \
                 `socket_path` of its `experimental {{ broker {{ ... }} }}` block as `broker_socket` in [identity]"
            )),
            other => SourceError::Misconfigured(format!(
                "the server at {endpoint} and awsvid do not agree on TLS: is it the broker socket of a SPIFFE agent? \
                 ({other})"
            )),
        }
    }

    /// The server has sent the alert. Go's servers say the same of every certificate that they do not like.
    fn alert_error(&self, own: &OwnSvid, alert: AlertDescription) -> SourceError {
        use AlertDescription as A;
        let (endpoint, id) = (self.endpoint(), &own.spiffe_id);
        match (alert, self.own.trouble()) {
            (
                A::NoApplicationProtocol
                | A::ProtocolVersion
                | A::HandshakeFailure
                | A::InsufficientSecurity,
                _,
            ) => SourceError::Misconfigured(format!(
                "the server at {endpoint} and awsvid do not agree on TLS: is it the broker socket of a SPIFFE agent? \
                     ({alert:?})"
            )),
            (A::InternalError | A::CloseNotify | A::UserCanceled, _) => SourceError::Unavailable(
                format!("the server at {endpoint} did not finish the TLS handshake ({alert:?})"),
            ),
            (_, None) => SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} does not let awsvid in: add awsvid's SPIFFE ID, {id}, to `brokers` in the \
                 `experimental {{ broker {{ ... }} }}` block of the agent's configuration ({alert:?})"
            )),
            // What is shown may be of a trust domain that has other CAs by now.
            (_, Some(trouble)) => SourceError::Unavailable(format!(
                "the SPIFFE agent at {endpoint} does not let {id} in ({alert:?}), of which awsvid has heard nothing new: \
                 {trouble}"
            )),
        }
    }
}

/// The socket's mode is 0770, and it is there only where the configuration asks for it.
fn no_broker(endpoint: &Endpoint, error: &io::Error) -> String {
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
