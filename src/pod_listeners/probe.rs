//! Finds out whether a service answers at an address, by a TCP connection.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockopt, socket, sockopt,
};
use tokio::time::Instant;

/// A connection that is being opened. It stays in the network namespace in which it was started.
#[derive(Debug)]
pub(super) struct AnswerProbe {
    socket: OwnedFd,
    state: ProbeState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProbeState {
    Connecting,
    Answered,
    Rejected,
}

impl AnswerProbe {
    /// Starts to connect in the calling thread's network namespace. `None` if the kernel rejects
    /// the connection at once.
    pub(super) fn start(address: SocketAddr) -> io::Result<Option<Self>> {
        let family = match address {
            SocketAddr::V4(_) => AddressFamily::Inet,
            SocketAddr::V6(_) => AddressFamily::Inet6,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(family, SockType::Stream, flags, None)?;
        match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(Some(Self {
                socket,
                state: ProbeState::Connecting,
            })),
            Err(_) => Ok(None),
        }
    }

    pub(super) fn is_answered(&self) -> bool {
        self.state == ProbeState::Answered
    }

    /// Records that the connection is open, or that it has failed.
    fn finish(&mut self) {
        let is_open = matches!(getsockopt(&self.socket, sockopt::SocketError), Ok(0));
        self.state = match is_open {
            true => ProbeState::Answered,
            false => ProbeState::Rejected,
        };
    }
}

/// Waits until each service has answered or rejected its connection, for `limit` at most. Blocks.
pub(super) fn await_answers(probes: &mut [&mut AnswerProbe], limit: Duration) {
    let end = Instant::now() + limit;
    loop {
        let waiting: Vec<_> = probes
            .iter_mut()
            .filter(|probe| probe.state == ProbeState::Connecting)
            .collect();
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up, so that it does not poll in a loop at the end.
        let left = PollTimeout::try_from(left + Duration::from_micros(999));
        if waiting.is_empty() {
            return;
        }
        let mut polled: Vec<_> = waiting
            .iter()
            .map(|probe| PollFd::new(probe.socket.as_fd(), PollFlags::POLLOUT))
            .collect();
        match poll(&mut polled, left.unwrap_or(PollTimeout::ZERO)) {
            Ok(0) => return,
            Err(Errno::EINTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        let finished: Vec<_> = polled
            .iter()
            .map(|polled| polled.any() == Some(true))
            .collect();
        for (probe, _) in waiting.into_iter().zip(finished).filter(|(_, is)| *is) {
            probe.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn only_a_listener_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let [open, closed] = [&listener, &free].map(|one| one.local_addr().unwrap());
        drop(free);
        let started = Instant::now();
        let mut probes: Vec<_> = [open, closed, open]
            .into_iter()
            .filter_map(|address| AnswerProbe::start(address).unwrap())
            .collect();
        await_answers(
            &mut probes.iter_mut().collect::<Vec<_>>(),
            Duration::from_secs(60),
        );
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "it waits for none"
        );
        assert_eq!(probes.iter().filter(|probe| probe.is_answered()).count(), 2);
    }

    #[test]
    fn silence_is_no_answer() {
        // A full backlog: the kernel drops further connections.
        let listener = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        nix::sys::socket::bind(listener.as_raw_fd(), &SockaddrStorage::from(any)).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let listener = TcpListener::from(listener);
        let address = listener.local_addr().unwrap();
        let start = || AnswerProbe::start(address).unwrap().unwrap();
        let mut first = [start(), start(), start(), start()];
        await_answers(
            &mut first.iter_mut().collect::<Vec<_>>(),
            Duration::from_millis(50),
        );
        let answered = first.iter().filter(|probe| probe.is_answered()).count();
        assert!(answered < first.len(), "{answered}");
    }
}
