//! Network namespaces of pods: files on which a container runtime has mounted one, entered only to make sockets.
//!
//! Whatever is open of a namespace keeps it alive, this file too: it is opened, used, and closed again.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use thiserror::Error;

/// The calling thread's own.
const OWN: &str = "/proc/thread-self/ns/net";

/// The machine's first network namespace, by the inode that it has since Linux 6.17 (`NET_NS_INIT_INO` of linux/nsfs.h) ...
const FIRST_INODE: u64 = 0xEFFF_FFF9;
/// ... and by its cookie, as long as network namespaces are counted alone: from 1 on. Since Linux 6.18 namespaces of all kinds
/// are counted together, and this is one of the first of another kind.
const FIRST_COOKIE: u64 = 1;

/// Which namespace it is, whatever its files are called. Another one may have the same number once this one is freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

/// A namespace that can be entered.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    id: NamespaceId,
}

/// Why a namespace can't be had.
#[derive(Debug, Error)]
pub enum NamespaceError {
    /// The runtime makes a file first, and mounts the namespace on it some milliseconds later.
    #[error("no network namespace is mounted on it")]
    NotMounted,
    /// `setns(2)` asks for `CAP_SYS_ADMIN`.
    #[error("the daemon may not enter network namespaces: {0}")]
    Denied(io::Error),
    /// It is the one in which the machine has started, which is no pod's.
    #[error("it is the machine's own network")]
    Machines,
    /// Anything else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl NamespaceId {
    /// That of the calling thread, which is the daemon's.
    pub fn own() -> io::Result<Self> {
        Ok(Self::of(&std::fs::metadata(OWN)?))
    }

    /// That of the namespace which is mounted on the file; `None` if none is, or if it is a link: that says nothing about
    /// when the namespace ends. `own` tells the device on which all namespaces are.
    pub fn at(path: &Path, own: Self) -> io::Result<Option<Self>> {
        let found = Self::of(&std::fs::symlink_metadata(path)?);
        Ok((found.device == own.device).then_some(found))
    }

    /// Whether it is the one in which the machine has started: that of the node and of all pods with `hostNetworkSettings`, who may
    /// read each other's answers on its loopback device (attack 5). `cookie` is its `SO_NETNS_COOKIE`, which kernels before
    /// 5.14 do not have.
    pub fn is_initial(self, cookie: Option<u64>) -> bool {
        self.inode == FIRST_INODE || cookie == Some(FIRST_COOKIE)
    }

    /// Of [`Self::to_bytes`].
    pub const LENGTH: usize = 16;

    /// For another process on this machine.
    pub fn to_bytes(self) -> [u8; Self::LENGTH] {
        ((u128::from(self.device) << 64) | u128::from(self.inode)).to_ne_bytes()
    }

    /// From another process on this machine.
    pub fn from_bytes(bytes: [u8; Self::LENGTH]) -> Self {
        let [device, inode] =
            [64, 0].map(|shift| u128::from_ne_bytes(bytes) >> shift & u128::from(u64::MAX));
        Self {
            device: u64::try_from(device).unwrap_or(0),
            inode: u64::try_from(inode).unwrap_or(0),
        }
    }

    fn of(found: &Metadata) -> Self {
        Self {
            device: found.dev(),
            inode: found.ino(),
        }
    }
}

impl NetNs {
    /// The calling thread's own.
    pub fn own() -> Result<Self, NamespaceError> {
        Self::of(File::open(OWN)?)
    }

    /// The one that is mounted on this file.
    pub fn open(path: &Path) -> Result<Self, NamespaceError> {
        // Whatever it is instead, opening it neither waits nor leads elsewhere.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path);
        match opened {
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
                Err(NamespaceError::NotMounted)
            }
            opened => Self::of(opened?),
        }
    }

    fn of(file: File) -> Result<Self, NamespaceError> {
        if fstatfs(&file).map_err(io::Error::from)?.filesystem_type() != NSFS_MAGIC {
            return Err(NamespaceError::NotMounted);
        }
        let id = NamespaceId::of(&file.metadata()?);
        Ok(Self { file, id })
    }

    /// Which one it is.
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    /// Runs `make` inside, to make sockets there and nothing else. On a thread of its own, since a namespace is a thread's:
    /// nothing else ever runs in it.
    pub fn run_in<T: Send>(&self, make: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        let inside = || {
            let own = File::open(OWN)?;
            match setns(&self.file, CloneFlags::CLONE_NEWNET) {
                Ok(()) => {}
                Err(error @ (Errno::EPERM | Errno::EACCES)) => {
                    return Err(NamespaceError::Denied(error.into()));
                }
                // A namespace of another kind.
                Err(Errno::EINVAL) => return Err(NamespaceError::NotMounted),
                Err(error) => return Err(io::Error::from(error).into()),
            }
            let _home = RestoreGuard(own);
            Ok(make())
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("namespace".to_owned())
                .spawn_scoped(scope, inside)?;
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Where a thread goes back to, also from a panic.
struct RestoreGuard(File);

impl Drop for RestoreGuard {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.0, CloneFlags::CLONE_NEWNET) {
            // Whatever this thread did next would happen in a pod.
            tracing::error!(%error, "a thread cannot leave a pod's network namespace; ending");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests;
