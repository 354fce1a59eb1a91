//! A listener inside a pod's network namespace.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::listen::ListenError;
use crate::listen::tcp::{BindOptions, bind, bound_buffers, is_loopback_only};
use crate::netns::{NamespaceError, NamespaceId, NetNs};

/// The addresses of the credential endpoint in every pod.
pub const POD_ADDRESSES: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), POD_PORT),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), POD_PORT),
];
/// The port of the endpoint in every pod. It is below 1024, so that under the kernel's default a
/// pod's unprivileged users cannot bind it.
pub const POD_PORT: u16 = 974;

/// The addresses of EC2's instance metadata service.
pub const METADATA_ADDRESSES: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), 80),
    SocketAddr::new(
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
        80,
    ),
];

/// Returns whether a listener at this address serves the instance metadata service alone.
pub fn is_metadata_address(address: SocketAddr) -> bool {
    METADATA_ADDRESSES.contains(&address)
}

/// Returns the options of a pod's listener. The metadata address is also that of other hosts, if a
/// route leads from them to the pod.
fn bind_options(address: SocketAddr) -> BindOptions {
    BindOptions {
        free_bind: true,
        loopback_only: is_metadata_address(address),
    }
}

/// Returns whether this is an address of EC2's instance metadata service.
pub fn is_metadata_ip(ip: IpAddr) -> bool {
    METADATA_ADDRESSES.iter().any(|address| address.ip() == ip)
}

/// A reference to a pod's network namespace by one of its files. It keeps no descriptor open.
#[derive(Debug)]
pub struct NetnsRef {
    id: NamespaceId,
    /// One of the namespace's files; replaced by another if that is removed.
    path: Mutex<PathBuf>,
}

/// A listener in a pod's network namespace. Its socket is replaced if it is killed.
#[derive(Debug)]
pub struct PodListener {
    netns: Arc<NetnsRef>,
    address: SocketAddr,
    listener: Mutex<Arc<OwnedFd>>,
}

impl NetnsRef {
    /// Creates a reference to the namespace `id`, which is found at `path`.
    pub fn new(id: NamespaceId, path: PathBuf) -> Self {
        Self {
            id,
            path: Mutex::new(path),
        }
    }

    /// Returns the identifier of the namespace.
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    /// Returns one of the namespace's files.
    pub fn path(&self) -> PathBuf {
        lock(&self.path).clone()
    }

    /// Sets the file at which the namespace is found from now on.
    pub fn update_path(&self, path: &Path) {
        path.clone_into(&mut lock(&self.path));
    }

    /// Runs `make` in the namespace. Fails if the file now belongs to another namespace.
    pub fn run_in<T: Send>(&self, make: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        let namespace = NetNs::open(&self.path())?;
        if namespace.id() != self.id {
            return Err(NamespaceError::NotMounted);
        }
        namespace.run_in(make)
    }
}

impl PodListener {
    /// Binds and listens. Call it within the namespace. The address may not exist there yet: a
    /// loopback device has none before the pod's network is set up.
    pub fn bind(netns: Arc<NetnsRef>, address: SocketAddr) -> io::Result<Self> {
        let listener = Mutex::new(Arc::new(bind(address, bind_options(address))?));
        Ok(Self {
            netns,
            address,
            listener,
        })
    }

    /// Wraps a listener that another instance of awsvid made, and bounds its buffers. Fails if it
    /// has the metadata address, and hosts other than the pod can reach it.
    pub fn with(
        netns: Arc<NetnsRef>,
        address: SocketAddr,
        listener: Arc<OwnedFd>,
    ) -> io::Result<Self> {
        bound_buffers(&listener)?;
        if is_metadata_address(address) && !is_loopback_only(&listener)? {
            return Err(io::Error::other("it is not bound to the loopback device"));
        }
        Ok(Self {
            netns,
            address,
            listener: Mutex::new(listener),
        })
    }

    /// Returns the address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the socket that accepts now.
    pub fn listener(&self) -> Arc<OwnedFd> {
        lock(&self.listener).clone()
    }

    /// Binds a new socket instead of one that was killed.
    pub(super) fn rebind(&self) -> Result<(), ListenError> {
        let bound = self
            .netns
            .run_in(|| bind(self.address, bind_options(self.address)))
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
        write!(f, "{} in {}", self.address, self.netns.path().display())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
