//! Whether a unix socket is awsvid's: somebody else's would hand out credentials of *his* account, or hear what is asked.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::sys::socket::{getsockopt, sockopt};

use super::http_client::{self, LocalResponse};

/// Connects to the socket at `path` if it belongs to one of `owners`: directory, file, and whoever listens on it.
///
/// The listener's uid is what the kernel recorded when it began to listen, so a file that was swapped in between is of no
/// use to anybody.
fn connect(path: &Path, owners: &[u32]) -> Result<UnixStream, String> {
    let at = path.display();
    let failed = |error: io::Error| format!("{at}: {}", explain_connect_error(&error));
    let foreign = |what: &str, uid: u32| {
        let fix =
            "it has to be root, as whom awsvid runs; --same-user also trusts a daemon of your own";
        Err(format!(
            "{at}: {what} uid {uid}, so what is there is not trusted; {fix}"
        ))
    };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let found = fs::metadata(directory).map_err(failed)?;
    if !owners.contains(&found.uid()) {
        return foreign("the directory belongs to", found.uid());
    }
    if found.mode() & 0o022 != 0 {
        let fix = format!("chmod go-w {}", directory.display());
        return Err(format!(
            "{at}: others than its owner can put a socket of their own into the directory; {fix}"
        ));
    }
    let found = fs::symlink_metadata(path).map_err(failed)?;
    if !found.file_type().is_socket() {
        return Err(format!(
            "{at}: this is no socket; name that of [listen] with --socket"
        ));
    }
    if !owners.contains(&found.uid()) {
        return foreign("the socket belongs to", found.uid());
    }
    let stream = UnixStream::connect(path).map_err(failed)?;
    let peer =
        getsockopt(&stream, sockopt::PeerCredentials).map_err(|errno| failed(errno.into()))?;
    if !owners.contains(&peer.uid()) {
        return foreign("whoever listens there is", peer.uid());
    }
    Ok(stream)
}

/// Asks the daemon whose socket is at `path`, as [`connect`] and [`http_client::get`] do it.
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

/// The error and what to do about it.
fn explain_connect_error(error: &io::Error) -> String {
    let fix = match error.kind() {
        ErrorKind::NotFound => {
            "is awsvid installed and running here (systemctl status awsvid)? In a container its socket has to be mounted"
        }
        ErrorKind::ConnectionRefused => "nobody listens there: systemctl start awsvid",
        ErrorKind::PermissionDenied => {
            "this user may not open it: use sudo, or see the modes of the socket and of its directory"
        }
        ErrorKind::TimedOut => "awsvid does not answer: journalctl -u awsvid",
        _ => "journalctl -u awsvid may say more",
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
    fn only_what_is_its_owners_alone_is_connected_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let mode = |mode: u32| {
            fs::set_permissions(directory.path(), Permissions::from_mode(mode)).unwrap()
        };
        let own = geteuid().as_raw();
        let error = |owners: &[u32]| connect(&path, owners).unwrap_err();
        mode(0o755);
        assert!(error(&[own]).contains("is awsvid installed"));
        fs::write(&path, "").unwrap();
        assert!(error(&[own]).contains("no socket"));
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
        assert!(connect(&link, &[own]).unwrap_err().contains("no socket"));
        drop(listener);
        assert!(error(&[own]).contains("systemctl start awsvid"));
    }
}
