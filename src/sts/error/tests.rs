use super::*;
use crate::svid::jwt::tests::{billing, svid_for};

fn refused(code: Option<&str>, status: u16, message: &str) -> Failure {
    Failure::Refused {
        code: code.map(str::to_owned),
        status,
        message: message.to_owned(),
    }
}

#[test]
fn code_is_classified() {
    use RetryPolicy::{Later, Never, NewToken};
    let keys = "Couldn't retrieve verification key from your identity provider, please reference \
                AssumeRoleWithWebIdentity documentation for requirements";
    let table = [
        (
            Some("ExpiredTokenException"),
            400,
            "Token expired",
            NewToken,
            "sts_expired_token",
        ),
        (Some("ExpiredToken"), 400, "", NewToken, "sts_expired_token"),
        (
            Some("InvalidIdentityToken"),
            400,
            keys,
            Later,
            "sts_issuer_unreachable",
        ),
        (
            Some("InvalidIdentityToken"),
            400,
            "No OpenIDConnect provider found",
            NewToken,
            "sts_invalid_token",
        ),
        (
            Some("InvalidIdentityToken"),
            400,
            "",
            NewToken,
            "sts_invalid_token",
        ),
        (
            Some("IDPCommunicationError"),
            400,
            "",
            Later,
            "sts_issuer_unreachable",
        ),
        (
            Some("IDPCommunicationErrorException"),
            400,
            "",
            Later,
            "sts_issuer_unreachable",
        ),
        (
            Some("IDPRejectedClaim"),
            403,
            "",
            NewToken,
            "sts_invalid_token",
        ),
        (
            Some("AccessDenied"),
            403,
            "Not authorized",
            Never,
            "sts_access_denied",
        ),
        (
            Some("AccessDeniedException"),
            403,
            "",
            Never,
            "sts_access_denied",
        ),
        (
            Some("RegionDisabledException"),
            403,
            "",
            Never,
            "sts_region_disabled",
        ),
        (
            Some("MalformedPolicyDocument"),
            400,
            "",
            Never,
            "sts_bad_policy",
        ),
        (
            Some("PackedPolicyTooLarge"),
            400,
            "",
            Never,
            "sts_bad_policy",
        ),
        (Some("ValidationError"), 400, "", Never, "sts_bad_request"),
        (
            Some("InvalidParameterValue"),
            400,
            "",
            Never,
            "sts_bad_request",
        ),
        (
            Some("Throttling"),
            400,
            "Rate exceeded",
            Later,
            "sts_throttled",
        ),
        (Some("ThrottlingException"), 400, "", Later, "sts_throttled"),
        (
            Some("RequestLimitExceeded"),
            503,
            "",
            Later,
            "sts_throttled",
        ),
        (
            Some("TooManyRequestsException"),
            429,
            "",
            Later,
            "sts_throttled",
        ),
        (Some("SlowDown"), 503, "", Later, "sts_throttled"),
        (
            Some("BandwidthLimitExceeded"),
            400,
            "",
            Later,
            "sts_throttled",
        ),
        (
            Some("EC2ThrottledException"),
            400,
            "",
            Later,
            "sts_throttled",
        ),
        (
            Some("LimitExceededException"),
            400,
            "",
            Later,
            "sts_throttled",
        ),
        (
            Some("PriorRequestNotComplete"),
            400,
            "",
            Later,
            "sts_throttled",
        ),
        (
            Some("ProvisionedThroughputExceededException"),
            400,
            "",
            Later,
            "sts_throttled",
        ),
        (Some("RequestThrottled"), 400, "", Later, "sts_throttled"),
        (
            Some("RequestThrottledException"),
            400,
            "",
            Later,
            "sts_throttled",
        ),
        (Some("ThrottledException"), 400, "", Later, "sts_throttled"),
        (
            Some("TransactionInProgressException"),
            400,
            "",
            Later,
            "sts_throttled",
        ),
        (Some("RequestTimeout"), 400, "", Later, "sts_unavailable"),
        (Some("InternalFailure"), 500, "", Later, "sts_unavailable"),
        (
            Some("ServiceUnavailable"),
            503,
            "",
            Later,
            "sts_unavailable",
        ),
        (Some("UpstreamError"), 500, "", Later, "sts_unavailable"),
        // Codes of Ceph, RustFS, and S3 services that do not offer STS.
        (Some("NoSuchEntity"), 404, "", Never, "sts_bad_request"),
        (
            Some("InvalidArgument"),
            400,
            "no policies are available for this OIDC token",
            Never,
            "sts_bad_request",
        ),
        (Some("InvalidRequest"), 400, "", Never, "sts_bad_request"),
        (Some("InvalidToken"), 400, "", NewToken, "sts_invalid_token"),
        (
            Some("MethodNotAllowed"),
            405,
            "",
            Never,
            "sts_misconfigured",
        ),
        (Some("NotImplemented"), 501, "", Never, "sts_misconfigured"),
        (
            Some("MissingAuthenticationTokenException"),
            403,
            "",
            Never,
            "sts_misconfigured",
        ),
        (Some("SlowDownWrite"), 503, "", Later, "sts_throttled"),
        (Some("NeverHeardOf"), 400, "", Never, "sts_refused"),
        (Some("NeverHeardOf"), 429, "", Later, "sts_throttled"),
        (Some("NeverHeardOf"), 502, "", Later, "sts_unavailable"),
        (None, 301, "", Never, "sts_refused"),
        (None, 403, "", Never, "sts_refused"),
        (None, 404, "", Never, "sts_refused"),
        (None, 405, "", Never, "sts_misconfigured"),
        (None, 408, "", Later, "sts_unavailable"),
        (None, 429, "", Later, "sts_throttled"),
        (None, 500, "", Later, "sts_unavailable"),
        (None, 501, "", Never, "sts_misconfigured"),
        (None, 502, "", Later, "sts_unavailable"),
        (None, 503, "", Later, "sts_unavailable"),
        (None, 504, "", Later, "sts_unavailable"),
    ];
    for (code, status, message, retry, reason) in table {
        assert_eq!(
            refused(code, status, message).classify(),
            (retry, reason),
            "{code:?} {status} {message}"
        );
    }
    let others = [
        (
            Failure::InvalidResponse(String::new()),
            Later,
            "sts_bad_answer",
        ),
        (
            Failure::Unreachable(String::new()),
            Later,
            "sts_unreachable",
        ),
        (
            Failure::InvalidRequest(String::new()),
            Never,
            "sts_misconfigured",
        ),
        (Failure::Untrusted(String::new()), Later, "sts_no_ca"),
        (Failure::Busy, Later, "sts_busy"),
    ];
    for (failure, retry, reason) in others {
        assert_eq!(failure.classify(), (retry, reason));
    }
}

#[test]
fn error_text_does_not_quote_the_token() {
    let svid = svid_for(&billing(), 300, 1);
    let token = svid.secret();
    let clean = |text: &str| without_token(text, Some(&svid));
    let quotes = [
        format!("Value '{token}' at 'webIdentityToken' is too long"),
        format!("Value '{}...' at 'webIdentityToken'", &token[..60]),
        format!("token={token}"),
        format!("x{token}y"),
        token.to_owned(),
        token.split('.').collect::<Vec<_>>().join(" "),
        format!("ünïcödé {token} ünïcödé"),
    ];
    for text in quotes {
        let cleaned = clean(&text);
        assert!(cleaned.contains("[token]"), "{cleaned}");
        for at in 0..token.len() - 32 {
            assert!(!cleaned.contains(&token[at..at + 32]), "{cleaned}");
        }
    }
    let harmless = [
        "",
        "Not authorized to perform sts:AssumeRoleWithWebIdentity",
        "arn:aws:iam::123456789012:role/a-role-with-a-very-long-name-that-is-not-secret-at-all",
        "No OpenIDConnect provider found in your account for https://oidc.example.org/some/path",
        "ünïcödé",
        "...",
    ];
    for text in harmless {
        assert_eq!(clean(text), text);
    }
}

#[test]
fn error_names_the_host_and_the_proxy() {
    let at = |proxy: Option<&str>| StsDestination {
        name: "STS at https://sts-fips.us-east-1.amazonaws.com".to_owned(),
        is_aws: true,
        proxy: proxy.map(str::to_owned),
    };
    let failures = [
        refused(Some("AccessDenied"), 403, ""),
        Failure::InvalidResponse("x".to_owned()),
        Failure::Unreachable("x".to_owned()),
        Failure::InvalidRequest("x".to_owned()),
        Failure::Untrusted("x".to_owned()),
        Failure::Busy,
    ];
    for failure in failures {
        let error = StsError::new(&failure, &at(None), None).to_string();
        assert!(
            error.contains("STS at https://sts-fips.us-east-1.amazonaws.com"),
            "{error}"
        );
    }
    let through = at(Some("the proxy proxy.example.org:3128 (HTTPS_PROXY)"));
    let error =
        StsError::new(&Failure::Unreachable("refused".to_owned()), &through, None).to_string();
    assert!(
        error.contains("through the proxy proxy.example.org:3128 (HTTPS_PROXY): refused"),
        "{error}"
    );
}

#[derive(Debug, Error)]
#[error("{0}")]
struct Link(&'static str, #[source] Option<Box<Link>>);

#[test]
fn causes_are_unique_and_without_structures() {
    let chain = |texts: &[&'static str]| {
        texts
            .iter()
            .rev()
            .fold(None, |cause, text| Some(Box::new(Link(text, cause))))
            .unwrap()
    };
    let table = [
        (
            &[
                "io error",
                "client error (Connect)",
                "invalid certificate",
                "certificate",
            ][..],
            "client error (Connect): invalid certificate",
        ),
        (&["the SDK's own words"], "the connection failed"),
        (
            &["other", "failed to apply to `Request { body: ... }`"],
            "the connection failed",
        ),
        (
            &[
                "other",
                "failed to apply to `Request { body: ... }`",
                "no such host",
            ],
            "no such host",
        ),
    ];
    for (texts, parts) in table {
        assert_eq!(causes(&*chain(texts)), parts);
    }
}
