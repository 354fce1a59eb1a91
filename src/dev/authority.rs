//! The CA of `dev`, which issues X.509-SVIDs: generated for each run, never written to a file.
//!
//! Format: X509-SVID.md, sections 2 to 4.

use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::keys::KeyError;
use crate::identity::SpiffeId;

/// Lifetime of an X.509-SVID: SPIRE's default.
const SVID_LIFETIME: Duration = Duration::from_secs(3600);
/// Lifetime of the CA, which ends with the run.
const CA_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Time before now from which certificates are valid, as in SPIRE: clocks differ.
const BACKDATE: Duration = Duration::from_secs(10);

/// A CA with a P-256 key, as SPIRE uses by default.
pub struct DevAuthority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

/// A certificate with its key, which is cleared when it is dropped.
pub(super) struct IssuedSvid {
    pub(super) certificate: CertificateDer<'static>,
    /// PKCS #8 in DER.
    pub(super) key: Zeroizing<Vec<u8>>,
}

impl DevAuthority {
    /// Generates a CA of this trust domain.
    pub fn generate(trust_domain: &str, now: SystemTime) -> Result<Self, KeyError> {
        let key = KeyPair::generate().map_err(KeyError::of)?;
        let mut params = params(&format!("spiffe://{trust_domain}"), now, CA_LIFETIME)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(KeyError::of)?;
        Ok(Self {
            certificate: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    /// Returns the CA's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Issues an X.509-SVID with a key of its own.
    pub(super) fn issue(&self, id: &SpiffeId, now: SystemTime) -> Result<IssuedSvid, KeyError> {
        let key = KeyPair::generate().map_err(KeyError::of)?;
        let mut params = params(id.as_str(), now, SVID_LIFETIME)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &self.issuer).map_err(KeyError::of)?;
        Ok(IssuedSvid {
            certificate: certificate.der().clone(),
            key: Zeroizing::new(key.serialize_der()),
        })
    }
}

/// Returns the fields that all certificates have.
fn params(id: &str, now: SystemTime, lifetime: Duration) -> Result<CertificateParams, KeyError> {
    let mut params = CertificateParams::new(Vec::new()).map_err(KeyError::of)?;
    params.subject_alt_names = vec![SanType::URI(id.try_into().map_err(KeyError::of)?)];
    // No common name, as in SPIRE: IAM Roles Anywhere makes it the source identity.
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, "awsvid dev");
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + lifetime).into();
    Ok(params)
}

impl fmt::Debug for DevAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevAuthority").finish_non_exhaustive()
    }
}
