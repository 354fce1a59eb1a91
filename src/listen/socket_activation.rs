//! Sockets that systemd holds and passes to the daemon (`sd_listen_fds(3)`), so that they outlive
//! the daemon's restarts.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::listen::{ListenError, Listener};

/// Listeners that systemd passed and that are not yet claimed.
#[derive(Debug, Default)]
pub struct ActivatedSockets {
    unix: Vec<UnixListener>,
    tcp: Vec<TcpListener>,
}

impl ActivatedSockets {
    /// Takes the sockets from the environment. Call it once, before threads are started.
    pub fn from_environment() -> Self {
        let mut passed = listenfd::ListenFd::from_env();
        let mut inherited = Self::default();
        for index in 0..passed.len() {
            if let Ok(Some(listener)) = passed.take_unix_listener(index) {
                inherited.unix.push(listener);
            } else if let Ok(Some(listener)) = passed.take_tcp_listener(index) {
                inherited.tcp.push(listener);
            }
        }
        for listener in &inherited.unix {
            let _ = listener.set_nonblocking(true);
        }
        for listener in &inherited.tcp {
            let _ = listener.set_nonblocking(true);
        }
        inherited
    }

    #[cfg(test)]
    pub(super) fn of(tcp: TcpListener) -> Self {
        Self {
            unix: Vec::new(),
            tcp: vec![tcp],
        }
    }

    pub(super) fn take_tcp(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let index = self
            .tcp
            .iter()
            .position(|listener| listener.local_addr().is_ok_and(|found| found == address))?;
        Some(self.tcp.swap_remove(index))
    }

    pub(super) fn take_unix(&mut self, path: &Path) -> Option<UnixListener> {
        let is_here = |listener: &UnixListener| {
            listener
                .local_addr()
                .is_ok_and(|found| found.as_pathname() == Some(path))
        };
        let index = self.unix.iter().position(is_here)?;
        Some(self.unix.swap_remove(index))
    }

    /// Takes the listeners that were not claimed.
    pub fn take_unclaimed(&mut self) -> Vec<Result<Listener, ListenError>> {
        let unix = std::mem::take(&mut self.unix)
            .into_iter()
            .map(Listener::activated_unix);
        unix.chain(
            std::mem::take(&mut self.tcp)
                .into_iter()
                .map(Listener::activated_tcp),
        )
        .collect()
    }
}
