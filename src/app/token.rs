//! The token that callers over TCP may send, or must.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

/// The node's token: that of an earlier start, so that workloads that have read it keep working, or a new one.
///
/// 32 random bytes in base64url, without a newline, since some SDKs send the file's bytes as they are.
pub(super) fn token(path: &Path) -> io::Result<Zeroizing<String>> {
    let valid = |text: &String| text.len() == 43 && URL_SAFE_NO_PAD.decode(text).is_ok();
    if let Some(text) = std::fs::read_to_string(path).ok().filter(|text| valid(text)) {
        return Ok(Zeroizing::new(text));
    }
    let mut bytes = Zeroizing::new([0_u8; 32]);
    aws_lc_rs::rand::fill(&mut *bytes).map_err(|_| io::Error::other("the system gives no random numbers"))?;
    let text = Zeroizing::new(URL_SAFE_NO_PAD.encode(*bytes));
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
    file.write_all(text.as_bytes())?;
    std::fs::rename(&new, path)?;
    Ok(text)
}
