//! The key that signs JWT-SVIDs in `dev`: generated for each run, never written to a file.

use std::fmt;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Serialize;
use thiserror::Error;

/// Error of the cryptography library.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct KeyError(String);

impl KeyError {
    pub(super) fn of(error: impl std::error::Error) -> Self {
        Self(error.to_string())
    }
}

/// An ES256 key (P-256), as SPIRE uses by default.
pub struct SigningKey {
    private: EncodingKey,
    public: Jwk,
    header: Header,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey")
            .field("kid", &self.header.kid)
            .finish_non_exhaustive()
    }
}

impl SigningKey {
    /// Generates a key with a random key id.
    pub fn generate() -> Result<Self, KeyError> {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random)
            .map_err(|_| KeyError("a P-256 key cannot be generated".to_owned()))?;
        let private = EncodingKey::from_ec_der(document.as_ref());
        let kid = URL_SAFE_NO_PAD.encode(random_bytes::<16>()?);
        let mut public = Jwk::from_encoding_key(&private, Algorithm::ES256)
            .map_err(|e| KeyError(e.to_string()))?;
        public.common.key_id = Some(kid.clone());
        public.common.public_key_use = Some(PublicKeyUse::Signature);
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(kid);
        Ok(Self {
            private,
            public,
            header,
        })
    }

    /// Signs claims as a JWS in compact form, with `alg`, `kid` and `typ: JWT` in its header.
    pub fn sign(&self, claims: &impl Serialize) -> Result<String, KeyError> {
        jsonwebtoken::encode(&self.header, claims, &self.private)
            .map_err(|error| KeyError(error.to_string()))
    }

    /// Returns the JWK set with the public half, as JSON (RFC 7517).
    pub fn jwks(&self) -> String {
        let set = JwkSet {
            keys: vec![self.public.clone()],
        };
        // Writing strings to memory cannot fail.
        serde_json::to_string(&set).unwrap_or_default()
    }

    /// Returns the key id, as in the header and in the key set.
    pub fn kid(&self) -> &str {
        self.header.kid.as_deref().unwrap_or_default()
    }
}

/// Returns bytes of the system's random number generator.
pub(super) fn random_bytes<const N: usize>() -> Result<[u8; N], KeyError> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| KeyError("the system has no random bytes".to_owned()))?;
    Ok(bytes)
}
