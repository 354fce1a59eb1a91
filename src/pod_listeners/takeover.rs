//! Takeover of pods' listeners from the previous instance, and handover to the next one.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use crate::listen::is_metadata_address;
use crate::pod_listeners::PodListeners;
use crate::pod_listeners::handover_protocol::{
    self, HandoverKey, HandoverMessage, HandoverSocket, MetadataParts, ReceivedListeners,
    STEP_TIMEOUT,
};

/// Interval between attempts to accept the next instance after a failure.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// Role of this instance among those that may serve pods.
#[derive(Debug)]
pub(super) enum HandoverRole {
    /// The previous instance serves, until this one takes over.
    Standby(UnixStream),
    /// This instance serves the pods.
    Active,
    /// The next instance serves, as long as it keeps this connection open.
    Superseded(UnixStream),
}

/// Next event that the loop handles.
enum HandoverEvent {
    /// The directory of namespaces has changed, or something has to be tried again.
    Rescan,
    /// A step at the metadata address is due in a pod.
    Metadata,
    /// The previous instance ends, or this one is ready.
    TakeOver,
    /// The next instance has connected.
    NextConnected(UnixStream),
    /// It has sent a message, or is gone.
    NextReadable,
    /// The next instance is gone after it had taken over.
    Resume,
}

impl PodListeners {
    /// Determines whether a previous instance serves pods.
    pub(super) async fn begin(&mut self) {
        let previous = match &self.handover_path {
            Some(path) => handover_protocol::connect(path).await,
            None => Err(io::ErrorKind::NotFound.into()),
        };
        match previous {
            Ok(previous) => {
                tracing::info!("waiting to take over pods' listeners from the previous instance");
                self.role = HandoverRole::Standby(previous);
            }
            Err(error) => {
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) {
                    tracing::warn!(%error, "[pods] handover_socket: ignoring the socket: its peer is not a previous instance of awsvid");
                }
                self.reconciler.reconcile(HashMap::new()).await;
                self.listen_for_successor();
            }
        }
    }

    fn listen_for_successor(&mut self) {
        let Some(path) = self
            .handover_path
            .as_ref()
            .filter(|_| self.handover_socket.is_none())
        else {
            return;
        };
        match HandoverSocket::bind(path) {
            Ok(socket) => self.handover_socket = Some(socket),
            Err(error) if !self.logged_unbound.first() => {
                tracing::debug!(%error, "the handover socket cannot be bound yet");
            }
            Err(error) => {
                tracing::warn!(%error, "[pods] handover_socket: the socket cannot be bound: an update will interrupt pods' listeners");
            }
        }
    }

    /// Handles events until the daemon has to stop, then waits for the open connections.
    pub async fn run(mut self) {
        let drain = self.reconciler.service.drain.clone();
        let mut stopping = pin!(drain.stopped());
        let mut next = None;
        loop {
            let event = tokio::select! {
                biased;
                () = &mut stopping => break,
                event = self.event(next.as_ref()) => event,
            };
            match event {
                HandoverEvent::Rescan => self.rescan().await,
                HandoverEvent::Metadata => self.reconciler.serve_metadata(HashMap::new()).await,
                HandoverEvent::TakeOver => self.take_over().await,
                HandoverEvent::NextConnected(stream) => next = Some(stream),
                HandoverEvent::NextReadable => next = self.hand_over(next).await,
                HandoverEvent::Resume => self.resume().await,
            }
        }
        self.end(next).await;
    }

    /// Waits for the next event. `next` is an instance that waits for the listeners.
    async fn event(&self, next: Option<&UnixStream>) -> HandoverEvent {
        match &self.role {
            HandoverRole::Standby(previous) => {
                let mut could_serve = self.could_serve.clone();
                tokio::select! {
                    // The previous instance ends and sends its listeners, or is gone.
                    _ = previous.readable() => {}
                    () = async { drop(could_serve.wait_for(|could_serve| *could_serve).await) } => {}
                }
                HandoverEvent::TakeOver
            }
            HandoverRole::Superseded(next) => tokio::select! {
                () = end_of(next) => HandoverEvent::Resume,
                () = self.reconciler.changed(false) => HandoverEvent::Rescan,
            },
            HandoverRole::Active => tokio::select! {
                biased;
                stream = accept(self.handover_socket.as_ref(), next) => {
                    HandoverEvent::NextConnected(stream)
                }
                () = message(next) => HandoverEvent::NextReadable,
                rescan = self.reconciler.changed_before(
                    self.reconciler.metadata_due(),
                    self.lacks_socket(),
                ) => match rescan {
                    true => HandoverEvent::Rescan,
                    false => HandoverEvent::Metadata,
                },
            },
        }
    }

    /// Returns whether the handover socket has still to be bound.
    fn lacks_socket(&self) -> bool {
        self.handover_path.is_some() && self.handover_socket.is_none()
    }

    async fn rescan(&mut self) {
        match &self.role {
            HandoverRole::Active => {
                self.reconciler.reconcile(HashMap::new()).await;
                self.listen_for_successor();
            }
            HandoverRole::Standby(_) | HandoverRole::Superseded(_) => {
                self.reconciler.drop_removed().await;
            }
        }
    }

    async fn take_over(&mut self) {
        let HandoverRole::Standby(previous) =
            std::mem::replace(&mut self.role, HandoverRole::Active)
        else {
            return;
        };
        let taking = timeout(STEP_TIMEOUT, async {
            let request = HandoverMessage::Request(self.reconciler.service.metadata_parts());
            handover_protocol::send(&previous, &request).await?;
            handover_protocol::receive_all(&previous).await
        });
        let received = taking.await.unwrap_or_else(|late| Err(late.into()));
        match received {
            Ok(ReceivedListeners {
                listeners,
                key,
                earlier,
            }) => {
                tracing::info!(listeners = listeners.len(), "took over pods' listeners");
                self.earlier = earlier;
                if let Some(key) = key {
                    self.reconciler.service.adopt_key(&key);
                }
                self.reconciler.reconcile(listeners).await;
                let released = timeout(STEP_TIMEOUT, async {
                    handover_protocol::send(&previous, &HandoverMessage::Serving).await?;
                    handover_protocol::receive(&previous).await
                });
                let _ = released.await;
                // If it cannot be kept it is closed. The other end then finds this instance gone.
                let previous = previous.into_std().map(OwnedFd::from);
                self.earlier.extend(previous.map(Arc::new));
            }
            Err(error) => {
                tracing::warn!(%error, "taking over pods' listeners failed: binding new ones");
                drop(previous);
                self.reconciler.reconcile(HashMap::new()).await;
            }
        }
        self.listen_for_successor();
    }

    /// Passes the listeners to the next instance, which requested them. Returns `next` if it is
    /// alive and has not taken over.
    async fn hand_over(&mut self, next: Option<UnixStream>) -> Option<UnixStream> {
        let next = next?;
        let parts = match handover_protocol::try_receive(&next) {
            Ok(Some(HandoverMessage::Request(parts))) => parts,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(next),
            _ => return None,
        };
        let sent = self.send_listeners(&next, Some(parts)).await?;
        self.handover_socket = None;
        self.reconciler.pause(&sent);
        tracing::info!(
            listeners = sent.len(),
            "passed pods' listeners to the next instance"
        );
        // A failure means that it is gone, which the next event reports.
        let done = handover_protocol::send(&next, &HandoverMessage::Done);
        let _ = timeout(STEP_TIMEOUT, done).await;
        self.role = HandoverRole::Superseded(next);
        None
    }

    /// Sends all listeners, and waits until they are served. Both instances accept meanwhile.
    /// `parts` are those of the request. `None` before it: the first listener prompts it.
    async fn send_listeners(
        &mut self,
        next: &UnixStream,
        parts: Option<MetadataParts>,
    ) -> Option<Vec<(HandoverKey, Arc<OwnedFd>)>> {
        let is_metadata = |((_, address), _): &(HandoverKey, _)| is_metadata_address(*address);
        let (metadata, mut sent) = self
            .reconciler
            .listening()
            .into_iter()
            .partition::<Vec<_>, _>(is_metadata);
        self.earlier
            .retain(|connection| is_alive(connection.as_fd()));
        let earlier = self.earlier.iter().cloned().map(HandoverMessage::Earlier);
        let giving = timeout(STEP_TIMEOUT, async {
            send_all(next, &sent).await?;
            let parts = match parts {
                None if !sent.is_empty() => request(next).await?,
                parts => parts.unwrap_or_default(),
            };
            if parts.listeners {
                send_all(next, &metadata).await?;
                sent.extend(metadata);
            }
            let key = self.reconciler.service.sealed_key().filter(|_| parts.key);
            let key = key.map(HandoverMessage::TokenKey).into_iter();
            for message in key.chain(earlier).chain([HandoverMessage::End]) {
                handover_protocol::send(next, &message).await?;
            }
            while let Some(message) = handover_protocol::receive(next).await? {
                if matches!(message, HandoverMessage::Serving) {
                    return Ok(());
                }
            }
            Err(io::Error::from(io::ErrorKind::UnexpectedEof))
        });
        match giving.await.unwrap_or_else(|late| Err(late.into())) {
            Ok(()) => Some(sent),
            Err(error) => {
                tracing::warn!(%error, "passing pods' listeners to the next instance failed");
                None
            }
        }
    }

    /// Serves again, because the next instance ended before this one: the update failed.
    async fn resume(&mut self) {
        tracing::warn!("the next instance is gone: serving pods again");
        self.role = HandoverRole::Active;
        self.reconciler.drop_removed().await;
        self.reconciler.resume();
        self.rescan().await;
    }

    /// Ends after the accept loops have got the signal to stop.
    async fn end(mut self, next: Option<UnixStream>) {
        (self.handover_socket, self.handover_path) = (None, None);
        if let (Some(next), HandoverRole::Active) = (next, &self.role) {
            // From here on the next instance serves, ready or not.
            if let Some(sent) = self.send_listeners(&next, None).await {
                self.reconciler.leave_metadata(&sent);
            }
        }
        // Without a next instance, the previous one serves again if it is still alive.
        let mut earlier = self.earlier.drain(..);
        let is_resumed = earlier.any(|connection| is_alive(connection.as_fd()));
        drop(earlier);
        self.role = HandoverRole::Active;
        self.reconciler.end(is_resumed).await;
    }
}

/// Waits for the next instance to connect. Only one at a time is accepted.
async fn accept(socket: Option<&HandoverSocket>, next: Option<&UnixStream>) -> UnixStream {
    let (Some(socket), None) = (socket, next) else {
        return std::future::pending().await;
    };
    loop {
        match socket.accept().await {
            Ok(stream) => return stream,
            Err(error) => {
                if let Some(missed) = socket.take_rejection_log_permit() {
                    tracing::warn!(%error, missed, "[pods] handover_socket: rejected a request for pods' listeners");
                }
                // A lack of descriptors does not pass at once.
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// Sends one message for each of these listeners.
async fn send_all(next: &UnixStream, listeners: &[(HandoverKey, Arc<OwnedFd>)]) -> io::Result<()> {
    for (key, listener) in listeners {
        let message = HandoverMessage::Listener(*key, listener.clone());
        handover_protocol::send(next, &message).await?;
    }
    Ok(())
}

/// Waits for the request of the next instance.
async fn request(next: &UnixStream) -> io::Result<MetadataParts> {
    match handover_protocol::receive(next).await? {
        Some(HandoverMessage::Request(parts)) => Ok(parts),
        Some(_) => Err(io::ErrorKind::InvalidData.into()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Checks that the previous instance is still alive at the other end of this connection.
fn is_alive(previous: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(previous, PollFlags::POLLIN)];
    let ended = |polled: &PollFd<'_>| {
        polled
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP))
    };
    poll(&mut polled, PollTimeout::ZERO).is_err() || !ended(&polled[0])
}

/// Waits until the peer has closed the connection.
async fn end_of(stream: &UnixStream) {
    while let Ok(Some(_)) = handover_protocol::receive(stream).await {}
}

/// Waits until the next instance sends a message, or is gone.
async fn message(next: Option<&UnixStream>) {
    match next {
        Some(next) => drop(next.readable().await),
        None => std::future::pending().await,
    }
}
