//! For the fuzz target: the rules for requests, with one read from any bytes.

use hyper::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Uri};

use super::request_validation::{Authorization, RequestHead, validate};
use crate::caller::ListenerKind;
use crate::role::RequestedRole;

/// Returns whether a request with `METHOD TARGET` in the first line and headers in the others is
/// accepted. Asserts that an accepted one is harmless by itself.
pub(crate) fn request(bytes: &[u8]) -> bool {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let Some((method, target)) = lines.next().and_then(|line| split(line, b' ')) else {
        return false;
    };
    let (Ok(method), Ok(uri)) = (Method::from_bytes(method), Uri::try_from(target)) else {
        return false;
    };
    let mut headers = HeaderMap::new();
    for (name, value) in lines.filter_map(|line| split(line, b':')) {
        if let (Ok(name), Ok(value)) = (
            HeaderName::from_bytes(name),
            HeaderValue::from_bytes(value.trim_ascii()),
        ) {
            headers.append(name, value);
        }
    }
    let head = RequestHead {
        method: &method,
        has_authority: uri.authority().is_some() || uri.scheme().is_some(),
        path: uri.path(),
        query: uri.query(),
        headers: &headers,
        has_body: false,
    };
    let [tcp, unix] = [ListenerKind::Tcp, ListenerKind::Unix]
        .map(|listener| validate(&head, listener, &Authorization::Present).ok());
    assert!(
        tcp.is_none() || tcp == unix,
        "the unix socket requires less, never something else"
    );
    let Some(requested) = unix else { return false };
    assert_eq!(method, Method::GET);
    let no_query = uri.query().is_none_or(str::is_empty);
    assert!(!head.has_authority && uri.path().starts_with("/v1/credentials") && no_query);
    assert_eq!(headers.get_all(HOST).iter().count(), 1);
    for (name, value) in &headers {
        let name = name.as_str();
        assert!(
            !name.starts_with("x-forwarded-") && !matches!(name, "via" | "origin" | "referer"),
            "{name}"
        );
        // What a page makes a browser send.
        let site = value.as_bytes().ends_with(b"-site") || value.as_bytes() == b"same-origin";
        assert!(!(name == "sec-fetch-site" && site), "{value:?}");
    }
    match requested {
        RequestedRole::Default => {
            assert!(matches!(uri.path(), "/v1/credentials" | "/v1/credentials/"))
        }
        RequestedRole::ByName(name) => {
            assert!(
                (1..=64).contains(&name.len()) && !matches!(&*name, "." | ".."),
                "{name:?}"
            );
            assert!(
                name.bytes()
                    .all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c)),
                "{name:?}"
            );
        }
        RequestedRole::ByArn(arn) => {
            assert!(arn.as_str().bytes().all(|c| c.is_ascii_graphic()), "{arn}")
        }
    }
    true
}

fn split(line: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let separator = line.iter().position(|byte| *byte == at)?;
    Some((&line[..separator], &line[separator + 1..]))
}
