//! A listener: how it is set up, how it accepts, and how it ends.

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
use crate::listen::tcp::{BACKLOG, BindOptions, bind, bound_buffers};
use crate::listen::{ListenError, sys};

/// A listening socket of the daemon.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug)]
pub enum Listener {
    /// A unix socket. Its file is removed with it, unless systemd owns both.
    Unix {
        listener: AsyncFd<Arc<OwnedFd>>,
        /// The path that clients connect to.
        path: PathBuf,
        /// The mode of the file, kept for a rebind.
        mode: u32,
        /// The file, which is removed on drop. `None` if systemd holds the socket.
        file: Option<SocketFile>,
    },
    /// A TCP socket on a loopback address.
    Tcp {
        listener: AsyncFd<Arc<OwnedFd>>,
        /// The address, with the port that the kernel chose if the configuration has port 0.
        address: SocketAddr,
        /// The party that bound the socket.
        source: ListenerSource,
    },
}

/// The source of a TCP listener.
#[derive(Debug)]
pub enum ListenerSource {
    /// The daemon bound it, in its own network namespace.
    Own,
    /// systemd passed it and holds it, too.
    Activated,
    /// The daemon bound it in a pod's network namespace.
    Pod(Arc<PodListener>),
}

/// A connection, and for TCP its two addresses.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug)]
pub enum AcceptedStream {
    /// A connection over a unix socket.
    Unix(LazySocket),
    /// A connection over TCP.
    Tcp {
        stream: LazySocket,
        client: SocketAddr,
        /// The address that the connection was accepted on.
        server: SocketAddr,
    },
}

/// Returns whether the error of accept(2) concerns one connection only. The call also reports
/// errors of connections that waited in the backlog; the listener is intact then.
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
    /// Listens on a TCP address, or takes the listener that systemd passed.
    ///
    /// Never with SO_REUSEPORT: another process that shared the port would get half of the
    /// connections (T9).
    pub fn tcp(address: SocketAddr, inherited: &mut ActivatedSockets) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Tcp { address, source };
        let (listener, source) = match inherited.take_tcp(address) {
            Some(listener) => {
                bound_buffers(&listener).map_err(failed)?;
                (listener.into(), ListenerSource::Activated)
            }
            None => (
                bind(address, BindOptions::default()).map_err(failed)?,
                ListenerSource::Own,
            ),
        };
        let address = sys::local_address(&listener).map_err(failed)?;
        Ok(Self::Tcp {
            listener: sys::register_listener(Arc::new(listener)).map_err(failed)?,
            address,
            source,
        })
    }

    /// Listens on a unix socket with this mode, or takes the listener that systemd passed.
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

    /// Takes a TCP listener that systemd passed, at any address.
    pub(super) fn activated_tcp(listener: TcpListener) -> Result<Self, ListenError> {
        let address = listener.local_addr();
        let failed = |source| ListenError::Activated { source };
        let address = address.map_err(failed)?;
        let listener = sys::register_listener(Arc::new(listener.into())).map_err(failed)?;
        Ok(Self::Tcp {
            listener,
            address,
            source: ListenerSource::Activated,
        })
    }

    /// Takes a unix listener that systemd passed, at any path.
    pub(super) fn activated_unix(listener: UnixListener) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Activated { source };
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

    /// Takes the listener that was bound inside a pod's network namespace.
    pub fn pod(pod: Arc<PodListener>) -> Result<Self, ListenError> {
        let listener =
            sys::register_listener(pod.listener()).map_err(|source| pod.bind_error(source))?;
        Ok(Self::Tcp {
            listener,
            address: pod.address(),
            source: ListenerSource::Pod(pod),
        })
    }

    /// Returns the name of the listener for the log.
    pub fn name(&self) -> String {
        match self {
            Self::Unix { path, .. } => path.display().to_string(),
            Self::Tcp {
                source: ListenerSource::Pod(pod),
                ..
            } => pod.to_string(),
            Self::Tcp { address, .. } => address.to_string(),
        }
    }

    /// Waits until the backlog has a connection.
    pub(super) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, Arc<OwnedFd>>> {
        let (Self::Unix { listener, .. } | Self::Tcp { listener, .. }) = self;
        listener.readable().await
    }

    /// Accepts a connection from the backlog. Returns `None` if another process accepted it first.
    pub(super) fn accept(
        &self,
        ready: &mut AsyncFdReadyGuard<'_, Arc<OwnedFd>>,
    ) -> Option<io::Result<AcceptedStream>> {
        ready
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
                // Without the option the client gets more packets, but the same bytes.
                let _ = sys::set_tcp_cork(&stream);
                Ok(AcceptedStream::Tcp {
                    stream: LazySocket::new(stream),
                    client,
                    server: *address,
                })
            }
        }
    }

    /// Stops listening and returns the connections in the backlog. A plain close would reset them,
    /// and some have already sent their request.
    ///
    /// Where systemd holds the socket, later connections wait in the backlog for the daemon's next
    /// start. No connection from before the stop may stay there: systemd would restart awsvid at
    /// once to serve it. It may be awsvid's own readiness probe.
    pub(super) fn close_and_drain_backlog(self) -> io::Result<Vec<AcceptedStream>> {
        let (Self::Unix { listener, .. } | Self::Tcp { listener, .. }) = &self;
        match &self {
            // New connections are rejected from here on, so that the backlog is finite.
            Self::Unix { file: Some(_), .. } => shutdown(listener.as_raw_fd(), Shutdown::Both)?,
            // TCP cannot close the backlog alone. A connection that arrives between the last accept
            // and the close is reset, unless another process has the listener.
            Self::Unix { file: None, .. } | Self::Tcp { .. } => {}
        }
        let waiting = (0..BACKLOG).map(|_| self.accept_raw(listener.get_ref()));
        let waiting =
            waiting.take_while(|taken| taken.as_ref().err().is_none_or(is_per_connection_error));
        Ok(waiting.filter_map(Result::ok).collect())
    }

    /// Binds a new listener instead of one that was killed, as `ss -K` can do (T9).
    pub(super) async fn rebind(&self) -> Result<Self, ListenError> {
        match self {
            Self::Tcp {
                source: ListenerSource::Pod(pod),
                ..
            } => {
                let pod = pod.clone();
                Self::pod(on_blocking_thread(move || pod.rebind().map(|()| pod)).await?)
            }
            Self::Tcp { address, .. } => Self::tcp(*address, &mut ActivatedSockets::default()),
            Self::Unix { path, mode, .. } => {
                let (path, mode) = (path.clone(), *mode);
                // It waits for the lock of the file.
                on_blocking_thread(move || {
                    Self::unix(&path, mode, &mut ActivatedSockets::default())
                })
                .await
            }
        }
    }
}

async fn on_blocking_thread<T: Send + 'static>(
    bind: impl FnOnce() -> Result<T, ListenError> + Send + 'static,
) -> Result<T, ListenError> {
    let bound = tokio::task::spawn_blocking(bind).await;
    bound.map_err(|error| ListenError::Interrupted(error.to_string()))?
}

impl AcceptedStream {
    /// Returns the socket of the connection.
    pub fn socket(&self) -> &LazySocket {
        let (Self::Unix(stream) | Self::Tcp { stream, .. }) = self;
        stream
    }

    /// Takes the socket of the connection, without its addresses.
    pub fn into_socket(self) -> LazySocket {
        let (Self::Unix(stream) | Self::Tcp { stream, .. }) = self;
        stream
    }
}
