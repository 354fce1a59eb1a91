//! The fuzz target for the facts of a certificate, with arbitrary bytes.

use std::time::UNIX_EPOCH;

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

use super::certificate::{CertificateFacts, KeyKind};
use super::signature::decimal;

/// A prime that serial numbers are compared by, since they do not fit into an integer.
const PRIME: u64 = 1_000_000_007;

/// Checks the facts of a certificate: the serial number is the certificate's, and no certificate is
/// good both for a workload and for a CA.
pub(crate) fn certificate_facts(bytes: &[u8]) -> bool {
    let der = CertificateDer::from(bytes);
    let Ok(facts) = CertificateFacts::read(&der) else {
        return false;
    };
    let digits = facts.serial.as_bytes();
    assert!(digits.iter().all(u8::is_ascii_digit) && !digits.is_empty());
    assert!(digits == b"0" || digits.first() != Some(&b'0'), "{facts:?}");
    if let Ok(other) = EndEntityCert::try_from(&der) {
        // Another parser finds the same number.
        let by_bytes = remainder(other.serial().iter().copied(), 256);
        let by_digits = remainder(digits.iter().map(|digit| digit - b'0'), 10);
        assert_eq!(by_bytes, by_digits, "{facts:?}");
        assert_eq!(decimal(other.serial()), facts.serial);
    }
    for now in [facts.not_before, facts.not_after, UNIX_EPOCH] {
        let (leaf, ca) = (facts.leaf_problems(now), facts.ca_problems(now));
        assert!(!leaf.is_empty() || !ca.is_empty(), "{facts:?}");
        let is_ca = "is that of a CA";
        assert_eq!(leaf.contains(&is_ca), facts.is_ca);
        assert!(facts.key != KeyKind::Other || !leaf.is_empty());
    }
    let at_end = facts.leaf_problems(facts.not_after);
    assert!(at_end.contains(&"has expired"), "{facts:?}");
    // What follows a certificate is not ignored.
    let longer = CertificateDer::from([bytes, &[0]].concat());
    assert!(CertificateFacts::read(&longer).is_err(), "{facts:?}");
    true
}

/// Returns the remainder of a number with these digits.
fn remainder(digits: impl Iterator<Item = u8>, base: u64) -> u64 {
    digits.fold(0, |value, digit| (value * base + u64::from(digit)) % PRIME)
}
