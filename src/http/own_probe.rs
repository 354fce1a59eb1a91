//! Requests by which the daemon sees whether its own listeners answer.
//!
//! They are not requests of a workload, so they are neither counted nor audited. A secret marks
//! them: a uid or a path would let workloads send requests that leave no record.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hyper::header::HeaderMap;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// A path without credentials. Any attested caller gets a 404 there, whatever the rules are.
const PATH: &str = "/probe";
const HEADER: &str = "awsvid-probe";

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

    /// Returns the request, with this value of `Authorization`.
    pub fn request(&self, authorization: &str) -> Zeroizing<String> {
        let mark = self
            .0
            .as_ref()
            .map(|secret| format!("{HEADER}: {}\r\n", secret.as_str()));
        let mark = Zeroizing::new(mark.unwrap_or_default());
        Zeroizing::new(format!(
            "GET {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {authorization}\r\n{}\r\n",
            mark.as_str()
        ))
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
    use hyper::header::HeaderValue;

    #[test]
    fn probe_is_recognized_by_the_secret_of_its_run_alone() {
        let (own, other) = (OwnProbe::new(), OwnProbe::new());
        let mut headers = HeaderMap::new();
        assert!(!own.sent(PATH, &headers));
        let secret = own.0.as_ref().unwrap().as_str();
        headers.insert(HEADER, HeaderValue::from_str(secret).unwrap());
        assert!(own.sent(PATH, &headers) && !other.sent(PATH, &headers));
        assert!(!own.sent("/v1/credentials", &headers));
        assert!(
            own.request("x")
                .contains(&format!("\r\n{HEADER}: {secret}\r\n"))
        );
        assert!(!format!("{own:?}").contains(secret));
    }
}
