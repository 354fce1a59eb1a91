use super::*;

#[test]
fn every_refusal_is_json_that_all_sdks_can_read() {
    let cases = [
        (Refused::Caller(AttestError::CallerGone), 403, "caller_gone", None),
        (Refused::Caller(AttestError::SearchBusy), 503, "search_busy", Some(1)),
        (Refused::Caller(AttestError::ProcessExecuting), 503, "process_executing", Some(1)),
        (Refused::Caller(AttestError::ProcessUnresponsive), 503, "process_unresponsive", Some(1)),
        (Refused::Host, 400, "host", None),
        (Refused::Browser, 403, "browser", None),
        (Refused::Proxied, 403, "proxied", None),
        (Refused::Malformed, 400, "bad_request", None),
        (Refused::HeadTooLarge, 431, "head_too_large", None),
        (Refused::Method, 405, "method", None),
        (Refused::Body, 400, "body", None),
        (Refused::Path, 404, "path", None),
        (Refused::BadArn, 400, "bad_arn", None),
        (Refused::NoAuthorization, 403, "no_authorization", None),
        (Refused::WrongToken, 403, "wrong_token", None),
        (Refused::NoIdentity("uid 7".to_owned()), 403, "no_identity", None),
        (Refused::Denied(Denied::NoRole), 403, "no_role", None),
        (Refused::Pending, 503, "pending", Some(1)),
        (Refused::Full, 503, "cache_full", Some(1)),
        (Refused::TooManyRoles, 503, "too_many_roles", Some(1)),
        (Refused::Issue(IssueError::TooOften), 503, "too_many_exchanges", Some(1)),
        (Refused::NotAudited, 503, "not_audited", Some(1)),
    ];
    for (refused, status, code, retry_after) in cases {
        assert_eq!((refused.status(), refused.retry_after()), (status, retry_after), "{refused:?}");
        let body: serde_json::Value = serde_json::from_slice(&refused.body(None)).unwrap();
        let keys: Vec<_> = body.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["Code", "Message", "code", "message"]);
        assert_eq!((&body["code"], &body["Code"]), (&code.into(), &code.into()));
        assert_eq!(body["message"], body["Message"]);
        let message = body["message"].as_str().unwrap();
        assert!(message.starts_with("awsvid: ") && message.ends_with('.'), "{message}");
    }
}

#[test]
fn nobody_learns_of_other_workloads() {
    let refused = Refused::NoIdentity("uid 1003 in shop.service".to_owned());
    let text = String::from_utf8(refused.body(None)).unwrap();
    assert!(text.contains("uid 1003 in shop.service"));
    assert!(!text.contains("spiffe://"));
}
