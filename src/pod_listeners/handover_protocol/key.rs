//! The key of metadata tokens in a handover: an anonymous file that cannot be changed any more.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use zeroize::Zeroizing;

use crate::imds::KEY_BYTES;

/// Returns a file with this key, for another process.
pub(in crate::pod_listeners) fn sealed_key(key: &[u8; KEY_BYTES]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("awsvid-imds-key", flags)?);
    file.write_all(key)?;
    fcntl_add_seals(&file, seals())?;
    Ok(file.into())
}

/// Reads the key from a file of [`sealed_key`]. Fails for any other file: only a file in memory has
/// seals, so that the read does not block.
pub(in crate::pod_listeners) fn key_of(file: &OwnedFd) -> io::Result<Zeroizing<[u8; KEY_BYTES]>> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let found = fcntl_get_seals(file).map_err(|_| invalid())?;
    let file = File::from(file.try_clone()?);
    if !found.contains(seals()) || file.metadata()?.len() != KEY_BYTES as u64 {
        return Err(invalid());
    }
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    file.read_exact_at(key.as_mut_slice(), 0)?;
    Ok(key)
}

fn seals() -> SealFlags {
    SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_is_read_only_from_a_sealed_file() {
        let sent = sealed_key(&[7; KEY_BYTES]).unwrap();
        assert_eq!(*key_of(&sent).unwrap(), [7; KEY_BYTES]);
        let mut sent = File::from(sent);
        assert!(sent.write_all(b"x").is_err(), "its sender cannot change it");
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let open = |length: usize| {
            let mut file = File::from(memfd_create("key", flags).unwrap());
            file.write_all(&vec![1; length]).unwrap();
            file
        };
        let sealed = |length: usize| {
            let file = open(length);
            fcntl_add_seals(&file, seals()).unwrap();
            file
        };
        let (reader, _writer) = std::io::pipe().unwrap();
        for file in [
            open(KEY_BYTES).into(),
            sealed(KEY_BYTES - 1).into(),
            sealed(KEY_BYTES + 1).into(),
            tempfile::tempfile().unwrap().into(),
            OwnedFd::from(reader),
        ] {
            assert_eq!(
                key_of(&file).unwrap_err().kind(),
                io::ErrorKind::InvalidData
            );
        }
    }
}
