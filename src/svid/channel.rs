//! Connections to agents: how they are opened, kept for many calls, and described in errors.

use std::future::{Future, ready};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tonic::transport::{Channel, Uri};
use tonic::{Response, Status, Streaming};

use super::{SourceError, one_line};
use crate::socket_endpoint::Endpoint;

/// Timeout of a connection. A local agent accepts at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Opens one HTTP/2 connection over the stream that `connecting` returns.
pub(super) async fn open<S>(connecting: impl Future<Output = io::Result<S>>) -> io::Result<Channel>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let stream = timeout(CONNECT_TIMEOUT, connecting).await??;
    let mut stream = Some(TokioIo::new(stream));
    // tonic would reconnect after a failure, but this connector has only one stream.
    let connector = tower::service_fn(move |_: Uri| {
        ready(
            stream
                .take()
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)),
        )
    });
    // The authority of the requests, which is never resolved.
    let over = tonic::transport::Endpoint::from_static("http://localhost");
    over.connect_with_connector(connector)
        .await
        .map_err(io::Error::other)
}

/// Describes an error of the connection to the agent's socket, and its fix. `key` is the key of
/// `[identity]` that names the socket.
pub(crate) fn unreachable(endpoint: &Endpoint, key: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            format!(
                "no socket at {endpoint}: start the SPIFFE agent, or correct `{key}` in [identity]; in Kubernetes mount the \
                 agent's directory with a hostPath volume and a volumeMount"
            )
        }
        io::ErrorKind::PermissionDenied => format!(
            "awsvid may not open {endpoint}: give uid {} write access to the socket and search access to its \
             directories",
            nix::unistd::geteuid()
        ),
        io::ErrorKind::ConnectionRefused => {
            format!(
                "nothing listens at {endpoint}: start the SPIFFE agent (a stopped agent leaves its socket behind)"
            )
        }
        io::ErrorKind::WouldBlock => {
            format!(
                "the SPIFFE agent at {endpoint} takes no more connections: it hangs or has too many clients; restart it if it hangs"
            )
        }
        _ => format!(
            "no connection to the SPIFFE agent at {endpoint}: {}",
            one_line(&error.to_string())
        ),
    }
}

/// Returns true if the client created this status for a broken connection. Then its code is not the
/// agent's.
pub(super) fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// Returns the first message of a stream, and closes the stream. Fails if it has none.
pub(super) async fn first_message<T>(
    reply: Result<Response<Streaming<T>>, Status>,
) -> Result<T, Status> {
    let first = reply?.into_inner().message().await?;
    first.ok_or_else(|| Status::unavailable("the stream ended without a message"))
}

/// Returns the device and inode of the socket's file. Another agent at the same path has another
/// inode.
pub(super) fn file_at(socket: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(socket)
        .ok()
        .map(|file| (file.dev(), file.ino()))
}

/// Factory of connections to one agent.
#[async_trait]
pub(super) trait Connector: Send + Sync {
    /// Opens a new connection.
    async fn open(&self) -> Result<Channel, SourceError>;

    /// Returns the generation of a new connection. Kept connections of another generation are
    /// discarded.
    fn generation(&self) -> u64 {
        0
    }
}

/// Connection to one agent, opened when needed and kept while it works.
pub(super) struct ReconnectingChannel<C> {
    socket: PathBuf,
    connector: C,
    current: Mutex<Option<(ChannelKey, Channel)>>,
}

/// Key of a kept connection: the socket's device and inode, and the generation.
type ChannelKey = (Option<(u64, u64)>, u64);

/// Reason why a call failed.
pub(super) enum CallError {
    /// The connection could not be opened.
    Unconnected(SourceError),
    /// The agent rejected, or the connection broke.
    Answered(Status),
}

impl<C: Connector> ReconnectingChannel<C> {
    pub(super) fn new(socket: &Path, connector: C) -> Self {
        Self {
            socket: socket.to_owned(),
            connector,
            current: Mutex::default(),
        }
    }

    /// Connects unless there is a connection.
    pub(super) async fn connect(&self) -> Result<(), CallError> {
        self.channel().await.map(drop)
    }

    /// Sends one call. If the kept connection is broken, as after a restart of the agent, it sends
    /// the call again over a new one. No call changes any state at the agent.
    pub(super) async fn call<T, F>(
        &self,
        request: impl Fn(Channel) -> F + Send + Sync,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Status>> + Send,
    {
        let (key, channel, is_kept) = self.channel().await?;
        match request(channel).await {
            Err(status) if is_broken(&status) => {
                self.invalidate(key).await;
                if !is_kept {
                    return Err(CallError::Answered(status));
                }
            }
            reply => return reply.map_err(CallError::Answered),
        }
        let (key, channel, _) = self.channel().await?;
        let reply = request(channel).await;
        if reply.as_ref().is_err_and(is_broken) {
            self.invalidate(key).await;
        }
        reply.map_err(CallError::Answered)
    }

    /// Returns the connection, and true if it was kept. The socket's file reveals an agent that was
    /// replaced at the same path while the old one still runs. Running calls keep their connection.
    async fn channel(&self) -> Result<(ChannelKey, Channel, bool), CallError> {
        let mut current = self.current.lock().await;
        let key = (file_at(&self.socket), self.connector.generation());
        if let Some((kept_key, channel)) = &*current
            && *kept_key == key
        {
            return Ok((key, channel.clone(), true));
        }
        *current = None;
        let channel = self
            .connector
            .open()
            .await
            .map_err(CallError::Unconnected)?;
        *current = Some((key, channel.clone()));
        Ok((key, channel, false))
    }

    /// Discards the connection with this key, so that the next call opens a new one.
    async fn invalidate(&self, key: ChannelKey) {
        let mut current = self.current.lock().await;
        if current
            .as_ref()
            .is_some_and(|(kept_key, _)| *kept_key == key)
        {
            *current = None;
        }
    }

    /// Discards the kept connection, so that the next call opens a new one. Running calls keep
    /// theirs.
    pub(super) async fn invalidate_all(&self) {
        *self.current.lock().await = None;
    }
}
