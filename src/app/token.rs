//! The token that callers over TCP may send, or must.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use zeroize::Zeroizing;

/// How often a file is tried again that could not be written.
const RETRY: Duration = Duration::from_secs(5);

/// The node's token, and where it could not be written.
pub(super) struct NodeToken {
    /// The token.
    pub(super) token: Zeroizing<String>,
    /// Why its file is not there yet.
    pub(super) unwritten: Option<io::Error>,
}

impl NodeToken {
    /// That of an earlier start, so that workloads that have read it keep working, or a new one. An error if the system has no
    /// random numbers.
    ///
    /// 32 random bytes in base64url, without a newline, since some SDKs send the file's bytes as they are.
    pub(super) fn load(path: &Path) -> io::Result<Self> {
        let valid = |text: &String| text.len() == 43 && URL_SAFE_NO_PAD.decode(text).is_ok();
        if let Some(text) = std::fs::read_to_string(path).ok().filter(valid) {
            return Ok(Self { token: Zeroizing::new(text), unwritten: None });
        }
        let mut bytes = Zeroizing::new([0_u8; 32]);
        aws_lc_rs::rand::fill(&mut *bytes).map_err(|_| io::Error::other("the system gives no random numbers"))?;
        let token = Zeroizing::new(URL_SAFE_NO_PAD.encode(*bytes));
        let unwritten = write(path, &token).err();
        Ok(Self { token, unwritten })
    }
}

/// Writes the file as soon as that is possible: its directory may be on a file system that is mounted later.
pub(super) async fn write_later(path: PathBuf, token: Zeroizing<String>) {
    loop {
        sleep(RETRY).await;
        let (to, text) = (path.clone(), token.clone());
        if let Ok(Ok(())) = spawn_blocking(move || write(&to, &text)).await {
            tracing::info!(path = %path.display(), "the token file is written");
            return;
        }
    }
}

fn write(path: &Path, token: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let new = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&new)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(token.as_bytes())?;
    std::fs::rename(&new, path)
}
