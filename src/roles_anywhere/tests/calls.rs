//! Calls to a server that the test controls.

use std::collections::HashMap;

use super::*;
use crate::sts::tests::fake::{FakeSts, StsReply};
use crate::sts::tests::settings;
use crate::sts::{RetryPolicy, StsReason};

fn client() -> RolesAnywhere {
    RolesAnywhere::new(settings(), Clock::starting_at(now()))
}

fn at_server(server: &FakeSts) -> RolesAnywhereTarget {
    RolesAnywhereTarget {
        endpoint: Some(format!("http://{}", server.address)),
        ..at()
    }
}

fn created(access_key_id: &str, expiration: &str) -> StsReply {
    let body = serde_json::json!({
        "credentialSet": [{
            "assumedRoleUser": { "arn": "arn:aws:sts::123456789012:assumed-role/example/0f1e", "assumedRoleId": "AROA:x" },
            "credentials": {
                "accessKeyId": access_key_id,
                "secretAccessKey": "secret",
                "sessionToken": "token",
                "expiration": expiration,
            },
            "packedPolicySize": 1,
            "roleArn": "arn:aws:iam::123456789012:role/example",
            "sourceIdentity": "",
        }],
        "subjectArn": "arn:aws:rolesanywhere:eu-central-1:123456789012:subject/1",
    });
    StsReply::Body(201, "application/json", body.to_string())
}

fn rejected(status: u16, code: &str, message: &str) -> StsReply {
    let body = serde_json::json!({ "code": code, "message": message });
    StsReply::Body(status, "application/json", body.to_string())
}

#[tokio::test]
async fn session_has_the_credentials_of_the_response() {
    let server = FakeSts::start(|_, _| created("ASIAEXAMPLE", "2027-06-30T01:00:00Z")).await;
    let target = at_server(&server);
    let session = client()
        .create_session(&grant(), &target, &svid("rsa.pem"))
        .await;
    let session = session.unwrap();
    assert_eq!(session.access_key_id, "ASIAEXAMPLE");
    assert_eq!(*session.session_token, "token");
    // AWS has not used the requested name.
    let name = session.first_session_name.unwrap();
    assert_eq!(name.as_str(), "0f1e");
    assert_eq!(session.expiration, now() + Duration::from_secs(3600));
    let [request] = &server.received()[..] else {
        panic!("one request")
    };
    assert!(request.uri.starts_with("/sessions?profileArn=arn%3Aaws%3A"));
    assert_eq!(request.headers["host"], server.address.to_string());
    assert_eq!(request.headers["x-amz-date"], "20270630T000000Z");
}

/// Returns for each request whether it had the name of a session: the name has the only `=` of a
/// body.
fn named(server: &FakeSts) -> Vec<bool> {
    let received = server.received();
    received
        .iter()
        .map(|request| !request.form.is_empty())
        .collect()
}

#[tokio::test]
async fn rejected_session_name_is_left_out_for_an_hour() {
    let server = FakeSts::start(|number, _| match number {
        0 => rejected(
            403,
            "AccessDeniedException",
            "Not authorized to set roleSessionName",
        ),
        _ => created("ASIAEXAMPLE", "2027-06-30T01:00:00Z"),
    })
    .await;
    let (client, target) = (client(), at_server(&server));
    let (grant, svid) = (grant(), svid("p256.pem"));
    let create = async || {
        let session = client.create_session(&grant, &target, &svid).await;
        session.unwrap();
    };
    create().await;
    create().await;
    assert_eq!(named(&server), [true, false, false]);
    // The profile may have been changed.
    let hour_ago = Instant::now().checked_sub(NAME_RETRY).unwrap();
    client
        .unnamed()
        .insert(target.profile_arn.clone(), hour_ago);
    create().await;
    assert_eq!(named(&server), [true, false, false, true]);
}

#[tokio::test]
async fn other_rejections_do_not_disable_session_names() {
    for (status, code, message) in [
        (
            400,
            "ValidationException",
            "Not authorized to set roleSessionName",
        ),
        (
            403,
            "AccessDeniedException",
            "1 validation error detected: value at 'roleSessionName' failed to satisfy a constraint",
        ),
        (403, "AccessDeniedException", "Untrusted certificate"),
    ] {
        let server = FakeSts::start(move |_, _| rejected(status, code, message)).await;
        let (client, target) = (client(), at_server(&server));
        for _ in 0..2 {
            let session = client
                .create_session(&grant(), &target, &svid("p256.pem"))
                .await;
            session.unwrap_err();
        }
        assert_eq!(named(&server), [true, true], "{code} {message}");
    }
}

#[tokio::test]
async fn failures_have_the_classes_of_sts() {
    use RetryPolicy::{Later, Never};
    let table = [
        (403, "AccessDeniedException", Never, StsReason::AccessDenied),
        (400, "ValidationException", Never, StsReason::BadRequest),
        (
            404,
            "ResourceNotFoundException",
            Never,
            StsReason::BadRequest,
        ),
        (
            409,
            "ServiceLinkedRoleLockClientException",
            Never,
            StsReason::BadRequest,
        ),
        (
            409,
            "ServiceLinkedRoleLockServiceException",
            Later,
            StsReason::Unavailable,
        ),
        (429, "ThrottlingException", Later, StsReason::Throttled),
        (
            500,
            "InternalServerException",
            Later,
            StsReason::Unavailable,
        ),
        (503, "Unknown", Later, StsReason::Unavailable),
        // A certificate is not replaced like a token.
        (403, "ExpiredTokenException", Never, StsReason::ExpiredToken),
    ];
    for (status, code, retry, reason) in table {
        let server = FakeSts::start(move |_, _| rejected(status, code, "because")).await;
        let target = at_server(&server);
        let session = client()
            .create_session(&grant(), &target, &svid("p384.pem"))
            .await;
        let error = session.unwrap_err();
        assert_eq!((error.retry, error.reason), (retry, reason), "{code}");
        let expected = format!(
            "IAM Roles Anywhere at http://{} rejected {} to {ID}: {code}: because",
            server.address,
            grant().role_arn
        );
        assert_eq!(error.what, expected);
        assert_eq!(server.received().len(), 1);
    }
}

#[tokio::test]
async fn unusable_responses_are_outages() {
    for reply in [
        StsReply::Body(201, "application/json", "{}".to_owned()),
        StsReply::Body(
            201,
            "application/json",
            r#"{"credentialSet":[]}"#.to_owned(),
        ),
        created("", "2027-06-30T01:00:00Z"),
        created("ASIAEXAMPLE", "2027-06-29T01:00:00Z"),
        created("ASIAEXAMPLE", "2029-06-29T01:00:00Z"),
        created("ASIAEXAMPLE", "tomorrow"),
    ] {
        let server = FakeSts::start(move |_, _| reply.clone()).await;
        let target = at_server(&server);
        let session = client()
            .create_session(&grant(), &target, &svid("rsa.pem"))
            .await;
        let error = session.unwrap_err();
        assert_eq!(
            (error.retry, error.reason),
            (RetryPolicy::Later, StsReason::BadAnswer),
            "{error}"
        );
    }
}

#[tokio::test]
async fn server_without_an_answer_is_an_outage() {
    for reply in [StsReply::Never, StsReply::Breaks] {
        let server = FakeSts::start(move |_, _| reply.clone()).await;
        let settings = Settings {
            timeout: Duration::from_millis(200),
            ..settings()
        };
        let client = RolesAnywhere::new(settings, Clock::starting_at(now()));
        let target = at_server(&server);
        let session = client
            .create_session(&grant(), &target, &svid("rsa.pem"))
            .await;
        let error = session.unwrap_err();
        assert_eq!(error.reason, StsReason::Unreachable, "{error}");
        assert!(error.fix.unwrap().contains("[roles_anywhere]"));
        client.probe(&target).await.unwrap_err();
    }
    let server = FakeSts::start(|_, _| rejected(403, "AccessDeniedException", "no")).await;
    client().probe(&at_server(&server)).await.unwrap();
}

#[test]
fn endpoint_is_that_of_the_region() {
    let of = |region: &str, variables: &[(&str, &str)]| {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        let network = crate::sts::NetworkSettings::from_env(|name| {
            variables.get(name).map(|value| (*value).to_owned())
        });
        let target = RolesAnywhereTarget {
            region: region.to_owned(),
            ..at()
        };
        network.roles_anywhere_url(&target).unwrap()
    };
    let fips = [("AWS_USE_FIPS_ENDPOINT", "true")];
    let dual_stack = [("AWS_USE_DUALSTACK_ENDPOINT", "true")];
    for (url, expected) in [
        (
            of("eu-central-1", &[]),
            "https://rolesanywhere.eu-central-1.amazonaws.com",
        ),
        (
            of("cn-north-1", &[]),
            "https://rolesanywhere.cn-north-1.amazonaws.com.cn",
        ),
        (
            of("us-east-1", &fips),
            "https://rolesanywhere-fips.us-east-1.amazonaws.com",
        ),
        (
            of("us-east-1", &dual_stack),
            "https://rolesanywhere.us-east-1.api.aws",
        ),
    ] {
        assert_eq!(url, expected);
        assert!(is_aws_url(&url));
    }
    assert!(!is_aws_url("https://rolesanywhere.s3.amazonaws.com"));
    assert!(!is_aws_url("http://rolesanywhere.us-east-1.amazonaws.com"));
}
