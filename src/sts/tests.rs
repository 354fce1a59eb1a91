mod chained;
mod connections;
pub(crate) mod fake;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tempfile::tempdir;

use super::*;
use crate::captured_log::CapturedLog;
use crate::identity::{ArnTemplate, RoleArn, SessionName, SpiffeId, SpiffeIdPattern};
use crate::role::{GrantDetails, Role};
use crate::svid::jwt::tests::{AUDIENCE, NOW, billing, now, svid_for};
use fake::{FakeProxy, FakeSts, RequestBarrier, StsReply};

const ARN: &str = "arn:aws:iam::123456789012:role/billing";

/// Fakes that tests of other modules use too.
pub(crate) fn grant(target: &StsTarget) -> Grant {
    let role = Role {
        name: "billing".to_owned(),
        spiffe_id: SpiffeIdPattern::parse("spiffe://example.org/*").unwrap(),
        role_arn: ArnTemplate::parse(ARN).unwrap(),
        audience: AUDIENCE.to_owned(),
        duration: Duration::from_secs(3600),
        session_name: None,
        sts: target.clone(),
        policy: None,
        policy_arns: vec![],
        exchange: crate::role::FirstExchange::WebIdentity,
        chain: vec![],
    };
    Grant {
        spiffe_id: billing(),
        role: Arc::new(role),
        role_arn: RoleArn::parse(ARN).unwrap(),
        session_name: SessionName::of(&billing()),
        details: None,
    }
}

pub(crate) fn endpoint(url: String) -> StsTarget {
    StsTarget {
        region: "eu-central-1".to_owned(),
        endpoint: Some(url),
    }
}

pub(crate) fn plain(server: &FakeSts) -> StsTarget {
    endpoint(format!("http://{}", server.address))
}

pub(crate) fn settings() -> Settings {
    Settings {
        timeout: Duration::from_secs(30),
        max_concurrent: 16,
        ca_file: None,
        network: NetworkSettings::default(),
        blocking: BlockingCalls::default(),
    }
}

#[track_caller]
fn assert_kind(error: &StsError, retry: RetryPolicy, reason: &str) {
    assert_eq!(
        (error.retry, error.reason.label()),
        (retry, reason),
        "{error}"
    );
}

fn sts(settings: Settings) -> Sts {
    Sts::new(settings, Clock::starting_at(now()))
}

fn network(variables: &[(&str, String)]) -> NetworkSettings {
    NetworkSettings::from_env(|name| {
        variables
            .iter()
            .find(|(existing, _)| *existing == name)
            .map(|(_, v)| v.clone())
    })
}

const NAMESPACE: &str = r#" xmlns="https://sts.amazonaws.com/doc/2011-06-15/""#;

/// Returns AWS's response with these credentials and this XML namespace.
fn success(namespace: &str, credentials: &str) -> StsReply {
    let text = format!(
        "<AssumeRoleWithWebIdentityResponse{namespace}><AssumeRoleWithWebIdentityResult>\
         <SubjectFromWebIdentityToken>{}</SubjectFromWebIdentityToken><Audience>{AUDIENCE}</Audience>\
         <AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/billing/example.org=billing</Arn>\
         <AssumedRoleId>AROAEXAMPLE:example.org=billing</AssumedRoleId></AssumedRoleUser>\
         <Credentials>{credentials}</Credentials><Provider>arn:aws:iam::123456789012:oidc-provider/o</Provider>\
         </AssumeRoleWithWebIdentityResult><ResponseMetadata><RequestId>r</RequestId></ResponseMetadata>\
         </AssumeRoleWithWebIdentityResponse>",
        billing()
    );
    StsReply::Body(200, "text/xml", text)
}

const CREDENTIALS: &str = "<AccessKeyId>ASIAEXAMPLE</AccessKeyId><SecretAccessKey>secret+/key</SecretAccessKey>\
                           <SessionToken>session//token==</SessionToken><Expiration>2026-01-01T01:00:00Z</Expiration>";

pub(crate) fn good() -> StsReply {
    success(NAMESPACE, CREDENTIALS)
}

pub(crate) fn rejection(status: u16, code: &str, message: &str) -> StsReply {
    let text = format!(
        "<ErrorResponse{NAMESPACE}><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>\
         <RequestId>3b0e1c5f-0000-0000-0000-000000000000</RequestId></ErrorResponse>"
    );
    StsReply::Body(status, "text/xml", text)
}

/// Returns the result of one call that gets `reply`.
async fn assume_of(reply: StsReply) -> (Result<Credentials, StsError>, FakeSts) {
    let server = FakeSts::start(move |_, _| reply.clone()).await;
    let sts = sts(settings());
    (
        sts.assume(&grant(&plain(&server)), &svid_for(&billing(), 300, 1))
            .await,
        server,
    )
}

#[tokio::test]
async fn request_has_grant_and_token_and_no_signature() {
    let server = FakeSts::start(|_, _| good()).await;
    let mut narrowed = grant(&plain(&server));
    let role = Role {
        duration: Duration::from_secs(900),
        ..(*narrowed.role).clone()
    };
    narrowed = Grant {
        role: Arc::new(role),
        details: Some(Arc::new(GrantDetails {
            policy: Some(r#"{"Version":"2012-10-17","Statement":[]}"#.to_owned()),
            policy_arns: vec![
                "arn:aws:iam::aws:policy/A".to_owned(),
                "arn:aws:iam::aws:policy/B".to_owned(),
            ],
            ..GrantDetails::default()
        })),
        ..narrowed
    };
    let token = svid_for(&billing(), 300, 1);
    sts(settings()).assume(&narrowed, &token).await.unwrap();
    let [request] = &server.received()[..] else {
        panic!("not exactly one request")
    };
    let expected = [
        ("Action", "AssumeRoleWithWebIdentity"),
        ("Version", "2011-06-15"),
        ("RoleArn", ARN),
        ("RoleSessionName", "example.org=billing"),
        ("WebIdentityToken", token.secret()),
        ("DurationSeconds", "900"),
        ("Policy", r#"{"Version":"2012-10-17","Statement":[]}"#),
        ("PolicyArns.member.1.arn", "arn:aws:iam::aws:policy/A"),
        ("PolicyArns.member.2.arn", "arn:aws:iam::aws:policy/B"),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(request.form, HashMap::from(expected));
    assert_eq!(
        request.uri, "/",
        "the token belongs into the body: URLs are logged"
    );
    assert!(
        !request.headers.contains_key("authorization"),
        "{:?}",
        request.headers
    );
    assert!(
        !request.headers.contains_key("x-amz-security-token"),
        "{:?}",
        request.headers
    );

    // Without policies the request lacks that parameter.
    sts(settings())
        .assume(&grant(&plain(&server)), &token)
        .await
        .unwrap();
    let plain = &server.received()[1].form;
    assert!(
        plain.keys().all(|name| !name.starts_with("Policy")),
        "{plain:?}"
    );
}

#[tokio::test]
async fn responses_of_several_implementations_are_parsed() {
    let minio = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<AssumeRoleWithWebIdentityResponse{NAMESPACE}>\
         <AssumeRoleWithWebIdentityResult><AssumedRoleUser><Arn></Arn><AssumeRoleId></AssumeRoleId></AssumedRoleUser>\
         <Credentials>{CREDENTIALS}</Credentials></AssumeRoleWithWebIdentityResult><ResponseMetadata><RequestId>1\
         </RequestId></ResponseMetadata></AssumeRoleWithWebIdentityResponse>"
    );
    let bare = minio.replace(
        "<AssumedRoleUser><Arn></Arn><AssumeRoleId></AssumeRoleId></AssumedRoleUser>",
        "",
    );
    let with = |expiration: &str| {
        success(
            NAMESPACE,
            &CREDENTIALS.replace("2026-01-01T01:00:00Z", expiration),
        )
    };
    let replies = [
        good(),
        success("", CREDENTIALS),
        StsReply::Body(200, "application/xml", minio),
        StsReply::Body(200, "text/plain", bare),
        with("2026-01-01T01:00:00.000Z"),
        with("2026-01-01T01:00:00.000000000Z"),
        with("2026-01-01T02:00:00+01:00"),
        with("2025-12-31T20:30:00.000-04:30"),
        with("2026-01-01T01:00:00+00:00"),
        with("2026-01-01t01:00:00z"),
    ];
    for (row, reply) in replies.into_iter().enumerate() {
        let credentials = assume_of(reply)
            .await
            .0
            .unwrap_or_else(|error| panic!("row {row}: {error}"));
        assert_eq!(credentials.access_key_id, "ASIAEXAMPLE");
        assert_eq!(credentials.secret_access_key.as_str(), "secret+/key");
        assert_eq!(credentials.session_token.as_str(), "session//token==");
        assert_eq!(credentials.expiration, now() + Duration::from_secs(3600));
    }
}

#[tokio::test]
async fn unusable_response_is_an_error() {
    let with = |old: &str, new: &str| success(NAMESPACE, &CREDENTIALS.replace(old, new));
    let page = |text: &str| StsReply::Body(200, "text/html", text.to_owned());
    let replies = [
        with("2026-01-01T01:00:00Z", &format!("{NOW}.5")),
        with("2026-01-01T01:00:00Z", "1.7672292E9"),
        with("2026-01-01T01:00:00Z", "tomorrow"),
        with("2026-01-01T01:00:00Z", ""),
        with("<Expiration>2026-01-01T01:00:00Z</Expiration>", ""),
        with("2026-01-01T01:00:00Z", "2025-12-31T23:59:59Z"),
        with("2026-01-01T01:00:00Z", "2026-01-01T00:00:00Z"),
        with("2026-01-01T01:00:00Z", "2026-01-03T00:00:00Z"),
        with("2026-01-01T01:00:00Z", "9999-01-01T00:00:00Z"),
        with("ASIAEXAMPLE", ""),
        with("secret+/key", ""),
        with("session//token==", ""),
        with("<SessionToken>session//token==</SessionToken>", ""),
        success(NAMESPACE, ""),
        page(""),
        page("<html><body>Please log in to the network</body></html>"),
        page("<html><body>Please log in"),
        page("<AssumeRoleResponse></AssumeRoleResponse>"),
        page(&format!(
            "<AssumeRoleWithWebIdentityResponse{NAMESPACE}></AssumeRoleWithWebIdentityResponse>"
        )),
        page("{\"Credentials\":{}}"),
        StsReply::Body(204, "text/xml", String::new()),
    ];
    for (row, reply) in replies.into_iter().enumerate() {
        let error = assume_of(reply).await.0.expect_err(&format!("row {row}"));
        assert_eq!(
            (error.retry, error.reason.label()),
            (RetryPolicy::Later, "sts_bad_answer"),
            "row {row}: {error}"
        );
        assert!(
            !error.to_string().contains("secret+/key") && !error.to_string().contains("log in"),
            "row {row}: {error}"
        );
    }
}

#[tokio::test]
async fn rejection_on_the_wire_is_classified() {
    use RetryPolicy::{Later, Never, NewToken};
    let keys = "Couldn't retrieve verification key from your identity provider";
    let table = [
        (
            400,
            "ExpiredTokenException",
            "Token expired: current date/time 1 must be before 0",
            NewToken,
            "sts_expired_token",
        ),
        (
            400,
            "InvalidIdentityToken",
            keys,
            Later,
            "sts_issuer_unreachable",
        ),
        (
            400,
            "InvalidIdentityToken",
            "Incorrect token audience",
            NewToken,
            "sts_invalid_token",
        ),
        (
            400,
            "IDPCommunicationError",
            "",
            Later,
            "sts_issuer_unreachable",
        ),
        (403, "IDPRejectedClaim", "", NewToken, "sts_invalid_token"),
        (
            403,
            "AccessDenied",
            "Not authorized to perform sts:AssumeRoleWithWebIdentity",
            Never,
            "sts_access_denied",
        ),
        (
            403,
            "RegionDisabledException",
            "",
            Never,
            "sts_region_disabled",
        ),
        (400, "MalformedPolicyDocument", "", Never, "sts_bad_policy"),
        (400, "PackedPolicyTooLarge", "", Never, "sts_bad_policy"),
        (
            400,
            "ValidationError",
            "The requested DurationSeconds exceeds the maximum",
            Never,
            "sts_bad_request",
        ),
        (400, "Throttling", "Rate exceeded", Later, "sts_throttled"),
        (503, "SlowDown", "", Later, "sts_throttled"),
        (500, "InternalFailure", "", Later, "sts_unavailable"),
        // Codes of MinIO alone.
        (400, "InvalidParameterValue", "", Never, "sts_bad_request"),
        (400, "ExpiredToken", "", NewToken, "sts_expired_token"),
        (503, "STSNotInitialized", "", Later, "sts_unavailable"),
    ];
    for (status, code, message, retry, reason) in table {
        let (result, server) = assume_of(rejection(status, code, message)).await;
        let error = result.unwrap_err();
        assert_eq!(
            (error.retry, error.reason.label(), error.code.as_str()),
            (retry, reason, code),
            "{error}"
        );
        assert!(
            error.to_string().contains(message) && error.to_string().contains(ARN),
            "{error}"
        );
        assert_eq!(
            server.received().len(),
            1,
            "{code}: the SDK must not try again by itself"
        );
    }
}

#[tokio::test]
async fn response_without_code_is_classified_by_status() {
    use RetryPolicy::{Later, Never};
    let html =
        || "<html><head><title>503</title></head><body><p>Secret page<br></body></html>".to_owned();
    let table = [
        (503, html(), Later, "sts_unavailable"),
        (502, String::new(), Later, "sts_unavailable"),
        (
            504,
            "upstream request timeout".to_owned(),
            Later,
            "sts_unavailable",
        ),
        (429, html(), Later, "sts_throttled"),
        (403, html(), Never, "sts_refused"),
        (403, String::new(), Never, "sts_refused"),
        (404, "404 page not found".to_owned(), Never, "sts_refused"),
        (405, html(), Never, "sts_misconfigured"),
        (
            400,
            "<ErrorResponse><Error><Code></Code></Error></ErrorResponse>".to_owned(),
            Never,
            "sts_refused",
        ),
        (
            403,
            r#"{"message":"Secret page"}"#.to_owned(),
            Never,
            "sts_refused",
        ),
    ];
    for (status, body, retry, reason) in table {
        let error = assume_of(StsReply::Body(status, "text/html", body))
            .await
            .0
            .unwrap_err();
        assert_eq!(
            (error.retry, error.reason.label(), error.code.as_str()),
            (retry, reason, ""),
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains(&format!("HTTP {status}")) && !text.contains("Secret page"),
            "{error}"
        );
    }
}

/// A code has the same meaning in every form and with every status.
#[tokio::test]
async fn code_is_classified_in_every_form() {
    let table: [(u16, &str, &str); 8] = [
        (
            403,
            "application/xml",
            "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>{}</Message></Error>",
        ),
        (
            403,
            "text/plain",
            "<Error><Code>AccessDenied</Code><Message>{}</Message><RequestId>r</RequestId></Error>",
        ),
        (
            400,
            "text/xml",
            "<ErrorResponse><Error><Code>AccessDenied</Code><Message>{}</Message></Error></ErrorResponse>",
        ),
        (
            403,
            "application/json",
            r#"{"Error":{"Code":"AccessDenied","Message":"{}"}}"#,
        ),
        (
            403,
            "application/x-amz-json-1.1",
            r#"{"__type":"AccessDeniedException","message":"{}"}"#,
        ),
        (
            403,
            "application/json",
            r#"{"code":"AccessDenied","message":"{}"}"#,
        ),
        // Some servers reject with a status of success.
        (
            200,
            "application/xml",
            "<Error><Code>AccessDenied</Code><Message>{}</Message></Error>",
        ),
        (
            200,
            "application/json",
            r#"{"Error":{"Code":"AccessDenied","Message":"{}"}}"#,
        ),
    ];
    for (status, kind, body) in table {
        for message in ["", "Not authorized"] {
            let (result, _server) =
                assume_of(StsReply::Body(status, kind, body.replace("{}", message))).await;
            let error = result.unwrap_err();
            assert_eq!(
                (error.retry, error.reason.label()),
                (RetryPolicy::Never, "sts_access_denied"),
                "{body}: {error}"
            );
            assert!(
                error.what.contains(message) && error.what.contains("AccessDenied"),
                "{body}: {error}"
            );
            assert!(
                error
                    .fix
                    .as_ref()
                    .is_some_and(|fix| fix.contains("the trust policy of")),
                "{body}: {error}"
            );
        }
    }
}

#[tokio::test]
async fn redirect_is_not_followed() {
    let elsewhere = FakeSts::start(|_, _| good()).await;
    let (result, _server) =
        assume_of(StsReply::Redirect(format!("http://{}/", elsewhere.address))).await;
    let error = result.unwrap_err();
    assert_kind(&error, RetryPolicy::Never, "sts_refused");
    assert!(elsewhere.received().is_empty());
}

#[tokio::test]
async fn incomplete_response_is_an_outage() {
    for reply in [StsReply::Never, StsReply::Stalls] {
        let server = FakeSts::start(move |_, _| reply.clone()).await;
        let sts = sts(Settings {
            timeout: Duration::from_millis(200),
            ..settings()
        });
        let error = sts
            .assume(&grant(&plain(&server)), &svid_for(&billing(), 300, 1))
            .await
            .unwrap_err();
        assert_kind(&error, RetryPolicy::Later, "sts_unreachable");
        assert!(error.to_string().contains("within 200ms"), "{error}");
    }
    let endless = StsReply::Body(200, "text/xml", "x".repeat(1024 * 1024));
    for reply in [StsReply::Breaks, endless] {
        let error = assume_of(reply).await.0.unwrap_err();
        assert_kind(&error, RetryPolicy::Later, "sts_unreachable");
    }
    // A port that is bound, so that no other process can take it, but without a listener.
    let taken = tokio::net::TcpSocket::new_v4().unwrap();
    taken.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let target = endpoint(format!("http://{}", taken.local_addr().unwrap()));
    let error = sts(settings())
        .assume(&grant(&target), &svid_for(&billing(), 300, 1))
        .await
        .unwrap_err();
    assert_kind(&error, RetryPolicy::Later, "sts_unreachable");
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

#[tokio::test]
async fn invalid_request_is_a_misconfiguration() {
    let targets = [
        endpoint("not a url".to_owned()),
        endpoint("minio.internal:9000".to_owned()),
        endpoint("ftp://minio.internal".to_owned()),
        endpoint(String::new()),
        StsTarget {
            region: "not a region!".to_owned(),
            endpoint: None,
        },
        StsTarget {
            region: String::new(),
            endpoint: None,
        },
    ];
    for target in targets {
        let error = sts(settings())
            .assume(&grant(&target), &svid_for(&billing(), 300, 1))
            .await
            .unwrap_err();
        assert_eq!(
            (error.retry, error.reason.label()),
            (RetryPolicy::Never, "sts_misconfigured"),
            "{target:?}: {error}"
        );
        assert!(!error.to_string().contains("Request"), "{error}");
    }
}

#[tokio::test]
async fn logs_and_errors_do_not_show_secrets() {
    let token = svid_for(&billing(), 300, 1);
    let log = CapturedLog::start();
    let echo = |status: u16| {
        move |_: usize, request: &fake::ReceivedRequest| {
            let token = &request.form["WebIdentityToken"];
            let message = format!(
                "1 validation error: Value '{token}' at 'webIdentityToken', {}...",
                &token[..50]
            );
            rejection(status, &token[..80], &message)
        }
    };
    for server in [
        FakeSts::start(echo(400)).await,
        FakeSts::start(echo(503)).await,
    ] {
        let error = sts(settings())
            .assume(&grant(&plain(&server)), &token)
            .await
            .unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains("[token]"), "{shown}");
        for part in token.secret().split('.') {
            assert!(!shown.contains(&part[..20]), "{shown}");
        }
    }
    for reply in [
        good(),
        StsReply::Breaks,
        StsReply::Body(200, "text/xml", "secret+/key".to_owned()),
    ] {
        let _ = assume_of(reply).await;
    }
    let text = log.text();
    assert!(
        text.contains("TRACE") && text.contains("hyper"),
        "the log was on: {text}"
    );
    for secret in token
        .secret()
        .split('.')
        .chain(["secret+/key", "session//token=="])
    {
        assert!(
            !text.contains(secret),
            "{}",
            text.lines().find(|line| line.contains(secret)).unwrap()
        );
    }
}

#[tokio::test]
async fn concurrent_calls_are_bounded() {
    let meeting = RequestBarrier::new();
    let StsReply::Body(_, _, body) = good() else {
        unreachable!()
    };
    let reply = StsReply::Together(meeting.clone(), body);
    let server = FakeSts::start(move |_, _| reply.clone()).await;
    let sts = Arc::new(sts(Settings {
        max_concurrent: 2,
        ..settings()
    }));
    let calls: Vec<_> = (0..8)
        .map(|serial| {
            let (sts, grant) = (sts.clone(), grant(&plain(&server)));
            tokio::spawn(
                async move { sts.assume(&grant, &svid_for(&billing(), 300, serial)).await },
            )
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(
        meeting.most.load(Ordering::SeqCst),
        2,
        "two at once, and never more"
    );
    assert_eq!(server.received().len(), 8);
}

#[tokio::test(start_paused = true)]
async fn call_without_permit_fails_after_the_timeout() {
    let sts = sts(Settings {
        max_concurrent: 1,
        ..settings()
    });
    let _other = sts
        .permits
        .acquire_evicting(&SpiffeId::parse("spiffe://example.org/other").unwrap())
        .await
        .unwrap();
    let start = tokio::time::Instant::now();
    let target = endpoint("http://127.0.0.1:9".to_owned());
    let error = sts
        .assume(&grant(&target), &svid_for(&billing(), 300, 1))
        .await
        .unwrap_err();
    assert_kind(&error, RetryPolicy::Later, "sts_busy");
    assert_eq!(start.elapsed(), crate::limits::ACQUIRE_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn workload_may_use_a_quarter_of_the_permits() {
    let sts = sts(settings());
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(sts.permits.acquire_evicting(&billing()).await.unwrap());
    }
    let mine = grant(&endpoint("http://127.0.0.1:9".to_owned()));
    let other = Grant {
        spiffe_id: SpiffeId::parse("spiffe://example.org/other").unwrap(),
        ..mine.clone()
    };
    let token = svid_for(&billing(), 300, 1);
    assert_eq!(
        sts.assume(&mine, &token).await.unwrap_err().reason.label(),
        "sts_busy"
    );
    assert_eq!(
        sts.assume(&other, &token).await.unwrap_err().reason.label(),
        "sts_unreachable",
        "it was sent"
    );
}

/// Covers T29: calls that hang, such as those to an endpoint that does not respond.
#[tokio::test]
async fn workload_is_served_while_four_others_hold_all_permits() {
    const HANGING: usize = 16;
    let arrived = Arc::new(tokio::sync::Semaphore::new(0));
    let server = {
        let arrived = arrived.clone();
        FakeSts::start(move |number, _| {
            arrived.add_permits(1);
            if number < HANGING {
                StsReply::Never
            } else {
                good()
            }
        })
        .await
    };
    let sts = Arc::new(sts(settings()));
    let mut hanging = tokio::task::JoinSet::new();
    for number in 0..HANGING {
        let id = SpiffeId::parse(&format!("spiffe://example.org/hostile-{}", number % 4)).unwrap();
        let grant = Grant {
            spiffe_id: id,
            ..grant(&plain(&server))
        };
        let sts = sts.clone();
        hanging.spawn(async move { sts.assume(&grant, &svid_for(&billing(), 300, 1)).await });
    }
    let all = arrived.acquire_many(HANGING.try_into().unwrap()).await;
    all.unwrap().forget();
    let token = svid_for(&billing(), 300, 1);
    sts.assume(&grant(&plain(&server)), &token).await.unwrap();
    let evicted = hanging.join_next().await.unwrap().unwrap().unwrap_err();
    assert_eq!(
        (evicted.reason.label(), evicted.retry),
        ("sts_busy", RetryPolicy::Later)
    );
    // Its permit is free now.
    sts.assume(&grant(&plain(&server)), &token).await.unwrap();
    assert_eq!(hanging.len(), HANGING - 1);
    assert!(hanging.try_join_next().is_none());
}

#[tokio::test]
async fn target_has_one_client_and_one_connection() {
    let server = FakeSts::start(|_, _| good()).await;
    let sts = sts(settings());
    for serial in 0..3 {
        sts.assume(&grant(&plain(&server)), &svid_for(&billing(), 300, serial))
            .await
            .unwrap();
    }
    let connections: Vec<_> = server
        .received()
        .iter()
        .map(|request| request.connection)
        .collect();
    assert_eq!(connections, [0, 0, 0]);
    let other = StsTarget {
        region: "us-east-1".to_owned(),
        ..plain(&server)
    };
    sts.assume(&grant(&other), &svid_for(&billing(), 300, 9))
        .await
        .unwrap();
    assert_eq!(sts.clients.lock().len(), 2);
}

#[tokio::test]
async fn probe_succeeds_if_sts_responds() {
    let server = FakeSts::start(|_, _| {
        rejection(
            400,
            "InvalidIdentityToken",
            "The ID Token provided is not a valid JWT",
        )
    })
    .await;
    sts(settings()).probe(&plain(&server)).await.unwrap();
    assert_eq!(server.received()[0].form["WebIdentityToken"], "none");
    let server = FakeSts::start(|_, _| StsReply::Body(503, "text/html", String::new())).await;
    sts(settings()).probe(&plain(&server)).await.unwrap();
    for reply in [StsReply::Never, StsReply::Breaks] {
        let server = FakeSts::start(move |_, _| reply.clone()).await;
        let sts = sts(Settings {
            timeout: Duration::from_millis(200),
            ..settings()
        });
        let error = sts.probe(&plain(&server)).await.unwrap_err();
        assert_eq!(error.reason.label(), "sts_unreachable", "{error}");
    }
}
