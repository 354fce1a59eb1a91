//! The certificates of a server, with the reason why this machine would not trust them.

use std::sync::{Arc, Mutex, PoisonError};

use super::ProbeError;
use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// The certificates that a server sent.
pub(in crate::commands) struct ServerChain {
    /// Reason why this machine would not trust them.
    pub(in crate::commands) distrust: Option<String>,
    /// IAM's thumbprint: the SHA-1 of the last certificate that the server sends, in hex.
    pub(in crate::commands) thumbprint: String,
}

/// Creates a configuration that accepts every server, and puts its chain into `capture`.
pub(super) fn tls(capture: &Arc<CertCapture>) -> Result<ClientConfig, ProbeError> {
    let provider = Arc::new(default_provider());
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|_| ProbeError::NoRoots)?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(RecordingVerifier {
            verifier,
            capture: capture.clone(),
        }))
        .with_no_client_auth();
    Ok(config)
}

/// The chain of one connection.
#[derive(Default)]
pub(super) struct CertCapture {
    chain: Mutex<Option<ServerChain>>,
}

impl CertCapture {
    /// Removes and returns the chain, if the server sent one.
    pub(super) fn take(&self) -> Option<ServerChain> {
        self.chain
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl std::fmt::Debug for CertCapture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertCapture").finish_non_exhaustive()
    }
}

/// Accepts every server, and records the result of the real verification. Only for reading public
/// documents.
#[derive(Debug)]
struct RecordingVerifier {
    verifier: Arc<WebPkiServerVerifier>,
    capture: Arc<CertCapture>,
}

impl ServerCertVerifier for RecordingVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.verifier.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        let last = digest(
            &SHA1_FOR_LEGACY_USE_ONLY,
            intermediates.last().unwrap_or(end_entity),
        );
        let chain = ServerChain {
            distrust: verified.err().map(|error| error.to_string()),
            thumbprint: last
                .as_ref()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        };
        *self
            .capture
            .chain
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(chain);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
