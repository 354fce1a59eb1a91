//! The token that TCP callers may send or have to send.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use zeroize::Zeroizing;

use super::{AppError, retry};
use crate::config::{self, exposures};
use crate::http::Authorization;

/// The node's token, and the reason why its file is missing.
struct NodeToken {
    token: Zeroizing<String>,
    /// Error of the attempt to write the file.
    unwritten: Option<io::Error>,
}

impl NodeToken {
    /// Loads the token of an earlier start, so that workloads that have read it keep working.
    /// Otherwise makes a new one.
    ///
    /// A token that another user could have written is replaced (T38), because that user would know
    /// it. The text is 32 random bytes in base64url, without a newline, since some SDKs send the
    /// file's bytes unchanged. Fails if the system has no random numbers.
    fn load(path: &Path) -> io::Result<Self> {
        let valid = |text: &String| text.len() == 43 && URL_SAFE_NO_PAD.decode(text).is_ok();
        if let Some(text) = read(path).ok().filter(valid) {
            return Ok(Self {
                token: Zeroizing::new(text),
                unwritten: None,
            });
        }
        let mut bytes = Zeroizing::new([0_u8; 32]);
        // The kernel's generator: that of the TLS library takes 40 ms at first, while it gathers
        // jitter of the processor.
        getrandom::fill(&mut *bytes)?;
        let token = Zeroizing::new(URL_SAFE_NO_PAD.encode(*bytes));
        let unwritten = write(path, &token).err();
        Ok(Self { token, unwritten })
    }
}

/// Reads the file. Fails if another user could have written it.
fn read(path: &Path) -> io::Result<String> {
    // O_NONBLOCK: another user's FIFO would block the start.
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if let Some(exposed) = exposures(path, &file.metadata()?, "token file").first() {
        tracing::warn!(error = %exposed, "replacing the token in [listen] token_file");
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Loads the token, and starts writing its file. One SDK uses the endpoint only if it gets the
/// token by a file.
pub(super) fn authorization(
    listen: &config::ListenConfig,
    token_needed: &Arc<Notify>,
) -> Result<Authorization, AppError> {
    let path = &listen.token_file;
    let node = NodeToken::load(path).map_err(|source| AppError::Token {
        path: path.clone(),
        source,
    })?;
    if let Some(error) = node.unwritten {
        let path = path.display();
        tracing::warn!(%path, %error, "[listen] token_file cannot be written yet: retrying every 5 seconds");
        let (path, token) = (listen.token_file.clone(), node.token.clone());
        tokio::spawn(write_later(path, token, token_needed.clone()));
    }
    Ok(match listen.authorization {
        config::AuthorizationMode::Present => Authorization::Present,
        config::AuthorizationMode::Token => Authorization::Token(node.token),
        config::AuthorizationMode::Off => Authorization::Off,
    })
}

/// Retries until the file is written: its directory may be on a file system that is mounted later.
/// It tries in the background, and at once after a request without the token (`needed`), which its
/// SDK repeats.
async fn write_later(path: PathBuf, token: Zeroizing<String>, needed: Arc<Notify>) {
    loop {
        retry::until_needed(needed.notified()).await;
        let (to, text) = (path.clone(), token.clone());
        if let Ok(Ok(())) = spawn_blocking(move || write(&to, &text)).await {
            tracing::info!(path = %path.display(), "token file written");
            return;
        }
        retry::pause().await;
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
    fn token_is_kept_unless_another_user_could_have_written_it() {
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
        // The replacement fixed the mode, too.
        assert_eq!(token(), second);
        fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
        assert_ne!(token(), second);
    }

    #[tokio::test(start_paused = true)]
    async fn request_without_the_token_writes_the_file_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let (needed, start) = (Arc::<Notify>::default(), tokio::time::Instant::now());
        needed.notify_one();
        write_later(path.clone(), "text".to_owned().into(), needed).await;
        assert_eq!(start.elapsed(), std::time::Duration::ZERO);
        assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    }
}
