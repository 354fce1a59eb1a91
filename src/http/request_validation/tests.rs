use super::*;
use hyper::header::{HeaderName, HeaderValue};

impl<'a> RequestHead<'a> {
    /// Returns the parts of a request to a path, which may have a query.
    pub(in crate::http) fn without_body(
        method: &'a Method,
        path: &'a str,
        headers: &'a HeaderMap,
    ) -> Self {
        let (path, query) = path
            .split_once('?')
            .map_or((path, None), |(path, query)| (path, Some(query)));
        Self {
            method,
            has_authority: false,
            path,
            query,
            headers,
            has_body: false,
        }
    }
}

/// A request as SDKs send it, with changes: `("Name", "value")` sets, an empty value removes.
fn request(changes: &[(&str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("host", "127.0.0.1:974"),
        ("authorization", "any"),
        ("accept", "*/*"),
    ]
    .iter()
    .chain(changes)
    {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        if value.is_empty() {
            headers.remove(&name);
        } else {
            headers.insert(name, HeaderValue::from_str(value).unwrap());
        }
    }
    headers
}

fn judge(
    path: &str,
    headers: &HeaderMap,
    listener: ListenerKind,
    authorization: &Authorization,
) -> Result<RequestedRole, &'static str> {
    let request_head = RequestHead::without_body(&Method::GET, path, headers);
    validate(&request_head, listener, authorization).map_err(|rejected| rejected.reason())
}

fn over_tcp(path: &str, changes: &[(&str, &str)]) -> Result<RequestedRole, &'static str> {
    judge(
        path,
        &request(changes),
        ListenerKind::Tcp,
        &Authorization::Present,
    )
}

#[test]
fn loopback_host_is_accepted() {
    for host in [
        "127.0.0.1",
        "127.0.0.1:974",
        "127.8.9.1:1",
        "localhost",
        "LocalHost:974",
        "[::1]",
        "::1",
        "[::1]:974",
        "[::ffff:127.0.0.1]:974",
    ] {
        assert_eq!(
            over_tcp("/v1/credentials", &[("host", host)]),
            Ok(RequestedRole::Default),
            "{host}"
        );
    }
}

#[test]
fn other_host_is_rejected() {
    let hosts = [
        "",
        "evil.example",
        "evil.example:974",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "169.254.169.254",
        "127.0.0.1:974:974",
        "127.0.0.1:",
        "127.0.0.1:x",
        "localhost@evil.example",
        "[::1",
        "0.0.0.0",
        "[fe80::1]",
        "localhost, evil.example",
    ];
    for host in hosts {
        assert_eq!(
            over_tcp("/v1/credentials", &[("host", host)]),
            Err("host"),
            "{host}"
        );
    }
    let mut twice = request(&[]);
    twice.append(HOST, HeaderValue::from_static("127.0.0.1"));
    assert_eq!(
        judge(
            "/v1/credentials",
            &twice,
            ListenerKind::Tcp,
            &Authorization::Present
        ),
        Err("host")
    );
    // On the unix socket too: a deputy may speak over it as well.
    assert_eq!(
        judge(
            "/v1/credentials",
            &request(&[("host", "evil.example")]),
            ListenerKind::Unix,
            &Authorization::Off
        ),
        Err("host")
    );
}

#[test]
fn deputy_is_rejected() {
    for (name, value) in [
        ("Origin", "http://127.0.0.1:974"),
        ("Origin", "null"),
        ("Referer", "http://127.0.0.1:974/"),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "same-site"),
        ("Sec-Fetch-Site", "same-origin"),
        ("Sec-Fetch-Site", "none, none"),
        ("Sec-Fetch-Mode", "navigate"),
        ("Sec-Fetch-Mode", "websocket"),
        ("Sec-Fetch-Dest", "document"),
        ("Sec-Fetch-Dest", "script"),
        ("Sec-Fetch-User", "?1"),
    ] {
        assert_eq!(
            over_tcp("/v1/credentials", &[(name, value)]),
            Err("browser"),
            "{name}: {value}"
        );
    }
    for name in [
        "Forwarded",
        "Via",
        "X-Real-IP",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Anything",
    ] {
        assert_eq!(
            over_tcp("/v1/credentials", &[(name, "x")]),
            Err("proxied"),
            "{name}"
        );
    }
    // One value of a page among others.
    let mut several = request(&[("Sec-Fetch-Site", "none")]);
    several.append("sec-fetch-site", HeaderValue::from_static("cross-site"));
    assert_eq!(
        judge(
            "/v1/credentials",
            &several,
            ListenerKind::Tcp,
            &Authorization::Present
        ),
        Err("browser")
    );
}

/// A head of heads.txt.
struct Head {
    name: &'static str,
    outcome: &'static str,
    method: Method,
    path: &'static str,
    headers: HeaderMap,
}

fn heads() -> Vec<Head> {
    let mut heads: Vec<Head> = Vec::new();
    for line in include_str!("tests/heads.txt")
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if let Some((name, outcome)) = line
            .strip_prefix("= ")
            .and_then(|line| line.split_once(" = "))
        {
            heads.push(Head {
                name,
                outcome,
                method: Method::GET,
                path: "",
                headers: HeaderMap::new(),
            });
            continue;
        }
        let head = heads.last_mut().unwrap();
        match line.split_once(": ") {
            Some((name, value)) => {
                let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
                head.headers.append(name, HeaderValue::from_static(value));
            }
            None => {
                let mut words = line.split(' ');
                head.method = words.next().unwrap().parse().unwrap();
                head.path = words.next().unwrap();
            }
        }
    }
    heads
}

/// Captured requests: those of programs are answered, those that a page makes a browser send are
/// rejected.
#[test]
fn client_is_accepted_and_page_is_rejected() {
    let judge = |head: &Head, headers: &HeaderMap, authorization: &Authorization| {
        let request_head = RequestHead::without_body(&head.method, head.path, headers);
        match validate(&request_head, ListenerKind::Tcp, authorization) {
            Ok(RequestedRole::Default) => "first",
            Ok(_) => "other",
            Err(rejected) => rejected.reason(),
        }
    };
    let (mut answered, mut rejected) = (0, 0);
    for head in heads() {
        if head.outcome == "first" {
            assert_eq!(
                judge(&head, &head.headers, &Authorization::Present),
                "first",
                "{}",
                head.name
            );
            answered += 1;
            continue;
        }
        // The endpoint may require no Authorization, and a page can leave out the Referer.
        let mut bare = head.headers.clone();
        bare.remove("referer");
        for headers in [&head.headers, &bare] {
            assert_eq!(
                judge(&head, headers, &Authorization::Off),
                head.outcome,
                "{}",
                head.name
            );
        }
        rejected += 1;
    }
    assert!(
        answered >= 26 && rejected >= 30,
        "{answered} and {rejected}"
    );
}

#[test]
fn other_method_than_get_is_rejected() {
    let headers = request(&[]);
    for method in [
        Method::POST,
        Method::PUT,
        Method::HEAD,
        Method::OPTIONS,
        Method::CONNECT,
        Method::DELETE,
    ] {
        let request_head = RequestHead::without_body(&method, "/v1/credentials", &headers);
        assert_eq!(
            validate(&request_head, ListenerKind::Tcp, &Authorization::Present)
                .unwrap_err()
                .reason(),
            "method",
            "{method}"
        );
    }
}

#[test]
fn target_with_server_or_body_is_rejected() {
    let cases = [
        ("/v1/credentials", 0, Ok(RequestedRole::Default)),
        ("/v1/credentials?", 0, Ok(RequestedRole::Default)),
        // No target has a fragment (RFC 9112, section 3.2). The reader of targets leaves out what a
        // client sends.
        ("/v1/credentials#", 0, Ok(RequestedRole::Default)),
        ("/v1/credentials#role", 0, Ok(RequestedRole::Default)),
        ("/v1/credentials?#role", 0, Ok(RequestedRole::Default)),
        ("/v1/credentials#?role=x", 0, Ok(RequestedRole::Default)),
        (
            "/v1/credentials/#/../billing",
            0,
            Ok(RequestedRole::Default),
        ),
        ("/v1/credentials??", 0, Err("path")),
        ("/v1/credentials?#", 0, Ok(RequestedRole::Default)),
        ("http://127.0.0.1/v1/credentials", 0, Err("proxied")),
        ("http://127.0.0.1/v1/credentials?", 0, Err("proxied")),
        ("127.0.0.1:974", 0, Err("proxied")),
        ("*", 0, Err("path")),
        ("/v1/credentials", 1, Err("body")),
    ];
    for (target, length, expected) in cases {
        let body = http_body_util::Full::new(bytes::Bytes::from(vec![0; length]));
        let mut request = Request::builder().uri(target).body(body).unwrap();
        *request.headers_mut() = self::request(&[]);
        let judge = |request: &Request<_>| {
            validate(
                &RequestHead::of(request),
                ListenerKind::Tcp,
                &Authorization::Present,
            )
            .map_err(|rejected| rejected.reason())
        };
        assert_eq!(judge(&request), expected, "{target} {length}");
        request
            .headers_mut()
            .insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        let expected = if expected == Err("proxied") {
            expected
        } else {
            Err("body")
        };
        assert_eq!(judge(&request), expected, "{target} {length}, chunked");
    }
}

#[test]
fn authorization_is_required_over_tcp() {
    let token = Authorization::Token(zeroize::Zeroizing::new("s3cret".to_owned()));
    let cases = [
        (
            Authorization::Present,
            "anything",
            Ok(RequestedRole::Default),
        ),
        (Authorization::Present, "", Err("no_authorization")),
        (Authorization::Off, "", Ok(RequestedRole::Default)),
        (token.clone(), "s3cret", Ok(RequestedRole::Default)),
        (token.clone(), "Bearer s3cret", Ok(RequestedRole::Default)),
        (token.clone(), "s3cre", Err("wrong_token")),
        (token.clone(), "s3cret2", Err("wrong_token")),
        (token.clone(), "bearer s3cret", Err("wrong_token")),
        (token.clone(), "", Err("wrong_token")),
    ];
    for (authorization, value, expected) in cases {
        let headers = request(&[("authorization", value)]);
        assert_eq!(
            judge(
                "/v1/credentials",
                &headers,
                ListenerKind::Tcp,
                &authorization
            ),
            expected,
            "{authorization:?} {value:?}"
        );
        assert_eq!(
            judge(
                "/v1/credentials",
                &headers,
                ListenerKind::Unix,
                &authorization
            ),
            Ok(RequestedRole::Default)
        );
    }
    let mut twice = request(&[("authorization", "s3cret")]);
    twice.append(AUTHORIZATION, HeaderValue::from_static("other"));
    assert_eq!(
        judge("/v1/credentials", &twice, ListenerKind::Tcp, &token),
        Err("wrong_token")
    );
    let present = Authorization::Present;
    assert_eq!(
        judge("/v1/credentials", &twice, ListenerKind::Tcp, &present),
        Err("no_authorization")
    );
    assert!(!format!("{token:?}").contains("s3cret"));
}

#[test]
fn path_selects_role_or_is_rejected() {
    let arn = "arn:aws:iam::123456789012:role/app-1";
    let named = |name: &str| Ok(RequestedRole::ByName(name.to_owned()));
    let cases = [
        ("/v1/credentials", Ok(RequestedRole::Default)),
        ("/v1/credentials/", Ok(RequestedRole::Default)),
        ("/v1/credentials/billing", named("billing")),
        ("/v1/credentials/b%69lling", named("billing")),
        // Decoded once.
        ("/v1/credentials/b%2569lling", Err("path")),
        ("/v1/credentials/a%20b", Err("path")),
        ("/v1/credentials/a%00", Err("path")),
        ("/v1/credentials/..", Err("path")),
        ("/v1/credentials/%2e%2e", Err("path")),
        ("/v1/credentials/%2e%2e%2fbilling", Err("path")),
        ("/v1/credentials/../credentials", Err("path")),
        ("/v1/../v1/credentials", Err("path")),
        ("/v1/credentials//", Err("path")),
        ("//v1/credentials", Err("path")),
        ("/%76%31/credentials", Err("path")),
        (
            "/v1/credentials/arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fapp-1",
            Ok(RequestedRole::ByArn(RoleArn::parse(arn).unwrap())),
        ),
        (
            "/v1/credentials/arn:aws:iam::123456789012:role/app-1",
            Ok(RequestedRole::ByArn(RoleArn::parse(arn).unwrap())),
        ),
        ("/v1/credentials/arn:aws:iam::12:role/app-1", Err("bad_arn")),
        ("/v1/credentials/%ff", Err("path")),
        ("/v1/credentialsx", Err("path")),
        ("/v1/credentials?role=x", Err("path")),
        ("/v1/credentials?", Ok(RequestedRole::Default)),
        ("/v1/credentials/?", Ok(RequestedRole::Default)),
        ("/v1/credentials/billing?", named("billing")),
        ("/v1/credentials/billing?role=x", Err("path")),
        ("/v1/credentials??", Err("path")),
        ("/v1/credentials?&", Err("path")),
        ("/v1/credentials?=", Err("path")),
        ("/v1/credentials?%20", Err("path")),
        ("/v1/credentials%3F", Err("path")),
        ("/v1/credentials%23", Err("path")),
        ("/v1/credentials/billing%3F", Err("path")),
        ("/v1/credentials/billing/", Err("path")),
        ("/v1/credentials//billing", Err("path")),
        ("/v1/credentials/%2Fbilling", Err("path")),
        ("/v1/credentials;a=b", Err("path")),
        ("/v2/credentials", Err("path")),
        ("/", Err("path")),
        ("/latest/meta-data/", Err("path")),
    ];
    for (path, expected) in cases {
        assert_eq!(over_tcp(path, &[]), expected, "{path}");
    }
}
