//! The signed request for a session.

use std::collections::BTreeMap;
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use serde::Serialize;
use thiserror::Error;

use super::certificate::{CertificateFacts, UnreadableCertificate};
use super::signature::{
    CERTIFICATE_HEADER, CHAIN_HEADER, DATE_HEADER, SESSIONS_PATH, canonical_query,
    canonical_request, date, hex, scope, signed_headers, string_to_sign,
};
use super::svid_key::{SigningError, SvidKey};
use crate::role::{Grant, RolesAnywhereTarget};
use crate::svid::X509Svid;

/// A request that is ready to be sent, but for `Content-Length`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SignedSessionRequest {
    /// Path and query of the URL.
    pub(super) path: String,
    /// The headers, with names in lower case, `authorization` included.
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: String,
}

/// Reason why a request cannot be signed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum UnsignableRequest {
    #[error(transparent)]
    Certificate(#[from] UnreadableCertificate),
    #[error("the key of the SVID {0}")]
    Key(#[from] SigningError),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SessionParameters<'a> {
    duration_seconds: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    role_session_name: Option<&'a str>,
}

impl SignedSessionRequest {
    /// Signs a request for a session of `grant` with `svid`, for the server at `host`. Without
    /// `with_name` the session gets its name from the certificate.
    pub(super) fn new(
        grant: &Grant,
        at: &RolesAnywhereTarget,
        host: &str,
        svid: &X509Svid,
        with_name: bool,
        now: SystemTime,
    ) -> Result<Self, UnsignableRequest> {
        let (leaf, above) = svid.chain().split_first().ok_or(UnreadableCertificate)?;
        let serial = CertificateFacts::read(leaf)?.serial;
        let key = SvidKey::from_pkcs8(svid.secret())?;
        let query = canonical_query([
            ("profileArn", at.profile_arn.as_str()),
            ("roleArn", grant.role_arn.as_str()),
            ("trustAnchorArn", at.trust_anchor_arn.as_str()),
        ]);
        let parameters = SessionParameters {
            duration_seconds: grant.role.duration.as_secs(),
            role_session_name: with_name.then(|| grant.session_name.as_str()),
        };
        // Strings and numbers in memory cannot fail to serialize.
        let body = serde_json::to_string(&parameters).unwrap_or_default();
        let date = date(now);
        let mut headers: BTreeMap<String, String> = [
            ("content-type", "application/json"),
            ("host", host),
            (DATE_HEADER, &date),
            (CERTIFICATE_HEADER, &STANDARD.encode(leaf)),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        let chain = intermediates(above);
        if !chain.is_empty() {
            headers.insert(CHAIN_HEADER.to_owned(), chain);
        }
        let scope = scope(&date, &at.region);
        let canonical = canonical_request(&query, &headers, body.as_bytes());
        let text = string_to_sign(key.algorithm(), &date, &scope, &canonical);
        let authorization = format!(
            "{} Credential={serial}/{scope}, SignedHeaders={}, Signature={}",
            key.algorithm(),
            signed_headers(&headers),
            hex(&key.sign(text.as_bytes())?)
        );
        headers.insert("authorization".to_owned(), authorization);
        Ok(Self {
            path: format!("{SESSIONS_PATH}?{query}"),
            headers,
            body,
        })
    }
}

/// Returns the certificates between the leaf and the trust anchor, which is left out.
fn intermediates(above: &[CertificateDer<'_>]) -> String {
    let is_root = |certificate: &CertificateDer<'_>| {
        CertificateFacts::read(certificate).is_ok_and(|facts| facts.is_self_issued)
    };
    let between: Vec<String> = above
        .iter()
        .filter(|certificate| !is_root(certificate))
        .map(|certificate| STANDARD.encode(certificate))
        .collect();
    between.join(",")
}
