use std::time::UNIX_EPOCH;

use http_body_util::BodyExt;
use hyper::header::RETRY_AFTER;

use super::*;
use crate::caller::AttestError;
use crate::exchange::ExchangeError;
use crate::protocol::Protocol;
use crate::svid::SourceError;

const REQUEST: RequestId = RequestId { boot: 1, number: 7 };
const ROLE: MetadataPath<'_> = MetadataPath::Role {
    name: "billing",
    extended: false,
};

/// Returns status, `Retry-After` and body.
async fn answer(error: &RequestError, path: MetadataPath<'_>) -> (u16, bool, String) {
    let answer = error_response(error, path, (REQUEST, UNIX_EPOCH));
    let (status, retries) = (
        answer.status().as_u16(),
        answer.headers().contains_key(RETRY_AFTER),
    );
    assert_eq!(answer.headers()["cache-control"], "no-store");
    assert_eq!(answer.headers()["connection"], "close");
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, retries, String::from_utf8(body.to_vec()).unwrap())
}

fn no_identity() -> RequestError {
    RequestError::NoIdentity {
        caller: "uid 7".to_owned(),
        fix: "add a rule",
    }
}

#[tokio::test]
async fn status_is_one_that_sdks_understand() {
    let denied = || SourceError::Denied("denied".to_owned());
    let table = [
        (RequestError::Host, ROLE, 400),
        (RequestError::Body, ROLE, 400),
        (RequestError::Browser, ROLE, 403),
        (RequestError::Proxied, MetadataPath::Token, 403),
        (RequestError::MetadataTtl, MetadataPath::Token, 400),
        (RequestError::MetadataToken, ROLE, 401),
        (RequestError::Path, MetadataPath::Unknown, 404),
        (no_identity(), ROLE, 404),
        (RequestError::Caller(AttestError::CallerGone), ROLE, 404),
        (RequestError::Caller(AttestError::SearchBusy), ROLE, 503),
        (RequestError::Pending, ROLE, 503),
        (RequestError::Full, ROLE, 503),
        (RequestError::NotAudited, ROLE, 503),
        (RequestError::Exchange(denied().into()), ROLE, 200),
        (
            RequestError::Exchange(denied().into()),
            MetadataPath::RoleName,
            404,
        ),
        (RequestError::Exchange(ExchangeError::TooOften), ROLE, 503),
    ];
    for (error, path, expected) in table {
        let (status, retries, body) = answer(&error, path).await;
        assert_eq!((status, retries), (expected, expected == 503), "{error:?}");
        assert!(body.contains("(request 00000001-7)"), "{body}");
    }
}

/// No error is a 400 or a 403 for its caller: SDKs would give up, or fall back to version 1.
#[tokio::test]
async fn error_of_a_caller_is_not_final() {
    for error in RequestError::samples(Protocol::Imds) {
        let is_of_request = matches!(
            error,
            RequestError::Host
                | RequestError::Body
                | RequestError::Browser
                | RequestError::Proxied
                | RequestError::Method
                | RequestError::MetadataTtl
                | RequestError::MetadataToken
        );
        for path in [ROLE, MetadataPath::RoleName, MetadataPath::Region] {
            let (status, ..) = answer(&error, path).await;
            let is_right = [200, 404, 503].contains(&status);
            assert_ne!(is_right, is_of_request, "{error:?}: {status}");
        }
    }
}

#[tokio::test]
async fn rejection_by_sts_has_its_reason_where_sdks_read_credentials() {
    let error = RequestError::Exchange(SourceError::Denied("not registered".to_owned()).into());
    let (_, _, body) = answer(&error, ROLE).await;
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["Code"], "AssumeRoleUnauthorizedAccess");
    assert!(body["Message"].as_str().unwrap().contains("not registered"));
    assert_eq!(body["LastUpdated"], "1970-01-01T00:00:00Z");
}

#[test]
fn method_that_is_right_depends_on_the_path() {
    for (path, method) in [(MetadataPath::Token, "PUT"), (ROLE, "GET")] {
        let answer = error_response(&RequestError::Method, path, (REQUEST, UNIX_EPOCH));
        assert_eq!(answer.status(), 405);
        assert_eq!(answer.headers()[ALLOW], method);
    }
}

#[test]
fn each_message_of_a_request_has_its_fix() {
    for error in [
        RequestError::Host,
        RequestError::Browser,
        RequestError::Proxied,
        RequestError::Method,
        RequestError::Body,
        RequestError::Path,
        RequestError::MetadataTtl,
        RequestError::MetadataToken,
    ] {
        let text = message(&error);
        assert!(text.contains("; ") && !text.ends_with('.'), "{text}");
    }
}
