//! Notifications to the service manager, by `sd_notify(3)`.
//!
//! The manager's socket has a queue, and a send waits while it is full: as long as pid 1 does not
//! run. So a thread of their own sends them, in their order.

use std::env;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Time that the daemon waits for one notification to be sent.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Sender of notifications. Outside systemd it does nothing.
#[derive(Debug, Clone)]
pub(super) struct Notifier(Option<mpsc::Sender<Notification>>);

/// A notification, and the sender that is dropped once it is sent.
type Notification = (Vec<NotifyState<'static>>, oneshot::Sender<()>);

impl Notifier {
    /// Starts the thread if a service manager listens.
    pub(super) fn start() -> Self {
        env::var_os("NOTIFY_SOCKET").map_or(Self(None), |_| {
            Self::with(|state| drop(sd_notify::notify(state)))
        })
    }

    /// Starts the thread, which calls `send`. Without a thread, notifications are lost.
    fn with(send: impl Fn(&[NotifyState<'_>]) + Send + 'static) -> Self {
        let (sender, notifications) = mpsc::channel::<Notification>();
        let run = move || {
            for (state, _sent) in notifications {
                send(&state);
            }
        };
        let started = thread::Builder::new()
            .name("awsvid-notify".to_owned())
            .spawn(run);
        if let Err(error) = &started {
            tracing::warn!(%error, "cannot notify the service manager");
        }
        Self(started.is_ok().then_some(sender))
    }

    /// Sends `state` after the earlier ones, and does not wait.
    pub(super) fn notify_later(&self, state: Vec<NotifyState<'static>>) {
        if let Some(sender) = &self.0 {
            // An error means that the thread has ended.
            let _ = sender.send((state, oneshot::channel().0));
        }
    }

    /// Sends `state` after the earlier ones, and waits for at most [`SEND_TIMEOUT`]. After that it
    /// is sent when the manager receives again.
    pub(super) async fn notify(&self, state: Vec<NotifyState<'static>>) {
        let Some(sender) = &self.0 else { return };
        let (sent, is_sent) = oneshot::channel();
        if sender.send((state, sent)).is_ok() && timeout(SEND_TIMEOUT, is_sent).await.is_err() {
            tracing::warn!("the service manager does not receive a notification; it is sent later");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn notifications_arrive_late_and_in_order_after_a_full_queue() {
        let (manager, received) = mpsc::sync_channel(0);
        let notifier = Notifier::with(move |state| {
            let _ = manager.send(state.len());
        });
        notifier.notify(vec![NotifyState::Ready]).await;
        let second = notifier.notify(vec![NotifyState::Reloading, NotifyState::Ready]);
        let received = thread::spawn(move || [received.recv(), received.recv()]);
        second.await;
        assert_eq!(received.join().unwrap(), [Ok(1), Ok(2)]);
    }
}
