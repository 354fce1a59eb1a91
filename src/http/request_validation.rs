//! Validation of a request: its method, its path, and the headers that keep out browsers, proxies
//! and other deputies.
//!
//! hyper and httparse reject malformed HTTP/1.1 before this: spaces before a colon, folded lines,
//! control characters, two lengths that differ, a coding other than chunked.
//! [`GuardedStream`](super::guarded_stream::GuardedStream) rejects line feeds alone. The standard
//! allows to ignore these: `Upgrade` (one Java client offers HTTP/2 with every request), `Expect`
//! without a body, unknown headers, bytes above 127 in their values, everything after the first
//! request.
//! HTTP/1.0 with a `Host` is answered as such, because small clients and probes use it.

use std::net::IpAddr;

use hyper::body::Body;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderValue, TRANSFER_ENCODING};
use hyper::{Method, Request};
use percent_encoding::percent_decode_str;
use subtle::ConstantTimeEq;

use crate::caller::ListenerKind;
use crate::http::error_response::RequestError;
use crate::identity::RoleArn;
use crate::listen::is_metadata_ip;
use crate::role::RequestedRole;

/// `[listen] authorization`: the header that a caller over TCP has to send. It proves that the
/// caller can set headers. A deputy that only fetches URLs for others cannot (T4).
#[derive(Clone)]
pub enum Authorization {
    /// Any value is right.
    Present,
    /// This value is right, with or without `Bearer `.
    Token(zeroize::Zeroizing<String>),
    /// The header is not required.
    Off,
}

impl std::fmt::Debug for Authorization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Present => "Present",
            Self::Token(_) => "Token",
            Self::Off => "Off",
        })
    }
}

/// The parts of a request's head that are validated.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug)]
pub struct RequestHead<'a> {
    pub method: &'a Method,
    /// The target is more than a path: `http://host/path`, as clients of a proxy send it, or
    /// `host:port`.
    pub has_authority: bool,
    /// The path, percent-encoded as it came.
    pub path: &'a str,
    /// The query, if there was a `?`.
    pub query: Option<&'a str>,
    pub headers: &'a HeaderMap,
    /// A body follows the head.
    pub has_body: bool,
}

impl<'a> RequestHead<'a> {
    /// Returns the parts of a request.
    pub fn of<B: Body>(request: &'a Request<B>) -> Self {
        let uri = request.uri();
        Self {
            method: request.method(),
            has_authority: uri.authority().is_some() || uri.scheme().is_some(),
            path: uri.path(),
            query: uri.query(),
            headers: request.headers(),
            has_body: has_body(request),
        }
    }
}

/// Returns whether a body follows the head, or may. A length of 0 is none; a transfer coding always
/// counts.
pub(super) fn has_body<B: Body>(request: &Request<B>) -> bool {
    !request.body().is_end_stream() || request.headers().contains_key(TRANSFER_ENCODING)
}

const CREDENTIALS_PATH: &str = "/v1/credentials";
/// Headers that a client sends only for a page in a browser (Fetch, section 3.2; RFC 9110, section
/// 10.1.3).
const BROWSER_HEADERS: [&str; 3] = ["origin", "referer", "sec-fetch-user"];
/// Headers of Fetch Metadata, with the values that clients without a page send too. undici's
/// `fetch` sends the mode alone, Electron's `net` all three. A request for a page has another site
/// than `none`; a typed address has another mode and destination than these.
const FETCH_METADATA: [(&str, &[&str]); 3] = [
    ("sec-fetch-site", &["none"]),
    ("sec-fetch-mode", &["cors", "no-cors", "same-origin"]),
    ("sec-fetch-dest", &["empty"]),
];
/// Headers that proxies set. The attested process is then the proxy, not the client. A forward
/// proxy may set `Via` alone (tinyproxy 1.11 does).
const PROXY_HEADERS: [&str; 3] = ["forwarded", "via", "x-real-ip"];
const PROXY_PREFIX: &str = "x-forwarded-";
/// The longest name of a role in bytes, as in the configuration.
const MAX_ROLE_NAME_BYTES: usize = 64;

/// The names by which a caller may address a listener. An attacker can point any other name at it
/// (DNS rebinding).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HostRule {
    /// `localhost` and loopback addresses, with or without a port.
    Loopback,
    /// The addresses of the instance metadata service, with or without port 80.
    Metadata,
}

impl HostRule {
    /// Returns whether there is one `Host`, and it is right.
    fn accepts(self, headers: &HeaderMap) -> bool {
        let mut hosts = headers.get_all(HOST).iter();
        let (Some(host), None) = (hosts.next(), hosts.next()) else {
            return false;
        };
        let Ok(host) = host.to_str() else {
            return false;
        };
        let is_port = |port: &str| match self {
            Self::Loopback => !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit()),
            Self::Metadata => port == "80",
        };
        // AWS's SDKs in C write `::1` without brackets, which has no port.
        self.accepts_name(host)
            || host
                .rsplit_once(':')
                .is_some_and(|(name, port)| is_port(port) && self.accepts_name(name))
    }

    fn accepts_name(self, name: &str) -> bool {
        let bare = name
            .strip_prefix('[')
            .and_then(|name| name.strip_suffix(']'))
            .unwrap_or(name);
        let ip = bare.parse::<IpAddr>();
        match self {
            Self::Loopback => {
                let loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
                bare.eq_ignore_ascii_case("localhost") || ip.is_ok_and(loopback)
            }
            Self::Metadata => ip.is_ok_and(is_metadata_ip),
        }
    }
}

/// Rejects what deputies send: a browser, a proxy, and a caller that was led here by a name.
pub(super) fn check_deputies(
    head: &RequestHead<'_>,
    host_rule: HostRule,
) -> Result<(), RequestError> {
    if !host_rule.accepts(head.headers) {
        return Err(RequestError::Host);
    }
    let (mut browser, mut proxy) = (false, false);
    for (name, value) in head.headers {
        browser |= is_browser_header(name.as_str(), value);
        proxy |= PROXY_HEADERS.contains(&name.as_str()) || name.as_str().starts_with(PROXY_PREFIX);
    }
    if browser {
        return Err(RequestError::Browser);
    }
    // RFC 9112 wants origin servers to accept such a target too. But an SDK sends one only if it is
    // configured to use this address as a proxy, and then the target is another server's.
    if head.has_authority && head.method != Method::CONNECT {
        return Err(RequestError::Proxied);
    }
    if proxy {
        return Err(RequestError::Proxied);
    }
    Ok(())
}

/// Validates a request, and returns the role that it requests.
pub(super) fn validate(
    head: &RequestHead<'_>,
    listener: ListenerKind,
    authorization: &Authorization,
) -> Result<RequestedRole, RequestError> {
    check_deputies(head, HostRule::Loopback)?;
    if head.method != Method::GET {
        return Err(RequestError::Method);
    }
    // No SDK sends a body. Its content, even if it is a second request, is never read.
    if head.has_body {
        return Err(RequestError::Body);
    }
    if listener != ListenerKind::Unix && !authorized(head.headers, authorization) {
        return Err(match authorization {
            Authorization::Token(_) => RequestError::WrongToken,
            Authorization::Present | Authorization::Off => RequestError::NoAuthorization,
        });
    }
    requested_role(head.path, head.query)
}

/// Returns whether only a browser sends this header with this value.
fn is_browser_header(name: &str, value: &HeaderValue) -> bool {
    let others = FETCH_METADATA
        .iter()
        .find(|(metadata, _)| *metadata == name);
    BROWSER_HEADERS.contains(&name)
        || others.is_some_and(|(_, others)| !others.iter().any(|other| value == other))
}

fn authorized(headers: &HeaderMap, authorization: &Authorization) -> bool {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (header, only_one) = (values.next(), values.next().is_none());
    match authorization {
        Authorization::Off => true,
        Authorization::Present => only_one && header.is_some_and(|header| !header.is_empty()),
        Authorization::Token(token) => header.is_some_and(|header| {
            let header = header
                .as_bytes()
                .strip_prefix(b"Bearer ")
                .unwrap_or(header.as_bytes());
            only_one && bool::from(header.ct_eq(token.as_bytes()))
        }),
    }
}

/// Parses `/v1/credentials`, `/v1/credentials/<name>` or `/v1/credentials/<ARN>`, decoded once. A
/// trailing `/` is ignored.
fn requested_role(path: &str, query: Option<&str>) -> Result<RequestedRole, RequestError> {
    let rest = path
        .strip_prefix(CREDENTIALS_PATH)
        .ok_or(RequestError::Path)?;
    // An empty query is right: some clients write the `?` also without a parameter.
    if query.is_some_and(|query| !query.is_empty()) {
        return Err(RequestError::Path);
    }
    let name = match rest {
        "" | "/" => return Ok(RequestedRole::Default),
        rest => rest.strip_prefix('/').ok_or(RequestError::Path)?,
    };
    let name = percent_decode_str(name)
        .decode_utf8()
        .map_err(|_| RequestError::Path)?;
    if name.starts_with("arn:") {
        return RoleArn::parse(&name)
            .map(RequestedRole::ByArn)
            .map_err(|_| RequestError::BadArn);
    }
    // No role's name has other bytes: no NUL, no `%` of a path that was encoded twice.
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    if name.len() > MAX_ROLE_NAME_BYTES
        || !name.bytes().all(allowed)
        || matches!(&*name, "." | "..")
    {
        return Err(RequestError::Path);
    }
    Ok(RequestedRole::ByName(name.into_owned()))
}

#[cfg(test)]
mod tests;
