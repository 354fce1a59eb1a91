//! X.509-SVIDs as the Workload API sends them, parsed and checked.
//!
//! Standard: X509-SVID.md, and SPIFFE_Workload_API.md, section 5.2.1.
//!
//! Standard: X509-SVID.md, and SPIFFE_Workload_API.md, section 5.2.1.

use std::fmt;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs::{default_provider, sign::any_supported_type};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use webpki::{EndEntityCert, KeyUsage};
use zeroize::Zeroizing;

use crate::identity::SpiffeId;
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
    pub(super) fn read(mut message: X509svidResponse, version: u64) -> Result<Self, String> {
        // The keys of all SVIDs are moved first, so that unused ones are zeroized too.
        let take_key =
            |svid: &mut X509svid| Zeroizing::new(std::mem::take(&mut svid.x509_svid_key));
        let keys: Vec<_> = message.svids.iter_mut().map(take_key).collect();
        let all: Vec<_> = message
            .svids
            .iter()
            .map(|svid| svid.spiffe_id.clone())
            .collect();
        let default = all.first().ok_or("the message has none")?;
        let spiffe_id = SpiffeId::parse(default)
            .map_err(|error| format!("its SPIFFE ID is invalid: {error}"))?;
        let of_default = message
            .svids
            .iter()
            .zip(&keys)
            .filter(|(svid, _)| svid.spiffe_id == *default);
        let mut read = of_default.map(|(svid, key)| read_one(svid, key, &spiffe_id));
        let first = read.next().ok_or("the message has none")?;
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
) -> Result<(CertifiedKey, RootCertStore), String> {
    let chain = split(&svid.x509_svid).ok_or("its certificates are not DER")?;
    let leaf = chain.first().ok_or("it has no certificate")?;
    let certified_id = id_of(leaf).map_err(|error| format!("its certificate {error}"))?;
    if certified_id != *spiffe_id {
        return Err(format!(
            "its certificate is that of {certified_id}, not of {spiffe_id}"
        ));
    }
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
    // The library's error does not quote the key, and is omitted all the same.
    let key = any_supported_type(&key).map_err(|_| "its private key cannot be read")?;
    let certified = CertifiedKey::new(chain, key);
    certified
        .keys_match()
        .map_err(|_| "its private key is not that of its certificate")?;
    let mut roots = RootCertStore::empty();
    for root in split(&svid.bundle).ok_or("its bundle is not DER")? {
        roots
            .add(root)
            .map_err(|error| format!("its bundle has a CA that cannot be used: {error}"))?;
    }
    if roots.is_empty() {
        return Err("its bundle is empty".to_owned());
    }
    Ok((certified, roots))
}

/// Returns the SPIFFE ID of a certificate. An X.509-SVID has exactly one URI among its names. The
/// signature is not verified.
pub fn id_of(certificate: &CertificateDer<'_>) -> Result<SpiffeId, String> {
    let certificate =
        EndEntityCert::try_from(certificate).map_err(|error| format!("cannot be read: {error}"))?;
    let mut names = certificate.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(name), None) => {
            SpiffeId::parse(name).map_err(|error| format!("has no SPIFFE ID: {error}"))
        }
        (None, _) => Err("has no SPIFFE ID".to_owned()),
        (Some(_), Some(_)) => Err("has several URIs, so its SPIFFE ID is ambiguous".to_owned()),
    }
}

/// Splits concatenated DER certificates. Returns `None` for other bytes.
pub(super) fn split(mut bytes: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
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
