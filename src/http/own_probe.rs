//! Requests by which the daemon sees whether its own listeners answer.
//!
//! They are not requests of a workload, so they are neither counted nor audited. A secret marks
//! them: a uid or a path would let workloads send requests that leave no record.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Uri};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// A path without credentials. Any attested caller gets a 404 there, whatever the rules are.
const PATH: &str = "/probe";
const HEADER: HeaderName = HeaderName::from_static("awsvid-probe");

/// The secret of this run of the daemon. Cheap to clone.
#[derive(Clone)]
pub struct OwnProbe(Option<Arc<Zeroizing<String>>>);

impl fmt::Debug for OwnProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnProbe")
    }
}

impl Default for OwnProbe {
    fn default() -> Self {
        Self::new()
    }
}

impl OwnProbe {
    /// Returns a new secret. If the kernel has no randomness, probes are counted like other
    /// requests.
    pub fn new() -> Self {
        let mut secret = Zeroizing::new([0; 16]);
        let filled = getrandom::fill(secret.as_mut_slice()).is_ok();
        Self(filled.then(|| Arc::new(Zeroizing::new(URL_SAFE_NO_PAD.encode(&secret)))))
    }

    /// Returns the request, with this value of `Authorization`. A value that is not one of a header
    /// is left out.
    pub fn request(&self, authorization: &str) -> Request<Empty<Bytes>> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = Uri::from_static(PATH);
        let secret = self.0.as_ref().map_or("", |secret| secret.as_str());
        let headers = [
            (HOST, "localhost"),
            (AUTHORIZATION, authorization),
            (HEADER, secret),
        ];
        for (name, value) in headers {
            if let Ok(mut value) = HeaderValue::from_str(value) {
                value.set_sensitive(name != HOST);
                request.headers_mut().insert(name, value);
            }
        }
        request
    }

    /// Returns whether this daemon sent the request with this path and these headers.
    pub(super) fn sent(&self, path: &str, headers: &HeaderMap) -> bool {
        let (Some(secret), PATH, Some(value)) = (&self.0, path, headers.get(HEADER)) else {
            return false;
        };
        secret.as_bytes().ct_eq(value.as_bytes()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_is_recognized_by_the_secret_of_its_run_alone() {
        let (own, other) = (OwnProbe::new(), OwnProbe::new());
        let mut headers = HeaderMap::new();
        assert!(!own.sent(PATH, &headers));
        let secret = own.0.as_ref().unwrap().as_str();
        headers.insert(HEADER, HeaderValue::from_str(secret).unwrap());
        assert!(own.sent(PATH, &headers) && !other.sent(PATH, &headers));
        assert!(!own.sent("/v1/credentials", &headers));
        let request = own.request("x");
        assert!(own.sent(request.uri().path(), request.headers()));
        assert_eq!(request.headers()[AUTHORIZATION], "x");
        assert!(!format!("{own:?} {request:?}").contains(secret));
    }
}
