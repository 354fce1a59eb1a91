//! Checks of the issuer as STS reads it: discovery document, keys, their TLS chains, and the
//! token's signature.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::Value;
use tokio::task::JoinSet;

use super::report::CheckReport;
use crate::commands::https_probe::HttpProbe;
use crate::commands::live_token;
use crate::svid::JwtSvid;

mod documents;
#[cfg(any(test, fuzzing))]
pub(in crate::commands) mod fuzzing;

use documents::{belongs_to_issuer, document, keys_url};

pub(super) const TOKEN: &str = "token";
pub(super) const DISCOVERY: &str = "discovery";
pub(super) const KEYS: &str = "keys";
/// AWS gives up on an issuer that needs longer for both documents.
const MAX_ISSUER_TIME: Duration = Duration::from_secs(5);
/// Number of concurrent fetches of the keys: fewer than many workloads that start together cause.
const CONCURRENT_FETCHES: usize = 20;
/// IAM reads this many keys of each kind.
const MAX_KEYS_PER_KIND: usize = 100;
/// No longer subject is known that AWS accepted.
const MAX_SUBJECT_LENGTH: usize = 255;

/// Checks the path from the token's `iss` to the key that signed it.
///
/// `base` is the documents' URL as seen from outside. `aws` is set if STS is AWS's.
pub(super) async fn check(
    token: &JwtSvid,
    base: Option<&str>,
    aws: bool,
    web: &HttpProbe,
    report: &mut CheckReport,
) {
    let Some(issuer) = token.issuer() else {
        report.failed(
            TOKEN,
            "the token has no `iss`, so STS cannot know its issuer",
            "set jwt_issuer = \"https://...\" in the SPIRE server's configuration, to the URL of the OIDC discovery provider \
             without a slash at its end, and restart it",
        );
        report.unchecked(
            DISCOVERY,
            "without an issuer there are no documents to check",
        );
        return;
    };
    check_token(token, &issuer, aws, report);
    let Some((discovery, took)) = document(
        &live_token::discovery_url(base.unwrap_or(&issuer)),
        DISCOVERY,
        web,
        report,
    )
    .await
    else {
        report.unchecked(
            KEYS,
            "the keys' URL is in the discovery document, which failed",
        );
        return;
    };
    belongs_to_issuer(&discovery, &issuer, report);
    let Some(url) = keys_url(&discovery, &issuer, aws, report) else {
        return;
    };
    let Some((keys, took_too)) = document(&url, KEYS, web, report).await else {
        return;
    };
    match took + took_too {
        took if took > MAX_ISSUER_TIME => report.failed(
            KEYS,
            format!("the issuer needs {took:.1?} for both documents, and AWS waits about {MAX_ISSUER_TIME:?}"),
            "put it nearer, or in front of it a cache that keeps no longer than the keys' rotation allows",
        ),
        _ => fetch_concurrently(&url, web, report).await,
    }
    contents(&keys, report);
    signature(token, &keys, &url, report);
}

/// Fetches the keys many times at once, as STS does for workloads that start together. Rate limits
/// and bot protection make some of those fetches fail, but not the single fetch of an operator.
async fn fetch_concurrently(url: &str, web: &HttpProbe, report: &mut CheckReport) {
    report.show_progress(&format!("{url}, {CONCURRENT_FETCHES} times at once"));
    let web = HttpProbe {
        deadline: web.deadline.min(MAX_ISSUER_TIME),
        ..web.clone()
    };
    let mut fetches = JoinSet::new();
    for _ in 0..CONCURRENT_FETCHES {
        let (web, url) = (web.clone(), url.to_owned());
        fetches.spawn(async move { web.get(&url).await });
    }
    let mut slowest = Duration::ZERO;
    let mut failures: BTreeMap<String, usize> = BTreeMap::new();
    for fetched in fetches.join_all().await {
        let failure = match fetched {
            Ok(answer) if answer.status == 200 => {
                slowest = slowest.max(answer.took);
                continue;
            }
            Ok(answer) => format!("answers {}", answer.status),
            Err(error) => error.to_string(),
        };
        *failures.entry(failure).or_default() += 1;
    }
    if failures.is_empty() {
        return report.ok(
            KEYS,
            format!(
                "{CONCURRENT_FETCHES} requests at once are answered, the slowest in {slowest:.0?}"
            ),
        );
    }
    let failed: usize = failures.values().sum();
    let failures: Vec<String> = failures
        .iter()
        .map(|(what, count)| format!("{what} ({count} times)"))
        .collect();
    report.failed(
        KEYS,
        format!("of {CONCURRENT_FETCHES} requests at once {failed} fail: {}", failures.join("; ")),
        "STS fetches as often as workloads call: take rate limits and bot protection off the keys and the discovery document, or \
         put a cache in front of them",
    );
}

fn check_token(token: &JwtSvid, issuer: &str, aws: bool, report: &mut CheckReport) {
    report.ok(TOKEN, format!("issued by {issuer}"));
    if issuer.ends_with('/') {
        report.info(
            TOKEN,
            format!("the issuer {issuer} ends with a slash: IAM's provider, the discovery document and the token then differ \
                 easily by one byte"),
            "remove the slash from jwt_issuer in the SPIRE server's configuration",
        );
    }
    let algorithm = token.algorithm();
    if aws && algorithm.starts_with("PS") {
        report.failed(
            TOKEN,
            format!("it is signed with {algorithm}, which AWS does not take"),
            "use RS256 or ES256",
        );
    }
    if aws && !issuer.starts_with("https://") {
        report.failed(
            TOKEN,
            format!("the issuer {issuer} is not https, and IAM takes no other"),
            "set jwt_issuer to an https URL",
        );
    }
    let length = token.spiffe_id().as_str().len();
    if length > MAX_SUBJECT_LENGTH {
        report.info(
            TOKEN,
            format!("its `sub` has {length} characters, more than {MAX_SUBJECT_LENGTH}"),
            "choose a shorter SPIFFE ID",
        );
    }
}

fn contents(keys: &Value, report: &mut CheckReport) {
    let Some(keys) = keys["keys"].as_array() else {
        report.failed(
            KEYS,
            "the document has no list `keys`",
            "is `jwks_uri` the URL of a JWK set?",
        );
        return;
    };
    let mut ids = BTreeSet::new();
    for (i, key) in keys.iter().enumerate() {
        let needed: &[&str] = match key["kty"].as_str() {
            Some("RSA") => &["kid", "n", "e"],
            Some("EC") => &["kid", "crv", "x", "y"],
            _ => &["kid", "kty"],
        };
        let missing: Vec<&&str> = needed
            .iter()
            .filter(|name| !key[**name].is_string())
            .collect();
        let id = key["kid"].as_str().unwrap_or_default();
        if !missing.is_empty() {
            report.failed(
                KEYS,
                format!("key {i} ({id:?}) lacks {missing:?}"),
                "correct the published JWK set",
            );
        }
        if !id.is_empty() && !ids.insert(id) {
            report.failed(
                KEYS,
                format!("two keys have the id {id:?}"),
                "correct the published JWK set",
            );
        }
        if key["use"] == "enc" {
            report.failed(
                KEYS,
                format!("key {id:?} is for encryption (`use`)"),
                "publish signing keys only",
            );
        }
    }
    for kind in ["RSA", "EC"] {
        let count = keys.iter().filter(|key| key["kty"] == kind).count();
        if count > MAX_KEYS_PER_KIND {
            report.failed(
                KEYS,
                format!("{count} {kind} keys, and IAM reads {MAX_KEYS_PER_KIND}"),
                "withdraw old keys",
            );
        }
    }
}

fn signature(token: &JwtSvid, keys: &Value, url: &str, report: &mut CheckReport) {
    let Some(id) = token.key_id() else {
        report.failed(
            KEYS,
            "the token's header names no key (`kid`)",
            "STS finds the key by it: correct it at the SPIFFE provider",
        );
        return;
    };
    let list = keys["keys"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let Some(key) = list.iter().find(|key| key["kid"] == id) else {
        let known: Vec<&str> = list.iter().filter_map(|key| key["kid"].as_str()).collect();
        report.failed(
            KEYS,
            format!("the token is signed with the key {id:?}, and {url} has {known:?}, probably a copy from before the last rotation"),
            "publish the current keys: SPIRE's provider polls every 10 s (poll_interval), a bucket or a CDN keeps the old copy",
        );
        return;
    };
    let verified = verifies(token.secret(), token.algorithm(), key);
    match verified {
        Some(true) => report.ok(
            KEYS,
            format!("the token's signature is right by key {id:?}"),
        ),
        Some(false) => report.failed(
            KEYS,
            format!("the key {id:?} that is published is not the one that signed the token"),
            "publish the keys of the server that issues the tokens: two servers, or an old copy?",
        ),
        None => report.info(
            KEYS,
            format!(
                "the signature by key {id:?} ({}) is not verified here",
                token.algorithm()
            ),
            "STS verifies it; few implementations support ES512",
        ),
    }
}

/// Verifies the signature. `None` if this program does not support the algorithm.
fn verifies(token: &str, algorithm: &str, key: &Value) -> Option<bool> {
    let algorithm: Algorithm = algorithm.parse().ok()?;
    let key: Jwk = serde_json::from_value(key.clone()).ok()?;
    let key = DecodingKey::from_jwk(&key).ok()?;
    let mut validation = Validation::new(algorithm);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_aud = false;
    Some(jsonwebtoken::decode::<Value>(token, &key, &validation).is_ok())
}

#[cfg(test)]
mod tests;
