//! Connections to agents: how they are made, how one is kept for many calls, and what is said when there is none.

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
use tonic::Status;
use tonic::transport::{Channel, Uri};

use super::{SourceError, one_line};
use crate::socket_endpoint::Endpoint;

/// A local agent accepts at once or not at all.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// One HTTP/2 connection over the stream that `connecting` gives.
pub(super) async fn open<S>(connecting: impl Future<Output = io::Result<S>>) -> io::Result<Channel>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let stream = timeout(CONNECT_DEADLINE, connecting).await??;
    let mut stream = Some(TokioIo::new(stream));
    // tonic would connect again if this connection broke; there is nothing more for it to take.
    let connector = tower::service_fn(move |_: Uri| {
        ready(
            stream
                .take()
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)),
        )
    });
    // The authority of the requests; nothing resolves it.
    let over = tonic::transport::Endpoint::from_static("http://localhost");
    over.connect_with_connector(connector)
        .await
        .map_err(io::Error::other)
}

/// What went wrong between the daemon and the agent's socket, which `key` of `[identity]` names, and what to do about it.
pub(crate) fn unreachable(endpoint: &Endpoint, key: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            format!(
                "there is no socket at {endpoint}: start the SPIFFE agent, or correct `{key}` in [identity]; in Kubernetes the \
                 agent's directory has to be there by a hostPath volume and a volumeMount"
            )
        }
        io::ErrorKind::PermissionDenied => format!(
            "awsvid may not open {endpoint}: give uid {} write access to the socket and search access to its \
             directories",
            nix::unistd::geteuid()
        ),
        io::ErrorKind::ConnectionRefused => {
            format!(
                "nobody listens at {endpoint}: start the SPIFFE agent (one that stopped leaves its socket behind)"
            )
        }
        io::ErrorKind::WouldBlock => {
            format!(
                "the SPIFFE agent at {endpoint} takes no more connections: it hangs or has too many clients"
            )
        }
        _ => format!(
            "no connection to the SPIFFE agent at {endpoint}: {}",
            one_line(&error.to_string())
        ),
    }
}

/// Whether the client made this status out of a broken connection; whatever its code is, the agent has not said it.
pub(super) fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// The socket's file, by device and inode, if there is one: another agent at the same path has another.
pub(super) fn file_at(socket: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(socket)
        .ok()
        .map(|file| (file.dev(), file.ino()))
}

/// Makes connections to one agent.
#[async_trait]
pub(super) trait Connector: Send + Sync {
    /// A new connection.
    async fn dial(&self) -> Result<Channel, SourceError>;

    /// Which connections are as good as a new one: another number is given when older ones are to be left.
    fn generation(&self) -> u64 {
        0
    }
}

/// The connection to one agent, made when it is needed and kept while it is good.
pub(super) struct ReconnectingChannel<D> {
    socket: PathBuf,
    dial: D,
    now: Mutex<Option<(ChannelKey, Channel)>>,
}

/// What a connection was made with: the socket's file, by device and inode, and the generation.
type ChannelKey = (Option<(u64, u64)>, u64);

/// Why a call has no answer.
pub(super) enum CallError {
    /// There was no connection.
    Unconnected(SourceError),
    /// The agent refused, or the connection broke.
    Answered(Status),
}

impl<D: Connector> ReconnectingChannel<D> {
    pub(super) fn new(socket: &Path, dial: D) -> Self {
        Self {
            socket: socket.to_owned(),
            dial,
            now: Mutex::default(),
        }
    }

    /// Makes a connection if there is none.
    pub(super) async fn connect(&self) -> Result<(), CallError> {
        self.channel().await.map(drop)
    }

    /// Makes one call; a second time over a new connection if the one that was kept turns out to be broken, as after the
    /// agent was restarted. Nothing that is asked here changes anything at the agent.
    pub(super) async fn call<T, F>(
        &self,
        request: impl Fn(Channel) -> F + Send + Sync,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Status>> + Send,
    {
        let (tag, channel, was_kept) = self.channel().await?;
        match request(channel).await {
            Err(status) if is_broken(&status) => {
                self.invalidate(tag).await;
                if !was_kept {
                    return Err(CallError::Answered(status));
                }
            }
            answer => return answer.map_err(CallError::Answered),
        }
        let (tag, channel, _) = self.channel().await?;
        let answer = request(channel).await;
        if answer.as_ref().is_err_and(is_broken) {
            self.invalidate(tag).await;
        }
        answer.map_err(CallError::Answered)
    }

    /// The connection, and whether there was one. An agent that was replaced at the same path, while the old one lives
    /// on, is noticed by the socket's file. Calls that are under way keep the connection that they have.
    async fn channel(&self) -> Result<(ChannelKey, Channel, bool), CallError> {
        let mut now = self.now.lock().await;
        let tag = (file_at(&self.socket), self.dial.generation());
        if let Some((made_with, channel)) = &*now
            && *made_with == tag
        {
            return Ok((tag, channel.clone(), true));
        }
        *now = None;
        let channel = self.dial.dial().await.map_err(CallError::Unconnected)?;
        *now = Some((tag, channel.clone()));
        Ok((tag, channel, false))
    }

    /// Has the next call make a new connection, unless another call has seen to that.
    async fn invalidate(&self, tag: ChannelKey) {
        let mut now = self.now.lock().await;
        if now.as_ref().is_some_and(|(made_with, _)| *made_with == tag) {
            *now = None;
        }
    }

    /// Has the next call make a new connection. Those that are under way keep the one that they have.
    pub(super) async fn forget(&self) {
        *self.now.lock().await = None;
    }
}
