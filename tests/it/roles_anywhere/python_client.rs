//! The verifying server against AWS's client for Python, unmodified: a second implementation, which
//! sends the ARNs in the body instead of the query, and its certificate's serial number in decimal.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use awsvid::clock::Clock;
use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384};

use super::aws_client::CertifiedFiles;
use super::server::{ANCHOR, PROFILE, ROLE, Trust, VerifyingServer};
use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{folder, python};
use crate::harness::forward::Network;
use crate::harness::tls::TlsFront;

const TIMEOUT: Duration = Duration::from_secs(60);
const PROGRAM: &str = include_str!("session.py");

/// Returns the client's line of output, for a request with this region and session name.
fn answer(
    files: &CertifiedFiles,
    trust: Trust<'_>,
    [region, name]: [&str; 2],
    folder: &Path,
) -> Option<String> {
    let server = VerifyingServer::start(trust);
    let behind = server.sts.url().trim_start_matches("http://").parse();
    // The client speaks nothing but https.
    let front = TlsFront::start(
        Network::Own,
        (Ipv4Addr::LOCALHOST, 0).into(),
        behind.unwrap(),
    );
    let ca = folder.join("server-ca.pem");
    fs::write(&ca, front.certificate()).unwrap();
    let mut command = Command::new(python("rolesanywhere-python")?);
    command
        .env_clear()
        .env("HOME", folder)
        .args(["-c", PROGRAM, &front.address().to_string()])
        .args([&ca, &files.certificate, &files.key])
        .arg(files.bundle.as_deref().unwrap_or(Path::new("")))
        .args([ROLE, PROFILE, ANCHOR, region, name]);
    let output = run(command, b"", TIMEOUT).success("AWS's client for Python");
    let is_issued = output.starts_with("ASIA");
    assert_eq!(server.sts.issued(), u64::from(is_issued), "{output}");
    Some(output)
}

#[test]
fn verifying_server_accepts_aws_python_client_and_rejects_what_is_wrong() {
    let folder = folder();
    let right = ["us-east-1", "reader"];
    // It names the digest of the certificate's signature, and always signs with SHA-256. So an
    // intermediate CA that signs with another one, as of P-384, does not work with it.
    for (key, intermediate) in [
        (
            KeyPair::generate().unwrap(),
            Some(KeyPair::generate().unwrap()),
        ),
        (
            KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap(),
            None,
        ),
        (
            KeyPair::from_pem(include_str!("rsa.key.pem")).unwrap(),
            None,
        ),
    ] {
        let mut files = CertifiedFiles::new(folder.path(), &key, intermediate);
        let bundle = files.bundle.clone();
        let Some(issued) = answer(&files, Trust::of(&files.ca), right, folder.path()) else {
            return;
        };
        assert!(issued.starts_with("ASIA"), "{issued}");
        if files.bundle.take().is_some() {
            let output = answer(&files, Trust::of(&files.ca), right, folder.path()).unwrap();
            assert!(output.contains("Untrusted certificate"), "{output}");
        }
        files.bundle = bundle;

        let trust = || Trust::of(&files.ca);
        let rejected = |files: &CertifiedFiles, trust, parameters, reason: &str| {
            let output = answer(files, trust, parameters, folder.path()).unwrap();
            assert!(
                output.contains(reason) && output.starts_with('4'),
                "{output}"
            );
        };
        let elsewhere = ["us-west-2", "reader"];
        rejected(&files, trust(), elsewhere, "not scoped to this region");
        let late = Trust {
            clock: Clock::starting_at(SystemTime::now() + Duration::from_secs(310)),
            ..trust()
        };
        rejected(&files, late, right, "Signature expired or not yet valid");
        let unnamed = Trust {
            accepts_session_name: false,
            ..trust()
        };
        rejected(
            &files,
            unnamed,
            right,
            "Not authorized to set roleSessionName",
        );
        let other_ca = rcgen::generate_simple_self_signed(Vec::new()).unwrap();
        let other_ca = other_ca.cert.pem();
        rejected(&files, Trust::of(&other_ca), right, "Untrusted certificate");
        let other_key = match key.serialize_pem() {
            pem if pem == include_str!("rsa.key.pem") => {
                include_str!("other-rsa.key.pem").to_owned()
            }
            _ => KeyPair::generate_for(key.algorithm())
                .unwrap()
                .serialize_pem(),
        };
        fs::write(&files.key, other_key).unwrap();
        rejected(&files, trust(), right, "Signature does not match");
    }
}
