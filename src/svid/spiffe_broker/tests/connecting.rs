//! Verification of the agent's certificate, and the errors for other servers.

use std::os::unix::fs::PermissionsExt;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;

/// Returns the result of a connection to a server with this certificate, with `server` configured.
async fn connect_error(
    server: Option<&str>,
    certificate: impl FnOnce(&Authority) -> TestCertificate,
) -> Result<(), SourceError> {
    let mut node = Node::new().await;
    let certificate = certificate(&node.authority);
    let agent = FakeBroker::at(
        &node.broker,
        &node.authority,
        certificate,
        &[ID],
        async |_| Some(good()),
    );
    let client = node.client_with(server, CALL_TIMEOUT);
    let connected = client.connect().await;
    if connected.is_err() {
        // The server receives no request.
        assert_eq!(
            client.fetch_for_pid(1, AUDIENCE).await.unwrap_err(),
            connected.clone().unwrap_err()
        );
        assert_eq!(agent.requests().len(), 0);
    } else {
        client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    }
    connected
}

#[tokio::test]
async fn server_must_have_an_expected_id() {
    let named = |id: &'static str| move |authority: &Authority| authority.sign(&[id], |_| {});
    for (server, id) in [
        (None, AGENT),
        (None, "spiffe://example.org/spire/agent/x"),
        (Some(AGENT), AGENT),
        (
            Some("spiffe://example.org/agents/*"),
            "spiffe://example.org/agents/seven",
        ),
    ] {
        connect_error(server, named(id))
            .await
            .unwrap_or_else(|error| panic!("{server:?} {id}: {error}"));
    }
    for (server, id) in [
        (None, "spiffe://example.org/spire/server"),
        (None, "spiffe://example.org/spire/agents/x"),
        (None, "spiffe://example.org/billing"),
        // The CA is that of another trust domain.
        (None, "spiffe://other.org/spire/agent/x"),
        (
            Some("spiffe://other.org/spire/agent/**"),
            "spiffe://other.org/spire/agent/x",
        ),
        (Some("spiffe://example.org/spire/agent/seven"), AGENT),
    ] {
        let error = connect_error(server, named(id)).await.unwrap_err();
        assert!(
            matches!(&error, SourceError::Misconfigured(text) if text.contains(id) && text.contains("`broker_server_id`")),
            "{server:?} {id}: {error:?}"
        );
    }
}

#[tokio::test]
async fn certificate_without_exactly_one_uri_is_rejected() {
    for (uris, reason) in [
        (&[AGENT, "spiffe://example.org/x"][..], "several URIs"),
        (&["https://example.org/", AGENT], "several URIs"),
        (&[], "no SPIFFE ID"),
        (&["https://example.org/"], "no SPIFFE ID"),
    ] {
        let error = connect_error(None, |authority| authority.sign(uris, |_| {}))
            .await
            .unwrap_err();
        assert!(
            matches!(&error, SourceError::Misconfigured(text) if text.contains(reason)),
            "{uris:?}: {error:?}"
        );
    }
    let name = |params: &mut CertificateParams| {
        params.subject_alt_names.push(rcgen::SanType::DnsName(
            "agent.example.org".try_into().unwrap(),
        ));
    };
    connect_error(None, |authority| authority.sign(&[AGENT], name))
        .await
        .unwrap();
}

#[tokio::test]
async fn certificate_of_another_ca_is_rejected() {
    let past: fn(&mut CertificateParams) =
        |params| params.not_after = rcgen::date_time_ymd(2020, 2, 1);
    let future: fn(&mut CertificateParams) =
        |params| params.not_before = rcgen::date_time_ymd(2999, 2, 1);
    let ca: fn(&mut CertificateParams) =
        |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let for_mail: fn(&mut CertificateParams) = |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::EmailProtection];
    };
    for (what, change) in [
        ("expired", past),
        ("not yet", future),
        ("a CA", ca),
        ("for mail", for_mail),
    ] {
        let error = connect_error(None, |authority| authority.sign(&[AGENT], change))
            .await
            .unwrap_err();
        assert!(
            matches!(&error, SourceError::Unavailable(text) if text.contains("no certificate of awsvid's trust domain, example.org")),
            "{what}: {error:?}"
        );
    }
    let error = connect_error(None, |_| Authority::new().sign(&[AGENT], |_| {}))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("check that it is the agent that")),
        "{error:?}"
    );
}

#[tokio::test]
async fn server_that_rejects_awsvid_is_reported_at_once() {
    let mut node = Node::new().await;
    let serve = |node: &Node, clients: &[&str]| {
        let _ = std::fs::remove_file(&node.broker);
        FakeBroker::at(
            &node.broker,
            &node.authority,
            node.certificate(),
            clients,
            async |_| Some(good()),
        )
    };
    let agent = serve(&node, &["spiffe://example.org/another"]);
    let client = node.client();
    // The result does not depend on the order in which server and client run.
    for _ in 0..50 {
        let error = client.connect().await.unwrap_err();
        assert_eq!(client.fetch_for_pid(1, AUDIENCE).await.unwrap_err(), error);
        assert!(
            matches!(&error, SourceError::Misconfigured(text)
                if text.contains(&format!("awsvid's SPIFFE ID, {ID}, to `brokers`")) && text.contains("AccessDenied")),
            "{error:?}"
        );
    }
    assert_eq!(agent.requests().len(), 0);
    let _agent = serve(&node, &["spiffe://example.org/another", ID]);
    client.connect().await.unwrap();

    // The agent may have another CA by now, which awsvid has not received.
    let _agent = serve(&node, &[]);
    let mut stream = Some(node.stream);
    drop(stream.take());
    node.workload_api
        .next_client()
        .await
        .reject(Status::unavailable("starting"));
    let error = loop {
        match client.connect().await.unwrap_err() {
            SourceError::Misconfigured(_) => tokio::task::yield_now().await,
            error => break error,
        }
    };
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("own X.509-SVID may be outdated")),
        "{error:?}"
    );
}

#[tokio::test]
async fn connect_without_own_svid_reports_the_reason() {
    let mut node = Node::new().await;
    let agent = node.serve_always(good());
    let client = node.client();
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    // After a withdrawal the connection with that identity is discarded too.
    node.stream
        .fail(Status::permission_denied("no identity issued"));
    while client.own.latest().is_ok() {
        tokio::task::yield_now().await;
    }
    let error = client.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    // `Denied` would mean that the workload has no identity.
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("register awsvid itself")),
        "{error:?}"
    );
    assert_eq!(agent.requests().len(), 1);

    // A start waits for the first SVID.
    node.workload_api
        .next_client()
        .await
        .reject(Status::permission_denied("no identity issued"));
    let connect_error = tokio::spawn(async move { client.connect().await });
    node.workload_api
        .next_client()
        .await
        .accept()
        .send(node.authority.message(ID));
    connect_error.await.unwrap().unwrap();
}

#[tokio::test]
async fn expired_svid_is_not_presented() {
    let authority = Authority::new();
    let past = |params: &mut CertificateParams| params.not_after = rcgen::date_time_ymd(2020, 2, 1);
    let svid = authority.svid_of(ID, authority.sign(&[ID], past));
    let mut node = Node::with(authority, X509svidResponse { svids: vec![svid] }).await;
    let _agent = node.serve_always(good());
    let client = node.client();
    let error = client.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("X.509-SVID has expired")),
        "{error:?}"
    );
    node.rotate(&client).await;
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
}

#[tokio::test]
async fn missing_or_dead_socket_is_unavailable() {
    let mut node = Node::new().await;
    let client = node.client();
    let error = client.connect().await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("no socket at")
            && text.contains("`broker_socket`") && text.contains("experimental { broker { socket_path")),
        "{error:?}"
    );
    drop(std::os::unix::net::UnixListener::bind(&node.broker).unwrap());
    let error = client.connect().await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("nothing listens")),
        "{error:?}"
    );
    std::fs::remove_file(&node.broker).unwrap();
    let _agent = node.serve_always(good());
    client.connect().await.unwrap();
}

#[test]
fn socket_without_permission_is_unavailable() {
    // For root, permissions count only under another file system uid, which is per thread.
    let error = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut node = Node::new().await;
            let _listener = UnixListener::bind(&node.broker).unwrap();
            std::fs::set_permissions(&node.broker, std::fs::Permissions::from_mode(0o000)).unwrap();
            std::fs::set_permissions(node.dir.path(), std::fs::Permissions::from_mode(0o755))
                .unwrap();
            if nix::unistd::geteuid().is_root() {
                nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65_533));
            }
            let error = node.client().connect().await.unwrap_err();
            nix::unistd::setfsuid(nix::unistd::geteuid());
            error
        })
    });
    let error = error.join().unwrap();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("may not open") && text.contains("mode 0770")),
        "{error:?}"
    );
}

#[tokio::test]
async fn server_without_broker_api_is_a_misconfiguration() {
    let mut node = Node::new().await;
    let client = node.client();
    // The agent's other sockets speak HTTP/2 without TLS.
    let other = FakeAgent::at(&node.broker);
    let error = client.connect().await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Misconfigured(text) if text.contains("does not speak TLS") && text.contains("`broker_socket`")),
        "{error:?}"
    );
    drop(other);
    std::fs::remove_file(&node.broker).unwrap();

    let listener = UnixListener::bind(&node.broker).unwrap();
    let hangs_up = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_exact(&mut [0; 100]).await.unwrap();
        stream.shutdown().await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.unwrap();
    });
    let error = client.connect().await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("TLS handshake")),
        "{error:?}"
    );
    hangs_up.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn server_that_hangs_in_the_handshake_is_abandoned() {
    let mut node = Node::new().await;
    let client = node.client();
    let _mute = UnixListener::bind(&node.broker).unwrap();
    let begun = Instant::now();
    let error = client.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("TLS handshake")),
        "{error:?}"
    );
    assert_eq!(begun.elapsed().as_secs(), 5);
}
