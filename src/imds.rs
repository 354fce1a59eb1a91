//! EC2's instance metadata service, version 2, as far as SDKs need it: metadata tokens, paths and
//! bodies.
//!
//! A metadata token proves that its caller can send a PUT and a header, which a deputy that fetches
//! URLs for others cannot (T42). It is not an identity. The daemon attests each request by its own
//! connection, as at the container credential endpoint.

use std::sync::Arc;

use crate::clock::Clock;
use crate::netns::NamespaceId;

pub mod body;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod path;
mod token;

pub use path::{MetadataPath, is_metadata};
pub use token::{KEY_BYTES, TOKEN_HEADER, TTL_HEADER, TokenKey, TokenTtl};

/// The instance metadata service of this daemon.
#[derive(Debug)]
pub struct Imds {
    /// Issues and verifies metadata tokens.
    pub tokens: Arc<TokenKey>,
    /// Whether region and availability zone are served too.
    pub serves_region: bool,
    /// The network namespace of the host's listeners.
    pub netns: NamespaceId,
    /// The clock by which metadata tokens expire.
    pub clock: Clock,
}
