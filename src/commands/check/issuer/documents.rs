//! The discovery document and the keys' document: how they are served, and whether they fit.

use std::time::Duration;

use serde_json::Value;

use super::DISCOVERY;
use crate::commands::check::report::CheckReport;
use crate::commands::https_probe::{HttpProbe, HttpProbeResponse};

/// Fetches a JSON object, and returns it with the time that it took.
pub(super) async fn document(
    url: &str,
    step: &'static str,
    web: &HttpProbe,
    report: &mut CheckReport,
) -> Option<(Value, Duration)> {
    report.show_progress(url);
    let answer = match web.get(url).await {
        Ok(answer) => answer,
        Err(error) => {
            report.failed(
                step,
                format!("{url}: {error}"),
                "STS fetches this over the internet: publish it there; to check from inside use --resolve or --url",
            );
            return None;
        }
    };
    if let Some((saw, fix)) = status(&answer) {
        report.failed(step, format!("{url} answers {}: {saw}", answer.status), fix);
        return None;
    }
    if let Some(distrust) = answer
        .chain
        .as_ref()
        .and_then(|chain| chain.distrust.as_ref().map(|text| (text, chain)))
    {
        report.info(
            step,
            format!("{url}: this machine does not trust its TLS chain ({}), and AWS may not either", distrust.0),
            format!(
                "use a public CA; or compare the thumbprint {} with your own CA's, and then give it to IAM's provider (awsvid trust-policy \
                 --accept-untrusted-issuer)",
                distrust.1.thumbprint
            ),
        );
    }
    match serde_json::from_slice::<Value>(&answer.body) {
        Ok(value) if value.is_object() => {
            report.ok(step, format!("{url} answers in {:.0?}", answer.took));
            Some((value, answer.took))
        }
        _ => {
            report.failed(
                step,
                format!("{url} is not a JSON object, but {} bytes of something else", answer.body.len()),
                "find out what answers there: the discovery provider, a login page, a proxy, a default backend",
            );
            None
        }
    }
}

/// Returns the meaning of a status other than 200 at SPIRE's OIDC discovery provider.
fn status(answer: &HttpProbeResponse) -> Option<(String, &'static str)> {
    Some(match answer.status {
        200 => return None,
        300..=399 => (
            format!(
                "it sends clients on to {}",
                answer.location.as_deref().unwrap_or("nowhere")
            ),
            "serve the document at the issuer's own URL: STS compares what it finds there with `iss`",
        ),
        400 => (
            "the discovery provider does not know this host name".to_owned(),
            "add the issuer's host to `domains` in the OIDC discovery provider's configuration, and let the load balancer \
             pass the Host header on as it is",
        ),
        404 => (
            "no such document exists there".to_owned(),
            "is the issuer's path right, and `server_path_prefix` of the OIDC discovery provider?",
        ),
        500 => (
            "the discovery provider has not got the keys yet".to_owned(),
            "give it access to the SPIRE server's socket (server_api), or to an agent's (workload_api); its log has details",
        ),
        501 => (
            "the discovery provider has no JWT keys".to_owned(),
            "let the SPIRE server of this trust domain have JWT keys: check spire-server jwt, ca_key_type and jwt_key_type",
        ),
        401 | 403 => (
            "a server in front of it requires authentication".to_owned(),
            "allow anonymous reads, because STS sends no credentials: check the web application firewall and the bucket's policy",
        ),
        _ => (
            "it fails".to_owned(),
            "read the logs of the discovery provider and of the servers in front of it",
        ),
    })
}

pub(super) fn belongs_to_issuer(discovery: &Value, issuer: &str, report: &mut CheckReport) {
    let fix = "make jwt_issuer of the SPIRE server and of the OIDC discovery provider (or its `domains` and the Host header \
               that reaches it) the same, byte by byte; and the URL of IAM's provider";
    match discovery["issuer"].as_str() {
        Some(found) if found == issuer => {
            report.ok(DISCOVERY, "its issuer is the token's, byte by byte")
        }
        Some(found) => report.failed(
            DISCOVERY,
            format!(
                "its issuer is {found:?}, the token's is {issuer:?}: {}",
                difference(found, issuer)
            ),
            fix,
        ),
        None => report.failed(DISCOVERY, "it has no `issuer`", fix),
    }
}

/// Describes the difference between two URLs.
fn difference(one: &str, other: &str) -> String {
    let scheme = |url: &str| {
        url.split_once("://")
            .map_or("", |(scheme, _)| scheme)
            .to_owned()
    };
    let host = |url: &str| url.split('/').nth(2).unwrap_or_default().to_owned();
    if one.trim_end_matches('/') == other.trim_end_matches('/') {
        return "they differ by a slash at the end".to_owned();
    }
    if one.eq_ignore_ascii_case(other) {
        return "they differ in capital letters".to_owned();
    }
    if scheme(one) != scheme(other) {
        return "they differ in the scheme".to_owned();
    }
    if host(one) != host(other) {
        let bare = |url: &str| host(url).split(':').next().unwrap_or_default().to_owned();
        let what = if bare(one) == bare(other) {
            "port"
        } else {
            "host"
        };
        return format!("they differ in the {what}");
    }
    let common = one
        .bytes()
        .zip(other.bytes())
        .take_while(|(a, b)| a == b)
        .count();
    format!("they differ from byte {common} on")
}

pub(super) fn keys_url(
    discovery: &Value,
    issuer: &str,
    aws: bool,
    report: &mut CheckReport,
) -> Option<String> {
    const FIX: &str = "set `jwks_uri` (or `server_path_prefix`) in the OIDC discovery provider's configuration, and let a proxy \
                       that ends TLS send X-Forwarded-Proto: https";
    let Some(url) = discovery["jwks_uri"].as_str() else {
        report.failed(
            DISCOVERY,
            "it has no `jwks_uri`, so STS does not find the keys",
            FIX,
        );
        return None;
    };
    if (aws || issuer.starts_with("https://")) && !url.starts_with("https://") {
        report.failed(
            DISCOVERY,
            format!("its `jwks_uri` is {url:?}: STS fetches keys over https only"),
            FIX,
        );
    }
    Some(url.to_owned())
}
