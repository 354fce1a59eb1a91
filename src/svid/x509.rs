//! X.509-SVIDs of workloads, and the check that each one passes before its key signs anything.
//!
//! IAM Roles Anywhere verifies the chain: it knows the CAs. The daemon checks that the certificate
//! is the requested identity's, and that the key is the certificate's. Format: X509-SVID.md.

use std::fmt;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use zeroize::Zeroizing;

use super::own_svid::{OwnSvidError, certified, split};
use super::proto::spire::api::agent::delegatedidentity;
use super::proto::{broker, workload};
use super::{BadToken, last_to_expire, non_empty};
use crate::identity::SpiffeId;

/// Minimum remaining life of a certificate, so that it does not expire while a request waits.
const MIN_REMAINING_LIFE: Duration = Duration::from_secs(30);

/// An X.509-SVID that passed the check. Its key is a secret, and is cleared when it is dropped.
#[derive(Clone)]
pub struct X509Svid {
    spiffe_id: SpiffeId,
    /// Certificates in DER, the leaf first.
    chain: Vec<CertificateDer<'static>>,
    bundle: Vec<CertificateDer<'static>>,
    /// PKCS #8 in DER.
    key: Zeroizing<Vec<u8>>,
    expires: SystemTime,
}

/// One X.509-SVID of a workload as the agent sent it, not checked.
pub struct ReceivedX509Svid {
    /// The SPIFFE ID that the agent claims for the certificate.
    pub spiffe_id: String,
    /// The operator's name for the identity, if it has one.
    pub hint: Option<String>,
    /// Certificates in DER, the leaf first. `None` if the agent's bytes are not certificates.
    pub chain: Option<Vec<CertificateDer<'static>>>,
    /// CAs of the trust domain, where the agent sends them along.
    pub bundle: Vec<CertificateDer<'static>>,
    /// The private key: PKCS #8 in DER.
    pub key: Zeroizing<Vec<u8>>,
}

impl X509Svid {
    /// Accepts an SVID if its leaf is that of `expected` alone, its key is the leaf's, and at least
    /// 30 s of its life are left at `now`.
    pub fn check(
        received: ReceivedX509Svid,
        expected: &SpiffeId,
        now: SystemTime,
    ) -> Result<Self, BadToken> {
        let wrong = |text: String| BadToken::Wrong(text);
        let chain = received
            .chain
            .ok_or_else(|| wrong("its certificates are not DER".to_owned()))?;
        let certified = certified(chain, &received.key, expected).map_err(|error| match error {
            // The text may reach a workload, which must not learn of another one's ID.
            OwnSvidError::OtherId { expected, .. } => {
                wrong(format!("its certificate is not that of {expected}"))
            }
            other => wrong(other.to_string()),
        })?;
        let chain = certified.cert;
        let validity = chain
            .first()
            .and_then(|leaf| Certificate::from_der(leaf).ok())
            .map(|leaf| *leaf.tbs_certificate().validity())
            .ok_or_else(|| wrong("its certificate cannot be read".to_owned()))?;
        let (from, expires) = (
            validity.not_before.to_system_time(),
            validity.not_after.to_system_time(),
        );
        let left = expires.duration_since(now).unwrap_or_default();
        if left < MIN_REMAINING_LIFE {
            return Err(BadToken::Expiring(format!(
                "its certificate expires in {} s; check the agent's connection to its server, and this node's clock",
                left.as_secs()
            )));
        }
        if from > now + MIN_REMAINING_LIFE {
            return Err(wrong(
                "its certificate is not valid yet: compare this node's clock".to_owned(),
            ));
        }
        Ok(Self {
            spiffe_id: expected.clone(),
            chain,
            bundle: received.bundle,
            key: received.key,
            expires,
        })
    }

    /// Returns the one that passes [`Self::check`] and expires last, or `None` without an SVID of
    /// `expected`. If none passes, the error is that of the first.
    pub fn check_any(
        received: impl IntoIterator<Item = ReceivedX509Svid>,
        expected: &SpiffeId,
        now: SystemTime,
    ) -> Result<Option<Self>, BadToken> {
        let of_expected = received
            .into_iter()
            .filter(|svid| svid.spiffe_id == expected.as_str());
        let checked = of_expected.map(|svid| Self::check(svid, expected, now));
        last_to_expire(checked, Self::expires)
    }

    /// Returns the SPIFFE ID of the leaf.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.spiffe_id
    }

    /// Returns the certificates, the leaf first. It is never empty.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Returns the CAs of the trust domain that came with the SVID. Some agents send none.
    pub fn bundle(&self) -> &[CertificateDer<'static>] {
        &self.bundle
    }

    /// Returns the private key, PKCS #8 in DER, for a signature alone.
    pub fn secret(&self) -> &[u8] {
        &self.key
    }

    /// Returns the time at which the leaf expires.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }
}

/// Moves the key out of the message, which would not clear it.
impl From<workload::X509svid> for ReceivedX509Svid {
    fn from(svid: workload::X509svid) -> Self {
        Self {
            key: Zeroizing::new(svid.x509_svid_key),
            chain: split(&svid.x509_svid),
            bundle: split(&svid.bundle).unwrap_or_default(),
            spiffe_id: svid.spiffe_id,
            hint: non_empty(svid.hint),
        }
    }
}

impl From<broker::X509svid> for ReceivedX509Svid {
    fn from(svid: broker::X509svid) -> Self {
        Self {
            key: Zeroizing::new(svid.x509_svid_key),
            chain: split(&svid.x509_svid),
            bundle: split(&svid.bundle).unwrap_or_default(),
            spiffe_id: svid.spiffe_id,
            hint: non_empty(svid.hint),
        }
    }
}

impl From<delegatedidentity::v1::X509svidWithKey> for ReceivedX509Svid {
    fn from(svid: delegatedidentity::v1::X509svidWithKey) -> Self {
        let key = Zeroizing::new(svid.x509_svid_key);
        let certificate = svid.x509_svid.unwrap_or_default();
        let chain = certificate.cert_chain.into_iter();
        Self {
            key,
            chain: Some(chain.map(CertificateDer::from).collect()),
            bundle: Vec::new(),
            spiffe_id: certificate.id.unwrap_or_default().text(),
            hint: non_empty(certificate.hint),
        }
    }
}

impl fmt::Debug for X509Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("X509Svid")
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ReceivedX509Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceivedX509Svid")
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests;
