use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::*;

/// Starts an https server with a chain of a private CA. Returns its port, and the thumbprint of its
/// last certificate.
async fn private() -> (u16, String) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["oidc.example.org".to_owned()])
        .unwrap()
        .signed_by(&key, &ca)
        .unwrap();
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
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                .await;
            let _ = stream.shutdown().await;
        }
    });
    (
        port,
        last.as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    )
}

#[tokio::test]
async fn untrusted_chain_is_reported_with_its_thumbprint() {
    let (port, thumbprint) = private().await;
    let resolve = vec![
        format!("oidc.example.org:{port}:127.0.0.1")
            .parse()
            .unwrap(),
    ];
    let web = HttpProbe {
        resolve,
        network: None,
        deadline: Duration::from_secs(5),
    };
    let answer = web
        .get(&format!("https://oidc.example.org:{port}/keys"))
        .await
        .unwrap();
    assert_eq!((answer.status, &answer.body[..]), (200, &b"{}"[..]));
    let chain = answer.chain.unwrap();
    assert!(chain.distrust.unwrap().contains("certificate"));
    assert_eq!(chain.thumbprint, thumbprint);
}

#[tokio::test]
async fn get_ends_at_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let web = HttpProbe {
        resolve: Vec::new(),
        network: None,
        deadline: Duration::from_millis(50),
    };
    let error = web
        .get(&format!("http://{}/", listener.local_addr().unwrap()))
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("no answer within 50ms"), "{error}");
}

#[test]
fn resolve_parses_host_port_and_address() {
    let parse = |text: &str| text.parse::<Resolve>();
    assert!(parse("a.example.org:443:192.0.2.1").is_ok() && parse("a:443:[2001:db8::1]").is_ok());
    for text in ["", "a", "a:443", "a:x:192.0.2.1", "a:443:b"] {
        assert!(parse(text).is_err(), "{text}");
    }
}

/// Starts a proxy with this answer, which connects each successful client to `port`. Returns the
/// requests that it gets.
async fn proxy(answer: &'static str, port: u16) -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, heads) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).await.unwrap();
            sender
                .send(String::from_utf8_lossy(&head[..length]).into_owned())
                .unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            if answer.contains(" 200 Connection") {
                let mut target = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut target).await;
            }
        }
    });
    (address, heads)
}

fn network(variables: &[(&str, &str)]) -> NetworkSettings {
    NetworkSettings::from_env(|name| {
        variables
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, v)| (*v).to_owned())
    })
}

#[tokio::test]
async fn get_uses_the_proxy_of_sts() {
    const DEADLINE: Duration = Duration::from_secs(5);
    let (port, _) = private().await;
    let url = format!("https://oidc.example.org:{port}/keys");
    let (address, mut heads) = proxy(
        "HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n",
        port,
    )
    .await;
    let proxied = format!("http://user:s3cret@{address}");
    let through = network(&[("HTTPS_PROXY", &proxied)]);
    let web = HttpProbe {
        resolve: Vec::new(),
        network: Some(through.clone()),
        deadline: DEADLINE,
    };
    let answer = web.get(&url).await.unwrap();
    assert_eq!((answer.status, &answer.body[..]), (200, &b"{}"[..]));
    let head = heads.recv().await.unwrap();
    assert!(
        head.starts_with(&format!("CONNECT oidc.example.org:{port} HTTP/1.1\r\n")),
        "{head}"
    );
    // base64 of user:s3cret
    assert!(
        head.contains("Proxy-Authorization: Basic dXNlcjpzM2NyZXQ=\r\n"),
        "{head}"
    );

    // With an address of the operator's, or a host that is an exception, the connection is direct.
    let resolve = vec![
        format!("oidc.example.org:{port}:127.0.0.1")
            .parse()
            .unwrap(),
    ];
    HttpProbe {
        resolve,
        network: Some(through.clone()),
        deadline: DEADLINE,
    }
    .get(&url)
    .await
    .unwrap();
    let except = network(&[
        ("HTTPS_PROXY", &proxied),
        ("NO_PROXY", "oidc.example.invalid"),
    ]);
    let web = HttpProbe {
        resolve: Vec::new(),
        network: Some(except),
        deadline: DEADLINE,
    };
    let error = web
        .get("https://oidc.example.invalid/")
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("does not resolve"), "{error}");
    assert!(heads.try_recv().is_err(), "no other request arrived");
}

#[tokio::test]
async fn rejection_of_a_proxy_is_reported_without_the_password() {
    let (address, mut heads) = proxy("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", 1).await;
    let through = network(&[("ALL_PROXY", &format!("http://user:s3cret@{address}"))]);
    let web = HttpProbe {
        resolve: Vec::new(),
        network: Some(through.clone()),
        deadline: Duration::from_secs(5),
    };
    let error = web
        .get("https://oidc.example.org/")
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("the proxy 127.0.0.1")
            && error.contains("oidc.example.org:443: tunnel error: proxy authorization required")
            && !error.contains("s3cret"),
        "{error}"
    );
    assert!(
        heads
            .recv()
            .await
            .unwrap()
            .starts_with("CONNECT oidc.example.org:443 ")
    );

    // Without TLS the proxy itself sends the request, and gets no header that is meant for
    // loopback.
    let answer = web
        .get_with("http://oidc.example.org/a?b", Some("t0ken"))
        .await
        .unwrap();
    assert_eq!(answer.status, 407);
    let head = heads.recv().await.unwrap();
    assert!(
        head.starts_with("GET http://oidc.example.org/a?b HTTP/1.1\r\n") && !head.contains("t0ken"),
        "{head}"
    );

    // Control characters of its response do not reach the terminal either.
    let (address, _heads) = proxy("HTTP/1.1 403 \x1b[2J\r\n\r\n", 1).await;
    let through = network(&[("HTTPS_PROXY", &address)]);
    let web = HttpProbe {
        resolve: Vec::new(),
        network: Some(through.clone()),
        deadline: Duration::from_secs(5),
    };
    let error = web
        .get("https://oidc.example.org/")
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("unsuccessful") && !error.contains('\x1b'),
        "{error:?}"
    );

    let secure = network(&[("HTTPS_PROXY", "https://proxy.example.org")]);
    let web = HttpProbe {
        resolve: Vec::new(),
        network: Some(secure),
        deadline: Duration::from_secs(5),
    };
    assert!(
        web.get("https://oidc.example.org/")
            .await
            .err()
            .unwrap()
            .to_string()
            .contains("needs TLS")
    );
}
