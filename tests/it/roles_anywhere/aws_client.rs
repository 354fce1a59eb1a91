//! The verifying server against AWS's own client, unmodified.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use awsvid::clock::Clock;
use rcgen::{
    BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P384_SHA384, SanType,
};

use super::server::{ANCHOR, PROFILE, ROLE, Trust, VerifyingServer};
use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::{folder, tool};
use crate::harness::env::id;

const TIMEOUT: Duration = Duration::from_secs(60);

/// A CA, and files with a certificate and a key of its own.
pub(super) struct CertifiedFiles {
    pub(super) ca: String,
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    /// The intermediate CA, if there is one.
    pub(super) bundle: Option<PathBuf>,
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl CertifiedFiles {
    /// Creates a certificate of a workload with this key, below an intermediate CA with this other
    /// key, or below the root itself.
    pub(super) fn new(folder: &Path, key: &KeyPair, intermediate: Option<KeyPair>) -> Self {
        let root_key = KeyPair::generate().unwrap();
        let root_params = ca_params("root");
        let root = root_params.self_signed(&root_key).unwrap();
        let mut issuer = Issuer::new(root_params, root_key);
        let bundle = intermediate.map(|between_key| {
            let between_params = ca_params("between");
            let between = between_params.signed_by(&between_key, &issuer).unwrap();
            issuer = Issuer::new(between_params, between_key);
            let bundle = folder.join("bundle.pem");
            fs::write(&bundle, between.pem()).unwrap();
            bundle
        });
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI(id("reader").try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // No common name, as SPIRE has it for workloads without a DNS name.
        params.distinguished_name = rcgen::DistinguishedName::new();
        let files = ["certificate.pem", "key.pem"].map(|name| folder.join(name));
        let certificate = params.signed_by(key, &issuer).unwrap();
        fs::write(&files[0], certificate.pem()).unwrap();
        fs::write(&files[1], key.serialize_pem()).unwrap();
        let [certificate, key] = files;
        Self {
            ca: root.pem(),
            certificate,
            key,
            bundle,
        }
    }

    /// Runs AWS's client against a server.
    fn run(&self, url: &str, more: &[&str]) -> Option<Output> {
        let mut command = Command::new(tool("aws_signing_helper")?);
        command
            .env_clear()
            .args(["credential-process", "--endpoint", url])
            .arg("--certificate")
            .arg(&self.certificate)
            .arg("--private-key")
            .arg(&self.key)
            .args(["--role-arn", ROLE, "--profile-arn", PROFILE])
            .args(["--trust-anchor-arn", ANCHOR])
            .args(more);
        if let Some(bundle) = &self.bundle {
            command.arg("--intermediates").arg(bundle);
        }
        Some(run(command, b"", TIMEOUT))
    }
}

fn ec() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn p384() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap()
}

#[track_caller]
fn rejected(output: &Output, reason: &str) {
    assert!(!output.status.success(), "{output:?}");
    assert!(output.stderr.contains(reason), "{output:?}");
}

#[test]
fn verifying_server_accepts_aws_client_and_rejects_what_is_wrong() {
    let folder = folder();
    for (name, key, intermediate) in [
        ("p256", ec(), None),
        ("p384", p384(), Some(p384())),
        (
            "rsa",
            KeyPair::from_pem(include_str!("rsa.key.pem")).unwrap(),
            None,
        ),
    ] {
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        let mut certified = CertifiedFiles::new(&folder, &key, intermediate);
        let server = VerifyingServer::start(Trust::of(&certified.ca));
        let Some(output) = certified.run(server.sts.url(), &["--role-session-name", "reader"])
        else {
            return;
        };
        let credentials: serde_json::Value =
            serde_json::from_str(&output.success("AWS's client")).unwrap();
        assert!(
            credentials["AccessKeyId"]
                .as_str()
                .unwrap()
                .starts_with("ASIA")
        );
        assert_eq!(server.sts.accepted_requests().len(), 1);

        // A chain that lacks the intermediate CA.
        if let Some(bundle) = certified.bundle.take() {
            let output = certified.run(server.sts.url(), &[]).unwrap();
            rejected(&output, "Untrusted certificate");
            certified.bundle = Some(bundle);
        }

        // Another key than the certificate's.
        let own_key = fs::read(&certified.key).unwrap();
        let other = match name {
            "rsa" => include_str!("other-rsa.key.pem").to_owned(),
            "p384" => p384().serialize_pem(),
            _ => ec().serialize_pem(),
        };
        fs::write(&certified.key, other).unwrap();
        let output = certified.run(server.sts.url(), &[]).unwrap();
        rejected(&output, "Signature does not match");
        fs::write(&certified.key, own_key).unwrap();

        // A region that the server is not in.
        let output = certified
            .run(server.sts.url(), &["--region", "us-west-2"])
            .unwrap();
        rejected(&output, "not scoped to this region");

        // A CA that is not the trust anchor's.
        let other = rcgen::generate_simple_self_signed(Vec::new())
            .unwrap()
            .cert
            .pem();
        let server = VerifyingServer::start(Trust::of(&other));
        let output = certified.run(server.sts.url(), &[]).unwrap();
        rejected(&output, "Untrusted certificate");

        // Another time, before and after.
        for clock in [
            SystemTime::now() - Duration::from_secs(310),
            SystemTime::now() + Duration::from_secs(310),
        ] {
            let trust = Trust {
                clock: Clock::starting_at(clock),
                ..Trust::of(&certified.ca)
            };
            let server = VerifyingServer::start(trust);
            let output = certified.run(server.sts.url(), &[]).unwrap();
            rejected(&output, "Signature expired or not yet valid");
            assert_eq!(server.sts.issued(), 0);
        }

        // A name that the profile does not accept.
        let trust = Trust {
            accepts_session_name: false,
            ..Trust::of(&certified.ca)
        };
        let server = VerifyingServer::start(trust);
        let output = certified
            .run(server.sts.url(), &["--role-session-name", "reader"])
            .unwrap();
        rejected(&output, "Not authorized to set roleSessionName");
        certified
            .run(server.sts.url(), &[])
            .unwrap()
            .success("without a name");
    }
}

/// Sends bytes to a server, and returns its response.
fn send(url: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
    stream.write_all(request).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response
}

/// The end of a request of AWS's client, which sends its body in chunks.
const LAST_CHUNK: &str = "\r\n0\r\n\r\n";

/// Returns a whole request of AWS's client, as it is on the wire.
fn captured(certified: &CertifiedFiles) -> Option<String> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let capturing = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
        while !request.ends_with(LAST_CHUNK.as_bytes()) {
            let count = stream.read(&mut buffer).unwrap();
            assert!(count > 0, "{}", String::from_utf8_lossy(&request));
            request.extend_from_slice(&buffer[..count]);
        }
        let rejection = "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(rejection.as_bytes()).unwrap();
        String::from_utf8(request).unwrap()
    });
    certified.run(&url, &["--role-session-name", "reader"])?;
    Some(capturing.join().unwrap())
}

#[test]
fn verifying_server_rejects_each_changed_part_of_a_request() {
    let folder = folder();
    let certified = CertifiedFiles::new(folder.path(), &ec(), Some(p384()));
    let Some(request) = captured(&certified) else {
        return;
    };
    let server = VerifyingServer::start(Trust::of(&certified.ca));
    let response = |request: &str| send(server.sts.url(), request.as_bytes());
    let unchanged = response(&request);
    assert!(unchanged.contains("201 Created"), "{unchanged} {request}");

    let line = |name: &str| {
        let line = request
            .lines()
            .find(|line| line.to_lowercase().starts_with(name));
        line.unwrap_or_else(|| panic!("no {name} in {request}"))
            .to_owned()
    };
    let without = |name: &str| request.replacen(&format!("{}\r\n", line(name)), "", 1);
    let changed = |from: &str, to: &str| {
        assert!(request.contains(from), "{from} {request}");
        request.replacen(from, to, 1)
    };
    const MISMATCH: &str = "Signature does not match";
    const UNSIGNED: &str = "each X-Amz header have to be signed";
    const OTHER_LEAF: &str = "Algorithm or serial number is not that of the certificate";
    let table = [
        (without("authorization"), "Missing Authentication Token"),
        (without("x-amz-date"), "X-Amz-Date is required"),
        (without("x-amz-x509:"), "Header x-amz-x509 is not single"),
        (
            without("x-amz-x509-chain"),
            "Header x-amz-x509-chain is not single",
        ),
        (without("content-type"), "Header content-type is not single"),
        (changed("Host: 127", "Host: 128"), MISMATCH),
        (
            changed(
                "\"roleSessionName\":\"reader\"",
                "\"roleSessionName\":\"writer\"",
            ),
            MISMATCH,
        ),
        (
            changed("durationSeconds\":3600", "durationSeconds\":3601"),
            MISMATCH,
        ),
        (changed("role%2Fapp", "role%2Fapq"), MISMATCH),
        (
            changed(
                "Content-Type: application/json",
                "Content-Type: application/jsom",
            ),
            MISMATCH,
        ),
        // A header that the client did not sign.
        (
            changed("\r\n\r\n", "\r\nX-Amz-Security-Token: x\r\n\r\n"),
            UNSIGNED,
        ),
        (
            changed("SignedHeaders=content-type;", "SignedHeaders="),
            UNSIGNED,
        ),
        (changed("Credential=", "Credential=1"), OTHER_LEAF),
        (
            changed("AWS4-X509-ECDSA-SHA256", "AWS4-X509-RSA-SHA256"),
            OTHER_LEAF,
        ),
        (
            changed(LAST_CHUNK, &format!("\r\n1\r\n {LAST_CHUNK}")),
            MISMATCH,
        ),
    ];
    for (request, reason) in table {
        let response = response(&request);
        assert!(
            response.starts_with("HTTP/1.1 403 ") && response.contains(reason),
            "{reason}: {response} {request}"
        );
    }
    // The digest of a signature is that of its own text.
    let (head, signature) = request.split_once("Signature=").unwrap();
    let digit = if signature.starts_with('3') { "4" } else { "3" };
    let forged = format!("{head}Signature={digit}{}", &signature[1..]);
    assert!(response(&forged).contains(MISMATCH));
    assert_eq!(server.sts.issued(), 1);
}
