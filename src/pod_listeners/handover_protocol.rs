//! Passes pods' listeners from one instance to the next over a unix socket, so that an update
//! refuses no connection.
//!
//! Each message is one byte, or a record with a descriptor:
//!
//! | message | sender | meaning |
//! |---|---|---|
//! | `G` | next | requests the listeners, when the next instance could serve |
//! | `L` | previous | one listener, with its descriptor |
//! | `B` | previous | one connection of an earlier takeover, with its descriptor |
//! | `E` | previous | end of the records |
//! | `S` | next | the next instance serves the listeners |
//! | `D` | previous | it has stopped accepting, and removed the path of this socket |
//!
//! The next instance connects at its start. The previous one sends the records after `G`, or when
//! it has to end. It keeps the listeners until it ends: if the next instance dies before that, it
//! serves them again. The connections in `B` belong to instances before the previous one. Each of
//! them resumes only if all later instances are gone.
//!
//! A process with these listeners answers as awsvid in every pod (T10). So only root can use the
//! socket, both ends verify their peer, and each received descriptor is verified before use.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{SockType, SockaddrStorage, getsockname, getsockopt, sockopt};
use nix::unistd::geteuid;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use crate::cgroup;
use crate::listen::{ListenError, POD_ADDRESSES, SocketFile};
use crate::netns::NamespaceId;
use crate::pod_listeners::{LOG_INTERVAL, sys};
use crate::telemetry::LogQuota;

pub(super) const REQUEST: u8 = b'G';
pub(super) const SERVING: u8 = b'S';
pub(super) const DONE: u8 = b'D';
const LISTENER: u8 = b'L';
const EARLIER: u8 = b'B';
const END: u8 = b'E';
/// Length of a record in bytes: kind, namespace, index of the address.
const RECORD_LENGTH: usize = 1 + NamespaceId::LENGTH + 1;
/// Time limit of a step that takes milliseconds.
pub(super) const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// Key of a listener: its namespace and address.
pub(super) type HandoverKey = (NamespaceId, SocketAddr);

/// Listeners and connections that one instance passes to the next.
#[derive(Debug, Default)]
pub(super) struct ReceivedListeners {
    /// Not verified yet: see [`is_listener`].
    pub(super) listeners: HashMap<HandoverKey, OwnedFd>,
    /// Connections of instances before the sender. They carry no messages and are only kept open.
    pub(super) earlier: Vec<OwnedFd>,
}

/// The socket to which the next instance connects.
#[derive(Debug)]
pub(super) struct Handover {
    listener: UnixListener,
    /// Limits the log lines about connections from other processes.
    refusals: Mutex<LogQuota>,
    _file: SocketFile,
}

impl Handover {
    /// Binds the socket. Has to be called within the runtime.
    pub(super) fn bind(path: &Path) -> Result<Self, ListenError> {
        let (listener, file) = SocketFile::bind_private(path)?;
        let failed = |source| ListenError::Unix {
            path: path.to_owned(),
            source,
        };
        let refusals = Mutex::new(LogQuota::new(3, LOG_INTERVAL));
        Ok(Self {
            listener: UnixListener::from_std(listener).map_err(failed)?,
            refusals,
            _file: file,
        })
    }

    /// Returns the number of suppressed lines if a rejected connection may be logged now.
    pub(super) fn refusal(&self) -> Option<u64> {
        self.refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
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
        let netns = |process: &str| {
            let text = std::fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
            let (_, path) = cgroup::lines(&text).find(|(controllers, _)| controllers.is_empty())?;
            Some(grandparent_cgroup(path))
        };
        if netns(&peer.pid().to_string()) != netns("self") {
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

/// Sends a message of one byte.
pub(super) async fn send_message(stream: &UnixStream, message: u8) -> io::Result<()> {
    send(stream, &[message], None).await
}

/// Receives a message of one byte. `None` at the end of the stream.
pub(super) async fn receive_message(stream: &UnixStream) -> io::Result<Option<u8>> {
    let mut message = [0];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            length => return Ok((length? > 0).then_some(message[0])),
        }
    }
}

/// Sends all of these listeners and connections, then the end.
pub(super) async fn send_all(
    stream: &UnixStream,
    listeners: &[(HandoverKey, Arc<OwnedFd>)],
    earlier: &[OwnedFd],
) -> io::Result<()> {
    for ((id, address), listener) in listeners {
        let index = POD_ADDRESSES
            .iter()
            .position(|known| known == address)
            .and_then(|index| u8::try_from(index).ok());
        let index = index.ok_or_else(|| io::Error::other("not an address of a pod"))?;
        send(
            stream,
            &record(LISTENER, *id, index),
            Some(listener.as_fd()),
        )
        .await?;
    }
    let nowhere = NamespaceId::from_bytes([0; NamespaceId::LENGTH]);
    for connection in earlier {
        send(
            stream,
            &record(EARLIER, nowhere, 0),
            Some(connection.as_fd()),
        )
        .await?;
    }
    send(stream, &record(END, nowhere, 0), None).await
}

async fn send(
    stream: &UnixStream,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    stream
        .async_io(Interest::WRITABLE, || {
            sys::send(stream.as_fd(), bytes, descriptor)
        })
        .await
}

fn record(kind: u8, id: NamespaceId, index: u8) -> Vec<u8> {
    [&[kind][..], &id.to_bytes(), &[index]].concat()
}

/// Receives records up to the end.
pub(super) async fn receive_all(stream: &UnixStream) -> io::Result<ReceivedListeners> {
    let mut received = ReceivedListeners::default();
    loop {
        let mut record = [0; RECORD_LENGTH];
        let receive = || sys::receive(stream.as_fd(), &mut record);
        let (length, descriptor) = stream.async_io(Interest::READABLE, receive).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let [kind, id @ .., index] = record;
        match (kind, descriptor, POD_ADDRESSES.get(usize::from(index))) {
            (END, None, _) if length == RECORD_LENGTH => return Ok(received),
            (LISTENER, Some(listener), Some(address)) if length == RECORD_LENGTH => {
                received
                    .listeners
                    .insert((NamespaceId::from_bytes(id), *address), listener);
            }
            (EARLIER, Some(connection), _) if length == RECORD_LENGTH => {
                received.earlier.push(connection)
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
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
