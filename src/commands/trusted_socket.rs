//! Verification that a unix socket is awsvid's. Another user's socket could return credentials of
//! another account, or read the requests.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use serde_json::Value;
use thiserror::Error;
use tokio::time::Instant;

use super::local_client::{self, LocalError, LocalResponse};
use crate::listen::connect_unix;

/// Maximum size of the status. Ten thousand entries need some ten megabytes.
const MAX_STATUS: usize = 256 * 1024 * 1024;

/// A socket that is not used, or whose daemon has not answered.
#[derive(Debug, Error)]
#[error("{}: {cause}; {}", path.display(), self.fix())]
pub(super) struct SocketError {
    pub(super) path: PathBuf,
    pub(super) cause: SocketErrorCause,
}

/// Reason why a socket is not used, or the daemon behind it has not answered.
#[derive(Debug, Error)]
pub(super) enum SocketErrorCause {
    #[error(transparent)]
    Failed(#[from] LocalError),
    /// The directory, the socket or its listener belongs to another user.
    #[error("not trusted: {what} uid {uid}")]
    Foreign { what: &'static str, uid: u32 },
    #[error("not trusted: other users can put their own socket into the directory")]
    WritableDirectory,
    #[error("not a socket")]
    OtherFile,
    #[error("unexpected response with status {status}: not from awsvid")]
    Unexpected { status: u16 },
}

impl From<io::Error> for SocketErrorCause {
    fn from(error: io::Error) -> Self {
        LocalError::from(error).into()
    }
}

impl SocketError {
    /// Returns whether the deadline ended the request.
    pub(super) fn is_timeout(&self) -> bool {
        matches!(&self.cause, SocketErrorCause::Failed(error) if error.kind() == ErrorKind::TimedOut)
    }

    /// Returns what the user can do.
    pub(super) fn fix(&self) -> String {
        let fix = match &self.cause {
            SocketErrorCause::Failed(error) => fix_for(error.kind()),
            SocketErrorCause::Foreign { .. } => {
                "the owner has to be root, as which awsvid runs; --same-user also trusts a daemon of your own"
            }
            SocketErrorCause::WritableDirectory => {
                return format!("chmod go-w {}", directory_of(&self.path).display());
            }
            SocketErrorCause::OtherFile => "give the socket of [listen] with --socket",
            SocketErrorCause::Unexpected { .. } => "give the right --socket",
        };
        fix.to_owned()
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Connects to the socket at `path` if its directory, its file and its listener belong to one of
/// `owners`. Waits until `deadline` for a daemon that is stopped, and blocks the thread meanwhile.
///
/// The kernel recorded the listener's uid when it began to listen. So a file that was swapped in
/// meanwhile gains nothing.
fn connect(path: &Path, owners: &[u32], deadline: Instant) -> Result<UnixStream, SocketErrorCause> {
    let check_owner = |what, uid| match owners.contains(&uid) {
        true => Ok(()),
        false => Err(SocketErrorCause::Foreign { what, uid }),
    };
    let found = fs::metadata(directory_of(path))?;
    check_owner("the directory belongs to", found.uid())?;
    if found.mode() & 0o022 != 0 {
        return Err(SocketErrorCause::WritableDirectory);
    }
    let found = fs::symlink_metadata(path)?;
    if !found.file_type().is_socket() {
        return Err(SocketErrorCause::OtherFile);
    }
    check_owner("the socket belongs to", found.uid())?;
    let max_wait = deadline.saturating_duration_since(Instant::now());
    if max_wait.is_zero() {
        return Err(io::Error::from(ErrorKind::TimedOut).into());
    }
    let stream = connect_unix(path, max_wait)?;
    let peer = getsockopt(&stream, sockopt::PeerCredentials).map_err(io::Error::from)?;
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
    let request = async {
        let stream = connect(path, owners, deadline)?;
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        Ok(local_client::get(stream, what, max_body, deadline).await?)
    };
    request.await.map_err(|cause| SocketError {
        path: path.to_owned(),
        cause,
    })
}

/// Requests `what` from the daemon of root or of this user at `path`, for at most `timeout`.
pub(super) async fn get_of_operator(
    path: &Path,
    what: &str,
    max_body: usize,
    timeout: Duration,
) -> Result<LocalResponse, SocketError> {
    let owners = [0, geteuid().as_raw()];
    get(path, &owners, what, max_body, Instant::now() + timeout).await
}

/// Requests the status from the daemon at the status socket `path`, for at most `timeout`.
pub(super) async fn get_status(path: &Path, timeout: Duration) -> Result<Value, SocketError> {
    let response = get_of_operator(path, "/status", MAX_STATUS, timeout).await?;
    let status = serde_json::from_slice(&response.body)
        .ok()
        .filter(|_| response.status == 200);
    status.ok_or_else(|| SocketError {
        path: path.to_owned(),
        cause: SocketErrorCause::Unexpected {
            status: response.status,
        },
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
        let rejected = |path: &Path, owners: &[u32], deadline| {
            let error = SocketError {
                path: path.to_owned(),
                cause: connect(path, owners, deadline).unwrap_err(),
            };
            error.to_string()
        };
        let error = |owners: &[u32]| rejected(&path, owners, in_time());
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
        let linked = rejected(&link, &[own], in_time());
        assert!(linked.contains("not a socket"));
        // A stopped daemon, whose backlog local users have filled.
        let _waiting = fill_backlog(&listener, &path);
        let soon = Instant::now() + Duration::from_millis(20);
        let stopped = rejected(&path, &[own], soon);
        assert!(stopped.contains("journalctl -u awsvid"), "{stopped}");
        drop(listener);
        assert!(error(&[own]).contains("systemctl start awsvid"));
    }
}
