use hyper::header::{HeaderName, HeaderValue};

use super::*;

fn headers(values: &[(&str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in values {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        headers.append(name, HeaderValue::from_str(value).unwrap());
    }
    headers
}

/// Returns the reason for which a request is rejected before its token.
fn judge(
    (method, path): (&str, &str),
    values: &[(&str, &str)],
    rule: HostRule,
) -> Result<(), &'static str> {
    let (headers, method) = (
        headers(values),
        Method::from_bytes(method.as_bytes()).unwrap(),
    );
    let head = RequestHead::without_body(&method, path, &headers);
    let parsed = MetadataPath::parse(path, None);
    validate(&head, parsed, rule).map_err(|error| error.reason())
}

#[test]
fn host_is_the_address_of_the_listener() {
    let host = |host, rule| judge(("PUT", "/latest/api/token"), &[("host", host)], rule);
    for name in [
        "169.254.169.254",
        "169.254.169.254:80",
        "[fd00:ec2::254]",
        "[fd00:ec2::254]:80",
        "fd00:ec2::254",
    ] {
        assert_eq!(host(name, HostRule::Metadata), Ok(()), "{name}");
        assert_eq!(host(name, HostRule::Loopback), Err("host"), "{name}");
    }
    for name in [
        "127.0.0.1",
        "localhost",
        "169.254.169.254:81",
        "169.254.169.253",
        "169.254.169.254.rebound.example",
        "instance-data",
        "",
    ] {
        assert_eq!(host(name, HostRule::Metadata), Err("host"), "{name}");
    }
    assert_eq!(host("127.0.0.1:974", HostRule::Loopback), Ok(()));
}

#[test]
fn deputy_is_rejected_before_its_method() {
    const HOST: (&str, &str) = ("host", "127.0.0.1");
    let token = ("POST", "/latest/api/token");
    for (header, reason) in [
        (("x-forwarded-for", "10.0.0.1"), "proxied"),
        (("via", "1.1 proxy"), "proxied"),
        (("forwarded", "for=10.0.0.1"), "proxied"),
        (("origin", "http://rebound.example"), "browser"),
        (("host", "127.0.0.1"), "host"),
    ] {
        let rejected = judge(token, &[HOST, header], HostRule::Loopback);
        assert_eq!(rejected, Err(reason), "{header:?}");
    }
    assert_eq!(judge(token, &[HOST], HostRule::Loopback), Err("method"));
}

#[test]
fn each_path_has_one_method() {
    const HOST: &[(&str, &str)] = &[("host", "127.0.0.1")];
    let role = "/latest/meta-data/iam/security-credentials/";
    for (method, path, expected) in [
        ("PUT", "/latest/api/token", Ok(())),
        ("GET", "/latest/api/token", Err("method")),
        ("GET", role, Ok(())),
        ("PUT", role, Err("method")),
        ("HEAD", role, Err("method")),
        ("OPTIONS", role, Err("method")),
        ("POST", role, Err("method")),
        ("GET", "/latest/user-data", Ok(())),
    ] {
        let judged = judge((method, path), HOST, HostRule::Loopback);
        assert_eq!(judged, expected, "{method} {path}");
    }
}

#[test]
fn two_tokens_are_none() {
    let token = |values: &[(&str, &str)]| only_header(&headers(values)).map(<[u8]>::to_vec);
    let name = TOKEN_HEADER;
    assert_eq!(token(&[(name.as_str(), "a")]), Some(b"a".to_vec()));
    assert_eq!(token(&[(name.as_str(), "a"), (name.as_str(), "a")]), None);
    assert_eq!(token(&[]), None);
}

#[test]
fn hold_is_shorter_for_the_sdk_that_waits_half_a_second() {
    for (agent, expected) in [
        (
            "aws-sdk-go-v2/1.30.1 ua/2.1 os/linux lang/go#1.23",
            SHORT_HOLD,
        ),
        (
            "APN/1.0 example/2.0 (+https://a.example) aws-sdk-go-v2/1.30",
            SHORT_HOLD,
        ),
        ("aws-sdk-go-v20/1", HOLD),
        ("x-aws-sdk-go-v2/1.30", HOLD),
        ("aws-sdk-go/1.55.8 (go1.23; linux; amd64)", HOLD),
        ("Boto3/1.44.8 md/Botocore#1.44.8", HOLD),
        ("curl/8.14.1", HOLD),
        ("", HOLD),
    ] {
        assert_eq!(
            hold(&headers(&[("user-agent", agent)])),
            expected,
            "{agent}"
        );
    }
    assert_eq!(hold(&HeaderMap::new()), HOLD);
}
