//! A client process: its cgroup, its user, its number of descriptors; and one request on the wire.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::prctl::{set_dumpable, set_pdeathsig};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, pipe, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};

use crate::BenchError;

/// A response that takes longer than this counts as missing.
const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Caller {
    /// The user, and the group of the same number.
    pub(crate) uid: u32,
    /// The directory of its cgroup.
    pub(crate) cgroup: PathBuf,
    /// The number of its descriptors, without its connections.
    pub(crate) descriptors: usize,
}

impl Caller {
    /// Makes this process, which root has started, that caller. The descriptors close with the
    /// value.
    ///
    /// They have the lowest numbers, so that a search for a connection finds it last.
    pub(crate) fn become_it(&self) -> Result<Vec<OwnedFd>, BenchError> {
        fs::write(self.cgroup.join("cgroup.procs"), "0")?;
        let limit = u64::try_from(self.descriptors)? + 5000;
        setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?;
        let mut files = Vec::new();
        // 0 to 2 are open already.
        while files.len() + 3 < self.descriptors {
            let (read, write) = pipe()?;
            let (one, other) = UnixStream::pair()?;
            files.extend([
                read,
                write,
                one.into(),
                other.into(),
                File::open("/dev/null")?.into(),
            ]);
        }
        files.truncate(self.descriptors.saturating_sub(3));
        become_user(self.uid)?;
        Ok(files)
    }
}

/// Becomes this user, with the group of the same number and no others.
pub(crate) fn become_user(uid: u32) -> Result<(), BenchError> {
    let parent = nix::unistd::getppid();
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    // A change of user clears both. Without the first, /proc/<pid> would be root's, as that of an
    // ordinary program is not.
    set_dumpable(true)?;
    set_pdeathsig(Signal::SIGKILL)?;
    if nix::unistd::getppid() == parent {
        Ok(())
    } else {
        Err("the bench has ended".into())
    }
}

pub(crate) trait Wire: Read + Write {}

impl<T: Read + Write> Wire for T {}

/// Connects to an address of TCP, or to a unix socket by its absolute path.
pub(crate) fn connect(address: &str) -> io::Result<Box<dyn Wire>> {
    if Path::new(address).is_absolute() {
        let stream = UnixStream::connect(address)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        return Ok(Box::new(stream));
    }
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    Ok(Box::new(stream))
}

/// Returns the request of an SDK.
pub(crate) fn request(path: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: x\r\nUser-Agent: awsvid-bench/1 os/linux lang/rust\r\n\
         Accept: */*\r\nAccept-Encoding: identity\r\n\r\n"
    )
    .into_bytes()
}

/// Connects, sends a request and reads its response.
pub(crate) fn exchange(address: &str, request: &[u8]) -> io::Result<Answer> {
    let mut wire = connect(address)?;
    wire.write_all(request)?;
    answer(&mut *wire)
}

/// The path of the roles in the instance metadata service.
pub(crate) const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// The request of an SDK for a metadata token.
pub(crate) const METADATA_PUT: &[u8] = b"PUT /latest/api/token HTTP/1.1\r\nHost: 127.0.0.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\
    User-Agent: awsvid-bench/1 os/linux lang/rust\r\nAccept: */*\r\nAccept-Encoding: identity\r\n\r\n";

/// Fetches a metadata token.
pub(crate) fn metadata_token(address: &str) -> io::Result<String> {
    Ok(exchange(address, METADATA_PUT)?.body)
}

/// Returns the request of an SDK for metadata.
pub(crate) fn metadata_request(path: &str, token: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-aws-ec2-metadata-token: {token}\r\n\
         User-Agent: awsvid-bench/1 os/linux lang/rust\r\nAccept: */*\r\nAccept-Encoding: identity\r\n\r\n"
    )
    .into_bytes()
}

/// Fetches credentials as an SDK does: a token, the name of the role, and the role.
pub(crate) fn as_sdk(address: &str) -> io::Result<Answer> {
    let token = metadata_token(address)?;
    let role = exchange(address, &metadata_request(ROLES, &token))?.body;
    exchange(
        address,
        &metadata_request(&format!("{ROLES}{role}"), &token),
    )
}

#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
    /// The moment at which the last byte of the body had arrived.
    pub(crate) at: Instant,
}

/// Reads one response to the end of the connection, which the server closes.
pub(crate) fn answer(wire: &mut dyn Wire) -> io::Result<Answer> {
    let (mut bytes, mut end, mut chunk) = (Vec::new(), None, [0; 4096]);
    loop {
        let length = wire.read(&mut chunk)?;
        bytes.extend_from_slice(&chunk[..length]);
        match end.or_else(|| head_and_length(&bytes)) {
            Some((head, body)) if bytes.len() >= head + body => {
                let at = Instant::now();
                while wire.read(&mut chunk)? > 0 {}
                let text = String::from_utf8_lossy(&bytes);
                let status = text
                    .get(9..12)
                    .and_then(|status| status.parse().ok())
                    .unwrap_or_default();
                return Ok(Answer {
                    status,
                    body: text.get(head..).unwrap_or_default().to_owned(),
                    at,
                });
            }
            found => end = found,
        }
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Returns the length of the head, once it has arrived, and of the body.
fn head_and_length(bytes: &[u8]) -> Option<(usize, usize)> {
    let text = std::str::from_utf8(bytes).ok()?;
    let head = text.find("\r\n\r\n")? + 4;
    let length = text[..head]
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))?;
    Some((head, length.parse().ok()?))
}
