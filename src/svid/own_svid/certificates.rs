//! X.509-SVIDs as the Workload API sends them, parsed and checked.
//!
//! Standard: X509-SVID.md, and SPIFFE_Workload_API.md, section 5.2.1.

use std::fmt;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs::{default_provider, sign::any_supported_type};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use thiserror::Error;
use webpki::{EndEntityCert, KeyUsage};
use zeroize::Zeroizing;

use crate::identity::{InvalidName, SpiffeId};
use crate::svid::proto::workload::{X509svid, X509svidResponse};

/// An X.509-SVID of the daemon itself with its key, and the CAs of its trust domain.
pub struct OwnSvid {
    /// The daemon's default SPIFFE ID.
    pub spiffe_id: SpiffeId,
    /// All SPIFFE IDs of the daemon, as the agent sent them.
    pub all: Vec<String>,
    /// The certificates, the leaf first, and the leaf's key.
    pub certified: Arc<CertifiedKey>,
    /// The CAs of the trust domain.
    pub roots: Arc<RootCertStore>,
    /// Number that increases with each SVID.
    pub version: u64,
}

/// Reason why the agent's X.509-SVID cannot be used.
#[derive(Debug, Error)]
pub(in crate::svid) enum OwnSvidError {
    /// The message has no SVID for its first identity.
    #[error("the message has none")]
    Missing,
    /// The first identity is not a SPIFFE ID.
    #[error("its SPIFFE ID is invalid: {0}")]
    InvalidId(InvalidName),
    /// The certificates are not a sequence of DER values.
    #[error("its certificates are not DER")]
    Chain,
    /// The chain is empty.
    #[error("it has no certificate")]
    NoCertificate,
    /// The leaf is not an X.509-SVID.
    #[error("its certificate {0}")]
    Certificate(CertificateIdError),
    /// The leaf has another SPIFFE ID than the message.
    #[error("its certificate is that of {certified}, not of {expected}")]
    OtherId {
        /// The SPIFFE ID of the leaf.
        certified: SpiffeId,
        /// The SPIFFE ID of the message.
        expected: SpiffeId,
    },
    /// The key is not a PKCS #8 key of a supported type. The library's error does not quote the
    /// key, and is omitted all the same.
    #[error("its private key cannot be read")]
    Key,
    /// The key belongs to another certificate.
    #[error("its private key is not that of its certificate")]
    OtherKey,
    /// The CAs are not a sequence of DER values.
    #[error("its bundle is not DER")]
    Bundle,
    /// A CA is not a usable trust anchor.
    #[error("its bundle has a CA that cannot be used: {0}")]
    Root(rustls::Error),
    /// The bundle has no CA.
    #[error("its bundle is empty")]
    NoRoots,
}

/// Reason why a certificate has no SPIFFE ID. The text follows the word "certificate".
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CertificateIdError {
    /// The certificate is not valid X.509.
    #[error("cannot be read: {0}")]
    Unreadable(webpki::Error),
    /// The certificate has no URI among its names.
    #[error("has no SPIFFE ID")]
    NoUri,
    /// The only URI is not a SPIFFE ID.
    #[error("has no SPIFFE ID: {0}")]
    InvalidId(InvalidName),
    /// X.509-SVID.md allows one URI only.
    #[error("has several URIs, so its SPIFFE ID is ambiguous")]
    SeveralUris,
}

impl fmt::Debug for OwnSvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnSvid")
            .field("spiffe_id", &self.spiffe_id)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl OwnSvid {
    /// Parses the default identity of a message, which is the first. An identity may have several
    /// SVIDs: with several entries, or from an agent that merges the replies of two others and may
    /// label one wrongly. Then the first usable SVID counts.
    pub(super) fn read(mut message: X509svidResponse, version: u64) -> Result<Self, OwnSvidError> {
        // The keys of all SVIDs are moved first, so that unused ones are zeroized too.
        let take_key =
            |svid: &mut X509svid| Zeroizing::new(std::mem::take(&mut svid.x509_svid_key));
        let keys: Vec<_> = message.svids.iter_mut().map(take_key).collect();
        let all: Vec<_> = message
            .svids
            .iter()
            .map(|svid| svid.spiffe_id.clone())
            .collect();
        let default = all.first().ok_or(OwnSvidError::Missing)?;
        let spiffe_id = SpiffeId::parse(default).map_err(OwnSvidError::InvalidId)?;
        let of_default = message
            .svids
            .iter()
            .zip(&keys)
            .filter(|(svid, _)| svid.spiffe_id == *default);
        let mut read = of_default.map(|(svid, key)| read_one(svid, key, &spiffe_id));
        let first = read.next().ok_or(OwnSvidError::Missing)?;
        let (certified, roots) = first.or_else(|error| read.find_map(Result::ok).ok_or(error))?;
        drop(read);
        Ok(Self {
            spiffe_id,
            all,
            certified: Arc::new(certified),
            roots: Arc::new(roots),
            version,
        })
    }

    /// Returns true if the certificate has expired, so that no server accepts it.
    pub fn is_expired(&self, now: UnixTime) -> bool {
        let Some((leaf, intermediates)) = self.certified.cert.split_first() else {
            return true;
        };
        let Ok(leaf) = EndEntityCert::try_from(leaf) else {
            return true;
        };
        let algorithms = default_provider().signature_verification_algorithms.all;
        let usage = KeyUsage::client_auth();
        let verified = leaf.verify_for_usage(
            algorithms,
            &self.roots.roots,
            intermediates,
            now,
            usage,
            None,
            None,
        );
        matches!(verified, Err(webpki::Error::CertExpired { .. }))
    }
}

/// Parses the certificates and the key of an SVID of this identity, and the CAs of its trust
/// domain.
fn read_one(
    svid: &X509svid,
    key: &[u8],
    spiffe_id: &SpiffeId,
) -> Result<(CertifiedKey, RootCertStore), OwnSvidError> {
    let chain = split(&svid.x509_svid).ok_or(OwnSvidError::Chain)?;
    let certified = certified(chain, key, spiffe_id)?;
    let mut roots = RootCertStore::empty();
    for root in split(&svid.bundle).ok_or(OwnSvidError::Bundle)? {
        roots.add(root).map_err(OwnSvidError::Root)?;
    }
    if roots.is_empty() {
        return Err(OwnSvidError::NoRoots);
    }
    Ok((certified, roots))
}

/// Returns the certificates of an SVID of this identity with its key. Fails if they do not belong
/// to the identity or to one another.
pub(in crate::svid) fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: &[u8],
    spiffe_id: &SpiffeId,
) -> Result<CertifiedKey, OwnSvidError> {
    let leaf = chain.first().ok_or(OwnSvidError::NoCertificate)?;
    let certified = id_of(leaf).map_err(OwnSvidError::Certificate)?;
    if certified != *spiffe_id {
        return Err(OwnSvidError::OtherId {
            certified,
            expected: spiffe_id.clone(),
        });
    }
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
    let key = any_supported_type(&key).map_err(|_| OwnSvidError::Key)?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|_| OwnSvidError::OtherKey)?;
    Ok(certified)
}

/// Returns the SPIFFE ID of a certificate. An X.509-SVID has exactly one URI among its names. The
/// signature is not verified. Fails for any other number, and for a name that is not a SPIFFE ID.
pub fn id_of(certificate: &CertificateDer<'_>) -> Result<SpiffeId, CertificateIdError> {
    let certificate =
        EndEntityCert::try_from(certificate).map_err(CertificateIdError::Unreadable)?;
    let mut names = certificate.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(name), None) => SpiffeId::parse(name).map_err(CertificateIdError::InvalidId),
        (None, _) => Err(CertificateIdError::NoUri),
        (Some(_), Some(_)) => Err(CertificateIdError::SeveralUris),
    }
}

/// Splits concatenated DER certificates. Returns `None` for other bytes.
pub(in crate::svid) fn split(mut bytes: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let mut certificates = Vec::new();
    while !bytes.is_empty() {
        let (certificate, rest) = bytes.split_at_checked(length(bytes)?)?;
        certificates.push(CertificateDer::from(certificate.to_vec()));
        bytes = rest;
    }
    Some(certificates)
}

/// Returns the length of the DER sequence at the start of `bytes`, header included.
fn length(bytes: &[u8]) -> Option<usize> {
    const SEQUENCE: u8 = 0x30;
    let (&[key, first], rest) = bytes.split_first_chunk()?;
    if key != SEQUENCE {
        return None;
    }
    let (head, content) = match first {
        0..=0x7f => (2, usize::from(first)),
        0x81 => (3, usize::from(*rest.first()?)),
        0x82 => (4, usize::from(u16::from_be_bytes(*rest.first_chunk()?))),
        // Certificates are not that long.
        _ => return None,
    };
    Some(head + content)
}
