//! From the daemon before to the next one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use crate::pods::handover::{self, DEADLINE, DONE, GIVE, Given, Handover, Key, SERVING};
use crate::pods::{LOOK_AGAIN, Pod, Pods};

/// Who serves pods.
#[derive(Debug)]
pub(super) enum Stage {
    /// The daemon before, until this one takes over.
    Before(UnixStream),
    /// This one.
    Serving,
    /// The next one, as long as it has this connection.
    After(UnixStream),
}

/// What to do next.
enum Event {
    Look,
    TakeOver,
    /// A daemon has connected.
    Next(UnixStream),
    /// It has said something, or is gone.
    Asked,
    /// The next daemon is gone, after it had taken over.
    Resume,
}

impl Pods {
    /// Finds out whether there is a daemon before.
    pub(super) async fn begin(&mut self) {
        let before = match &self.handover {
            Some(path) => handover::connect(path).await,
            None => Err(io::ErrorKind::NotFound.into()),
        };
        match before {
            Ok(before) => {
                tracing::info!("another daemon serves pods; its listeners are taken over when this one is ready");
                self.stage = Stage::Before(before);
            }
            Err(error) => {
                if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) {
                    tracing::warn!(%error, "[listen] handover: what answers there is not taken for a daemon before this one");
                }
                self.look().await;
                self.await_successors();
            }
        }
    }

    fn await_successors(&mut self) {
        let Some(path) = self.handover.as_ref().filter(|_| self.successors.is_none()) else { return };
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
                Event::Look => self.follow().await,
                Event::TakeOver => self.take_over().await,
                Event::Next(stream) => next = Some(stream),
                Event::Asked => next = self.answer(next).await,
                Event::Resume => self.resume().await,
            }
        }
        self.end(next).await;
    }

    /// Waits for what is next; `next` is a daemon that waits for the listeners.
    async fn event(&self, next: Option<&UnixStream>) -> Event {
        match &self.stage {
            Stage::Before(before) => {
                let mut able = self.able.clone();
                tokio::select! {
                    // It ends, and gives its listeners, or is gone.
                    _ = before.readable() => {}
                    () = async { drop(able.wait_for(|able| *able).await) } => {}
                }
                Event::TakeOver
            }
            Stage::After(after) => tokio::select! {
                () = end_of(after) => Event::Resume,
                () = self.change() => Event::Look,
            },
            Stage::Serving => tokio::select! {
                biased;
                stream = accept(self.successors.as_ref(), next) => Event::Next(stream),
                () = word(next) => Event::Asked,
                () = self.change() => Event::Look,
            },
        }
    }

    async fn follow(&mut self) {
        match &self.stage {
            Stage::Serving => {
                self.look().await;
                self.await_successors();
            }
            Stage::Before(_) | Stage::After(_) => self.forget(),
        }
    }

    /// Lets go what is gone, and listens in nothing new.
    fn forget(&mut self) {
        let found = self.found();
        self.pods.retain(|id, _| found.contains_key(id));
    }

    async fn take_over(&mut self) {
        let Stage::Before(before) = std::mem::replace(&mut self.stage, Stage::Serving) else { return };
        let taking = timeout(DEADLINE, async {
            handover::say(&before, GIVE).await?;
            handover::take(&before).await
        });
        let given = taking.await.unwrap_or_else(|late| Err(late.into()));
        match given {
            Ok(Given { listeners, before: earlier }) => {
                tracing::info!(listeners = listeners.len(), "the listeners in pods are handed over");
                self.before = earlier;
                self.look_with(listeners).await;
                let released = timeout(DEADLINE, async {
                    handover::say(&before, SERVING).await?;
                    handover::hear(&before).await
                });
                let _ = released.await;
                // If it can't be kept it is closed, which says that this one is gone.
                self.before.extend(before.into_std().map(OwnedFd::from));
            }
            Err(error) => {
                tracing::warn!(%error, "the daemon before hands nothing over; pods' listeners are bound anew");
                drop(before);
                self.look().await;
            }
        }
        self.await_successors();
    }

    /// Gives the listeners to the next daemon, which asks for them. It is returned if it is there still, and has not taken over.
    async fn answer(&mut self, next: Option<UnixStream>) -> Option<UnixStream> {
        let next = next?;
        let mut word = [0];
        match next.try_read(&mut word) {
            Ok(1) if word == [GIVE] => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(next),
            _ => return None,
        }
        let given = self.give(&next).await?;
        self.successors = None;
        self.pods.values_mut().for_each(|pod| pod.pause(&given));
        self.metrics.pod_namespaces.set(0);
        tracing::info!(listeners = given.len(), "the next daemon serves pods now");
        // If it can't be told it is gone, which is seen next.
        let _ = timeout(DEADLINE, handover::say(&next, DONE)).await;
        self.stage = Stage::After(next);
        None
    }

    /// Gives all listeners, and waits until they are served. Both accept meanwhile.
    async fn give(&mut self, next: &UnixStream) -> Option<Vec<(Key, Arc<OwnedFd>)>> {
        let given: Vec<_> = self.pods.values().flat_map(|pod| pod.listening()).collect();
        self.before.retain(|before| is_there(before.as_fd()));
        let giving = timeout(DEADLINE, async {
            handover::give(next, &given, &self.before).await?;
            while let Some(word) = handover::hear(next).await? {
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
        self.stage = Stage::Serving;
        self.forget();
        self.pods.values_mut().for_each(|pod| pod.resume(&self.service));
        self.follow().await;
    }

    /// Accept loops have been told to end.
    async fn end(mut self, next: Option<UnixStream>) {
        (self.successors, self.handover) = (None, None);
        if let (Some(next), Stage::Serving) = (next, &self.stage) {
            // It serves from here on whether it is ready or not.
            let _ = self.give(&next).await;
        }
        // If there is no next one, the daemon before this one, if it is there still, serves again.
        self.before.clear();
        self.stage = Stage::Serving;
        self.pods.values_mut().for_each(Pod::release);
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
                () = self.change() => self.forget(),
            }
        }
    }
}

/// The next daemon to connect. Only one at a time is waited for.
async fn accept(successors: Option<&Handover>, next: Option<&UnixStream>) -> UnixStream {
    let (Some(successors), None) = (successors, next) else { return std::future::pending().await };
    loop {
        match successors.accept().await {
            Ok(stream) => return stream,
            Err(error) => {
                if let Some(missed) = successors.refusal() {
                    tracing::warn!(%error, missed, "[listen] handover: whoever asked there for pods' listeners does not get them");
                }
                // A lack of descriptors does not pass at once.
                sleep(LOOK_AGAIN).await;
            }
        }
    }
}

/// Whether the daemon before is there, at the other end of this connection.
fn is_there(before: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(before, PollFlags::POLLIN)];
    let ended = |polled: &PollFd<'_>| polled.revents().is_some_and(|events| events.contains(PollFlags::POLLHUP));
    poll(&mut polled, PollTimeout::ZERO).is_err() || !ended(&polled[0])
}

/// Waits until whoever is at the other end is gone.
async fn end_of(stream: &UnixStream) {
    while let Ok(Some(_)) = handover::hear(stream).await {}
}

/// Waits until the next daemon asks, or is gone.
async fn word(next: Option<&UnixStream>) {
    match next {
        Some(next) => drop(next.readable().await),
        None => std::future::pending().await,
    }
}
