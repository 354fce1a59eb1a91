//! The fixed vectors were made with Python's urllib and hashlib, and signed by OpenSSL 3.0:
//! `openssl dgst -sha256 -sign <key> <string to sign>`. `between.pem` has the chain of `p384.pem`,
//! an intermediate CA and a root.

mod calls;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, SignatureVerificationAlgorithm};
use sha2::{Digest, Sha256};
use webpki::EndEntityCert;
use webpki::aws_lc_rs::{ECDSA_P256_SHA256, ECDSA_P384_SHA256, RSA_PKCS1_2048_8192_SHA256};
use zeroize::Zeroizing;

use super::certificate::{CertificateFacts, KeyKind};
use super::signature::{canonical_query, canonical_request, date, decimal, hex};
use super::svid_key::{SigningError, SvidKey};
use super::*;
use crate::identity::{RoleArn, SessionName};
use crate::role::Role;
use crate::svid::ReceivedX509Svid;

const ID: &str = "spiffe://example.org/billing";
const HOST: &str = "rolesanywhere.eu-central-1.amazonaws.com";

fn at() -> RolesAnywhereTarget {
    let arn = |resource: &str| {
        format!("arn:aws:rolesanywhere:eu-central-1:123456789012:{resource}-0123456789ab")
    };
    RolesAnywhereTarget {
        trust_anchor_arn: arn("trust-anchor/9f084b8b-2e5c-4d5c-a4c1"),
        profile_arn: arn("profile/1b2c3d4e-0000-4d5c-a4c1"),
        region: "eu-central-1".to_owned(),
        endpoint: None,
    }
}

fn grant() -> Grant {
    let spiffe_id = SpiffeId::parse(ID).unwrap();
    Grant {
        session_name: SessionName::of(&spiffe_id),
        spiffe_id,
        role_arn: RoleArn::parse("arn:aws:iam::123456789012:role/example").unwrap(),
        role: std::sync::Arc::new(Role::example()),
        details: None,
    }
}

/// 2027-06-30, within the validity of the vectors' certificates.
fn now() -> SystemTime {
    humantime::parse_rfc3339("2027-06-30T00:00:00Z").unwrap()
}

fn vector(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/roles_anywhere/tests/vectors");
    folder.join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(vector(name)).unwrap()
}

fn key(name: &str) -> Vec<u8> {
    let key = PrivateKeyDer::from_pem_file(vector(name)).unwrap();
    key.secret_der().to_vec()
}

fn svid(name: &str) -> X509Svid {
    let mut chain = vec![CertificateDer::from_pem_file(vector(name)).unwrap()];
    if name == "p384.pem" {
        let above = CertificateDer::pem_file_iter(vector("between.pem")).unwrap();
        chain.extend(above.map(Result::unwrap));
    }
    let received = ReceivedX509Svid {
        hint: None,
        spiffe_id: ID.to_owned(),
        chain: Some(chain),
        bundle: Vec::new(),
        key: Zeroizing::new(key(name)),
    };
    X509Svid::check(received, &SpiffeId::parse(ID).unwrap(), now()).unwrap()
}

/// Returns the signed text and the signature of a request.
fn signed(name: &str) -> (SignedSessionRequest, Vec<u8>) {
    let request =
        SignedSessionRequest::new(&grant(), &at(), HOST, &svid(name), true, now()).unwrap();
    let (_, signature) = request.headers["authorization"]
        .split_once("Signature=")
        .unwrap();
    let bytes = (0..signature.len() / 2)
        .map(|i| u8::from_str_radix(&signature[2 * i..2 * i + 2], 16).unwrap())
        .collect();
    (request, bytes)
}

#[test]
fn request_is_that_of_the_vectors() {
    for (name, algorithm, serial) in [
        (
            "rsa",
            "AWS4-X509-RSA-SHA256",
            "730750818665451459101842416358141509827966271487",
        ),
        (
            "p256",
            "AWS4-X509-ECDSA-SHA256",
            "320187260592966088227705887823340838415",
        ),
        ("p384", "AWS4-X509-ECDSA-SHA256", "1"),
    ] {
        let (mut request, _) = signed(&format!("{name}.pem"));
        let authorization = request.headers.remove("authorization").unwrap();
        let names = match name {
            "p384" => "content-type;host;x-amz-date;x-amz-x509;x-amz-x509-chain",
            _ => "content-type;host;x-amz-date;x-amz-x509",
        };
        let expected = format!(
            "{algorithm} Credential={serial}/20270630/eu-central-1/rolesanywhere/aws4_request, SignedHeaders={names}, Signature="
        );
        assert!(authorization.starts_with(&expected), "{authorization}");
        let (_, query) = request.path.split_once('?').unwrap();
        let canonical = canonical_request(query, &request.headers, request.body.as_bytes());
        let digest = text(&format!("{name}.string-to-sign"));
        let digest = digest.rsplit('\n').next().unwrap().to_owned();
        assert_eq!(hex(&Sha256::digest(&canonical)), digest, "{canonical}");
        assert_eq!(
            request.body,
            r#"{"durationSeconds":3600,"roleSessionName":"example.org=billing"}"#
        );
    }
}

#[test]
fn signatures_are_those_of_openssl() {
    let verified = |algorithm: &dyn SignatureVerificationAlgorithm,
                    name: &str,
                    signature: &[u8]| {
        let certificate = CertificateDer::from_pem_file(vector(&format!("{name}.pem"))).unwrap();
        let certificate = EndEntityCert::try_from(&certificate).unwrap();
        let text = text(&format!("{name}.string-to-sign"));
        certificate.verify_signature(algorithm, text.as_bytes(), signature)
    };
    // RSA's signatures are deterministic.
    let (_, signature) = signed("rsa.pem");
    assert_eq!(hex(&signature), text("rsa.signature"));
    for (name, algorithm) in [
        ("rsa", RSA_PKCS1_2048_8192_SHA256),
        ("p256", ECDSA_P256_SHA256),
        ("p384", ECDSA_P384_SHA256),
    ] {
        let (_, mut signature) = signed(&format!("{name}.pem"));
        verified(algorithm, name, &signature).unwrap();
        let openssl = text(&format!("{name}.signature"));
        let openssl: Vec<u8> = (0..openssl.len() / 2)
            .map(|i| u8::from_str_radix(&openssl[2 * i..2 * i + 2], 16).unwrap())
            .collect();
        verified(algorithm, name, &openssl).unwrap();
        *signature.last_mut().unwrap() ^= 1;
        verified(algorithm, name, &signature).unwrap_err();
    }
}

#[test]
fn other_kinds_of_keys_do_not_sign() {
    let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    for key in [ed25519.serialize_der(), vec![], vec![0x30, 0]] {
        let error = SvidKey::from_pkcs8(&key).err();
        assert_eq!(error, Some(SigningError::Kind));
    }
}

#[test]
fn session_name_can_be_left_out() {
    let request =
        SignedSessionRequest::new(&grant(), &at(), HOST, &svid("rsa.pem"), false, now()).unwrap();
    assert_eq!(request.body, r#"{"durationSeconds":3600}"#);
}

#[test]
fn serial_numbers_are_decimal() {
    for (bytes, expected) in [
        (&[][..], "0"),
        (&[0], "0"),
        (&[0, 0xff], "255"),
        (&[1, 0], "256"),
        (&[0x7f; 1], "127"),
        (
            &[0xff; 20],
            "1461501637330902918203684832716283019655932542975",
        ),
    ] {
        assert_eq!(decimal(bytes), expected);
    }
}

#[test]
fn query_and_headers_are_canonical() {
    let pairs = [("b", "ä /"), ("a", "z~._-"), ("a", ":+=")];
    assert_eq!(canonical_query(pairs), "a=%3A%2B%3D&a=z~._-&b=%C3%A4%20%2F");
    let headers = [("host", " a  b "), ("x-amz-date", "c")];
    let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let text = canonical_request("q=1", &headers.into(), b"");
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    assert_eq!(
        text,
        format!("POST\n/sessions\nq=1\nhost:a b\nx-amz-date:c\n\nhost;x-amz-date\n{empty}")
    );
    assert_eq!(date(now() + Duration::from_secs(5)), "20270630T000005Z");
}

#[test]
fn certificate_facts_are_those_of_the_vectors() {
    let facts = |name: &str| {
        let certificate = CertificateDer::from_pem_file(vector(name)).unwrap();
        CertificateFacts::read(&certificate).unwrap()
    };
    for (name, key) in [
        ("rsa.pem", KeyKind::Rsa),
        ("p256.pem", KeyKind::P256),
        ("p384.pem", KeyKind::P384),
    ] {
        let facts = facts(name);
        assert_eq!(facts.key, key);
        assert_eq!(facts.leaf_problems(now()), [""; 0]);
        assert_eq!(facts.common_name, None);
        assert_eq!(
            facts.ca_problems(now()),
            ["is not that of a CA", "lacks the key usage keyCertSign"]
        );
    }
    let between = facts("between.pem");
    assert_eq!(between.ca_problems(now()), [""; 0]);
    assert!(!between.is_self_issued);
    assert_eq!(
        between.leaf_problems(now()),
        ["is that of a CA", "lacks the key usage digitalSignature"]
    );
    let in_200_years = now() + Duration::from_secs(200 * 365 * 86_400);
    assert_eq!(
        facts("rsa.pem").leaf_problems(in_200_years),
        ["has expired"]
    );
    let before = SystemTime::UNIX_EPOCH;
    assert_eq!(facts("rsa.pem").leaf_problems(before), ["is not valid yet"]);
}
