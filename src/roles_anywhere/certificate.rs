//! The facts of a certificate that IAM Roles Anywhere judges it by.
//!
//! Reference: IAM Roles Anywhere User Guide, "Trust model", with the rules for CAs and for end
//! entities.

use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use thiserror::Error;
use x509_cert::Certificate;
use x509_cert::der::asn1::{ObjectIdentifier, PrintableStringRef, Utf8StringRef};
use x509_cert::der::{Decode, Encode};
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage};

use super::signature::decimal;

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
/// Signatures with SHA-256 or longer: RSA, RSA-PSS and ECDSA.
const STRONG_SIGNATURES: [ObjectIdentifier; 7] = [
    ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10"),
    ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11"),
    ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.12"),
    ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.13"),
    ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2"),
    ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3"),
    ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.4"),
];

/// Maximum number of CAs in a trust anchor.
pub const MAX_ANCHOR_CAS: usize = 2;

/// The bytes are not an X.509 certificate.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the certificate cannot be read")]
pub struct UnreadableCertificate;

/// Kind of a public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// RSA, of any length.
    Rsa,
    /// An elliptic curve: P-256.
    P256,
    /// An elliptic curve: P-384.
    P384,
    /// A kind that IAM Roles Anywhere does not accept.
    Other,
}

/// The facts of one certificate.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// The serial number in decimal digits.
    pub serial: String,
    pub key: KeyKind,
    pub is_ca: bool,
    /// Whether issuer and subject are the same.
    pub is_self_issued: bool,
    /// The use of the key for signatures.
    pub signs_data: bool,
    /// The use of the key for certificates.
    pub signs_certificates: bool,
    /// Whether its own signature has SHA-256 or longer.
    pub has_strong_signature: bool,
    /// The common name of the subject.
    pub common_name: Option<String>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl CertificateFacts {
    /// Reads a certificate in DER. Verifies no signature.
    pub fn read(der: &CertificateDer<'_>) -> Result<Self, UnreadableCertificate> {
        let certificate = Certificate::from_der(der).map_err(|_| UnreadableCertificate)?;
        let fields = certificate.tbs_certificate();
        let constraints = fields.get_extension::<BasicConstraints>();
        let usage = fields.get_extension::<KeyUsage>();
        let (Ok(constraints), Ok(usage)) = (constraints, usage) else {
            return Err(UnreadableCertificate);
        };
        let usage = usage.map(|(_, usage)| usage);
        Ok(Self {
            serial: decimal(fields.serial_number().as_bytes()),
            key: key_kind(&certificate),
            is_ca: constraints.is_some_and(|(_, constraints)| constraints.ca),
            is_self_issued: fields.issuer() == fields.subject(),
            signs_data: usage.is_some_and(|usage| usage.digital_signature()),
            signs_certificates: usage.is_some_and(|usage| usage.key_cert_sign()),
            has_strong_signature: STRONG_SIGNATURES
                .contains(&certificate.signature_algorithm().oid),
            common_name: common_name(&certificate),
            not_before: fields.validity().not_before.to_system_time(),
            not_after: fields.validity().not_after.to_system_time(),
        })
    }

    /// Returns each rule for the certificate of a workload that this one breaks at `now`. A text
    /// follows the words "the certificate".
    pub fn leaf_problems(&self, now: SystemTime) -> Vec<&'static str> {
        let rules = [
            (!self.is_ca, "is that of a CA"),
            (self.signs_data, "lacks the key usage digitalSignature"),
            (
                self.key != KeyKind::Other,
                "has a key that is neither RSA nor of the curves P-256 and P-384",
            ),
        ];
        broken(&rules).chain(self.common_problems(now)).collect()
    }

    /// Returns each rule for the CA of a trust anchor that this certificate breaks at `now`.
    pub fn ca_problems(&self, now: SystemTime) -> Vec<&'static str> {
        let rules = [
            (self.is_ca, "is not that of a CA"),
            (self.signs_certificates, "lacks the key usage keyCertSign"),
        ];
        broken(&rules).chain(self.common_problems(now)).collect()
    }

    fn common_problems(&self, now: SystemTime) -> impl Iterator<Item = &'static str> {
        let rules = [
            (
                self.has_strong_signature,
                "is signed with a hash that is weaker than SHA-256",
            ),
            (self.not_before <= now, "is not valid yet"),
            (self.not_after > now, "has expired"),
        ];
        broken(&rules).collect::<Vec<_>>().into_iter()
    }
}

fn broken(rules: &[(bool, &'static str)]) -> impl Iterator<Item = &'static str> {
    rules
        .iter()
        .filter(|(is_kept, _)| !is_kept)
        .map(|(_, problem)| *problem)
}

fn key_kind(certificate: &Certificate) -> KeyKind {
    let algorithm = &certificate
        .tbs_certificate()
        .subject_public_key_info()
        .algorithm;
    let curve = algorithm
        .parameters
        .as_ref()
        .and_then(|parameters| parameters.decode_as::<ObjectIdentifier>().ok());
    match (algorithm.oid, curve) {
        (RSA, _) => KeyKind::Rsa,
        (EC, Some(P256)) => KeyKind::P256,
        (EC, Some(P384)) => KeyKind::P384,
        _ => KeyKind::Other,
    }
}

fn common_name(certificate: &Certificate) -> Option<String> {
    let names = certificate.tbs_certificate().subject();
    let name = names
        .as_ref()
        .iter()
        .flat_map(|part| part.as_ref().iter())
        .find(|attribute| attribute.oid == COMMON_NAME)?;
    let value = name.value.to_der().ok()?;
    let utf8 = Utf8StringRef::from_der(&value).map(|text| text.as_str().to_owned());
    utf8.or_else(|_| PrintableStringRef::from_der(&value).map(|text| text.as_str().to_owned()))
        .ok()
}
