//! The issuer of `dev`: an OpenID Connect discovery document and the key set, over HTTP on
//! loopback.

use std::io;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::loopback_http::{self, LoopbackResponse, Server};

/// Path of the document by OpenID Connect Discovery 1.0, section 4.
pub(super) const DISCOVERY_PATH: &str = "/.well-known/openid-configuration";
const KEYS_PATH: &str = "/keys";

/// The running issuer. It ends when this value is dropped.
#[derive(Debug)]
pub struct DevOidcIssuer {
    url: String,
    _server: Server,
}

impl DevOidcIssuer {
    /// Serves this JWK set on a port that the kernel picks.
    pub async fn start(jwks: String) -> io::Result<Self> {
        let (listener, address) = loopback_http::bind().await?;
        let url = format!("http://{address}");
        let discovery = Bytes::from(discovery(&url));
        let jwks = Bytes::from(jwks);
        let server = Server::start(listener, move |request| {
            let answer = answer(&request, &discovery, &jwks);
            async move { answer }
        });
        Ok(Self {
            url,
            _server: server,
        })
    }

    /// Returns the `iss` of its tokens: an http URL without a trailing slash.
    pub fn url(&self) -> &str {
        &self.url
    }
}

fn answer(request: &Request<Bytes>, discovery: &Bytes, jwks: &Bytes) -> LoopbackResponse {
    let document = match request.uri().path() {
        DISCOVERY_PATH => discovery,
        KEYS_PATH => jwks,
        _ => return loopback_http::empty(StatusCode::NOT_FOUND),
    };
    if request.method() != Method::GET {
        return loopback_http::empty(StatusCode::METHOD_NOT_ALLOWED);
    }
    let mut response = Response::new(Full::new(document.clone()));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Returns the fields that IAM reads of an issuer, as SPIRE's OIDC discovery provider writes them.
fn discovery(issuer: &str) -> String {
    serde_json::json!({
        "issuer": issuer,
        "jwks_uri": format!("{issuer}{KEYS_PATH}"),
        "authorization_endpoint": "",
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256"],
    })
    .to_string()
}
