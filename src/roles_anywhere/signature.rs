//! Signature Version 4 with an X.509 certificate, as IAM Roles Anywhere defines it.
//!
//! Reference: IAM Roles Anywhere User Guide, "Signing process", and AWS's
//! rolesanywhere-credential-helper. The canonical request is that of Signature Version 4. AWS's
//! crates offer it only together with a signature by a shared secret.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::SystemTime;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::{Digest, Sha256};

/// The algorithm of RSA keys.
pub(crate) const RSA: &str = "AWS4-X509-RSA-SHA256";
/// The algorithm of keys on elliptic curves.
pub(crate) const ECDSA: &str = "AWS4-X509-ECDSA-SHA256";
/// The path of `CreateSession`.
pub(crate) const SESSIONS_PATH: &str = "/sessions";
/// Header with the certificate: DER in base64.
pub(crate) const CERTIFICATE_HEADER: &str = "x-amz-x509";
/// Header with the certificates between it and the trust anchor: DER in base64, with commas.
pub(crate) const CHAIN_HEADER: &str = "x-amz-x509-chain";
/// Header with the time of the signature.
pub(crate) const DATE_HEADER: &str = "x-amz-date";
const SERVICE: &str = "rolesanywhere";

/// All characters but the unreserved ones of RFC 3986, section 2.3.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Returns a query in canonical form: encoded, and in the order of the encoded names and values.
pub(crate) fn canonical_query<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let encode = |text: &str| utf8_percent_encode(text, RESERVED).to_string();
    let mut pairs: Vec<(String, String)> = pairs
        .into_iter()
        .map(|(name, value)| (encode(name), encode(value)))
        .collect();
    pairs.sort();
    let pairs: Vec<String> = pairs
        .into_iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    pairs.join("&")
}

/// Returns the canonical request of a `POST` to [`SESSIONS_PATH`], with all of these headers
/// signed. Names of headers are in lower case.
pub(crate) fn canonical_request(
    query: &str,
    headers: &BTreeMap<String, String>,
    body: &[u8],
) -> String {
    let mut text = format!("POST\n{SESSIONS_PATH}\n{query}\n");
    for (name, value) in headers {
        let words: Vec<&str> = value.split(' ').filter(|word| !word.is_empty()).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name}:{}", words.join(" "));
    }
    let _ = write!(
        text,
        "\n{}\n{}",
        signed_headers(headers),
        hex(&Sha256::digest(body))
    );
    text
}

/// Returns the names of the signed headers, with semicolons.
pub(crate) fn signed_headers(headers: &BTreeMap<String, String>) -> String {
    let names: Vec<&str> = headers.keys().map(String::as_str).collect();
    names.join(";")
}

/// Returns the scope of a signature: date, region and service.
pub(crate) fn scope(date: &str, region: &str) -> String {
    let day = date.split('T').next().unwrap_or_default();
    format!("{day}/{region}/{SERVICE}/aws4_request")
}

/// Returns the text that the certificate's key signs.
pub(crate) fn string_to_sign(
    algorithm: &str,
    date: &str,
    scope: &str,
    canonical_request: &str,
) -> String {
    let digest = hex(&Sha256::digest(canonical_request));
    format!("{algorithm}\n{date}\n{scope}\n{digest}")
}

/// Formats the time of a signature: `yyyymmddThhmmssZ`.
pub(crate) fn date(time: SystemTime) -> String {
    let text = humantime::format_rfc3339_seconds(time).to_string();
    text.replace(['-', ':'], "")
}

/// Formats bytes in lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Formats the bytes of a serial number, the most significant first, in decimal digits. X.509
/// allows 20 bytes, which no integer type holds.
pub(crate) fn decimal(bytes: &[u8]) -> String {
    // Decimal digits, the least significant first.
    let mut digits = vec![0_u8];
    for byte in bytes {
        let mut carry = u16::from(*byte);
        for digit in &mut digits {
            let value = u16::from(*digit) * 256 + carry;
            // A remainder of ten is one digit.
            *digit = (value % 10) as u8;
            carry = value / 10;
        }
        while carry > 0 {
            digits.push((carry % 10) as u8);
            carry /= 10;
        }
    }
    digits
        .iter()
        .rev()
        .map(|digit| char::from(b'0' + digit))
        .collect()
}
