//! Verification that a unix socket is awsvid's. Another user's socket could return credentials of
//! another account, or read the requests.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt};
use thiserror::Error;
use tokio::time::Instant;

use super::local_client::{self, LocalError, LocalResponse};
use crate::listen::connect_unix;

const OWNER_FIX: &str =
    "the owner has to be root, as which awsvid runs; --same-user also trusts a daemon of your own";

/// Reason why a socket is not used, or the daemon behind it has not answered.
#[derive(Debug, Error)]
pub(super) enum SocketError {
    #[error("{path}: {error}; {}", fix_for(.error.kind()), path = path.display())]
    Failed { path: PathBuf, error: LocalError },
    /// The directory, the socket or its listener belongs to another user.
    #[error("{path}: not trusted: {what} uid {uid}; {OWNER_FIX}", path = path.display())]
    Foreign {
        path: PathBuf,
        what: &'static str,
        uid: u32,
    },
    #[error(
        "{path}: not trusted: other users can put their own socket into the directory; chmod go-w {directory}",
        path = path.display(),
        directory = directory_of(path).display()
    )]
    WritableDirectory { path: PathBuf },
    #[error("{path}: not a socket; give the socket of [listen] with --socket", path = path.display())]
    OtherFile { path: PathBuf },
}

fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Connects to the socket at `path` if its directory, its file and its listener belong to one of
/// `owners`. Waits until `deadline` for a daemon that is stopped, and blocks the thread meanwhile.
///
/// The kernel recorded the listener's uid when it began to listen. So a file that was swapped in
/// meanwhile gains nothing.
fn connect(path: &Path, owners: &[u32], deadline: Instant) -> Result<UnixStream, SocketError> {
    let at = || path.to_owned();
    let failed = |error: std::io::Error| SocketError::Failed {
        path: at(),
        error: error.into(),
    };
    let check_owner = |what, uid| match owners.contains(&uid) {
        true => Ok(()),
        false => Err(SocketError::Foreign {
            path: at(),
            what,
            uid,
        }),
    };
    let found = fs::metadata(directory_of(path)).map_err(failed)?;
    check_owner("the directory belongs to", found.uid())?;
    if found.mode() & 0o022 != 0 {
        return Err(SocketError::WritableDirectory { path: at() });
    }
    let found = fs::symlink_metadata(path).map_err(failed)?;
    if !found.file_type().is_socket() {
        return Err(SocketError::OtherFile { path: at() });
    }
    check_owner("the socket belongs to", found.uid())?;
    let max_wait = deadline.saturating_duration_since(Instant::now());
    if max_wait.is_zero() {
        return Err(failed(ErrorKind::TimedOut.into()));
    }
    let stream = connect_unix(path, max_wait).map_err(failed)?;
    let peer =
        getsockopt(&stream, sockopt::PeerCredentials).map_err(|errno| failed(errno.into()))?;
    check_owner("its listener runs as", peer.uid())?;
    Ok(stream)
}

/// Requests `what` from the daemon at `path`, by [`connect`] and [`local_client::get`].
pub(super) async fn get(
    path: &Path,
    owners: &[u32],
    what: &str,
    max_body: usize,
    deadline: Instant,
) -> Result<LocalResponse, SocketError> {
    let stream = connect(path, owners, deadline)?;
    let request = async {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        local_client::get(stream, what, max_body, deadline).await
    };
    request.await.map_err(|error| SocketError::Failed {
        path: path.to_owned(),
        error,
    })
}

fn fix_for(error: ErrorKind) -> &'static str {
    match error {
        ErrorKind::NotFound => {
            "start awsvid (systemctl start awsvid), or mount its socket into this container"
        }
        ErrorKind::ConnectionRefused => "start awsvid (systemctl start awsvid)",
        ErrorKind::PermissionDenied => {
            "use sudo, or correct the modes of the socket and of its directory"
        }
        _ => "find the cause in the log (journalctl -u awsvid)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    use nix::unistd::geteuid;

    use crate::listen::fill_backlog;

    #[test]
    fn connect_rejects_sockets_that_other_users_control() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let mode = |mode: u32| {
            fs::set_permissions(directory.path(), Permissions::from_mode(mode)).unwrap()
        };
        let own = geteuid().as_raw();
        let in_time = || Instant::now() + Duration::from_secs(20);
        let error = |owners: &[u32]| {
            let rejected = connect(&path, owners, in_time()).unwrap_err();
            rejected.to_string()
        };
        mode(0o755);
        assert!(error(&[own]).contains("start awsvid"));
        fs::write(&path, "").unwrap();
        assert!(error(&[own]).contains("not a socket"));
        fs::remove_file(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(connect(&path, &[own + 1, own], in_time()).is_ok());
        assert!(error(&[own + 1]).contains("the directory belongs to"));
        for writable in [0o775, 0o757, 0o1777] {
            mode(writable);
            assert!(error(&[own]).contains("chmod go-w"), "{writable:o}");
        }
        mode(0o755);
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let linked = connect(&link, &[own], in_time()).unwrap_err().to_string();
        assert!(linked.contains("not a socket"));
        // A stopped daemon, whose backlog local users have filled.
        let _waiting = fill_backlog(&listener, &path);
        let soon = Instant::now() + Duration::from_millis(20);
        let stopped = connect(&path, &[own], soon).unwrap_err().to_string();
        assert!(stopped.contains("journalctl -u awsvid"), "{stopped}");
        drop(listener);
        assert!(error(&[own]).contains("systemctl start awsvid"));
    }
}
