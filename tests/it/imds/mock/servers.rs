//! AWS's two servers that resemble the instance metadata service.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use rcgen::{CertificateParams, KeyPair, KeyUsagePurpose};

use crate::harness::counterparts::process::Process;
use crate::harness::counterparts::{Port, tool};
use crate::harness::stub_http;
use crate::imds::TIMEOUT;

/// The ARNs of the helper's command line.
const ROLE: &str = "arn:aws:iam::123456789012:role/dev";
const PROFILE: &str = "arn:aws:rolesanywhere:us-east-1:123456789012:profile/p";
const ANCHOR: &str = "arn:aws:rolesanywhere:us-east-1:123456789012:trust-anchor/t";
/// The answer of IAM Roles Anywhere, whose session does not end during the test.
const SESSION: &str = r#"{"credentialSet":[{"credentials":{"accessKeyId":"ASIAEXAMPLE","secretAccessKey":"secret","sessionToken":"token","expiration":"2036-01-01T00:00:00Z"}}]}"#;

/// A server that ends when this is dropped.
pub(super) struct OtherServer {
    pub(super) address: SocketAddr,
    _process: Process,
    _port: Option<Port>,
}

/// Returns a program with nothing else in its environment than a home.
fn program(path: &Path, home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(path);
    command.env_clear().env("HOME", home).args(arguments);
    command
}

/// Starts amazon-ec2-metadata-mock with version 2 alone.
pub(super) fn start_mock(folder: &Path) -> Option<OtherServer> {
    let path = tool("ec2-metadata-mock")?;
    let port = Port::reserve();
    let (address, number) = (port.address(), port.address().port().to_string());
    let arguments = ["--hostname", "127.0.0.1", "--port", &number, "--imdsv2"];
    let log = folder.join("ec2-metadata-mock.log");
    let command = program(&path, folder, &arguments);
    let process = Process::start("ec2-metadata-mock", command, &log);
    process.await_some("the mock listens", TIMEOUT, || {
        std::net::TcpStream::connect(address).ok()
    });
    Some(OtherServer {
        address,
        _process: process,
        _port: Some(port),
    })
}

/// Starts `rolesanywhere-credential-helper serve` with credentials of a stub.
pub(super) fn start_helper(folder: &Path) -> Option<OtherServer> {
    let path = tool("aws_signing_helper")?;
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let certificate = params.self_signed(&key).unwrap();
    let files = ["certificate.pem", "key.pem"].map(|name| folder.join(name));
    std::fs::write(&files[0], certificate.pem()).unwrap();
    std::fs::write(&files[1], key.serialize_pem()).unwrap();
    let [certificate, key] = files.each_ref().map(|file| file.to_str().unwrap());
    let endpoint = stub_http::start(|_, _| {
        stub_http::http("201 Created", "Content-Type: application/json\r\n", SESSION)
    });
    let arguments = [
        ["serve", "--port=0"],
        ["--endpoint", &endpoint],
        ["--certificate", certificate],
        ["--private-key", key],
        ["--role-arn", ROLE],
        ["--profile-arn", PROFILE],
        ["--trust-anchor-arn", ANCHOR],
    ];
    let log = folder.join("aws_signing_helper.log");
    let command = program(&path, folder, &arguments.concat());
    let process = Process::start("aws_signing_helper", command, &log);
    let port = process.await_some("the helper listens", TIMEOUT, || {
        let log = process.log();
        let (_, rest) = log.split_once("started on port: ")?;
        rest.split_once('\n')?.0.parse::<u16>().ok()
    });
    Some(OtherServer {
        address: ([127, 0, 0, 1], port).into(),
        _process: process,
        _port: None,
    })
}
