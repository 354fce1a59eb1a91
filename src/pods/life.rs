//! From the daemon before to the next one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use crate::pods::handover::{
    self, DEADLINE, DONE, GIVE, Handover, HandoverKey, ReceivedListeners, SERVING,
};
use crate::pods::{ListenedPod, MOUNT_POLL, PodListeners};

/// Who serves pods.
#[derive(Debug)]
pub(super) enum HandoverRole {
    /// The daemon before, until this one takes over.
    Standby(UnixStream),
    /// This one.
    Active,
    /// The next one, as long as it has this connection.
    Superseded(UnixStream),
}

/// What to do next.
enum HandoverEvent {
    Look,
    TakeOver,
    /// A daemon has connected.
    Next(UnixStream),
    /// It has said something, or is gone.
    Asked,
    /// The next daemon is gone, after it had taken over.
    Resume,
}

impl PodListeners {
    /// Finds out whether there is a daemon before.
    pub(super) async fn begin(&mut self) {
        let before = match &self.handover {
            Some(path) => handover::connect(path).await,
            None => Err(io::ErrorKind::NotFound.into()),
        };
        match before {
            Ok(before) => {
                tracing::info!(
                    "another daemon serves pods; its listeners are taken over when this one is ready"
                );
                self.stage = HandoverRole::Standby(before);
            }
            Err(error) => {
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) {
                    tracing::warn!(%error, "[listen] handover: what answers there is not taken for a daemon before this one");
                }
                self.reconcile().await;
                self.listen_for_successor();
            }
        }
    }

    fn listen_for_successor(&mut self) {
        let Some(path) = self.handover.as_ref().filter(|_| self.successors.is_none()) else {
            return;
        };
        match Handover::bind(path) {
            Ok(successors) => self.successors = Some(successors),
            Err(error) if std::mem::replace(&mut self.told.no_handover, true) => {
                tracing::debug!(%error, "listeners cannot be handed over yet");
            }
            Err(error) => {
                tracing::warn!(%error, "[listen] handover: at an update pods' listeners will be bound anew, not handed over");
            }
        }
    }

    /// Follows what happens until the daemon is told to end, then waits for the connections that are open.
    pub async fn run(mut self) {
        let mut stop = self.service.stop.clone();
        let mut stopping = pin!(async { drop(stop.wait_for(|stop| *stop).await) });
        let mut next = None;
        loop {
            let event = tokio::select! {
                biased;
                () = &mut stopping => break,
                event = self.event(next.as_ref()) => event,
            };
            match event {
                HandoverEvent::Look => self.follow().await,
                HandoverEvent::TakeOver => self.take_over().await,
                HandoverEvent::Next(stream) => next = Some(stream),
                HandoverEvent::Asked => next = self.hand_over(next).await,
                HandoverEvent::Resume => self.resume().await,
            }
        }
        self.end(next).await;
    }

    /// Waits for what is next; `next` is a daemon that waits for the listeners.
    async fn event(&self, next: Option<&UnixStream>) -> HandoverEvent {
        match &self.stage {
            HandoverRole::Standby(before) => {
                let mut able = self.able.clone();
                tokio::select! {
                    // It ends, and gives its listeners, or is gone.
                    _ = before.readable() => {}
                    () = async { drop(able.wait_for(|able| *able).await) } => {}
                }
                HandoverEvent::TakeOver
            }
            HandoverRole::Superseded(after) => tokio::select! {
                () = end_of(after) => HandoverEvent::Resume,
                () = self.wait_for_change() => HandoverEvent::Look,
            },
            HandoverRole::Active => tokio::select! {
                biased;
                stream = accept(self.successors.as_ref(), next) => HandoverEvent::Next(stream),
                () = word(next) => HandoverEvent::Asked,
                () = self.wait_for_change() => HandoverEvent::Look,
            },
        }
    }

    async fn follow(&mut self) {
        match &self.stage {
            HandoverRole::Active => {
                self.reconcile().await;
                self.listen_for_successor();
            }
            HandoverRole::Standby(_) | HandoverRole::Superseded(_) => self.drop_removed(),
        }
    }

    /// Lets go what is gone, and listens in nothing new.
    fn drop_removed(&mut self) {
        let found = self.scan();
        self.pods.retain(|id, _| found.contains_key(id));
    }

    async fn take_over(&mut self) {
        let HandoverRole::Standby(before) =
            std::mem::replace(&mut self.stage, HandoverRole::Active)
        else {
            return;
        };
        let taking = timeout(DEADLINE, async {
            handover::send_message(&before, GIVE).await?;
            handover::take(&before).await
        });
        let given = taking.await.unwrap_or_else(|late| Err(late.into()));
        match given {
            Ok(ReceivedListeners {
                listeners,
                before: earlier,
            }) => {
                tracing::info!(
                    listeners = listeners.len(),
                    "the listeners in pods are handed over"
                );
                self.before = earlier;
                self.reconcile_dir(listeners).await;
                let released = timeout(DEADLINE, async {
                    handover::send_message(&before, SERVING).await?;
                    handover::receive_message(&before).await
                });
                let _ = released.await;
                // If it can't be kept it is closed, which says that this one is gone.
                self.before.extend(before.into_std().map(OwnedFd::from));
            }
            Err(error) => {
                tracing::warn!(%error, "the daemon before hands nothing over; pods' listeners are bound anew");
                drop(before);
                self.reconcile().await;
            }
        }
        self.listen_for_successor();
    }

    /// Gives the listeners to the next daemon, which asks for them. It is returned if it is there still, and has not taken over.
    async fn hand_over(&mut self, next: Option<UnixStream>) -> Option<UnixStream> {
        let next = next?;
        let mut word = [0];
        match next.try_read(&mut word) {
            Ok(1) if word == [GIVE] => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(next),
            _ => return None,
        }
        let given = self.send_listeners(&next).await?;
        self.successors = None;
        self.pods.values_mut().for_each(|pod| pod.pause(&given));
        self.metrics.pod_listeners.set(0);
        tracing::info!(listeners = given.len(), "the next daemon serves pods now");
        // If it can't be told it is gone, which is seen next.
        let _ = timeout(DEADLINE, handover::send_message(&next, DONE)).await;
        self.stage = HandoverRole::Superseded(next);
        None
    }

    /// Gives all listeners, and waits until they are served. Both accept meanwhile.
    async fn send_listeners(
        &mut self,
        next: &UnixStream,
    ) -> Option<Vec<(HandoverKey, Arc<OwnedFd>)>> {
        let given: Vec<_> = self.pods.values().flat_map(|pod| pod.listening()).collect();
        self.before.retain(|before| is_there(before.as_fd()));
        let giving = timeout(DEADLINE, async {
            handover::give(next, &given, &self.before).await?;
            while let Some(word) = handover::receive_message(next).await? {
                if word == SERVING {
                    return Ok(());
                }
            }
            Err(io::Error::from(io::ErrorKind::UnexpectedEof))
        });
        match giving.await.unwrap_or_else(|late| Err(late.into())) {
            Ok(()) => Some(given),
            Err(error) => {
                tracing::warn!(%error, "the next daemon does not take the listeners in pods");
                None
            }
        }
    }

    /// The next daemon has ended before this one was told to: an update that failed.
    async fn resume(&mut self) {
        tracing::warn!("the next daemon is gone; this one serves pods again");
        self.stage = HandoverRole::Active;
        self.drop_removed();
        self.pods
            .values_mut()
            .for_each(|pod| pod.resume(&self.service));
        self.follow().await;
    }

    /// Accept loops have been told to end.
    async fn end(mut self, next: Option<UnixStream>) {
        (self.successors, self.handover) = (None, None);
        if let (Some(next), HandoverRole::Active) = (next, &self.stage) {
            // It serves from here on whether it is ready or not.
            let _ = self.send_listeners(&next).await;
        }
        // If there is no next one, the daemon before this one, if it is there still, serves again.
        self.before.clear();
        self.stage = HandoverRole::Active;
        self.pods.values_mut().for_each(ListenedPod::release);
        self.service.loops.close();
        let (loops, connections) = (self.service.loops.clone(), self.service.connections.clone());
        // Loops and connections end by themselves, or with their pod.
        let mut ended = pin!(async {
            loops.wait().await;
            connections.drained().await;
        });
        loop {
            tokio::select! {
                biased;
                () = &mut ended => break,
                () = self.wait_for_change() => self.drop_removed(),
            }
        }
    }
}

/// The next daemon to connect. Only one at a time is waited for.
async fn accept(successors: Option<&Handover>, next: Option<&UnixStream>) -> UnixStream {
    let (Some(successors), None) = (successors, next) else {
        return std::future::pending().await;
    };
    loop {
        match successors.accept().await {
            Ok(stream) => return stream,
            Err(error) => {
                if let Some(missed) = successors.refusal() {
                    tracing::warn!(%error, missed, "[listen] handover: whoever asked there for pods' listeners does not get them");
                }
                // A lack of descriptors does not pass at once.
                sleep(MOUNT_POLL).await;
            }
        }
    }
}

/// Whether the daemon before is there, at the other end of this connection.
fn is_there(before: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(before, PollFlags::POLLIN)];
    let ended = |polled: &PollFd<'_>| {
        polled
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP))
    };
    poll(&mut polled, PollTimeout::ZERO).is_err() || !ended(&polled[0])
}

/// Waits until whoever is at the other end is gone.
async fn end_of(stream: &UnixStream) {
    while let Ok(Some(_)) = handover::receive_message(stream).await {}
}

/// Waits until the next daemon asks, or is gone.
async fn word(next: Option<&UnixStream>) {
    match next {
        Some(next) => drop(next.readable().await),
        None => std::future::pending().await,
    }
}
