//! The certificates of a node: one authority, with servers and clients.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};

/// A certificate authority that writes into a directory: `ca.crt`, and for each certificate
/// `<name>.crt` and `<name>.key`.
pub(super) struct Authority<'a> {
    directory: &'a Path,
    issuer: Issuer<'static, KeyPair>,
}

impl<'a> Authority<'a> {
    pub(super) fn new(directory: &'a Path) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = named("kubernetes", None, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate");
        fs::write(directory.join("ca.crt"), certificate.pem()).expect("a file");
        Self {
            directory,
            issuer: Issuer::new(params, key),
        }
    }

    /// Issues a certificate with this common name and organization, for a server at these names and
    /// addresses.
    pub(super) fn issue(
        &self,
        name: &str,
        common_name: &str,
        organization: Option<&str>,
        at: &[&str],
    ) {
        let key = KeyPair::generate().expect("a key");
        let mut params = named(common_name, organization, at);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        fs::write(
            self.directory.join(format!("{name}.crt")),
            certificate.pem(),
        )
        .expect("a file");
        fs::write(
            self.directory.join(format!("{name}.key")),
            key.serialize_pem(),
        )
        .expect("a file");
    }
}

/// Writes a key pair alone, for the tokens of service accounts.
pub(super) fn key_pair(directory: &Path, name: &str) {
    let key = KeyPair::generate().expect("a key");
    fs::write(directory.join(format!("{name}.key")), key.serialize_pem()).expect("a file");
    fs::write(directory.join(format!("{name}.pub")), key.public_key_pem()).expect("a file");
}

fn named(common_name: &str, organization: Option<&str>, at: &[&str]) -> CertificateParams {
    let names: Vec<String> = at.iter().map(|&name| name.to_owned()).collect();
    let mut params = CertificateParams::new(names).expect("names and addresses");
    params.distinguished_name.remove(DnType::CommonName);
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        params
            .distinguished_name
            .push(DnType::OrganizationName, organization);
    }
    params
}
