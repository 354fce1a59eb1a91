//! Passes pods' listeners from one instance to the next over a unix socket, so that an update
//! rejects no connection. [`HandoverMessage`] lists the messages.
//!
//! The next instance connects at its start. The previous one sends the listeners after
//! [`HandoverMessage::Request`], or when it has to end. It keeps the listeners until it ends: if
//! the next instance dies before that, it serves them again. The connections of
//! [`HandoverMessage::Earlier`] belong to instances before the previous one. Each of them resumes
//! only if all later instances are gone.
//!
//! A process with these listeners answers as awsvid in every pod (T10). So only root can use the
//! socket, both ends verify their peer, and each received descriptor is verified before use.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{SockType, SockaddrStorage, getsockname, getsockopt, sockopt};
use nix::unistd::geteuid;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use crate::cgroup;
use crate::limits::LogQuota;
use crate::listen::{ListenError, SocketFile};
use crate::pod_listeners::{LOG_INTERVAL, sys};

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod key;
mod message;

pub(super) use key::{key_of, sealed_key};
pub(super) use message::{HandoverKey, HandoverMessage, MetadataParts};

use message::LENGTH;

/// Time limit of a step that takes milliseconds.
pub(super) const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// Listeners and connections that one instance passes to the next.
#[derive(Debug, Default)]
pub(super) struct ReceivedListeners {
    /// Not verified yet: see [`is_listener`].
    pub(super) listeners: HashMap<HandoverKey, Arc<OwnedFd>>,
    /// The key of metadata tokens, in a file that is not verified yet.
    pub(super) key: Option<Arc<OwnedFd>>,
    /// Connections of instances before the sender. They carry no messages and are only kept open.
    pub(super) earlier: Vec<Arc<OwnedFd>>,
}

/// The socket to which the next instance connects.
#[derive(Debug)]
pub(super) struct HandoverSocket {
    listener: UnixListener,
    /// Limits the log lines about connections from other processes.
    rejection_log_quota: LogQuota,
    _file: SocketFile,
}

impl HandoverSocket {
    /// Binds the socket. Has to be called within the runtime.
    pub(super) fn bind(path: &Path) -> Result<Self, ListenError> {
        let (listener, file) = SocketFile::bind_private(path)?;
        let failed = |source| ListenError::Unix {
            path: path.to_owned(),
            source,
        };
        let rejection_log_quota = LogQuota::new(3, LOG_INTERVAL);
        Ok(Self {
            listener: UnixListener::from_std(listener).map_err(failed)?,
            rejection_log_quota,
            _file: file,
        })
    }

    /// Returns the number of suppressed lines if a rejected connection may be logged now.
    pub(super) fn take_rejection_log_permit(&self) -> Option<u64> {
        self.rejection_log_quota.take()
    }

    /// Waits for the next instance to connect.
    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept().await?;
        check_peer(&stream)?;
        Ok(stream)
    }
}

/// Connects to the previous instance.
pub(super) async fn connect(path: &Path) -> io::Result<UnixStream> {
    let stream = timeout(STEP_TIMEOUT, UnixStream::connect(path))
        .await
        .map_err(io::Error::other)??;
    check_peer(&stream)?;
    Ok(stream)
}

/// Accepts only a peer of the same user and, where its process is visible, of the same kind of
/// cgroup.
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let denied = |what: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    let peer = getsockopt(stream, sockopt::PeerCredentials)?;
    if peer.uid() != geteuid().as_raw() {
        return denied(format!("the peer runs as user {}", peer.uid()));
    }
    // The kernel returns 0 for a process in another pid namespace, as two instances in pods mostly
    // are.
    if peer.pid() > 0 {
        let kind = |process: &str| {
            let text = std::fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
            cgroup::unified(&text).map(grandparent_cgroup)
        };
        if kind(&peer.pid().to_string()) != kind("self") {
            return denied(format!(
                "the peer, process {}, is in a cgroup of another kind",
                peer.pid()
            ));
        }
    }
    Ok(())
}

/// Returns the path without the parts in which two pods or two units of one kind differ: pod and
/// container, or service.
///
/// In a cgroup namespace the own path is `/`, and a sibling's begins with one `..` for each level
/// up.
fn grandparent_cgroup(path: &str) -> Vec<String> {
    let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    for _ in 0..2 {
        match parts.last() {
            Some(&"..") | None => parts.push(".."),
            Some(_) => drop(parts.pop()),
        }
    }
    parts.into_iter().map(str::to_owned).collect()
}

/// Sends one message to the peer.
pub(super) async fn send(stream: &UnixStream, message: &HandoverMessage) -> io::Result<()> {
    let (bytes, descriptor) = message.encode()?;
    stream
        .async_io(Interest::WRITABLE, || {
            sys::send(stream.as_fd(), &bytes, descriptor)
        })
        .await
}

/// Receives one message. `None` at the end of the stream.
pub(super) async fn receive(stream: &UnixStream) -> io::Result<Option<HandoverMessage>> {
    stream
        .async_io(Interest::READABLE, || read_message(stream))
        .await
}

/// Receives the message that has arrived. Fails with [`io::ErrorKind::WouldBlock`] if none has.
pub(super) fn try_receive(stream: &UnixStream) -> io::Result<Option<HandoverMessage>> {
    stream.try_io(Interest::READABLE, || read_message(stream))
}

fn read_message(stream: &UnixStream) -> io::Result<Option<HandoverMessage>> {
    let mut bytes = [0; LENGTH];
    match sys::receive(stream.as_fd(), &mut bytes)? {
        (0, _) => Ok(None),
        (LENGTH, descriptor) => HandoverMessage::decode(bytes, descriptor).map(Some),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Receives messages up to [`HandoverMessage::End`].
pub(super) async fn receive_all(stream: &UnixStream) -> io::Result<ReceivedListeners> {
    let mut received = ReceivedListeners::default();
    loop {
        match receive(stream).await? {
            Some(HandoverMessage::Listener(key, listener)) => {
                received.listeners.insert(key, listener);
            }
            Some(HandoverMessage::TokenKey(key)) => received.key = Some(key),
            Some(HandoverMessage::Earlier(connection)) => received.earlier.push(connection),
            Some(HandoverMessage::End) => return Ok(received),
            Some(_) => return Err(io::ErrorKind::InvalidData.into()),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Checks that this is a TCP listener on that address in the calling thread's network namespace, by
/// the namespace cookie.
///
/// The cookie has to equal that of a socket made here. `SIOCGSKNS`, which returns the namespace
/// itself, would need `CAP_NET_ADMIN`.
pub(super) fn is_listener(descriptor: &OwnedFd, address: SocketAddr) -> io::Result<bool> {
    let bound: SockaddrStorage = getsockname(descriptor.as_raw_fd())?;
    Ok(
        sys::network_cookie(descriptor.as_fd())? == sys::cookie_here()?
            && getsockopt(descriptor, sockopt::AcceptConn)?
            && getsockopt(descriptor, sockopt::SockType)? == SockType::Stream
            && bound == SockaddrStorage::from(address),
    )
}

#[cfg(test)]
mod tests;
