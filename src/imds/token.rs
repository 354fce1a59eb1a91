//! Metadata tokens. They have no state in the daemon, so that a flood of PUTs cannot evict those of
//! others (T45), and a restart leaves no SDK with a dead one.
//!
//! A token is `version (1 byte) | expiry in seconds since 1970 (5) | nonce (4) | HMAC-SHA256 (32)`,
//! in URL-safe base64: 56 characters, as EC2's have. The HMAC also covers the network namespace of
//! the listener. The kernel may reuse the number of a namespace after its end. Then a token of the
//! old one is valid in the new one, which is acceptable because it proves no identity.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hyper::header::{HeaderMap, HeaderName};
use tokio::sync::Notify;
use zeroize::Zeroizing;

use crate::netns::NamespaceId;

/// The header of a request with its metadata token.
pub const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
/// The header of a request for a metadata token, and of its answer: the lifetime in seconds.
pub const TTL_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");

/// The length of a key in bytes.
pub const KEY_BYTES: usize = 32;
const VERSION: u8 = 1;
const EXPIRY_BYTES: usize = 5;
/// The length of the part before the HMAC.
const HEAD_BYTES: usize = 1 + EXPIRY_BYTES + 4;
const TOKEN_BYTES: usize = HEAD_BYTES + 32;
const TOKEN_CHARS: usize = TOKEN_BYTES / 3 * 4;
/// The longest lifetime in seconds, which is EC2's.
const MAX_TTL_SECONDS: u16 = 21_600;

/// The lifetime that a caller requests for its token: 1 second to 6 hours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenTtl(u16);

impl TokenTtl {
    /// Parses the one header with the lifetime. Returns `None` if it is missing, is there twice, or
    /// is not a number within the bounds.
    pub fn parse(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TTL_HEADER).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return None;
        };
        let digits = value.to_str().ok()?;
        if digits.len() > 5 || !digits.bytes().all(|c| c.is_ascii_digit()) {
            return None;
        }
        let seconds = digits.parse().ok()?;
        (1..=MAX_TTL_SECONDS)
            .contains(&seconds)
            .then_some(Self(seconds))
    }

    /// Returns the lifetime in seconds.
    pub fn seconds(self) -> u16 {
        self.0
    }
}

/// The key of metadata tokens. After a handover it also verifies those of its own previous key.
pub struct TokenKey {
    keys: ArcSwap<TokenKeys>,
    /// Is notified when another key is adopted.
    adopted: Notify,
}

struct TokenKeys {
    current: HmacKey,
    earlier: Option<HmacKey>,
}

#[derive(Clone)]
struct HmacKey {
    bytes: Arc<Zeroizing<[u8; KEY_BYTES]>>,
    hmac: hmac::Key,
}

impl HmacKey {
    fn new(bytes: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        Self {
            hmac: hmac::Key::new(hmac::HMAC_SHA256, bytes.as_slice()),
            bytes: Arc::new(bytes),
        }
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenKey")
    }
}

impl TokenKey {
    /// Creates the key from its bytes.
    pub fn new(bytes: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let keys = TokenKeys {
            current: HmacKey::new(bytes),
            earlier: None,
        };
        Self {
            keys: ArcSwap::from_pointee(keys),
            adopted: Notify::new(),
        }
    }

    /// Returns the bytes of the key for new tokens.
    pub fn bytes(&self) -> Arc<Zeroizing<[u8; KEY_BYTES]>> {
        self.keys.load().current.bytes.clone()
    }

    /// Issues tokens by another instance's key from now on, and still accepts those of its own.
    pub fn adopt(&self, bytes: Zeroizing<[u8; KEY_BYTES]>) {
        let before = self.keys.load_full();
        if before.current.bytes.as_slice() != bytes.as_slice() {
            self.keys.store(Arc::new(TokenKeys {
                current: HmacKey::new(bytes),
                earlier: Some(before.current.clone()),
            }));
            self.adopted.notify_one();
        }
    }

    /// Waits until another key is adopted, if none was since the last call. Only one task may wait.
    pub async fn adopted(&self) {
        self.adopted.notified().await;
    }

    /// Returns a new token for callers in this network namespace. Its nonce only distinguishes it
    /// from others.
    pub fn issue(&self, ttl: TokenTtl, netns: NamespaceId, now: SystemTime) -> String {
        let expiry = seconds(now) + u64::from(ttl.0);
        let mut token = [0; TOKEN_BYTES];
        token[0] = VERSION;
        token[1..=EXPIRY_BYTES].copy_from_slice(&expiry.to_be_bytes()[8 - EXPIRY_BYTES..]);
        token[1 + EXPIRY_BYTES..HEAD_BYTES].copy_from_slice(&fastrand::u32(..).to_be_bytes());
        let (head, mac) = token.split_at_mut(HEAD_BYTES);
        let tag = hmac::sign(&self.keys.load().current.hmac, &message(head, netns));
        mac.copy_from_slice(tag.as_ref());
        URL_SAFE_NO_PAD.encode(token)
    }

    /// Returns the remaining lifetime of a token of this network namespace. Returns `None` for any
    /// other text, and for a token that has expired.
    pub fn verify(&self, text: &[u8], netns: NamespaceId, now: SystemTime) -> Option<Duration> {
        if text.len() != TOKEN_CHARS {
            return None;
        }
        let mut token = [0; TOKEN_BYTES];
        let length = URL_SAFE_NO_PAD.decode_slice(text, &mut token).ok()?;
        if length != TOKEN_BYTES || token[0] != VERSION {
            return None;
        }
        let (head, mac) = token.split_at(HEAD_BYTES);
        let (keys, message) = (self.keys.load(), message(head, netns));
        let is_of = |key: &HmacKey| hmac::verify(&key.hmac, &message, mac).is_ok();
        if !is_of(&keys.current) && !keys.earlier.as_ref().is_some_and(is_of) {
            return None;
        }
        let expiry = head[1..=EXPIRY_BYTES]
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let left = expiry.checked_sub(seconds(now)).filter(|left| *left > 0)?;
        Some(Duration::from_secs(left))
    }
}

/// Returns the bytes that the HMAC covers.
fn message(head: &[u8], netns: NamespaceId) -> [u8; HEAD_BYTES + NamespaceId::LENGTH] {
    let mut message = [0; HEAD_BYTES + NamespaceId::LENGTH];
    message[..HEAD_BYTES].copy_from_slice(head);
    message[HEAD_BYTES..].copy_from_slice(&netns.to_bytes());
    message
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
