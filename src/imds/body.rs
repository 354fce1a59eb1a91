//! The bodies of the instance metadata service.

use std::time::SystemTime;

use serde::Serialize;
use zeroize::Zeroizing;

use crate::cache::CachedCredentials;
use crate::clock::printable;

/// A rejection in the form that SDKs read where they expect credentials.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct RejectionBody<'a> {
    code: &'static str,
    message: &'a str,
    last_updated: String,
}

#[derive(Serialize)]
struct DocumentBody<'a> {
    region: &'a str,
}

/// Returns the body with these credentials, and with the account if `extended` and the role has
/// one. Its key, token and expiry are byte for byte those of the container credential endpoint.
pub fn credentials(cached: &CachedCredentials, extended: bool) -> Zeroizing<Vec<u8>> {
    let head = format!(
        "{{\"Code\":\"Success\",\"LastUpdated\":\"{}\",\"Type\":\"AWS-HMAC\",",
        time(cached.issued())
    );
    let account = match extended {
        true => cached.body.account_field(),
        false => &[],
    };
    let parts = [head.as_bytes(), cached.body.key_fields(), account, b"}"];
    // The buffer has the exact size, since a growing buffer would leave copies of the secrets.
    let length = parts.iter().map(|part| part.len()).sum();
    let mut body = Zeroizing::new(Vec::with_capacity(length));
    for part in parts {
        body.extend_from_slice(part);
    }
    body
}

/// Returns the body for credentials that STS or the source rejects. SDKs show its message.
pub fn rejection(message: &str, now: SystemTime) -> Vec<u8> {
    let body = RejectionBody {
        code: "AssumeRoleUnauthorizedAccess",
        message,
        last_updated: time(now),
    };
    // Serializing strings into memory cannot fail.
    serde_json::to_vec(&body).unwrap_or_default()
}

/// Returns the part of an instance's identity document that SDKs read.
pub fn document(region: &str) -> Vec<u8> {
    serde_json::to_vec(&DocumentBody { region }).unwrap_or_default()
}

/// Returns the time with whole seconds and `Z`, the only form that each SDK reads.
fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(printable(time)).to_string()
}
