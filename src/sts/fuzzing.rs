//! The fuzz targets for responses of an STS and for the settings of proxies, with arbitrary bytes.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::http::StatusCode;
use aws_smithy_types::body::SdkBody;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hyper::Uri;

use super::advice::StsDestination;
use super::error::FailedCall;
use super::error::{Failure, StsError};
use super::network::NetworkSettings;
use super::{error_response, no_proxy};
use crate::identity::{ArnTemplate, AttestedFacts, SpiffeId};
use crate::role::{Grant, Identity, RequestedRole, Role, Roles};
use crate::svid::JwtSvid;

/// Length of the shortest part of a token that no error contains, in bytes.
const TOKEN_PART: usize = 32;
/// Maximum length of an error, in characters.
const MAX_ERROR: usize = 4096;
const AUDIENCE: &str = "sts.amazonaws.com";

/// Returns a grant and its token.
fn call() -> Option<(Grant, JwtSvid)> {
    let id = SpiffeId::parse("spiffe://example.org/billing").ok()?;
    let parts = [
        r#"{"alg":"ES256"}"#,
        r#"{"iss":"https://oidc.example.org","sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":300}"#,
        "a signature that only STS would verify, and that has as many bytes as one",
    ];
    let token = parts.map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
    let token = JwtSvid::check(token, &id, AUDIENCE, UNIX_EPOCH).ok()?;
    let role = Role {
        name: "billing".to_owned(),
        role_arn: ArnTemplate::parse("arn:aws:iam::123456789012:role/billing").ok()?,
        ..Role::example()
    };
    let roles = Roles {
        defined: vec![Arc::new(role)],
        requested: None,
    };
    let identity = Identity {
        spiffe_id: id,
        hint: None,
    };
    let grant = roles
        .select(
            &[identity],
            &AttestedFacts::default(),
            &RequestedRole::Default,
        )
        .ok()?;
    Some((grant, token))
}

/// Splits the first line off.
fn first_line(bytes: &[u8]) -> (String, &[u8]) {
    let end = bytes.iter().position(|byte| *byte == b'\n');
    let (first, rest) = end.map_or((bytes, &[][..]), |end| (&bytes[..end], &bytes[end + 1..]));
    (String::from_utf8_lossy(first).into_owned(), rest)
}

/// Checks a rejection, with the status and `x-amzn-errortype` on the first line and then the body.
/// `TOKEN` in the body stands for the token of the call. The error is one short line, and contains
/// no part of the token.
pub(crate) fn sts_error(bytes: &[u8]) -> bool {
    let Some((grant, token)) = call() else {
        return false;
    };
    let (first, body) = first_line(bytes);
    let (status, header) = first.split_once(' ').unwrap_or((&first, ""));
    let Some(status) = status
        .parse()
        .ok()
        .and_then(|status: u16| StatusCode::try_from(status).ok())
    else {
        return false;
    };
    let body = String::from_utf8_lossy(body).replace("TOKEN", token.secret());
    let mut response = HttpResponse::new(status, SdkBody::from(body));
    if !header.is_empty() {
        // An invalid header never arrives.
        let _ = response
            .headers_mut()
            .try_insert("x-amzn-errortype", header.to_owned());
    }
    let rejection = error_response::read(&response);
    if let Some(rejection) = &rejection {
        let code = rejection.code.as_deref().unwrap_or_default();
        assert!(
            (1..=128).contains(&code.len()) && code.bytes().all(|c| c.is_ascii_graphic()),
            "{code:?}"
        );
    }
    let is_parsed = rejection.is_some();
    let rejection = rejection.unwrap_or_default();
    let failure = Failure::Rejected {
        code: rejection.code,
        status: status.as_u16(),
        message: rejection.message,
    };
    for is_aws in [true, false] {
        let at = StsDestination {
            name: "STS at https://sts".to_owned(),
            is_aws,
            proxy: None,
        };
        let error =
            StsError::new(&failure, &at, Some(FailedCall::with_token(&grant, &token))).to_string();
        assert!(!error.contains(char::is_control), "{error:?}");
        assert!(error.chars().count() <= MAX_ERROR, "{error}");
        let secret = token.secret().as_bytes().windows(TOKEN_PART);
        for part in secret.filter_map(|part| std::str::from_utf8(part).ok()) {
            assert!(!error.contains(part), "{part} of the token in {error}");
        }
    }
    is_parsed
}

/// Checks the URL of a proxy, `NO_PROXY` and the URL of a call, each on a line: an error does not
/// quote the proxy's URL, the SDK accepts what this parser accepts, and more entries of `NO_PROXY`
/// exempt no fewer hosts.
pub(crate) fn proxy(text: &str) -> bool {
    let mut lines = text.splitn(3, '\n');
    let [proxy, exempt, target] = [(); 3].map(|()| lines.next().unwrap_or_default());
    let Ok(target) = target.trim().parse::<Uri>() else {
        return false;
    };
    let settings = |exempt: &str| {
        NetworkSettings::from_env(|name| match name {
            "HTTPS_PROXY" | "HTTP_PROXY" => Some(proxy.to_owned()),
            "NO_PROXY" => Some(exempt.to_owned()),
            _ => None,
        })
    };
    let host = target.host().unwrap_or_default();
    if no_proxy::names(exempt, host, 443) {
        let more = format!("{exempt},other.example.net");
        assert!(no_proxy::names(&more, host, 443), "{more} {host}");
    }
    assert!(no_proxy::names("*", host, 443));
    assert_eq!(settings("*").hop(&target), Ok(None));
    match settings(exempt).hop(&target) {
        Err(error) => {
            // The text is the same for each value, so it quotes none.
            let other = NetworkSettings::from_env(|name| match name {
                "HTTPS_PROXY" | "HTTP_PROXY" => Some("socks5://other".to_owned()),
                _ => None,
            });
            assert_eq!(other.hop(&target), Err(error));
            false
        }
        Ok(None) => false,
        Ok(Some(hop)) => {
            assert!(!hop.host.is_empty() && hop.port > 0, "{hop:?}");
            assert!(proxy.contains(&hop.host), "{hop:?}");
            assert!(settings(exempt).proxy(&target).is_ok(), "{hop:?}");
            true
        }
    }
}
