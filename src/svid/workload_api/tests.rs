mod fake;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use tempfile::tempdir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::time::Instant;

use super::*;
use crate::caller::constant_proof::constant_caller;
use crate::caller::{ListenerKind, Process};
use crate::captured_log::CapturedLog;
use crate::svid::BadToken;
use crate::svid::jwt::tests::{AUDIENCE, NOW, billing, now, raw_token, token_for};
use crate::workload_rule::WorkloadRule;
use fake::{FakeWorkloadApi, WorkloadApiScript, socket, svids};

const ID: &str = "spiffe://example.org/billing";

fn api(path: &Path) -> WorkloadApi {
    let endpoint = Endpoint::parse(&format!("unix://{}", path.display())).unwrap();
    WorkloadApi::new(endpoint, [], Clock::starting_at(now()), Metrics::default())
}

fn good() -> JwtsvidResponse {
    svids([(ID, token_for(&billing(), 300, 1))])
}

fn always(
    answer: impl Fn() -> Result<JwtsvidResponse, Status> + Send + Sync + 'static,
) -> Arc<WorkloadApiScript> {
    Arc::new(move |_| Some(answer()))
}

/// Returns the result of one fetch that gets `reply`.
async fn fetch_of(
    answer: Result<JwtsvidResponse, Status>,
) -> (Result<JwtSvid, SourceError>, FakeWorkloadApi) {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let fake = fake::at(&path, always(move || answer.clone()));
    (api(&path).fetch(&billing(), AUDIENCE).await, fake)
}

#[tokio::test]
async fn request_has_one_audience_one_id_and_one_header() {
    let (result, fake) = fetch_of(Ok(good())).await;
    assert_eq!(result.unwrap().secret(), token_for(&billing(), 300, 1));
    let [(metadata, request)] = &fake.requests.all()[..] else {
        panic!("not exactly one request")
    };
    assert_eq!(
        request,
        &JwtsvidRequest {
            audience: vec![AUDIENCE.to_owned()],
            spiffe_id: ID.to_owned()
        }
    );
    let header: Vec<_> = metadata.get_all("workload.spiffe.io").iter().collect();
    assert_eq!(header, ["true"]);
    // The agent may end the call when no request waits any more.
    assert!(metadata.contains_key("grpc-timeout"));
}

#[tokio::test]
async fn fetch_returns_only_the_requested_id() {
    let ours = || (ID, token_for(&billing(), 300, 1));
    let other = || {
        (
            "spiffe://example.org/other",
            token_for(
                &SpiffeId::parse("spiffe://example.org/other").unwrap(),
                300,
                2,
            ),
        )
    };
    for answer in [
        vec![ours()],
        vec![other(), ours()],
        vec![ours(), other()],
        vec![(ID, String::new()), ours()],
        vec![ours(), ours()],
        // Another's token under this name, as from an agent that merges the replies of others.
        vec![(ID, other().1), ours()],
        vec![ours(), (ID, other().1)],
    ] {
        let (result, _) = fetch_of(Ok(svids(answer.clone()))).await;
        assert_eq!(result.unwrap().secret(), ours().1, "{answer:?}");
    }
    let unusable = [
        vec![],
        vec![(ID, String::new())],
        vec![("", token_for(&billing(), 300, 1))],
        vec![("", String::new())],
        vec![other()],
        vec![("spiffe://example.org/billing/", ours().1)],
        vec![("spiffe://example.org/Billing", ours().1)],
    ];
    for answer in unusable {
        let (result, _) = fetch_of(Ok(svids(answer.clone()))).await;
        assert!(
            matches!(&result, Err(SourceError::Denied(text)) if text.contains(ID)),
            "{answer:?}: {result:?}"
        );
    }
}

#[tokio::test]
async fn token_that_fails_the_check_is_rejected() {
    let other = SpiffeId::parse("spiffe://example.org/other").unwrap();
    let float = raw_token(
        r#"{"alg":"ES256"}"#,
        &format!(r#"{{"sub":"{ID}","aud":"{AUDIENCE}","iat":1.7e9,"exp":1867225600}}"#),
    );
    let (iat, exp) = (NOW - 295, NOW + 5);
    let claims = format!(r#"{{"sub":"{ID}","aud":"{AUDIENCE}","iat":{iat},"exp":{exp}}}"#);
    let expiring = raw_token(r#"{"alg":"ES256"}"#, &claims);
    let table = [
        (token_for(&other, 300, 1), "subject", false),
        (float, "iat", false),
        ("x".repeat(20_001), "20001", false),
        (expiring, "expires in ", true),
    ];
    for (token, reason, transient) in table {
        let (result, _) = fetch_of(Ok(svids([(ID, token)]))).await;
        let error = result.unwrap_err();
        assert!(
            matches!(error, SourceError::BadToken(_)) && error.to_string().contains(reason),
            "{error}"
        );
        assert_eq!(error.is_transient(), transient, "{error}");
        assert_eq!(error.reason(), "bad_token");
    }
    assert!(!SourceError::from(BadToken::Wrong(String::new())).is_transient());
}

#[tokio::test]
async fn status_code_is_classified() {
    let table = [
        (Code::Cancelled, "source_unavailable"),
        (Code::Unknown, "source_unavailable"),
        (Code::InvalidArgument, "source_misconfigured"),
        (Code::DeadlineExceeded, "source_unavailable"),
        (Code::NotFound, "source_denied"),
        (Code::AlreadyExists, "source_unavailable"),
        (Code::PermissionDenied, "source_denied"),
        (Code::ResourceExhausted, "source_unavailable"),
        (Code::FailedPrecondition, "source_unavailable"),
        (Code::Aborted, "source_unavailable"),
        (Code::OutOfRange, "source_misconfigured"),
        (Code::Unimplemented, "source_misconfigured"),
        (Code::Internal, "source_unavailable"),
        (Code::Unavailable, "source_unavailable"),
        (Code::DataLoss, "source_unavailable"),
        (Code::Unauthenticated, "source_unavailable"),
    ];
    for (code, reason) in table {
        let (result, fake) = fetch_of(Err(Status::new(code, "the agent's\nmessage"))).await;
        let error = result.unwrap_err();
        assert_eq!(error.reason(), reason, "{code:?}");
        assert_eq!(
            error.is_transient(),
            reason == "source_unavailable",
            "{code:?}"
        );
        assert!(
            error.to_string().contains("the agent's message"),
            "{code:?}: {error}"
        );
        assert_eq!(
            fake.requests.count(),
            1,
            "{code:?} is for others to try again"
        );
    }
}

#[tokio::test]
async fn recovered_agent_is_used_again() {
    for code in [Code::Unavailable, Code::PermissionDenied] {
        let dir = tempdir().unwrap();
        let path = socket(&dir);
        let script = move |number| {
            Some(if number < 3 {
                Err(Status::new(code, "not yet"))
            } else {
                Ok(good())
            })
        };
        let _fake = fake::at(&path, Arc::new(script));
        let api = api(&path);
        for _ in 0..3 {
            api.fetch(&billing(), AUDIENCE).await.unwrap_err();
        }
        api.fetch(&billing(), AUDIENCE).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn unanswered_call_ends_at_the_deadline() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let fake = fake::at(&path, Arc::new(|_| None));
    for deadline in [CALL_TIMEOUT, Duration::from_secs(7)] {
        let start = Instant::now();
        let error = api(&path)
            .with_deadline(deadline)
            .fetch(&billing(), AUDIENCE)
            .await
            .unwrap_err();
        assert!(matches!(error, SourceError::Unavailable(_)), "{error}");
        let took = start.elapsed();
        assert!(
            took >= deadline && took < deadline + Duration::from_secs(1),
            "{took:?}"
        );
    }
    assert_eq!(fake.requests.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn agent_that_does_not_accept_is_abandoned_at_the_deadline() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let error = api(&path).fetch(&billing(), AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("within 35s")),
        "{error}"
    );
}

#[tokio::test]
async fn agent_with_full_backlog_is_unavailable() {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket as new_socket,
    };
    use std::os::fd::AsRawFd;
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let listener = new_socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let _only_one_that_fits = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let error = api(&path).fetch(&billing(), AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("no more connections")),
        "{error}"
    );
}

#[tokio::test]
async fn connection_that_breaks_is_an_outage() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let listener = UnixListener::bind(&path).unwrap();
    let breaks = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        // The preface, the settings and the request have been sent when this much has arrived.
        stream.read_exact(&mut [0; 100]).await.unwrap();
    });
    let error = api(&path).fetch(&billing(), AUDIENCE).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable(_)), "{error}");
    breaks.await.unwrap();
}

#[tokio::test]
async fn goaway_is_an_outage_and_the_next_call_reconnects() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    for reason in [h2::Reason::NO_ERROR, h2::Reason::ENHANCE_YOUR_CALM] {
        let leaves = fake::at_h2(&path, move |mut connection| async move {
            let _request = connection.accept().await;
            connection.abrupt_shutdown(reason);
            while connection.accept().await.is_some() {}
        });
        let api = api(&path);
        for _ in 0..2 {
            let error = api.fetch(&billing(), AUDIENCE).await.unwrap_err();
            assert!(
                matches!(error, SourceError::Unavailable(_)),
                "{reason:?}: {error:?}"
            );
        }
        leaves.abort();
        std::fs::remove_file(&path).unwrap();
        let _agent = fake::at(&path, always(|| Ok(good())));
        api.fetch(&billing(), AUDIENCE).await.unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}

#[tokio::test]
async fn broken_stream_is_not_a_denial() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    // tonic converts the first to PermissionDenied, which the agent did not send.
    for reason in [
        h2::Reason::INADEQUATE_SECURITY,
        h2::Reason::CANCEL,
        h2::Reason::INTERNAL_ERROR,
    ] {
        let resets = fake::at_h2(&path, move |mut connection| async move {
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                respond.send_reset(reason);
            }
        });
        let error = api(&path).fetch(&billing(), AUDIENCE).await.unwrap_err();
        assert!(
            matches!(error, SourceError::Unavailable(_)),
            "{reason:?}: {error:?}"
        );
        resets.abort();
        std::fs::remove_file(&path).unwrap();
    }
}

#[tokio::test]
async fn replaced_agent_is_used_while_the_old_one_runs() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let api = api(&path);
    let old = fake::at(&path, always(|| Ok(good())));
    api.fetch(&billing(), AUDIENCE).await.unwrap();

    std::fs::rename(&path, dir.path().join("old.sock")).unwrap();
    let error = api.fetch(&billing(), AUDIENCE).await.unwrap_err();
    assert!(error.to_string().contains("no socket at"), "{error}");

    let new = fake::at(
        &path,
        always(|| Ok(svids([(ID, token_for(&billing(), 300, 2))]))),
    );
    let svid = api.fetch(&billing(), AUDIENCE).await.unwrap();
    assert_eq!(svid.secret(), token_for(&billing(), 300, 2));
    assert_eq!((old.requests.count(), new.requests.count()), (1, 1));
}

#[tokio::test]
async fn missing_or_dead_socket_is_unavailable() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let api = api(&path);
    let error = api.fetch(&billing(), AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("no socket at")),
        "{error}"
    );

    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let error = api.fetch(&billing(), AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("nothing listens")),
        "{error}"
    );

    std::fs::remove_file(&path).unwrap();
    let _agent = fake::at(&path, always(|| Ok(good())));
    api.fetch(&billing(), AUDIENCE).await.unwrap();
}

#[test]
fn socket_without_permission_is_unavailable() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    // For root, permissions count only under another file system uid, which is per thread.
    let error = std::thread::spawn(move || {
        if nix::unistd::geteuid().is_root() {
            nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65_533));
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime
            .block_on(api(&path).fetch(&billing(), AUDIENCE))
            .unwrap_err()
    });
    let error = error.join().unwrap();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("may not open")),
        "{error}"
    );
}

#[tokio::test]
async fn server_without_workload_api_is_a_misconfiguration() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    // HTTP/1, as at a container engine's socket.
    let listener = UnixListener::bind(&path).unwrap();
    let engine = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            .await
            .unwrap();
        // Until the client hangs up.
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let error = api(&path).fetch(&billing(), AUDIENCE).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable(_)), "{error}");
    engine.await.unwrap();
    std::fs::remove_file(&path).unwrap();

    let website = fake::at_h2(&path, |mut connection| async move {
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let response = tonic::codegen::http::Response::builder()
                .status(404)
                .body(())
                .unwrap();
            respond.send_response(response, true).unwrap();
        }
    });
    let error = api(&path).fetch(&billing(), AUDIENCE).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Misconfigured(text) if text.contains("check that it is a SPIFFE Workload API")),
        "{error:?}"
    );
    website.abort();
}

#[tokio::test]
async fn unknown_fields_are_ignored() {
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let _agent = fake::at_h2(&path, |mut connection| async move {
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let head = tonic::codegen::http::Response::builder()
                .header("content-type", "application/grpc");
            let mut body = respond
                .send_response(head.body(()).unwrap(), false)
                .unwrap();
            let mut message = good().encode_to_vec();
            // Field 1000, a string: its tag is 1000 << 3 | 2.
            message.extend_from_slice(&[0xc2, 0x3e, 3, b'n', b'e', b'w']);
            let mut frame = vec![0];
            frame.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
            frame.extend_from_slice(&message);
            body.send_data(Bytes::from(frame), false).unwrap();
            let mut trailers = tonic::codegen::http::HeaderMap::new();
            trailers.insert(
                "grpc-status",
                tonic::codegen::http::HeaderValue::from_static("0"),
            );
            body.send_trailers(trailers).unwrap();
        }
    });
    api(&path).fetch(&billing(), AUDIENCE).await.unwrap();
}

#[tokio::test]
async fn oversized_reply_is_rejected() {
    let other = || ("spiffe://example.org/other", "x".repeat(20_000));
    let (result, _) = fetch_of(Ok(svids((0..60).map(|_| other())))).await;
    let error = result.unwrap_err();
    assert!(
        matches!(&error, SourceError::Misconfigured(text) if text.contains("far more")),
        "{error:?}"
    );
    let few = (0..40)
        .map(|_| other())
        .chain([(ID, token_for(&billing(), 300, 1))]);
    fetch_of(Ok(svids(few))).await.0.unwrap();
}

#[tokio::test]
async fn tcp_endpoint_is_supported() {
    for address in ["127.0.0.1", "::1"] {
        let (agent, bound) = fake::at_tcp(address, always(|| Ok(good()))).await;
        let endpoint = Endpoint::parse(&format!("tcp://{bound}")).unwrap();
        let api = WorkloadApi::new(endpoint, [], Clock::starting_at(now()), Metrics::default());
        api.fetch(&billing(), AUDIENCE).await.unwrap();
        drop(agent);
    }
    // A port that is bound, so that no other process can take it, but without a listener.
    let bound_port = tokio::net::TcpSocket::new_v4().unwrap();
    bound_port.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = bound_port.local_addr().unwrap();
    let api = WorkloadApi::new(
        Endpoint::Tcp(address),
        [],
        Clock::starting_at(now()),
        Metrics::default(),
    );
    let error = api.fetch(&billing(), AUDIENCE).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("nothing listens at tcp://{address}")),
        "{error}"
    );
}

fn caller(uid: u32, process: Option<Process>) -> Arc<Caller> {
    Arc::new(constant_caller(
        ListenerKind::Tcp,
        uid,
        Some("/system.slice/billing.service"),
        process,
    ))
}

#[tokio::test]
async fn rules_assign_identities_to_callers() {
    let rule = |uid, gid, path: &str| WorkloadRule {
        spiffe_id: SpiffeId::parse(&format!("spiffe://example.org/{path}")).unwrap(),
        uid: Some(uid),
        gid,
        supplementary_group: None,
        exe: None,
        systemd_unit: None,
        cgroup: None,
    };
    let rules = vec![
        rule(1001, None, "billing"),
        rule(1002, Some(7), "by-group"),
        rule(1002, None, "shop"),
    ];
    let endpoint = Endpoint::parse("unix:///nowhere.sock").unwrap();
    let api = WorkloadApi::new(
        endpoint,
        rules,
        Clock::starting_at(now()),
        Metrics::default(),
    );
    let identity = |path: &str| {
        vec![Identity {
            spiffe_id: SpiffeId::parse(&format!("spiffe://example.org/{path}")).unwrap(),
            hint: None,
        }]
    };
    let process = |gid| Process {
        pid: 1,
        gid,
        groups: None,
        in_container: false,
        program: None,
        started: None,
    };

    assert_eq!(
        api.identify(&caller(1001, Some(process(7)))).await,
        Ok(identity("billing"))
    );
    assert_eq!(api.identify(&caller(1003, None)).await, Ok(vec![]));
    assert_eq!(
        api.identify(&caller(1002, Some(process(7)))).await,
        Ok(identity("by-group"))
    );
    assert_eq!(
        api.identify(&caller(1002, Some(process(8)))).await,
        Ok(identity("shop"))
    );
    let undecided = api.identify(&caller(1002, None)).await;
    assert!(
        matches!(undecided, Err(SourceError::Reloaded)),
        "{undecided:?}"
    );
}

#[tokio::test]
async fn ready_ignores_identities_of_other_nodes() {
    let rule = |path: &str, uid| WorkloadRule {
        spiffe_id: SpiffeId::parse(&format!("spiffe://example.org/{path}")).unwrap(),
        uid: Some(uid),
        gid: None,
        supplementary_group: None,
        exe: None,
        systemd_unit: None,
        cgroup: None,
    };
    let denied = || Err(Status::permission_denied("no identity issued"));
    type HasIdentity = fn(usize) -> bool;
    let table: [(HasIdentity, usize, bool); 4] = [
        (|number| number == 0, 1, true),
        (|number| number == 2, 3, true),
        (|_| false, READY_IDS, false),
        (|_| true, 1, true),
    ];
    for (has_identity, expected, ready) in table {
        let dir = tempdir().unwrap();
        let path = socket(&dir);
        let script = move |number: usize| {
            let id = SpiffeId::parse(&format!("spiffe://example.org/w{number}")).unwrap();
            Some(if has_identity(number) {
                Ok(svids([(id.as_str(), token_for(&id, 300, 1))]))
            } else {
                denied()
            })
        };
        let fake = fake::at(&path, Arc::new(script));
        // Each identity appears twice, and is fetched once.
        let rules: Vec<WorkloadRule> = (0..20)
            .map(|number| rule(&format!("w{}", number / 2), number))
            .collect();
        let endpoint = Endpoint::parse(&format!("unix://{}", path.display())).unwrap();
        let api = WorkloadApi::new(
            endpoint,
            rules,
            Clock::starting_at(now()),
            Metrics::default(),
        );
        let result = api.ready(AUDIENCE).await;
        assert_eq!(
            (result.is_ok(), fake.requests.count()),
            (ready, expected),
            "{result:?}"
        );
        assert!(
            ready
                || matches!(&result, Err(SourceError::Denied(text)) if text.contains("example.org/w0")),
            "{result:?}"
        );
    }
    // An outage for all identities is reported at once.
    let dir = tempdir().unwrap();
    let path = socket(&dir);
    let fake = fake::at(&path, always(|| Err(Status::unavailable("x"))));
    let endpoint = Endpoint::parse(&format!("unix://{}", path.display())).unwrap();
    let rules = vec![rule("w0", 1), rule("w1", 2)];
    let api = WorkloadApi::new(
        endpoint,
        rules,
        Clock::starting_at(now()),
        Metrics::default(),
    );
    assert!(matches!(
        api.ready(AUDIENCE).await,
        Err(SourceError::Unavailable(_))
    ));
    assert_eq!(fake.requests.count(), 1);
}

#[tokio::test]
async fn log_does_not_show_a_token() {
    let log = CapturedLog::start();
    let (result, _) = fetch_of(Ok(good())).await;
    let svid = result.unwrap();
    let text = log.text();
    assert!(text.contains("TRACE"), "the log was on: {text}");
    for part in svid.secret().split('.') {
        assert!(!text.contains(part), "{text}");
    }
}
