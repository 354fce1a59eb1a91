use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

/// An https server with a chain of a private CA; its port, and the thumbprint of what it sends last.
async fn private() -> (u16, String) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["oidc.example.org".to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
    let last = digest(&SHA1_FOR_LEGACY_USE_ONLY, ca.der());
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone(), ca.der().clone()], key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await;
            let _ = stream.shutdown().await;
        }
    });
    (port, last.as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[tokio::test]
async fn a_chain_that_is_not_trusted_is_told_with_its_thumbprint() {
    let (port, thumbprint) = private().await;
    let resolve = [format!("oidc.example.org:{port}:127.0.0.1").parse().unwrap()];
    let web = Web { resolve: &resolve, deadline: Duration::from_secs(5) };
    let answer = web.get(&format!("https://oidc.example.org:{port}/keys")).await.unwrap();
    assert_eq!((answer.status, &answer.body[..]), (200, &b"{}"[..]));
    let chain = answer.chain.unwrap();
    assert!(chain.distrust.unwrap().contains("certificate"));
    assert_eq!(chain.thumbprint, thumbprint);
}

#[tokio::test]
async fn no_answer_is_waited_for_longer_than_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let web = Web { resolve: &[], deadline: Duration::from_millis(50) };
    let error = web.get(&format!("http://{}/", listener.local_addr().unwrap())).await.err().unwrap();
    assert!(error.contains("no answer within 50ms"), "{error}");
}

#[test]
fn what_resolves_where() {
    let parse = |text: &str| text.parse::<Resolve>();
    assert!(parse("a.example.org:443:192.0.2.1").is_ok() && parse("a:443:[2001:db8::1]").is_ok());
    for text in ["", "a", "a:443", "a:x:192.0.2.1", "a:443:b"] {
        assert!(parse(text).is_err(), "{text}");
    }
}
