//! The proof of a request: a certificate, and a signature by its key.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::Request;
use hyper::body::Bytes;
use hyper::header::AUTHORIZATION;
use rustls::pki_types::{CertificateDer, SignatureVerificationAlgorithm, UnixTime};
use webpki::aws_lc_rs::{ECDSA_P256_SHA256, ECDSA_P384_SHA256, RSA_PKCS1_2048_8192_SHA256};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use super::DevSessionRejection;
use crate::dev::sts::sigv4::authorization_field;
use crate::identity::SpiffeId;
use crate::roles_anywhere::certificate::{CertificateFacts, KeyKind};
use crate::roles_anywhere::signature::{
    CERTIFICATE_HEADER, CHAIN_HEADER, DATE_HEADER, ECDSA, RSA, canonical_query, canonical_request,
    date, scope, string_to_sign,
};
use crate::svid::own_svid::id_of;

/// Maximum difference between a request's time and this clock, as AWS has it for signatures.
const MAX_SKEW: Duration = Duration::from_secs(5 * 60);

/// A certificate whose key has signed the request.
#[derive(Debug)]
pub(super) struct Proof {
    leaf: CertificateDer<'static>,
    intermediates: Vec<CertificateDer<'static>>,
    spiffe_id: SpiffeId,
    common_name: Option<String>,
    /// The text whose digest was signed.
    pub(super) canonical_request: String,
}

/// The fields of `Authorization`.
struct CertificateAuthorization<'a> {
    algorithm: &'a str,
    serial: &'a str,
    scope: &'a str,
    signed_headers: Vec<&'a str>,
    signature: Vec<u8>,
}

impl Proof {
    /// Verifies the signature of a request with this query, signed for `region`. The chain is not
    /// verified here.
    pub(super) fn of(
        request: &Request<Bytes>,
        query: &[(String, String)],
        region: &str,
        now: SystemTime,
    ) -> Result<Self, DevSessionRejection> {
        let authorization = header(request, AUTHORIZATION.as_str())
            .ok_or_else(|| DevSessionRejection::denied("Missing Authentication Token"))?;
        let authorization = CertificateAuthorization::parse(authorization)
            .ok_or_else(|| DevSessionRejection::denied("Authorization header is incomplete"))?;
        let signed_at = signed_at(request, now)?;
        if authorization.scope != scope(signed_at, region) {
            return Err(DevSessionRejection::denied(
                "Credential is not scoped to this region, service and date",
            ));
        }
        let headers = signed_headers(request, &authorization.signed_headers)?;
        let certificates = |name: &str| {
            let encoded = header(request, name).unwrap_or_default();
            let encoded = encoded.split(',').filter(|text| !text.is_empty());
            encoded
                .map(|text| STANDARD.decode(text).map(CertificateDer::from))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| DevSessionRejection::invalid(format!("{name} is not base64")))
        };
        let leaf = match <[_; 1]>::try_from(certificates(CERTIFICATE_HEADER)?) {
            Ok([leaf]) => leaf,
            Err(_) => return Err(DevSessionRejection::invalid("One certificate is required")),
        };
        let (spiffe_id, common_name) = check_leaf(&leaf, &authorization, now)?;
        let query = query
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let canonical_request =
            canonical_request(&canonical_query(query), &headers, request.body());
        let text = string_to_sign(
            authorization.algorithm,
            signed_at,
            authorization.scope,
            &canonical_request,
        );
        verify_signature(&leaf, text.as_bytes(), &authorization)?;
        Ok(Self {
            leaf,
            intermediates: certificates(CHAIN_HEADER)?,
            spiffe_id,
            common_name,
            canonical_request,
        })
    }

    /// Verifies that one of these CAs has signed the certificate, directly or not.
    pub(super) fn verify_chain(
        &self,
        anchors: &[CertificateDer<'static>],
        now: SystemTime,
    ) -> Result<(), DevSessionRejection> {
        let untrusted =
            || DevSessionRejection::denied("Untrusted certificate. Insufficient certificate");
        let anchors: Vec<_> = anchors
            .iter()
            .filter_map(|anchor| anchor_from_trusted_cert(anchor).ok())
            .collect();
        let leaf = EndEntityCert::try_from(&self.leaf).map_err(|_| untrusted())?;
        let at = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let verified = leaf.verify_for_usage(
            ALL_VERIFICATION_ALGS,
            &anchors,
            &self.intermediates,
            UnixTime::since_unix_epoch(at),
            KeyUsage::client_auth(),
            None,
            None,
        );
        verified.map(drop).map_err(|_| untrusted())
    }

    pub(super) fn spiffe_id(&self) -> &SpiffeId {
        &self.spiffe_id
    }

    /// Returns the common name of the certificate's subject.
    pub(super) fn common_name(&self) -> Option<&str> {
        self.common_name.as_deref()
    }

    /// Returns the serial number, which names a session without a name of its own.
    pub(super) fn serial_in_hex(&self) -> String {
        let leaf = EndEntityCert::try_from(&self.leaf).ok();
        let serial = leaf.map(|leaf| leaf.serial().to_vec()).unwrap_or_default();
        crate::roles_anywhere::signature::hex(&serial)
    }
}

impl<'a> CertificateAuthorization<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (algorithm, fields) = text.split_once(' ')?;
        let field = |name| authorization_field(fields, name);
        let (serial, scope) = field("Credential")?.split_once('/')?;
        Some(Self {
            algorithm,
            serial,
            scope,
            signed_headers: field("SignedHeaders")?.split(';').collect(),
            signature: bytes(field("Signature")?)?,
        })
    }
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = hex.as_bytes().chunks(2);
    pairs
        .map(|pair| match pair {
            [high, low] => u8::try_from(digit(*high)? * 16 + digit(*low)?).ok(),
            _ => None,
        })
        .collect()
}

fn header<'a>(request: &'a Request<Bytes>, name: &str) -> Option<&'a str> {
    request.headers().get(name)?.to_str().ok()
}

/// Returns the time of the signature, which must be near this clock's.
fn signed_at(request: &Request<Bytes>, now: SystemTime) -> Result<&str, DevSessionRejection> {
    let text = header(request, DATE_HEADER)
        .ok_or_else(|| DevSessionRejection::denied("X-Amz-Date is required"))?;
    // A text in the same form as the bounds compares like the times.
    let is_date = text.len() == "20150830T123600Z".len() && text.ends_with('Z');
    let bounds = date(now - MAX_SKEW)..=date(now + MAX_SKEW);
    if !is_date || !bounds.contains(&text.to_owned()) {
        return Err(DevSessionRejection::denied(
            "Signature expired or not yet valid",
        ));
    }
    Ok(text)
}

/// Returns the signed headers. Each header that matters has to be among them.
fn signed_headers(
    request: &Request<Bytes>,
    names: &[&str],
) -> Result<BTreeMap<String, String>, DevSessionRejection> {
    let is_sorted = names.is_sorted_by(|a, b| a < b);
    let present = request.headers().keys().map(|name| name.as_str());
    let required = ["host", DATE_HEADER, CERTIFICATE_HEADER];
    let mut all = present
        .filter(|name| name.starts_with("x-amz-") || *name == "content-type")
        .chain(required);
    if !is_sorted || !all.all(|name| names.contains(&name)) {
        return Err(DevSessionRejection::denied(
            "Host, Content-Type and each X-Amz header have to be signed, in their order",
        ));
    }
    names
        .iter()
        .map(|name| {
            let mut values = request.headers().get_all(*name).iter();
            let value = values.next().and_then(|value| value.to_str().ok());
            match (value, values.next()) {
                (Some(value), None) => Ok(((*name).to_owned(), value.to_owned())),
                _ => Err(DevSessionRejection::denied(format!(
                    "Header {name} is not single"
                ))),
            }
        })
        .collect()
}

/// Checks the certificate against the rules for workloads, and against `Authorization`. Returns its
/// names.
fn check_leaf(
    leaf: &CertificateDer<'_>,
    authorization: &CertificateAuthorization<'_>,
    now: SystemTime,
) -> Result<(SpiffeId, Option<String>), DevSessionRejection> {
    let facts = CertificateFacts::read(leaf)
        .map_err(|_| DevSessionRejection::invalid("The certificate cannot be read"))?;
    if let Some(problem) = facts.leaf_problems(now).first() {
        return Err(DevSessionRejection::denied(format!(
            "The certificate {problem}"
        )));
    }
    let algorithm = match facts.key {
        KeyKind::Rsa => RSA,
        _ => ECDSA,
    };
    if authorization.algorithm != algorithm || authorization.serial != facts.serial {
        return Err(DevSessionRejection::denied(
            "Algorithm or serial number is not that of the certificate",
        ));
    }
    let spiffe_id =
        id_of(leaf).map_err(|_| DevSessionRejection::denied("The certificate has no SPIFFE ID"))?;
    Ok((spiffe_id, facts.common_name))
}

fn verify_signature(
    leaf: &CertificateDer<'_>,
    text: &[u8],
    authorization: &CertificateAuthorization<'_>,
) -> Result<(), DevSessionRejection> {
    let mismatch = || DevSessionRejection::denied("Signature does not match");
    let algorithm: &dyn SignatureVerificationAlgorithm =
        match CertificateFacts::read(leaf).map(|facts| facts.key) {
            Ok(KeyKind::Rsa) => RSA_PKCS1_2048_8192_SHA256,
            Ok(KeyKind::P256) => ECDSA_P256_SHA256,
            Ok(KeyKind::P384) => ECDSA_P384_SHA256,
            _ => return Err(mismatch()),
        };
    let leaf = EndEntityCert::try_from(leaf).map_err(|_| mismatch())?;
    leaf.verify_signature(algorithm, text, &authorization.signature)
        .map_err(|_| mismatch())
}
