//! TLS with the agent. The daemon presents its own X.509-SVID, and accepts only the agent as
//! server.
//!
//! Standard: SPIFFE_Broker_Endpoint.md and X509-SVID.md, section 5.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs::default_provider, verify_tls12_signature,
    verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore,
    SignatureScheme,
};
use thiserror::Error as ErrorText;

use crate::identity::SpiffeIdPattern;
use crate::svid::own_svid::{OwnSvid, id_of};

/// Error for a server of the trust domain that is not the expected agent.
#[derive(Debug, ErrorText)]
#[error("{0}")]
pub(super) struct NotTheAgent(String);

/// Creates the configuration of one connection, with the current SVID and the pattern of the
/// server's ID.
pub(super) fn tls(own: &OwnSvid, expected: SpiffeIdPattern) -> Result<ClientConfig, Error> {
    let provider = Arc::new(default_provider());
    let verifier = Verifier::new(own, expected, &provider);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own.certified.clone())));
    config.alpn_protocols = vec![b"h2".to_vec()];
    // The server is identified by its SPIFFE ID, not by a name.
    config.enable_sni = false;
    // Every connection has to present the current certificate, and check the server's.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Verifier that accepts only a server with an X.509-SVID of the daemon's own trust domain and an
/// expected ID.
#[derive(Debug)]
struct Verifier {
    roots: Arc<RootCertStore>,
    trust_domain: String,
    expected: SpiffeIdPattern,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(own: &OwnSvid, expected: SpiffeIdPattern, provider: &CryptoProvider) -> Self {
        Self {
            roots: own.roots.clone(),
            trust_domain: own.spiffe_id.trust_domain().to_owned(),
            expected,
            algorithms: provider.signature_verification_algorithms,
        }
    }

    fn authorize(&self, certificate: &CertificateDer<'_>) -> Result<(), NotTheAgent> {
        let id =
            id_of(certificate).map_err(|error| NotTheAgent(format!("its certificate {error}")))?;
        // The CAs are those of one trust domain, and must not vouch for another.
        if id.trust_domain() != self.trust_domain {
            let text =
                format!("its certificate is that of {id}, which is not of awsvid's trust domain");
            return Err(NotTheAgent(text));
        }
        if !self.expected.matches(&id) {
            let text = format!(
                "its certificate is that of {id}, and not of {}",
                self.expected.as_str()
            );
            return Err(NotTheAgent(text));
        }
        Ok(())
    }
}

impl ServerCertVerifier for Verifier {
    /// Verifies the chain and the ID. A host name and a revocation list do not exist: SVIDs live
    /// for an hour.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.algorithms.all;
        // This also rejects the certificate of a CA instead of the server's.
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        self.authorize(end_entity)
            .map_err(|error| CertificateError::Other(OtherError(Arc::new(error))))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
