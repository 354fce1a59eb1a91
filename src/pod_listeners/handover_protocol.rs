//! Pods' listeners pass from one daemon to the next over a unix socket, so that an update refuses no connection.
//!
//! The next daemon connects at its start, and once it could serve it asks for the listeners (`G`), or is given them when the
//! daemon before is told to end. Each comes with its descriptor; then an end (`E`). It says when it serves (`S`); the one
//! before stops accepting, lets this socket's path go, and says so (`D`). It keeps the listeners until it ends: if the next
//! one is gone before that, it goes on serving. With the listeners the next one gets (`B`) the connections on which daemons
//! before this one wait for that in their turn: each goes on only if all who came after it are gone. Whoever holds these
//! listeners answers for awsvid in every pod (attack 10): the socket is root's alone, both look who the other is, and nothing
//! that is received is used unseen.

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

pub(super) const GIVE: u8 = b'G';
pub(super) const SERVING: u8 = b'S';
pub(super) const DONE: u8 = b'D';
const LISTENER: u8 = b'L';
const BEFORE: u8 = b'B';
const END: u8 = b'E';
/// One of the above, the namespace, and which of the addresses.
const RECORD: usize = 1 + NamespaceId::LENGTH + 1;
/// For what takes milliseconds.
pub(super) const DEADLINE: Duration = Duration::from_secs(5);

/// A listener, by its namespace and address.
pub(super) type HandoverKey = (NamespaceId, SocketAddr);

/// What one daemon gives to the next.
#[derive(Debug, Default)]
pub(super) struct ReceivedListeners {
    /// None of them is known to be what it is said to be: see [`is_listener`].
    pub(super) listeners: HashMap<HandoverKey, OwnedFd>,
    /// Connections of daemons before the one that gives. Nothing is said on them, they are only kept open.
    pub(super) before: Vec<OwnedFd>,
}

/// Where the next daemon connects.
#[derive(Debug)]
pub(super) struct Handover {
    listener: UnixListener,
    /// Bounds the log's lines about connections that are not the next daemon's.
    refusals: Mutex<LogQuota>,
    _file: SocketFile,
}

impl Handover {
    /// To be called within the runtime.
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

    /// Whether the log may have a line about one, and how many it did not have since the last.
    pub(super) fn refusal(&self) -> Option<u64> {
        self.refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// The next daemon, as soon as one connects.
    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept().await?;
        check_peer(&stream)?;
        Ok(stream)
    }
}

/// The daemon before, if there is one.
pub(super) async fn connect(path: &Path) -> io::Result<UnixStream> {
    let stream = timeout(DEADLINE, UnixStream::connect(path))
        .await
        .map_err(io::Error::other)??;
    check_peer(&stream)?;
    Ok(stream)
}

/// Only a daemon of the same user, and where its process can be seen, of the same place among cgroups.
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let denied = |what: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    let peer = getsockopt(stream, sockopt::PeerCredentials)?;
    if peer.uid() != geteuid().as_raw() {
        return denied(format!("the other end is user {}", peer.uid()));
    }
    // 0: it lives in another pid namespace, as daemons in pods mostly do of each other.
    if peer.pid() > 0 {
        let place = |process: &str| {
            let text = std::fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
            let (_, path) = cgroup::lines(&text).find(|(controllers, _)| controllers.is_empty())?;
            Some(grandparent_cgroup(path))
        };
        if place(&peer.pid().to_string()) != place("self") {
            return denied(format!(
                "the other end, process {}, is in a cgroup of another kind",
                peer.pid()
            ));
        }
    }
    Ok(())
}

/// Without the parts that two pods, or two units, of one kind differ in: a pod and its container, or a service. In a cgroup
/// namespace the own path is `/`, and another's begins with as many `..` as it is away.
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

/// Says one word.
pub(super) async fn send_message(stream: &UnixStream, word: u8) -> io::Result<()> {
    send(stream, &[word], None).await
}

/// Hears one word; `None` at the end.
pub(super) async fn receive_message(stream: &UnixStream) -> io::Result<Option<u8>> {
    let mut word = [0];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut word) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            length => return Ok((length? > 0).then_some(word[0])),
        }
    }
}

/// Gives all of these.
pub(super) async fn give(
    stream: &UnixStream,
    listeners: &[(HandoverKey, Arc<OwnedFd>)],
    before: &[OwnedFd],
) -> io::Result<()> {
    for ((id, address), listener) in listeners {
        let which = POD_ADDRESSES
            .iter()
            .position(|known| known == address)
            .and_then(|which| u8::try_from(which).ok());
        let which = which.ok_or_else(|| io::Error::other("no address of a pod"))?;
        send(
            stream,
            &record(LISTENER, *id, which),
            Some(listener.as_fd()),
        )
        .await?;
    }
    let nowhere = NamespaceId::from_bytes([0; NamespaceId::LENGTH]);
    for connection in before {
        send(
            stream,
            &record(BEFORE, nowhere, 0),
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

fn record(kind: u8, id: NamespaceId, which: u8) -> Vec<u8> {
    [&[kind][..], &id.to_bytes(), &[which]].concat()
}

/// Takes what is given.
pub(super) async fn take(stream: &UnixStream) -> io::Result<ReceivedListeners> {
    let mut taken = ReceivedListeners::default();
    loop {
        let mut record = [0; RECORD];
        let receive = || sys::receive(stream.as_fd(), &mut record);
        let (length, descriptor) = stream.async_io(Interest::READABLE, receive).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let [kind, id @ .., which] = record;
        match (kind, descriptor, POD_ADDRESSES.get(usize::from(which))) {
            (END, None, _) if length == RECORD => return Ok(taken),
            (LISTENER, Some(listener), Some(address)) if length == RECORD => {
                taken
                    .listeners
                    .insert((NamespaceId::from_bytes(id), *address), listener);
            }
            (BEFORE, Some(connection), _) if length == RECORD => taken.before.push(connection),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Whether this is a TCP listener on that address, in the network namespace that the calling thread is in: its cookie is
/// that of a socket which is made here. (`SIOCGSKNS`, which leads to the namespace itself, asks for `CAP_NET_ADMIN`.)
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
