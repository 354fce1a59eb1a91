//! Verification of the web identity token: its signature by the provider's keys, fetched for each
//! request, and its claims.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation};
use serde::Deserialize;
use serde_json::Value;

use super::rejection::{Code, DevRejection};
use super::{DevAccount, DevProvider};
use crate::dev::loopback_http::{self, FetchError};
use crate::dev::oidc::DISCOVERY_PATH;

/// Maximum time by which a token may be issued ahead of this clock.
const MAX_SKEW: Duration = Duration::from_secs(300);
/// Algorithms of STS that the library supports (it lacks ES512).
const ALGORITHMS: [Algorithm; 5] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::ES256,
    Algorithm::ES384,
];

/// Claims of a verified token.
#[derive(Debug)]
pub(super) struct DevTokenClaims {
    pub(super) issuer: String,
    pub(super) sub: String,
    pub(super) audience: String,
}

/// Claims as parsed. All are optional, so that an error can name the missing one.
#[derive(Deserialize)]
struct RawClaims {
    iss: Option<String>,
    sub: Option<String>,
    aud: Option<DevAudience>,
    azp: Option<String>,
    exp: Option<Value>,
    iat: Option<Value>,
    nbf: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum DevAudience {
    One(String),
    Several(Vec<String>),
}

fn rejected<T>(message: impl Into<String>) -> Result<T, DevRejection> {
    Err(DevRejection::new(Code::InvalidIdentityToken, message))
}

/// Verifies a token for this account, in the order in which STS reports errors.
pub(super) async fn verify(
    token: &str,
    account: &DevAccount,
    now: SystemTime,
) -> Result<DevTokenClaims, DevRejection> {
    let not_a_jwt = || {
        DevRejection::new(
            Code::InvalidIdentityToken,
            "The ID Token provided is not a valid JWT.",
        )
    };
    let header = jsonwebtoken::decode_header(token).map_err(|_| not_a_jwt())?;
    let unverified: RawClaims =
        jsonwebtoken::dangerous::insecure_decode_claims(token).map_err(|_| not_a_jwt())?;
    let Some(issuer) = unverified.iss else {
        return rejected("Missing a required claim: iss");
    };
    // The issuer only selects one of the configured providers. No URL from the token is fetched.
    let Some(provider) = account
        .providers
        .iter()
        .find(|provider| provider.issuer == issuer)
    else {
        return rejected(format!(
            "No OpenIDConnect provider found in your account for {issuer:.256}"
        ));
    };
    if !ALGORITHMS.contains(&header.alg) {
        return rejected(format!("Unsupported signature algorithm {:?}", header.alg));
    }
    let keys = fetch_keys(&provider.issuer).await.map_err(|error| {
        tracing::warn!(%error, "dev: STS cannot fetch the issuer's keys");
        no_key()
    })?;
    let claims = verify_signature(token, &header, &keys)?;
    check(claims, provider, now)
}

/// Returns AWS's error for missing keys, with its text, because users search for it.
fn no_key() -> DevRejection {
    DevRejection::new(
        Code::InvalidIdentityToken,
        "Couldn't retrieve verification key from your identity provider, please reference AssumeRoleWithWebIdentity \
         documentation for requirements",
    )
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

/// Reason why the keys are missing. As with AWS, only the log shows it.
#[derive(Debug, thiserror::Error)]
enum KeysError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    #[error("the discovery document is another issuer's: {0}")]
    Issuer(String),
}

async fn fetch_keys(issuer: &str) -> Result<JwkSet, KeysError> {
    let document = loopback_http::get(&format!("{issuer}{DISCOVERY_PATH}")).await?;
    let discovery: Discovery = serde_json::from_slice(&document)?;
    if discovery.issuer != issuer {
        return Err(KeysError::Issuer(discovery.issuer));
    }
    Ok(serde_json::from_slice(
        &loopback_http::get(&discovery.jwks_uri).await?,
    )?)
}

fn verify_signature(
    token: &str,
    header: &Header,
    keys: &JwkSet,
) -> Result<RawClaims, DevRejection> {
    let key: &Jwk = header
        .kid
        .as_deref()
        .and_then(|kid| keys.find(kid))
        .ok_or_else(no_key)?;
    let key = DecodingKey::from_jwk(key).map_err(|_| no_key())?;
    // Only the signature is checked here. The claims follow, with STS's own messages and order.
    let mut validation = Validation::new(header.alg);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_aud = false;
    match jsonwebtoken::decode(token, &key, &validation) {
        Ok(decoded) => Ok(decoded.claims),
        Err(_) => rejected("The signature of the ID Token is not valid"),
    }
}

fn check(
    claims: RawClaims,
    provider: &DevProvider,
    now: SystemTime,
) -> Result<DevTokenClaims, DevRejection> {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let Some(sub) = claims.sub else {
        return rejected("Missing a required claim: sub");
    };
    let exp = timestamp(claims.exp.as_ref(), "exp")?;
    let iat = timestamp(claims.iat.as_ref(), "iat")?;
    let not_before = claims
        .nbf
        .as_ref()
        .map_or(Ok(iat), |nbf| timestamp(Some(nbf), "nbf"))?;
    if exp <= now {
        // AWS accepts an expired token for a while. This STS is stricter, so that users do not rely
        // on that.
        let message = format!(
            "Token expired: current date/time {now} must be before the expiration date/time {exp}"
        );
        return Err(DevRejection::new(Code::ExpiredWebIdentity, message));
    }
    let valid_from = iat.max(not_before);
    if valid_from > now + MAX_SKEW.as_secs() {
        return rejected(format!(
            "Token is not yet valid: current date/time {now} must be after {valid_from}"
        ));
    }
    let audience = audience(claims.aud, claims.azp)?;
    if !provider.client_ids.contains(&audience) {
        return rejected("Incorrect token audience");
    }
    Ok(DevTokenClaims {
        issuer: provider.issuer.clone(),
        sub,
        audience,
    })
}

/// Parses a timestamp. STS accepts integers only, so `1.7e9` is rejected although it is the same
/// number.
fn timestamp(claim: Option<&Value>, name: &str) -> Result<u64, DevRejection> {
    match claim {
        Some(value) => match value.as_u64() {
            Some(seconds) => Ok(seconds),
            None => rejected("Invalid timestamp in token claims"),
        },
        None => rejected(format!("Missing a required claim: {name}")),
    }
}

/// Returns the audience that counts: the authorized party, if the token has one.
fn audience(
    claim: Option<DevAudience>,
    authorized_party: Option<String>,
) -> Result<String, DevRejection> {
    let audiences = match claim {
        Some(DevAudience::One(audience)) => vec![audience],
        Some(DevAudience::Several(audiences)) => audiences,
        None => vec![],
    };
    match (authorized_party, &audiences[..]) {
        (_, []) => rejected("Missing a required claim: aud"),
        (Some(party), _) => Ok(party),
        (None, [audience]) => Ok(audience.clone()),
        (None, _) => rejected(
            "Token audience contains more than one audience while authorized party is not present",
        ),
    }
}
