//! The digest by which operators compare the configurations of their nodes.

use std::fmt;

use sha2::{Digest, Sha256};

/// The SHA-256 of a configuration's files, one after the other. It displays as sha256sum(1) prints
/// it.
///
/// `Debug` leaves it out, because configurations of different texts may be equal.
#[derive(Clone, Default)]
pub struct ConfigDigest(String);

impl ConfigDigest {
    pub(super) fn of<'a>(texts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hash = Sha256::new();
        texts.into_iter().for_each(|text| hash.update(text));
        Self(
            hash.finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        )
    }
}

impl fmt::Display for ConfigDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ConfigDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConfigDigest")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_is_the_one_of_sha256sum() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(ConfigDigest::of([&b"a"[..], b"bc"]).to_string(), expected);
    }
}
