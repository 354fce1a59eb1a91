//! A listener: how it is had, what it accepts, how it ends.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use crate::listen::lazy_socket::LazySocket;
use crate::listen::pod_listener::PodListener;
use crate::listen::socket_activation::ActivatedSockets;
use crate::listen::socket_file::SocketFile;
use crate::listen::tcp::{BACKLOG, FreeBind, bind, bound_buffers};
use crate::listen::{ListenError, sys};

/// A listener.
#[derive(Debug)]
pub enum Listener {
    /// On a unix socket; its file is removed with it unless systemd owns both.
    Unix {
        /// Accepts.
        listener: AsyncFd<Arc<OwnedFd>>,
        /// Where clients find it.
        path: PathBuf,
        /// Its mode, for when it has to be bound again.
        mode: u32,
        /// Removes the file at the end. `None`: systemd holds the socket.
        file: Option<SocketFile>,
    },
    /// On a loopback address.
    Tcp {
        /// Accepts.
        listener: AsyncFd<Arc<OwnedFd>>,
        /// Its address, with the port that the kernel chose if the configuration says 0.
        address: SocketAddr,
        /// Who else has it.
        origin: ListenerSource,
    },
}

/// Where a TCP listener comes from.
#[derive(Debug)]
pub enum ListenerSource {
    /// The daemon has bound it, in its own network namespace.
    Own,
    /// systemd holds it, too.
    Inherited,
    /// It is in a pod's network namespace.
    Pod(Arc<PodListener>),
}

/// A connection, and for TCP the address that it was accepted on.
#[derive(Debug)]
pub enum AcceptedStream {
    /// Over the unix socket.
    Unix(LazySocket),
    /// Over TCP.
    Tcp {
        /// The connection.
        stream: LazySocket,
        /// The client's address.
        client: SocketAddr,
        /// The daemon's.
        server: SocketAddr,
    },
}

/// Whether nothing is wrong with the listener: accept(2) also tells of what happened to a connection that waited there.
pub(super) fn is_per_connection_error(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::ECONNABORTED
                | Errno::EINTR
                | Errno::EPERM
                | Errno::EPROTO
                | Errno::ENETDOWN
                | Errno::ENETUNREACH
                | Errno::EHOSTDOWN
                | Errno::EHOSTUNREACH
                | Errno::ENONET
                | Errno::ENOPROTOOPT
                | Errno::EOPNOTSUPP
        )
    )
}

impl Listener {
    /// Listens on a TCP address, or takes the one that systemd holds.
    ///
    /// Never with SO_REUSEPORT: whoever shares the port would get half of the connections (attack 9).
    pub fn tcp(address: SocketAddr, inherited: &mut ActivatedSockets) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Tcp { address, source };
        let (listener, origin) = match inherited.take_tcp(address) {
            Some(listener) => {
                bound_buffers(&listener).map_err(failed)?;
                (listener.into(), ListenerSource::Inherited)
            }
            None => (
                bind(address, FreeBind::Denied).map_err(failed)?,
                ListenerSource::Own,
            ),
        };
        let address = sys::local_address(&listener).map_err(failed)?;
        Ok(Self::Tcp {
            listener: sys::register_listener(Arc::new(listener)).map_err(failed)?,
            address,
            origin,
        })
    }

    /// Listens on a unix socket with this mode, or takes the one that systemd holds.
    pub fn unix(
        path: &Path,
        mode: u32,
        inherited: &mut ActivatedSockets,
    ) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Unix {
            path: path.to_owned(),
            source,
        };
        let (listener, file) = match inherited.take_unix(path) {
            Some(listener) => (listener, None),
            None => SocketFile::bind(path, mode).map(|(listener, file)| (listener, Some(file)))?,
        };
        let listener = sys::register_listener(Arc::new(listener.into())).map_err(failed)?;
        Ok(Self::Unix {
            listener,
            path: path.to_owned(),
            mode,
            file,
        })
    }

    /// A TCP listener that systemd holds, whatever its address is.
    pub(super) fn activated_tcp(listener: TcpListener) -> Result<Self, ListenError> {
        let address = listener.local_addr();
        let failed = |source| ListenError::Inherited { source };
        let address = address.map_err(failed)?;
        let listener = sys::register_listener(Arc::new(listener.into())).map_err(failed)?;
        Ok(Self::Tcp {
            listener,
            address,
            origin: ListenerSource::Inherited,
        })
    }

    /// A unix listener that systemd holds, whatever its path is.
    pub(super) fn activated_unix(listener: UnixListener) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Inherited { source };
        let path = listener
            .local_addr()
            .map_err(failed)?
            .as_pathname()
            .map(Path::to_owned)
            .unwrap_or_default();
        let listener = sys::register_listener(Arc::new(listener.into())).map_err(failed)?;
        Ok(Self::Unix {
            listener,
            path,
            mode: 0,
            file: None,
        })
    }

    /// The listener that was made inside a pod's network namespace.
    pub fn pod(inside: Arc<PodListener>) -> Result<Self, ListenError> {
        let listener = sys::register_listener(inside.listener())
            .map_err(|source| inside.bind_error(source))?;
        Ok(Self::Tcp {
            listener,
            address: inside.address(),
            origin: ListenerSource::Pod(inside),
        })
    }

    /// For the log.
    pub fn name(&self) -> String {
        match self {
            Self::Unix { path, .. } => path.display().to_string(),
            Self::Tcp {
                origin: ListenerSource::Pod(inside),
                ..
            } => inside.to_string(),
            Self::Tcp { address, .. } => address.to_string(),
        }
    }

    /// Waits until somebody has connected.
    pub(super) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, Arc<OwnedFd>>> {
        let (Self::Unix { listener, .. } | Self::Tcp { listener, .. }) = self;
        listener.readable().await
    }

    /// Takes the one who has connected; `None` if somebody else was quicker.
    pub(super) fn accept(
        &self,
        arrived: &mut AsyncFdReadyGuard<'_, Arc<OwnedFd>>,
    ) -> Option<io::Result<AcceptedStream>> {
        arrived
            .try_io(|listener| self.accept_raw(listener.as_fd()))
            .ok()
    }

    fn accept_raw(&self, listener: impl AsFd) -> io::Result<AcceptedStream> {
        match self {
            Self::Unix { .. } => Ok(AcceptedStream::Unix(LazySocket::new(sys::accept_unix(
                listener.as_fd(),
            )?))),
            Self::Tcp { address, .. } => {
                let (stream, client) = sys::accept_tcp(listener.as_fd())?;
                // Without it only more packets are sent.
                let _ = sys::set_tcp_cork(&stream);
                Ok(AcceptedStream::Tcp {
                    stream: LazySocket::new(stream),
                    client,
                    server: *address,
                })
            }
        }
    }

    /// Ends listening, and gives those who have connected already: closing alone resets them, and some have sent their
    /// request.
    ///
    /// Where systemd holds the socket, whoever comes from here on waits in its queue for the daemon's next start. Nobody may be
    /// left there who came before: it would be started for him as soon as it has ended, though it was told to stop, and he
    /// may be the daemon itself, which had asked whether it is ready.
    pub(super) fn close_and_drain_backlog(self) -> io::Result<Vec<AcceptedStream>> {
        let (Self::Unix { listener, .. } | Self::Tcp { listener, .. }) = &self;
        match &self {
            // Whoever comes from here on is refused, so that the queue has an end.
            Self::Unix { file: Some(_), .. } => shutdown(listener.as_raw_fd(), Shutdown::Both)?,
            // TCP has no way to end the queue alone. Who comes between the last of these and the close is reset, if no
            // other process has the listener.
            Self::Unix { file: None, .. } | Self::Tcp { .. } => {}
        }
        let waiting = (0..BACKLOG).map(|_| self.accept_raw(listener.get_ref()));
        let waiting =
            waiting.take_while(|taken| taken.as_ref().err().is_none_or(is_per_connection_error));
        Ok(waiting.filter_map(Result::ok).collect())
    }

    /// A listener in the place of one that somebody has killed, as `ss -K` can (attack 9).
    pub(super) async fn rebind(&self) -> Result<Self, ListenError> {
        match self {
            Self::Tcp {
                origin: ListenerSource::Pod(inside),
                ..
            } => {
                let inside = inside.clone();
                let bound = tokio::task::spawn_blocking(move || inside.rebind().map(|()| inside));
                Self::pod(
                    bound
                        .await
                        .map_err(|error| ListenError::Interrupted(error.to_string()))??,
                )
            }
            Self::Tcp { address, .. } => Self::tcp(*address, &mut ActivatedSockets::default()),
            Self::Unix { path, mode, .. } => {
                Self::unix(path, *mode, &mut ActivatedSockets::default())
            }
        }
    }
}

impl AcceptedStream {
    /// The connection itself.
    pub fn socket(&self) -> &LazySocket {
        let (Self::Unix(stream) | Self::Tcp { stream, .. }) = self;
        stream
    }

    /// The connection alone.
    pub fn into_socket(self) -> LazySocket {
        let (Self::Unix(stream) | Self::Tcp { stream, .. }) = self;
        stream
    }
}
