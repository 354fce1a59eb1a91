//! The token that callers over TCP may send, or must.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use zeroize::Zeroizing;

use crate::config::exposures;

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
    /// random numbers. A token that another user could have written is not kept (T38): that user would know it.
    ///
    /// 32 random bytes in base64url, without a newline, since some SDKs send the file's bytes as they are.
    pub(super) fn load(path: &Path) -> io::Result<Self> {
        let valid = |text: &String| text.len() == 43 && URL_SAFE_NO_PAD.decode(text).is_ok();
        if let Some(text) = read(path).ok().filter(valid) {
            return Ok(Self {
                token: Zeroizing::new(text),
                unwritten: None,
            });
        }
        let mut bytes = Zeroizing::new([0_u8; 32]);
        // The kernel's own: those of the TLS library take 40 ms at first, while it gathers jitter of the processor.
        getrandom::fill(&mut *bytes)?;
        let token = Zeroizing::new(URL_SAFE_NO_PAD.encode(*bytes));
        let unwritten = write(path, &token).err();
        Ok(Self { token, unwritten })
    }
}

/// The content of the file; an error if another user could have written it.
fn read(path: &Path) -> io::Result<String> {
    // Another user's FIFO would keep the start waiting.
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if let Some(exposed) = exposures(path, &file.metadata()?, "token file").first() {
        tracing::warn!(
            "[listen] token_file: {exposed}; a new token takes the place of the one in it"
        );
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn token_of_an_earlier_start_is_kept_unless_another_user_could_have_written_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = || NodeToken::load(&path).unwrap().token.to_string();
        let first = token();
        assert_eq!(
            (first.len(), token(), fs::read_to_string(&path).unwrap()),
            (43, first.clone(), first.clone())
        );
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        let second = token();
        assert_ne!(second, first);
        assert_eq!(fs::read_to_string(&path).unwrap(), second);
        // Its mode was mended with it.
        assert_eq!(token(), second);
        fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
        assert_ne!(token(), second);
    }
}
