//! Signatures with the key of an X.509-SVID.
//!
//! IAM Roles Anywhere fixes the hash to SHA-256, whatever the key: RSASSA-PKCS1-v1_5, or ECDSA as
//! ASN.1 in DER. aws-lc signs with P-384 and SHA-384 alone, so another library does that one.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
};
use p384::ecdsa::signature::hazmat::PrehashSigner;
use p384::pkcs8::DecodePrivateKey;
use sha2::{Digest, Sha256};
use thiserror::Error;

/// A private key of a kind that IAM Roles Anywhere accepts. It is cleared when it is dropped.
pub(super) enum SvidKey {
    Rsa(RsaKeyPair),
    P256(EcdsaKeyPair),
    P384(Box<p384::ecdsa::SigningKey>),
}

/// Reason why a key cannot sign. The text follows the words "the key of the SVID".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum SigningError {
    #[error("is neither RSA of 2048 bits or more nor of the curves P-256 and P-384")]
    Kind,
    #[error("did not sign")]
    Failed,
}

impl SvidKey {
    /// Reads PKCS #8 in DER.
    pub(super) fn from_pkcs8(der: &[u8]) -> Result<Self, SigningError> {
        if let Ok(key) = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der) {
            return Ok(Self::P256(key));
        }
        if let Ok(key) = p384::ecdsa::SigningKey::from_pkcs8_der(der) {
            return Ok(Self::P384(Box::new(key)));
        }
        RsaKeyPair::from_pkcs8(der)
            .map(Self::Rsa)
            .map_err(|_| SigningError::Kind)
    }

    /// Returns the name of the algorithm in `Authorization`.
    pub(super) fn algorithm(&self) -> &'static str {
        match self {
            Self::Rsa(_) => super::signature::RSA,
            Self::P256(_) | Self::P384(_) => super::signature::ECDSA,
        }
    }

    /// Signs the SHA-256 of a text.
    pub(super) fn sign(&self, text: &[u8]) -> Result<Vec<u8>, SigningError> {
        let random = SystemRandom::new();
        match self {
            Self::Rsa(key) => {
                let mut signature = vec![0; key.public_modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, text, &mut signature)
                    .map_err(|_| SigningError::Failed)?;
                Ok(signature)
            }
            Self::P256(key) => key
                .sign(&random, text)
                .map(|signature| signature.as_ref().to_vec())
                .map_err(|_| SigningError::Failed),
            Self::P384(key) => {
                let signature: Result<p384::ecdsa::Signature, _> =
                    key.sign_prehash(&Sha256::digest(text));
                let signature = signature.map_err(|_| SigningError::Failed)?;
                Ok(signature.to_der().as_bytes().to_vec())
            }
        }
    }
}
