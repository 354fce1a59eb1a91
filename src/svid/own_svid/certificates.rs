//! An X.509-SVID as the Workload API sends it, read and checked.
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

/// An X.509-SVID of the daemon itself, with its key, and what others of its trust domain are verified by.
pub struct OwnSvid {
    /// Who the daemon is.
    pub spiffe_id: SpiffeId,
    /// All identities that it has, as they were given.
    pub all: Vec<String>,
    /// The certificates, the leaf first, and the leaf's key.
    pub certified: Arc<CertifiedKey>,
    /// The trust domain's CAs.
    pub roots: Arc<RootCertStore>,
    /// Higher than that of every SVID before.
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
    /// Reads the default identity of a message, which is the first. The error says what is wrong with it. An identity may come
    /// several times: with several entries, or from an agent that merges the answers of two others and may label one wrongly.
    /// Then the first usable SVID counts.
    pub(super) fn read(mut message: X509svidResponse, version: u64) -> Result<Self, String> {
        // Of all of them, before anything else: those that are not used must not stay in memory either.
        let take = |svid: &mut X509svid| Zeroizing::new(std::mem::take(&mut svid.x509_svid_key));
        let keys: Vec<_> = message.svids.iter_mut().map(take).collect();
        let all: Vec<_> = message
            .svids
            .iter()
            .map(|svid| svid.spiffe_id.clone())
            .collect();
        let default = all.first().ok_or("there is none in it")?;
        let spiffe_id =
            SpiffeId::parse(default).map_err(|error| format!("its SPIFFE ID is none: {error}"))?;
        let of_default = message
            .svids
            .iter()
            .zip(&keys)
            .filter(|(svid, _)| svid.spiffe_id == *default);
        let mut read = of_default.map(|(svid, key)| read_one(svid, key, &spiffe_id));
        let first = read.next().ok_or("there is none in it")?;
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

    /// Whether it is over, so that nobody accepts it any more.
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

/// Reads the certificates and the key of an SVID of this identity, and the CAs of its trust domain.
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
    // The library's error says nothing of the key, and is not shown all the same.
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

/// Whose certificate it is: an X.509-SVID has exactly one URI among its names, the SPIFFE ID. Whether anybody has signed it
/// is another question.
pub fn id_of(certificate: &CertificateDer<'_>) -> Result<SpiffeId, String> {
    let certificate =
        EndEntityCert::try_from(certificate).map_err(|error| format!("cannot be read: {error}"))?;
    let mut names = certificate.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(name), None) => {
            SpiffeId::parse(name).map_err(|error| format!("has no SPIFFE ID: {error}"))
        }
        (None, _) => Err("has no SPIFFE ID".to_owned()),
        (Some(_), Some(_)) => Err("has several URIs, so it is not clear whose it is".to_owned()),
    }
}

/// DER certificates that stand one after the other. `None` if that is not what they are.
pub(super) fn split(mut bytes: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let mut certificates = Vec::new();
    while !bytes.is_empty() {
        let (certificate, rest) = bytes.split_at_checked(length(bytes)?)?;
        certificates.push(CertificateDer::from(certificate.to_vec()));
        bytes = rest;
    }
    Some(certificates)
}

/// How long the DER sequence is that `bytes` begin with, with its head.
fn length(bytes: &[u8]) -> Option<usize> {
    const SEQUENCE: u8 = 0x30;
    let (&[tag, first], rest) = bytes.split_first_chunk()?;
    if tag != SEQUENCE {
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
