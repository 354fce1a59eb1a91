//! The file with the key of metadata tokens, which is kept over restarts: one SDK uses its token
//! for six hours, whatever the answers are.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::task::spawn_blocking;
use zeroize::Zeroizing;

use super::{AppError, retry};
use crate::config::exposures;
use crate::imds::{KEY_BYTES, TokenKey};

type KeyBytes = Zeroizing<[u8; KEY_BYTES]>;

/// The permissions that users other than the owner must not have.
const OTHERS: u32 = 0o077;

/// The content of the file at the start.
enum StoredKey {
    Valid(KeyBytes),
    /// The file does not exist.
    Missing,
    /// Another user could know or write the key, or it has another length. The text has the cause.
    Invalid(String),
}

/// Loads the key, or makes one and starts writing its file. Fails if the system has no random
/// numbers.
pub(super) fn token_key(path: &Path) -> Result<Arc<TokenKey>, AppError> {
    let mut fresh = Zeroizing::new([0; KEY_BYTES]);
    getrandom::fill(fresh.as_mut_slice()).map_err(|error| AppError::ImdsKey {
        path: path.to_owned(),
        source: error.into(),
    })?;
    let key = match store(path, &fresh) {
        Ok(stored) => Arc::new(TokenKey::new(stored)),
        Err(_) => {
            let key = Arc::new(TokenKey::new(fresh));
            tokio::spawn(store_later(path.to_owned(), key.clone()));
            key
        }
    };
    tokio::spawn(store_adopted(path.to_owned(), key.clone()));
    Ok(key)
}

/// Retries until the file is written: its directory may be on a file system that is mounted later,
/// or be that of a socket that this daemon is about to bind. Tokens of the key that the daemon had
/// until then stay valid.
async fn store_later(path: PathBuf, key: Arc<TokenKey>) {
    let mut warned = false;
    loop {
        retry::until_needed(std::future::pending()).await;
        let (to, own) = (path.clone(), key.bytes());
        match spawn_blocking(move || store(&to, &own)).await {
            Ok(Ok(stored)) => {
                key.adopt(stored);
                tracing::info!(path = %path.display(), "key file written");
                return;
            }
            Ok(Err(error)) if !warned => {
                warned = true;
                tracing::warn!(
                    path = %path.display(), %error,
                    "[imds] key_file cannot be written yet: retrying every 5 seconds"
                );
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }
}

/// Writes each key that another instance passes, so that its tokens outlive a crash of this one.
async fn store_adopted(path: PathBuf, key: Arc<TokenKey>) {
    loop {
        key.adopted().await;
        loop {
            let (to, adopted) = (path.clone(), key.bytes());
            match spawn_blocking(move || replace(&to, &adopted)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => {
                    tracing::debug!(path = %path.display(), %error, "[imds] key_file cannot be replaced yet");
                }
                Err(_) => return,
            }
            retry::until_needed(std::future::pending()).await;
        }
    }
}

/// Writes the key over that of the file, if they differ.
fn replace(path: &Path, key: &KeyBytes) -> io::Result<()> {
    match read(path)? {
        StoredKey::Valid(stored) if *stored == **key => {}
        _ => drop(write(path, key)?.persist(path)?),
    }
    Ok(())
}

/// Returns the key of the file. Writes `fresh` if the file is missing or invalid. Of two daemons
/// that write at the same time, one reads the key of the other.
fn store(path: &Path, fresh: &KeyBytes) -> io::Result<KeyBytes> {
    match read(path)? {
        StoredKey::Valid(key) => return Ok(key),
        StoredKey::Invalid(cause) => {
            tracing::warn!(path = %path.display(), cause, "replacing the key in [imds] key_file");
            write(path, fresh)?.persist(path)?;
        }
        StoredKey::Missing => match write(path, fresh)?.persist_noclobber(path) {
            Ok(_) => {}
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                return match read(path)? {
                    StoredKey::Valid(key) => Ok(key),
                    StoredKey::Missing | StoredKey::Invalid(_) => Err(error.error),
                };
            }
            Err(error) => return Err(error.error),
        },
    }
    Ok(fresh.clone())
}

fn read(path: &Path) -> io::Result<StoredKey> {
    // O_NONBLOCK: another user's FIFO would block the start.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(path);
    let mut file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(StoredKey::Missing),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return Ok(StoredKey::Invalid("it is a symbolic link".to_owned()));
        }
        opened => opened?,
    };
    let found = file.metadata()?;
    if let Some(exposed) = exposures(path, &found, "key file").first() {
        return Ok(StoredKey::Invalid(exposed.to_string()));
    }
    if found.mode() & OTHERS != 0 {
        return Ok(StoredKey::Invalid("other users may read it".to_owned()));
    }
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    let is_whole = found.is_file() && found.len() == KEY_BYTES as u64;
    if !is_whole || file.read_exact(key.as_mut_slice()).is_err() {
        return Ok(StoredKey::Invalid("it is not a key".to_owned()));
    }
    Ok(StoredKey::Valid(key))
}

/// Writes the key to a new file in the directory, which only its owner may read. It does not create
/// the directory: that of a socket needs another mode than that of a key.
fn write(path: &Path, key: &KeyBytes) -> io::Result<tempfile::NamedTempFile> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::Builder::new()
        .prefix("imds-key.")
        .tempfile_in(directory)?;
    file.write_all(key.as_slice())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn stored(path: &Path, fresh: u8) -> u8 {
        let stored = store(path, &Zeroizing::new([fresh; KEY_BYTES])).unwrap();
        assert_eq!(stored.as_slice(), fs::read(path).unwrap());
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, 0o600);
        stored[0]
    }

    #[test]
    fn key_is_kept_unless_another_user_could_know_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys/imds-key");
        let missing = store(&path, &Zeroizing::new([1; KEY_BYTES]));
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::create_dir(path.parent().unwrap()).unwrap();
        assert_eq!((stored(&path, 1), stored(&path, 2)), (1, 1));
        for (mode, fresh) in [(0o640, 3), (0o604, 4), (0o622, 5)] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!((stored(&path, fresh), stored(&path, 9)), (fresh, fresh));
        }
        for (text, fresh) in [(&b"short"[..], 6), (&[0; 33], 7), (b"", 8)] {
            fs::write(&path, text).unwrap();
            assert_eq!(stored(&path, fresh), fresh);
        }
        fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o777)).unwrap();
        assert_eq!(stored(&path, 10), 10);
        // Nothing else stays in the directory.
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn link_is_replaced_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let [path, other] = ["imds-key", "other"].map(|name| folder.path().join(name));
        fs::write(&other, [7; KEY_BYTES]).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert_eq!(stored(&path, 1), 1);
        assert_eq!(fs::read(&other).unwrap(), [7; KEY_BYTES]);
    }

    #[test]
    fn daemons_that_start_together_have_one_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imds-key");
        let keys: Vec<_> = std::thread::scope(|scope| {
            let store_one = |number| {
                let path = &path;
                scope.spawn(move || store(path, &Zeroizing::new([number; KEY_BYTES])).unwrap())
            };
            let threads: Vec<_> = (0..8).map(store_one).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(keys.windows(2).all(|pair| pair[0] == pair[1]), "{keys:?}");
    }

    #[tokio::test]
    async fn key_of_previous_instance_replaces_that_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imds-key");
        assert_eq!(stored(&path, 1), 1);
        let key = token_key(&path).unwrap();
        key.adopt(Zeroizing::new([2; KEY_BYTES]));
        while fs::read(&path).unwrap() != [2; KEY_BYTES] {
            tokio::task::yield_now().await;
        }
        assert_eq!(stored(&path, 3), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_stay_valid_when_the_file_is_written_late() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imds-key");
        fs::write(&path, [7; KEY_BYTES]).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let key = Arc::new(TokenKey::new(Zeroizing::new([1; KEY_BYTES])));
        let bytes = [0; crate::netns::NamespaceId::LENGTH];
        let netns = crate::netns::NamespaceId::from_bytes(bytes);
        let mut headers = hyper::HeaderMap::new();
        headers.insert(crate::imds::TTL_HEADER, 60.into());
        let ttl = crate::imds::TokenTtl::parse(&headers).unwrap();
        let token = key.issue(ttl, netns, std::time::UNIX_EPOCH);
        store_later(path, key.clone()).await;
        assert_eq!(**key.bytes(), [7; KEY_BYTES]);
        let left = key.verify(token.as_bytes(), netns, std::time::UNIX_EPOCH);
        assert!(left.is_some());
    }
}
