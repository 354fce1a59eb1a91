//! When the daemon is ready: each listener, the identity source and STS have answered once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::admin::Readiness;
use crate::config::Config;
use crate::identity::SpiffeId;
use crate::role::StsTarget;
use crate::sts::Sts;
use crate::svid::WorkloadApi;

/// Between rounds of questions.
const AGAIN: Duration = Duration::from_secs(1);
/// For one answer of a listener.
const ANSWER: Duration = Duration::from_secs(5);
/// A path that does not exist: whoever asks for it is attested, and then gets 404 whatever the rules say.
const PROBE: &[u8] = b"GET /probe HTTP/1.1\r\nHost: localhost\r\nAuthorization: probe\r\n\r\n";

/// What has to answer.
#[derive(Debug)]
pub struct Probes {
    unix: Option<PathBuf>,
    source: Arc<WorkloadApi>,
    identity: Option<(SpiffeId, String)>,
    sts: Arc<Sts>,
    targets: Vec<StsTarget>,
}

impl Probes {
    /// Takes what is to be asked from the configuration.
    pub fn new(config: &Config, source: Arc<WorkloadApi>, sts: Arc<Sts>) -> Self {
        let mut targets: Vec<_> = config.roles.defined.iter().map(|role| role.sts.clone()).collect();
        targets.sort_by(|a, b| (&a.endpoint, &a.region).cmp(&(&b.endpoint, &b.region)));
        targets.dedup();
        let first = config.workloads.first().map(|rule| rule.spiffe_id.clone());
        let audience = config.roles.defined.first().map_or(&config.identity.audience, |role| &role.audience);
        let identity = first.map(|id| (id, audience.clone()));
        Self { unix: config.listen.unix.clone(), source, identity, sts, targets }
    }

    /// Asks until all have answered, or the daemon ends.
    pub async fn until_ready(self, tcp: Vec<SocketAddr>, readiness: Arc<Readiness>, mut stop: watch::Receiver<bool>) {
        let mut told = None;
        loop {
            let missing = tokio::select! {
                missing = self.missing(&tcp) => missing,
                _ = stop.wait_for(|stop| *stop) => return,
            };
            let Some(missing) = missing else {
                readiness.reached();
                tracing::info!("ready");
                return;
            };
            if told.as_ref() != Some(&missing) {
                tracing::warn!("not ready: {missing}");
                told = Some(missing);
            }
            // Ends early when the daemon is told to stop.
            if timeout(AGAIN, stop.wait_for(|stop| *stop)).await.is_ok() {
                return;
            }
        }
    }

    async fn missing(&self, tcp: &[SocketAddr]) -> Option<String> {
        if let Some(path) = &self.unix {
            let answered = timeout(ANSWER, async { answers(UnixStream::connect(path).await?).await }).await;
            if !matches!(answered, Ok(Ok(true))) {
                return Some(format!("the listener {} does not answer the daemon itself", path.display()));
            }
        }
        for address in tcp {
            let answered = timeout(ANSWER, async { answers(TcpStream::connect(address).await?).await }).await;
            if !matches!(answered, Ok(Ok(true))) {
                return Some(format!("the listener {address} does not answer the daemon itself"));
            }
        }
        if let Some((id, audience)) = &self.identity
            && let Err(error) = self.source.fetch(id, audience).await
        {
            return Some(format!("no JWT-SVID for {id}: {error}"));
        }
        for target in &self.targets {
            if let Err(error) = self.sts.answers(target).await {
                return Some(format!("STS: {error}"));
            }
        }
        None
    }
}

/// Whether the other end attests this process and finds nothing at the path: 403 would be a refusal to attest it.
async fn answers<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) -> std::io::Result<bool> {
    stream.write_all(PROBE).await?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).await?;
    Ok(&head == b"HTTP/1.1 404")
}
