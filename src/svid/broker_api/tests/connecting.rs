//! Whom the client takes for the agent, and what it says of everybody else.

use std::os::unix::fs::PermissionsExt;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;

/// What connecting to a server with this certificate comes to, where `server` is configured.
async fn connecting(
    server: Option<&str>,
    certified: impl FnOnce(&Authority) -> Certified,
) -> Result<(), SourceError> {
    let mut node = Node::new().await;
    let certified = certified(&node.authority);
    let agent = FakeBroker::at(
        &node.broker,
        &node.authority,
        certified,
        &[ID],
        async |_| Some(good()),
    );
    let client = node.client_with(server, CALL_TIMEOUT);
    let connected = client.connect().await;
    if connected.is_err() {
        // And no request reaches it.
        assert_eq!(
            client.fetch_for_pid(1, AUDIENCE).await.unwrap_err(),
            connected.clone().unwrap_err()
        );
        assert_eq!(agent.asked().len(), 0);
    } else {
        client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    }
    connected
}

#[tokio::test]
async fn the_server_has_to_be_one_that_is_expected() {
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
        connecting(server, named(id))
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
        let error = connecting(server, named(id)).await.unwrap_err();
        assert!(
            matches!(&error, SourceError::Misconfigured(text) if text.contains(id) && text.contains("`broker_server_id`")),
            "{server:?} {id}: {error:?}"
        );
    }
}

#[tokio::test]
async fn a_certificate_with_another_number_of_uris_is_nobodys() {
    for (uris, reason) in [
        (&[AGENT, "spiffe://example.org/x"][..], "several URIs"),
        (&["https://example.org/", AGENT], "several URIs"),
        (&[], "no SPIFFE ID"),
        (&["https://example.org/"], "no SPIFFE ID"),
    ] {
        let error = connecting(None, |authority| authority.sign(uris, |_| {}))
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
    connecting(None, |authority| authority.sign(&[AGENT], name))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_certificate_that_the_trust_domain_does_not_stand_for_is_refused() {
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
        let error = connecting(None, |authority| authority.sign(&[AGENT], change))
            .await
            .unwrap_err();
        assert!(
            matches!(&error, SourceError::Unavailable(text) if text.contains("no certificate of awsvid's trust domain, example.org")),
            "{what}: {error:?}"
        );
    }
    let error = connecting(None, |_| Authority::new().sign(&[AGENT], |_| {}))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("is it the agent that")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_server_that_does_not_let_awsvid_in_is_told_of_at_once() {
    let mut node = Node::new().await;
    let serve = |node: &Node, clients: &[&str]| {
        let _ = std::fs::remove_file(&node.broker);
        FakeBroker::at(
            &node.broker,
            &node.authority,
            node.certified(),
            clients,
            async |_| Some(good()),
        )
    };
    let agent = serve(&node, &["spiffe://example.org/another"]);
    let client = node.client();
    // Each time, however the server and the client come to run.
    for _ in 0..50 {
        let error = client.connect().await.unwrap_err();
        assert_eq!(client.fetch_for_pid(1, AUDIENCE).await.unwrap_err(), error);
        assert!(
            matches!(&error, SourceError::Misconfigured(text)
                if text.contains(&format!("awsvid's SPIFFE ID, {ID}, to `brokers`")) && text.contains("AccessDenied")),
            "{error:?}"
        );
    }
    assert_eq!(agent.asked().len(), 0);
    let _agent = serve(&node, &["spiffe://example.org/another", ID]);
    client.connect().await.unwrap();

    // It may have another CA by now, of which awsvid has heard nothing.
    let _agent = serve(&node, &[]);
    let mut stream = Some(node.stream);
    drop(stream.take());
    node.workload_api
        .asked()
        .await
        .refuse(Status::unavailable("starting"));
    let error = loop {
        match client.connect().await.unwrap_err() {
            SourceError::Misconfigured(_) => tokio::task::yield_now().await,
            error => break error,
        }
    };
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("heard nothing new")),
        "{error:?}"
    );
}

#[tokio::test]
async fn without_an_svid_of_its_own_it_says_why() {
    let mut node = Node::new().await;
    let agent = node.serve_always(good());
    let client = node.client();
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
    // The identity is taken back: the connection that was made with it is left, too.
    node.stream
        .fail(Status::permission_denied("no identity issued"));
    while client.own.latest().is_ok() {
        tokio::task::yield_now().await;
    }
    let error = client.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    // Denied would say that the workload has no identity.
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("register awsvid itself")),
        "{error:?}"
    );
    assert_eq!(agent.asked().len(), 1);

    // Whoever is to be started waits for it.
    node.workload_api
        .asked()
        .await
        .refuse(Status::permission_denied("no identity issued"));
    let connecting = tokio::spawn(async move { client.connect().await });
    node.workload_api
        .asked()
        .await
        .accept()
        .send(node.authority.message(ID));
    connecting.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_svid_that_is_over_is_not_shown() {
    let authority = Authority::new();
    let past = |params: &mut CertificateParams| params.not_after = rcgen::date_time_ymd(2020, 2, 1);
    let svid = authority.svid_of(ID, authority.sign(&[ID], past));
    let mut node = Node::with(authority, X509svidResponse { svids: vec![svid] }).await;
    let _agent = node.serve_always(good());
    let client = node.client();
    let error = client.fetch_for_pid(1, AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("X.509-SVID is over")),
        "{error:?}"
    );
    node.rotate(&client).await;
    client.fetch_for_pid(1, AUDIENCE).await.unwrap();
}

#[tokio::test]
async fn a_socket_that_is_not_there_or_not_listened_at() {
    let mut node = Node::new().await;
    let client = node.client();
    let error = client.connect().await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("there is no socket")
            && text.contains("`broker_socket`") && text.contains("experimental { broker { socket_path")),
        "{error:?}"
    );
    drop(std::os::unix::net::UnixListener::bind(&node.broker).unwrap());
    let error = client.connect().await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("nobody listens")),
        "{error:?}"
    );
    std::fs::remove_file(&node.broker).unwrap();
    let _agent = node.serve_always(good());
    client.connect().await.unwrap();
}

#[test]
fn a_socket_that_awsvid_may_not_open() {
    // For root, permissions count only under another file system uid, which is a thread's own.
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
async fn a_server_that_is_no_broker_socket() {
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
async fn a_server_that_does_not_go_on_is_left() {
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
