use super::*;

const REQUEST: RequestId = RequestId {
    boot: 0x9f2c_41aa,
    number: 7,
};

#[test]
fn error_body_is_json_that_all_sdks_read() {
    let cases = [
        (
            RequestError::Caller(AttestError::CallerGone),
            403,
            "caller_gone",
            None,
        ),
        (
            RequestError::Caller(AttestError::SearchBusy),
            503,
            "search_busy",
            Some(1),
        ),
        (
            RequestError::Caller(AttestError::ProcessExecuting),
            503,
            "process_executing",
            Some(1),
        ),
        (
            RequestError::Caller(AttestError::ProcessUnresponsive),
            503,
            "process_unresponsive",
            Some(1),
        ),
        (RequestError::Host, 400, "host", None),
        (RequestError::Browser, 403, "browser", None),
        (RequestError::Proxied, 403, "proxied", None),
        (RequestError::Malformed, 400, "bad_request", None),
        (RequestError::HeadTooLarge, 431, "head_too_large", None),
        (RequestError::Method, 405, "method", None),
        (RequestError::Body, 400, "body", None),
        (RequestError::Path, 404, "path", None),
        (RequestError::BadArn, 400, "bad_arn", None),
        (RequestError::NoAuthorization, 403, "no_authorization", None),
        (RequestError::WrongToken, 403, "wrong_token", None),
        (
            RequestError::NoIdentity {
                caller: "uid 7".to_owned(),
                fix: "add a rule",
            },
            403,
            "no_identity",
            None,
        ),
        (
            RequestError::Denied(Denial {
                denied: RoleDenied::NoRole,
                spiffe_ids: Vec::new(),
                requested: None,
            }),
            403,
            "no_role",
            None,
        ),
        (RequestError::Pending, 503, "pending", Some(1)),
        (RequestError::Full, 503, "cache_full", Some(1)),
        (RequestError::TooManyRoles, 503, "too_many_roles", Some(1)),
        (
            RequestError::Exchange(ExchangeError::TooOften),
            503,
            "too_many_exchanges",
            Some(1),
        ),
        (RequestError::NotAudited, 503, "not_audited", Some(1)),
    ];
    for (rejected, status, code, retry_after) in cases {
        assert_eq!(
            (rejected.status(), rejected.retry_after()),
            (status, retry_after),
            "{rejected:?}"
        );
        let body: serde_json::Value = serde_json::from_slice(&rejected.body(REQUEST)).unwrap();
        let keys: Vec<_> = body
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(keys, ["Code", "Message", "code", "message"]);
        assert_eq!((&body["code"], &body["Code"]), (&code.into(), &code.into()));
        assert_eq!(body["message"], body["Message"]);
        let message = body["message"].as_str().unwrap();
        assert!(
            message.starts_with("awsvid: ") && message.ends_with(". (request 9f2c41aa-7)"),
            "{message}"
        );
    }
}

#[test]
fn error_body_shows_no_fact_about_other_workloads() {
    let rejected = RequestError::NoIdentity {
        caller: "uid 1003 in shop.service".to_owned(),
        fix: "add a rule",
    };
    let text = String::from_utf8(rejected.body(REQUEST)).unwrap();
    assert!(text.contains("uid 1003 in shop.service; add a rule. (request"));
    assert!(!text.contains("spiffe://"));
}

#[test]
fn each_error_about_a_caller_has_one_fix() {
    for error in AttestError::ALL {
        let text = RequestError::Caller(error).message();
        assert_eq!(text.matches("; ").count(), 1, "{text}");
    }
}
