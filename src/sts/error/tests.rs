use super::*;
use crate::svid::jwt::tests::{billing, svid_for};

fn rejected(code: Option<&str>, status: u16, message: &str) -> Failure {
    Failure::Rejected {
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
            StsReason::ExpiredToken,
        ),
        (
            Some("ExpiredToken"),
            400,
            "",
            NewToken,
            StsReason::ExpiredToken,
        ),
        (
            Some("InvalidIdentityToken"),
            400,
            keys,
            Later,
            StsReason::IssuerUnreachable,
        ),
        (
            Some("InvalidIdentityToken"),
            400,
            "No OpenIDConnect provider found",
            NewToken,
            StsReason::InvalidToken,
        ),
        (
            Some("InvalidIdentityToken"),
            400,
            "",
            NewToken,
            StsReason::InvalidToken,
        ),
        (
            Some("IDPCommunicationError"),
            400,
            "",
            Later,
            StsReason::IssuerUnreachable,
        ),
        (
            Some("IDPCommunicationErrorException"),
            400,
            "",
            Later,
            StsReason::IssuerUnreachable,
        ),
        (
            Some("IDPRejectedClaim"),
            403,
            "",
            NewToken,
            StsReason::InvalidToken,
        ),
        (
            Some("AccessDenied"),
            403,
            "Not authorized",
            Never,
            StsReason::AccessDenied,
        ),
        (
            Some("AccessDeniedException"),
            403,
            "",
            Never,
            StsReason::AccessDenied,
        ),
        (
            Some("RegionDisabledException"),
            403,
            "",
            Never,
            StsReason::RegionDisabled,
        ),
        (
            Some("MalformedPolicyDocument"),
            400,
            "",
            Never,
            StsReason::BadPolicy,
        ),
        (
            Some("PackedPolicyTooLarge"),
            400,
            "",
            Never,
            StsReason::BadPolicy,
        ),
        (
            Some("ValidationError"),
            400,
            "",
            Never,
            StsReason::BadRequest,
        ),
        (
            Some("InvalidParameterValue"),
            400,
            "",
            Never,
            StsReason::BadRequest,
        ),
        (
            Some("Throttling"),
            400,
            "Rate exceeded",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("ThrottlingException"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("RequestLimitExceeded"),
            503,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("TooManyRequestsException"),
            429,
            "",
            Later,
            StsReason::Throttled,
        ),
        (Some("SlowDown"), 503, "", Later, StsReason::Throttled),
        (
            Some("BandwidthLimitExceeded"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("EC2ThrottledException"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("LimitExceededException"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("PriorRequestNotComplete"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("ProvisionedThroughputExceededException"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("RequestThrottled"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("RequestThrottledException"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("ThrottledException"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("TransactionInProgressException"),
            400,
            "",
            Later,
            StsReason::Throttled,
        ),
        (
            Some("RequestTimeout"),
            400,
            "",
            Later,
            StsReason::Unavailable,
        ),
        (
            Some("InternalFailure"),
            500,
            "",
            Later,
            StsReason::Unavailable,
        ),
        (
            Some("ServiceUnavailable"),
            503,
            "",
            Later,
            StsReason::Unavailable,
        ),
        (
            Some("UpstreamError"),
            500,
            "",
            Later,
            StsReason::Unavailable,
        ),
        // Codes of Ceph, RustFS, and S3 services that do not offer STS.
        (Some("NoSuchEntity"), 404, "", Never, StsReason::BadRequest),
        (
            Some("InvalidArgument"),
            400,
            "no policies are available for this OIDC token",
            Never,
            StsReason::BadRequest,
        ),
        (
            Some("InvalidRequest"),
            400,
            "",
            Never,
            StsReason::BadRequest,
        ),
        (
            Some("InvalidToken"),
            400,
            "",
            NewToken,
            StsReason::InvalidToken,
        ),
        (
            Some("MethodNotAllowed"),
            405,
            "",
            Never,
            StsReason::Misconfigured,
        ),
        (
            Some("NotImplemented"),
            501,
            "",
            Never,
            StsReason::Misconfigured,
        ),
        (
            Some("MissingAuthenticationTokenException"),
            403,
            "",
            Never,
            StsReason::Misconfigured,
        ),
        (Some("SlowDownWrite"), 503, "", Later, StsReason::Throttled),
        (Some("NeverHeardOf"), 400, "", Never, StsReason::Refused),
        (Some("NeverHeardOf"), 429, "", Later, StsReason::Throttled),
        (Some("NeverHeardOf"), 502, "", Later, StsReason::Unavailable),
        (None, 301, "", Never, StsReason::Refused),
        (None, 403, "", Never, StsReason::Refused),
        (None, 404, "", Never, StsReason::Refused),
        (None, 405, "", Never, StsReason::Misconfigured),
        (None, 408, "", Later, StsReason::Unavailable),
        (None, 429, "", Later, StsReason::Throttled),
        (None, 500, "", Later, StsReason::Unavailable),
        (None, 501, "", Never, StsReason::Misconfigured),
        (None, 502, "", Later, StsReason::Unavailable),
        (None, 503, "", Later, StsReason::Unavailable),
        (None, 504, "", Later, StsReason::Unavailable),
    ];
    for (code, status, message, retry, reason) in table {
        assert_eq!(
            rejected(code, status, message).classify(),
            (retry, reason),
            "{code:?} {status} {message}"
        );
    }
    let others = [
        (
            Failure::InvalidResponse(String::new()),
            Later,
            StsReason::BadAnswer,
        ),
        (
            Failure::Unreachable(String::new()),
            Later,
            StsReason::Unreachable,
        ),
        (
            Failure::InvalidRequest(String::new()),
            Never,
            StsReason::Misconfigured,
        ),
        (Failure::Untrusted(String::new()), Later, StsReason::NoCa),
        (Failure::Busy, Later, StsReason::Busy),
    ];
    for (failure, retry, reason) in others {
        assert_eq!(failure.classify(), (retry, reason));
    }
}

#[test]
fn error_text_does_not_quote_the_token() {
    let svid = svid_for(&billing(), 300, 1);
    let token = svid.secret();
    let clean = |text: &str| without_secrets(text, &[svid.secret()]);
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
        rejected(Some("AccessDenied"), 403, ""),
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
        StsError::new(&Failure::Unreachable("no route".to_owned()), &through, None).to_string();
    assert!(
        error.contains("through the proxy proxy.example.org:3128 (HTTPS_PROXY): no route"),
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
