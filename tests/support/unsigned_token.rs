//! JWT-SVIDs with an invalid signature, for unit tests, integration tests and the bench. Only STS
//! checks a signature.
#![allow(dead_code, reason = "not every test needs each of these functions")]

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// Returns a token with this header and these claims, as JSON text.
pub(crate) fn raw_token(header: &str, claims: &str) -> String {
    [header, claims, "a signature that no test verifies"]
        .map(|part| URL_SAFE_NO_PAD.encode(part))
        .join(".")
}

/// Returns a token that is valid from `from` on, for `lifetime` seconds. `serial` makes it unique.
pub(crate) fn token_of(
    spiffe_id: &str,
    audience: &str,
    from: SystemTime,
    lifetime: u64,
    serial: u32,
) -> String {
    let from = seconds(from);
    let until = from + lifetime;
    raw_token(
        r#"{"alg":"ES256","kid":"k1","typ":"JWT"}"#,
        &format!(
            r#"{{"sub":"{spiffe_id}","aud":["{audience}"],"iat":{from},"exp":{until},"jti":"{serial}"}}"#
        ),
    )
}

/// Returns the seconds since 1970, which claims have.
pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
