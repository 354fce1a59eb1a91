//! A listener inside a pod's network namespace.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::listen::ListenError;
use crate::listen::tcp::{FreeBind, bind, bound_buffers};
use crate::netns::{NamespaceError, NamespaceId, NetNs};

/// Where every SDK is told to ask, in every pod.
pub const POD_ADDRESSES: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), PORT),
];
/// Below 1024, so that a pod's unprivileged users can't have it where the kernel's default holds.
const PORT: u16 = 974;

/// A pod's network namespace, and where it is found. Nothing of it is kept open.
#[derive(Debug)]
pub struct NetnsRef {
    id: NamespaceId,
    /// One of its files; another one if that is removed.
    path: Mutex<PathBuf>,
}

/// A listener there. The one that accepts is replaced if it is killed.
#[derive(Debug)]
pub struct PodListener {
    place: Arc<NetnsRef>,
    address: SocketAddr,
    listener: Mutex<Arc<OwnedFd>>,
}

impl NetnsRef {
    /// Of this namespace.
    pub fn new(id: NamespaceId, path: PathBuf) -> Self {
        Self {
            id,
            path: Mutex::new(path),
        }
    }

    /// Which one it is.
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    /// One of its files.
    pub fn path(&self) -> PathBuf {
        lock(&self.path).clone()
    }

    /// Where it is found from now on.
    pub fn update_path(&self, path: &Path) {
        path.clone_into(&mut lock(&self.path));
    }

    /// Makes sockets there, if its file is still the same namespace's.
    pub fn run_in<T: Send>(&self, make: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        let namespace = NetNs::open(&self.path())?;
        if namespace.id() != self.id {
            return Err(NamespaceError::NotMounted);
        }
        namespace.run_in(make)
    }
}

impl PodListener {
    /// Listens; to be called within the namespace. The address may be one that it does not have yet: a loopback device has
    /// none before the pod's network is set up.
    pub fn bind(place: Arc<NetnsRef>, address: SocketAddr) -> io::Result<Self> {
        let listener = Mutex::new(Arc::new(bind(address, FreeBind::Allowed)?));
        Ok(Self {
            place,
            address,
            listener,
        })
    }

    /// With a listener that another daemon has made, with whatever buffers.
    pub fn with(place: Arc<NetnsRef>, address: SocketAddr, listener: OwnedFd) -> io::Result<Self> {
        bound_buffers(&listener)?;
        Ok(Self {
            place,
            address,
            listener: Mutex::new(Arc::new(listener)),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What accepts there.
    pub fn listener(&self) -> Arc<OwnedFd> {
        lock(&self.listener).clone()
    }

    /// Binds it again, in the place of one that was killed.
    pub(super) fn rebind(&self) -> Result<(), ListenError> {
        let bound = self
            .place
            .run_in(|| bind(self.address, FreeBind::Allowed))
            .map_err(|error| match error {
                NamespaceError::Io(error) => self.bind_error(error),
                other => self.bind_error(io::Error::other(other)),
            })?;
        *lock(&self.listener) = Arc::new(bound.map_err(|source| self.bind_error(source))?);
        Ok(())
    }

    pub(super) fn bind_error(&self, source: io::Error) -> ListenError {
        ListenError::Pod {
            name: self.to_string(),
            source,
        }
    }
}

impl fmt::Display for PodListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.address, self.place.path().display())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
