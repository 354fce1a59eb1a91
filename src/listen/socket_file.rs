//! The file of a unix socket: created safely, and removed at the end.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use crate::listen::{ListenError, connect_unix};

/// The file of a listening unix socket, which is removed on drop.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: u64,
    /// Held for the daemon's life, so that two starts at the same time cannot both find the file
    /// stale. `None` if a process holds the lock that does not listen.
    lock: Option<Flock<File>>,
}

/// The mode of a directory in which clients find their sockets.
const MODE_PUBLIC: u32 = 0o755;
/// The mode of a directory that only the daemon may enter.
const MODE_PRIVATE: u32 = 0o700;
/// The longest wait for the lock. A daemon needs far less time between taking it and listening.
const LOCK_TIMEOUT: Duration = Duration::from_millis(200);
const LOCK_POLL: Duration = Duration::from_millis(5);

impl SocketFile {
    /// Listens on `path` with `mode`. Replaces the file of a process that has ended, and fails if a
    /// process still serves it.
    pub fn bind(path: &Path, mode: u32) -> Result<(UnixListener, Self), ListenError> {
        Self::bind_in_dir(MODE_PUBLIC, path, mode)
    }

    /// Listens on a socket for other instances of awsvid, in a directory that only they may enter.
    /// Does not wait: only another instance can hold the lock there.
    pub fn bind_private(path: &Path) -> Result<(UnixListener, Self), ListenError> {
        Self::bind_in_dir(MODE_PRIVATE, path, 0o600)
    }

    fn bind_in_dir(
        directory_mode: u32,
        path: &Path,
        mode: u32,
    ) -> Result<(UnixListener, Self), ListenError> {
        let failed = |source: io::Error| ListenError::Unix {
            path: path.to_owned(),
            source,
        };
        let in_use = || ListenError::InUse {
            path: path.to_owned(),
        };
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(directory_mode)
            .create(directory)
            .map_err(failed)?;
        check_directory(directory, directory_mode)?;
        let name = with_suffix(path, ".lock");
        let lock = loop {
            let lock = open_lock(&name).map_err(failed)?;
            let lock = match directory_mode {
                MODE_PRIVATE => Some(Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(
                    |(_, error)| match error {
                        Errno::EWOULDBLOCK => in_use(),
                        error => failed(error.into()),
                    },
                )?),
                _ => take_lock(lock, path)?,
            };
            // The previous holder removes the file at its end, possibly after this process has
            // opened it.
            if lock.as_ref().is_none_or(|lock| is_at(lock, &name)) {
                break lock;
            }
        };
        // Another daemon has no lock file if systemd holds its socket.
        if is_served(path) {
            return Err(in_use());
        }
        let is_other = |found: fs::Metadata| !found.file_type().is_socket();
        if fs::symlink_metadata(path).is_ok_and(is_other) {
            return Err(failed(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "the file exists and is not a socket; remove it",
            )));
        }
        // The socket is created under another name first. Clients see it with its final mode, or
        // not at all.
        let new = with_suffix(path, ".new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&new).map_err(failed)?;
        fs::set_permissions(&new, Permissions::from_mode(mode)).map_err(failed)?;
        let inode = fs::symlink_metadata(&new).map_err(failed)?.ino();
        fs::rename(&new, path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok((
            listener,
            Self {
                path: path.to_owned(),
                inode,
                lock,
            },
        ))
    }
}

/// Returns whether a process listens on the socket at `path`. It may be stopped, with a full
/// backlog.
fn is_served(path: &Path) -> bool {
    connect_unix(path, Duration::ZERO)
        .map_or_else(|error| error.kind() == io::ErrorKind::TimedOut, |_| true)
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// Returns whether `file` is the file at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let inode =
        |found: io::Result<fs::Metadata>| found.ok().map(|found| (found.dev(), found.ino()));
    let opened = inode(file.metadata());
    opened.is_some() && opened == inode(fs::symlink_metadata(path))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Takes the lock, unless a daemon holds it.
///
/// A container in which the directory is mounted, even read-only, can take the lock too. That must
/// not stop the daemon from starting, so a holder counts only if it listens.
#[expect(
    clippy::disallowed_methods,
    reason = "a bind waits at most 200 ms for the lock"
)]
fn take_lock(mut lock: File, path: &Path) -> Result<Option<Flock<File>>, ListenError> {
    let start = Instant::now();
    loop {
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err(_) if is_served(path) => {
                return Err(ListenError::InUse {
                    path: path.to_owned(),
                });
            }
            Err(_) if start.elapsed() >= LOCK_TIMEOUT => {
                tracing::warn!(
                    path = %path.display(),
                    "ignoring the socket's lock: its holder does not listen"
                );
                return Ok(None);
            }
            Err((file, _)) => lock = file,
        }
        thread::sleep(LOCK_POLL);
    }
}

/// Rejects a directory in which other users may rename files: they could put a fake server in the
/// socket's path (T12).
fn check_directory(directory: &Path, mode: u32) -> Result<(), ListenError> {
    let failed = |source: io::Error| ListenError::Unix {
        path: directory.to_owned(),
        source,
    };
    let found = fs::metadata(directory).map_err(failed)?;
    let owned = found.uid() == 0 || found.uid() == geteuid().as_raw();
    if owned && found.mode() & 0o777 & !mode == 0 {
        Ok(())
    } else {
        Err(ListenError::UnsafeDirectory {
            path: directory.to_owned(),
            mode,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // The file may be a newer socket's by now.
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
        // The lock file is removed while it is locked, so that the next daemon creates a new one.
        let lock = with_suffix(&self.path, ".lock");
        if self.lock.as_ref().is_some_and(|held| is_at(held, &lock)) {
            let _ = fs::remove_file(lock);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listen::fill_backlog;

    fn safe_directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        directory
    }

    #[test]
    fn bind_replaces_a_stale_socket_and_not_a_served_one() {
        let directory = safe_directory();
        let path = directory.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (_listener, file) = SocketFile::bind(&path, 0o666).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o666);
        assert!(matches!(
            SocketFile::bind(&path, 0o666),
            Err(ListenError::InUse { .. })
        ));
        drop(file);
        assert!(!path.exists());
        // A process holds the socket without a lock file, as systemd does.
        let _held = UnixListener::bind(&path).unwrap();
        assert!(matches!(
            SocketFile::bind(&path, 0o666),
            Err(ListenError::InUse { .. })
        ));
    }

    /// The other process is stopped, and local users have filled its backlog.
    #[test]
    fn bind_rejects_a_socket_with_a_full_backlog() {
        let directory = safe_directory();
        let path = directory.path().join("a.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let _waiting = fill_backlog(&listener, &path);
        let is_in_use = || {
            let (result, bound) = (std::sync::mpsc::channel(), path.clone());
            thread::spawn(move || result.0.send(SocketFile::bind(&bound, 0o666).map(drop)));
            let bound = result.1.recv_timeout(Duration::from_secs(20));
            matches!(bound, Ok(Err(ListenError::InUse { .. })))
        };
        assert!(is_in_use());
        let lock = File::create(with_suffix(&path, ".lock")).unwrap();
        let _held = Flock::lock(lock, FlockArg::LockExclusiveNonblock).unwrap();
        assert!(is_in_use());
    }

    #[test]
    fn bind_rejects_other_files_and_unsafe_directories() {
        let directory = safe_directory();
        let path = directory.path().join("a.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            SocketFile::bind(&path, 0o666),
            Err(ListenError::Unix { .. })
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            SocketFile::bind(&directory.path().join("b.sock"), 0o666),
            Err(ListenError::UnsafeDirectory { .. })
        ));
    }

    #[test]
    fn held_lock_without_listener_does_not_block_bind() {
        let directory = safe_directory();
        let path = directory.path().join("a.sock");
        drop(SocketFile::bind(&path, 0o666).unwrap());
        // Opened read-only, as a container does that only connects.
        File::create(with_suffix(&path, ".lock")).unwrap();
        let file = File::open(with_suffix(&path, ".lock")).unwrap();
        let _taken = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
        let (_listener, _file) = SocketFile::bind(&path, 0o666).unwrap();
        assert!(matches!(
            SocketFile::bind(&path, 0o666),
            Err(ListenError::InUse { .. })
        ));
    }

    #[test]
    fn private_bind_creates_its_directory_and_rejects_open_ones() {
        let directory = safe_directory();
        let closed = directory.path().join("closed");
        let (_listener, _file) = SocketFile::bind_private(&closed.join("a.sock")).unwrap();
        assert_eq!(fs::metadata(&closed).unwrap().mode() & 0o777, 0o700);
        for mode in [0o755, 0o710, 0o701] {
            fs::set_permissions(&closed, Permissions::from_mode(mode)).unwrap();
            let rejected = SocketFile::bind_private(&closed.join("b.sock"));
            assert!(
                matches!(
                    rejected,
                    Err(ListenError::UnsafeDirectory { mode: 0o700, .. })
                ),
                "{mode:o}"
            );
        }
    }

    #[test]
    fn private_bind_fails_while_the_lock_is_held() {
        let directory = safe_directory();
        let path = directory.path().join("closed/a.sock");
        drop(SocketFile::bind_private(&path).unwrap());
        File::create(with_suffix(&path, ".lock")).unwrap();
        let taken = Flock::lock(
            File::open(with_suffix(&path, ".lock")).unwrap(),
            FlockArg::LockExclusiveNonblock,
        )
        .unwrap();
        assert!(matches!(
            SocketFile::bind_private(&path),
            Err(ListenError::InUse { .. })
        ));
        drop(taken);
        SocketFile::bind_private(&path).unwrap();
    }

    #[test]
    fn concurrent_binds_exclude_each_other_and_leave_no_files() {
        let directory = safe_directory();
        let path = directory.path().join("a.sock");
        let bound = std::sync::atomic::AtomicUsize::new(0);
        // Each holder is the only one, although the lock file is removed with each of them.
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        if let Ok(held) = SocketFile::bind(&path, 0o666) {
                            assert!(matches!(
                                SocketFile::bind(&path, 0o666),
                                Err(ListenError::InUse { .. })
                            ));
                            bound.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            drop(held);
                        }
                    }
                });
            }
        });
        assert!(bound.into_inner() >= 1);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn drop_keeps_the_file_of_another_socket() {
        let directory = safe_directory();
        let path = directory.path().join("a.sock");
        let (_listener, file) = SocketFile::bind(&path, 0o600).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
    }
}
