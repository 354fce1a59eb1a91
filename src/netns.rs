//! Network namespaces of pods. A container runtime mounts each on a file, and the daemon enters
//! them only to create sockets.
//!
//! Any open descriptor keeps a namespace alive. So the file is opened, used, and closed again.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use thiserror::Error;

/// The namespace of the calling thread.
const OWN_NETNS: &str = "/proc/thread-self/ns/net";

/// The inode of the machine's initial network namespace since Linux 6.17 (`NET_NS_INIT_INO` of
/// linux/nsfs.h).
const FIRST_INODE: u64 = 0xEFFF_FFF9;
/// The cookie of the initial network namespace, on kernels that count network namespaces
/// separately, from 1 on. Since Linux 6.18 all kinds of namespaces share one counter, and this
/// value is that of another kind.
const FIRST_COOKIE: u64 = 1;

/// The identity of a namespace, whatever its files are called. The number may be reused once the
/// namespace is freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

/// An open network namespace, which can be entered.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    id: NamespaceId,
}

/// The reason why a namespace cannot be used.
#[derive(Debug, Error)]
pub enum NamespaceError {
    /// No namespace is mounted on the file. The runtime creates a file first, and mounts the
    /// namespace on it some milliseconds later.
    #[error("no network namespace is mounted on it")]
    NotMounted,
    /// The kernel denied `setns(2)`, which requires `CAP_SYS_ADMIN`.
    #[error("the daemon may not enter network namespaces: {0}")]
    Denied(io::Error),
    /// The namespace is the machine's initial one, which belongs to no pod.
    #[error("it is the machine's own network")]
    Initial,
    /// Any other error of a system call.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl NamespaceId {
    /// Returns the namespace of the calling thread, which is the daemon's.
    pub fn own() -> io::Result<Self> {
        Ok(Self::of(&std::fs::metadata(OWN_NETNS)?))
    }

    /// Returns the namespace that is mounted on the file. `None` if none is, or if the file is a
    /// link, which does not show when the namespace ends. `own` provides the device that all
    /// namespaces are on. Fails if the file cannot be opened.
    pub fn at(path: &Path, own: Self) -> io::Result<Option<Self>> {
        let found = Self::of(&std::fs::symlink_metadata(path)?);
        Ok((found.device == own.device).then_some(found))
    }

    /// Returns whether it is the machine's initial namespace.
    ///
    /// The node and all pods with `hostNetwork` share it. They may read each other's responses on
    /// its loopback device (T5). `cookie` is its `SO_NETNS_COOKIE`, which kernels before 5.14 do
    /// not have.
    pub fn is_initial(self, cookie: Option<u64>) -> bool {
        self.inode == FIRST_INODE || cookie == Some(FIRST_COOKIE)
    }

    /// The length of [`Self::to_bytes`] in bytes.
    pub const LENGTH: usize = 16;

    /// Serializes the identity for another process on this machine.
    pub fn to_bytes(self) -> [u8; Self::LENGTH] {
        ((u128::from(self.device) << 64) | u128::from(self.inode)).to_ne_bytes()
    }

    /// Reads an identity from another process on this machine.
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
    /// Opens the namespace of the calling thread.
    pub fn own() -> Result<Self, NamespaceError> {
        Self::of(File::open(OWN_NETNS)?)
    }

    /// Opens the namespace that is mounted on this file. Fails if nothing is mounted there, or if
    /// it is not a network namespace.
    pub fn open(path: &Path) -> Result<Self, NamespaceError> {
        // If the file is of another kind, the open neither blocks nor follows a link.
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

    /// Returns the identity of the namespace.
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    /// Runs `make` inside the namespace, only to create sockets there. It runs on a thread of its
    /// own, since a namespace belongs to a thread. Fails if the namespace cannot be entered.
    pub fn run_in<T: Send>(&self, make: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        let enter = || {
            let own = File::open(OWN_NETNS)?;
            match setns(&self.file, CloneFlags::CLONE_NEWNET) {
                Ok(()) => {}
                Err(error @ (Errno::EPERM | Errno::EACCES)) => {
                    return Err(NamespaceError::Denied(error.into()));
                }
                // A namespace of another kind than network.
                Err(Errno::EINVAL) => return Err(NamespaceError::NotMounted),
                Err(error) => return Err(io::Error::from(error).into()),
            }
            let _home = RestoreGuard(own);
            Ok(make())
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("awsvid-netns".to_owned())
                .spawn_scoped(scope, enter)?;
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// A guard that returns its thread to the previous namespace, also after a panic.
struct RestoreGuard(File);

impl Drop for RestoreGuard {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.0, CloneFlags::CLONE_NEWNET) {
            // The thread would run its next work in a pod.
            tracing::error!(%error, "cannot leave a pod's network namespace; aborting");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests;
