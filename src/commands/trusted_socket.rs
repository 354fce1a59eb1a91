//! Verification that a unix socket is awsvid's. Another user's socket could return credentials of
//! another account, or read the requests.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::sys::socket::{getsockopt, sockopt};

use super::http_client::{self, LocalResponse};

/// Connects to the socket at `path` if its directory, its file and its listener belong to one of
/// `owners`.
///
/// The kernel recorded the listener's uid when it began to listen. So a file that was swapped in
/// meanwhile gains nothing.
fn connect(path: &Path, owners: &[u32]) -> Result<UnixStream, String> {
    let at = path.display();
    let failed = |error: io::Error| format!("{at}: {}", explain_connect_error(&error));
    let foreign = |what: &str, uid: u32| {
        let fix = "the owner has to be root, as which awsvid runs; --same-user also trusts a daemon of your own";
        Err(format!("{at}: not trusted: {what} uid {uid}; {fix}"))
    };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let found = fs::metadata(directory).map_err(failed)?;
    if !owners.contains(&found.uid()) {
        return foreign("the directory belongs to", found.uid());
    }
    if found.mode() & 0o022 != 0 {
        let fix = format!("chmod go-w {}", directory.display());
        return Err(format!(
            "{at}: not trusted: other users can put their own socket into the directory; {fix}"
        ));
    }
    let found = fs::symlink_metadata(path).map_err(failed)?;
    if !found.file_type().is_socket() {
        return Err(format!(
            "{at}: not a socket; give the socket of [listen] with --socket"
        ));
    }
    if !owners.contains(&found.uid()) {
        return foreign("the socket belongs to", found.uid());
    }
    let stream = UnixStream::connect(path).map_err(failed)?;
    let peer =
        getsockopt(&stream, sockopt::PeerCredentials).map_err(|errno| failed(errno.into()))?;
    if !owners.contains(&peer.uid()) {
        return foreign("its listener runs as", peer.uid());
    }
    Ok(stream)
}

/// Requests `what` from the daemon at `path`, by [`connect`] and [`http_client::get`].
pub(super) fn get(
    path: &Path,
    owners: &[u32],
    what: &str,
    most: usize,
    deadline: Instant,
) -> Result<LocalResponse, String> {
    let stream = connect(path, owners)?;
    http_client::get(stream, what, most, deadline)
        .map_err(|error| format!("{}: {}", path.display(), explain_connect_error(&error)))
}

/// Returns the error with its fix.
fn explain_connect_error(error: &io::Error) -> String {
    let fix = match error.kind() {
        ErrorKind::NotFound => {
            "start awsvid (systemctl start awsvid), or mount its socket into this container"
        }
        ErrorKind::ConnectionRefused => "start awsvid (systemctl start awsvid)",
        ErrorKind::PermissionDenied => {
            "use sudo, or correct the modes of the socket and of its directory"
        }
        ErrorKind::TimedOut => "find the cause in the log (journalctl -u awsvid)",
        _ => "find the cause in the log (journalctl -u awsvid)",
    };
    format!("{error}; {fix}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use nix::unistd::geteuid;

    #[test]
    fn connect_rejects_sockets_that_other_users_control() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let mode = |mode: u32| {
            fs::set_permissions(directory.path(), Permissions::from_mode(mode)).unwrap()
        };
        let own = geteuid().as_raw();
        let error = |owners: &[u32]| connect(&path, owners).unwrap_err();
        mode(0o755);
        assert!(error(&[own]).contains("start awsvid"));
        fs::write(&path, "").unwrap();
        assert!(error(&[own]).contains("not a socket"));
        fs::remove_file(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(connect(&path, &[own + 1, own]).is_ok());
        assert!(error(&[own + 1]).contains("the directory belongs to"));
        for writable in [0o775, 0o757, 0o1777] {
            mode(writable);
            assert!(error(&[own]).contains("chmod go-w"), "{writable:o}");
        }
        mode(0o755);
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(connect(&link, &[own]).unwrap_err().contains("not a socket"));
        drop(listener);
        assert!(error(&[own]).contains("systemctl start awsvid"));
    }
}
