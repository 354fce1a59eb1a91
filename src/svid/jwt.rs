//! JWT-SVIDs, and the check that each one passes before it is sent anywhere.
//!
//! STS verifies the signature: it knows the issuer's keys, the daemon does not. The daemon checks
//! that the token is the requested one, and that STS cannot misread it. Format: JWT-SVID.md,
//! sections 2 and 3.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;
use zeroize::Zeroizing;

use super::last_to_expire;
use crate::identity::SpiffeId;

/// Maximum length of `WebIdentityToken` at STS, in characters.
const MAX_TOKEN_BYTES: usize = 20_000;
/// Minimum remaining life of a token, so that it does not expire while it waits for STS. For a
/// short life a third is enough: SPIRE's agent renews its tokens at about half of their life.
const MIN_REMAINING_LIFE: Duration = Duration::from_secs(30);
/// Total life up to which an error names the setting that lengthens it.
const SHORT_LIFE: Duration = Duration::from_secs(90);
/// Advice to lengthen the life of tokens.
pub const TTL_FIX: &str = "give it a longer life (in SPIRE the entry's `-jwtSVIDTTL`, or the server's `default_jwt_svid_ttl`, which is \
     5 minutes unless it is set)";
/// Maximum lead of another clock over this one.
const MAX_SKEW: Duration = Duration::from_secs(300);
/// The last second of the year 9999. A later timestamp is in milliseconds, or invalid.
const MAX_TIMESTAMP: u64 = 253_402_300_799;
/// Algorithms that the standard allows. AWS STS rejects `PS*`, but other STS accept them, so the
/// choice is left to STS.
const ALGORITHMS: [&str; 9] = [
    "RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512",
];

/// A token that passed the check. It is a secret: its holder can assume the workload's roles until
/// it expires.
#[derive(Clone)]
pub struct JwtSvid {
    token: Zeroizing<String>,
    spiffe_id: SpiffeId,
    audience: String,
    algorithm: &'static str,
    lifetime: TokenLifetime,
}

/// The validity period of a token.
#[derive(Debug, Clone, Copy)]
struct TokenLifetime {
    /// `iat`. Without it the total life is unknown.
    issued: Option<SystemTime>,
    expires: SystemTime,
}

/// Reason why a token must not be used. The texts never hold the token.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadToken {
    /// The token has expired or is about to. The source may have a new one soon.
    #[error("{0}")]
    Expiring(String),
    /// The token is not the requested one, or STS could misread it.
    #[error("{0}")]
    Wrong(String),
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    typ: Option<String>,
}

/// Claims of a token. serde's derived code rejects a claim that appears twice. This is intended:
/// two readers could each use a different one.
#[derive(Deserialize)]
struct Claims<'a> {
    sub: String,
    aud: Audience,
    #[serde(borrow)]
    exp: &'a RawValue,
    #[serde(borrow)]
    iat: Option<&'a RawValue>,
    #[serde(borrow)]
    nbf: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

impl JwtSvid {
    /// Accepts `token` if it is a JWT-SVID of `expected` for `audience` alone, with 30 s or a third
    /// of its life left at `now`.
    ///
    /// `expected` includes the trust domain. Timestamps are checked as JSON text: STS rejects
    /// `1.7e9` and `1.0`, which a parser would take for integers. `iat` and `nbf` may be absent,
    /// and at most 5 minutes ahead of `now`.
    pub fn check(
        token: impl Into<Zeroizing<String>>,
        expected: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<Self, BadToken> {
        let token = token.into();
        if token.len() > MAX_TOKEN_BYTES {
            return wrong(format!(
                "it has {} characters, and STS takes at most {MAX_TOKEN_BYTES}",
                token.len()
            ));
        }
        let parts = DecodedToken::of(&token)?;
        let algorithm = check_header(&parts.header()?)?;
        let claims = parts.claims()?;
        expect_subject(&claims.sub, expected)?;
        expect_audience(&claims.aud, audience)?;
        let lifetime = check_times(&claims, now)?;
        lifetime.check(now)?;
        Ok(Self {
            token,
            spiffe_id: expected.clone(),
            audience: audience.to_owned(),
            algorithm,
            lifetime,
        })
    }

    /// Returns the one of `tokens` that passes [`Self::check`] and expires last, or `None` without
    /// a token. If none passes, the error is that of the first. All of them came with the label
    /// `expected`. An agent that merges the replies of two others returns an identity several
    /// times, and may label a token wrongly.
    pub fn check_any(
        tokens: impl IntoIterator<Item = impl Into<Zeroizing<String>>>,
        expected: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<Option<Self>, BadToken> {
        let checked = tokens
            .into_iter()
            .map(|token| Self::check(token, expected, audience, now));
        last_to_expire(checked, Self::expires)
    }

    /// Checks only the `sub` of `token`. Fails if it is not a SPIFFE ID, or another one than
    /// expected.
    pub fn check_subject(token: &str, expected: &SpiffeId) -> Result<(), BadToken> {
        let parts = DecodedToken::of(token)?;
        parts.header()?;
        expect_subject(&parts.claims()?.sub, expected)
    }

    /// Checks that enough of the life remains, for use after a wait. Fails if too little remains.
    pub fn check_life(&self, now: SystemTime) -> Result<(), BadToken> {
        self.lifetime.check(now)
    }

    /// Returns the token itself, for STS alone.
    pub fn secret(&self) -> &str {
        &self.token
    }

    /// Returns the SPIFFE ID that the token proves.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.spiffe_id
    }

    /// Returns the only audience of the token.
    pub fn audience(&self) -> &str {
        &self.audience
    }

    /// Returns `iss`, by which STS finds the issuer's keys. It is not checked.
    pub fn issuer(&self) -> Option<String> {
        text_of(&DecodedToken::of(&self.token).ok()?.claims, "iss")
    }

    /// Returns `kid`, the id of the key of the signature. It is not checked.
    pub fn key_id(&self) -> Option<String> {
        text_of(&DecodedToken::of(&self.token).ok()?.header, "kid")
    }

    /// Returns the algorithm of the signature, for example `ES256`.
    pub fn algorithm(&self) -> &'static str {
        self.algorithm
    }

    /// Returns the time at which the token expires.
    pub fn expires(&self) -> SystemTime {
        self.lifetime.expires
    }

    /// Returns the total life if it is short. [`TTL_FIX`] is the advice for it.
    pub fn short_life(&self) -> Option<Duration> {
        self.lifetime.short()
    }

    /// Returns true if both are the same token, as from a source that replies from its cache.
    pub fn is_same(&self, other: &Self) -> bool {
        self.token == other.token
    }
}

impl fmt::Debug for JwtSvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtSvid")
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

fn wrong<T>(text: impl Into<String>) -> Result<T, BadToken> {
    Err(BadToken::Wrong(text.into()))
}

/// Returns an error without serde_json's text, which may quote the value that it rejects.
fn unreadable(part: &str, error: &serde_json::Error) -> BadToken {
    let text = match error.classify() {
        serde_json::error::Category::Data => {
            "lack a claim, have one twice, or have one of a wrong type"
        }
        _ => "are not valid JSON",
    };
    BadToken::Wrong(format!("its {part} {text}"))
}

/// The header and the claims of a JWS in compact form, as JSON texts of objects.
struct DecodedToken {
    header: Vec<u8>,
    claims: Zeroizing<Vec<u8>>,
}

impl DecodedToken {
    fn of(token: &str) -> Result<Self, BadToken> {
        let parts: Vec<&str> = token.split('.').collect();
        let [header, claims, signature] = parts[..] else {
            return wrong("it is not a JWT, which has three parts");
        };
        let part = |text: &str| {
            URL_SAFE_NO_PAD
                .decode(text)
                .ok()
                .filter(|bytes| !bytes.is_empty())
        };
        let (Some(header), Some(claims), Some(_)) = (part(header), part(claims), part(signature))
        else {
            return wrong("it is not a signed JWT: one of its parts is empty or not base64url");
        };
        let claims = Zeroizing::new(claims);
        // serde's derived code would also accept an array, with the values in the order of the
        // fields.
        if ![&header, &*claims]
            .iter()
            .all(|part| part.trim_ascii_start().starts_with(b"{"))
        {
            return wrong("it is not a JWT: its header and claims are not both JSON objects");
        }
        Ok(Self { header, claims })
    }

    fn header(&self) -> Result<Header, BadToken> {
        serde_json::from_slice(&self.header).map_err(|error| unreadable("header's fields", &error))
    }

    fn claims(&self) -> Result<Claims<'_>, BadToken> {
        serde_json::from_slice(&self.claims).map_err(|error| unreadable("claims", &error))
    }
}

/// Returns a field of a JSON object, if it is a text that is not empty.
fn text_of(json: &[u8], name: &str) -> Option<String> {
    let fields: serde_json::Value = serde_json::from_slice(json).ok()?;
    let text = fields[name].as_str()?;
    (!text.is_empty()).then(|| text.to_owned())
}

fn check_header(header: &Header) -> Result<&'static str, BadToken> {
    if !matches!(header.typ.as_deref(), None | Some("JWT" | "JOSE")) {
        return wrong("it is not a JWT-SVID: its type is neither JWT nor JOSE");
    }
    match ALGORITHMS
        .iter()
        .find(|algorithm| **algorithm == header.alg)
    {
        Some(algorithm) => Ok(algorithm),
        None => wrong(
            "its signature's algorithm is not one that JWT-SVIDs may have (RS, ES or PS with 256, 384 or 512)",
        ),
    }
}

fn expect_subject(sub: &str, expected: &SpiffeId) -> Result<(), BadToken> {
    if sub == expected.as_str() {
        return Ok(());
    }
    // The text does not name the actual subject, since it may reach a workload that must not learn
    // it.
    wrong(format!("its subject is not {expected}"))
}

fn expect_audience(aud: &Audience, expected: &str) -> Result<(), BadToken> {
    let right = match aud {
        Audience::One(one) => one == expected,
        Audience::Several(several) => matches!(&several[..], [one] if one == expected),
    };
    if right {
        return Ok(());
    }
    // With a further audience, that other service could use the token here. AWS rejects it too.
    wrong(format!("its audience is not exactly `{expected}`"))
}

/// Reads and checks the validity period.
fn check_times(claims: &Claims<'_>, now: SystemTime) -> Result<TokenLifetime, BadToken> {
    let expires = timestamp("exp", claims.exp)?;
    let from = |name: &str, raw: Option<&RawValue>| {
        let Some(raw) = raw else { return Ok(None) };
        let from = timestamp(name, raw)?;
        if from >= expires {
            return wrong(format!("its `{name}` is not before its `exp`"));
        }
        if from > now + MAX_SKEW {
            return wrong(format!(
                "its `{name}` is more than 5 minutes in the future: compare this node's clock"
            ));
        }
        Ok(Some(from))
    };
    let issued = from("iat", claims.iat)?;
    from("nbf", claims.nbf)?;
    Ok(TokenLifetime { issued, expires })
}

impl TokenLifetime {
    /// Returns the total life, if known.
    fn whole(self) -> Option<Duration> {
        self.expires.duration_since(self.issued?).ok()
    }

    /// Returns the total life, if it is short.
    fn short(self) -> Option<Duration> {
        self.whole().filter(|whole| *whole <= SHORT_LIFE)
    }

    fn check(self, now: SystemTime) -> Result<(), BadToken> {
        let remaining = self.expires.duration_since(now).unwrap_or_default();
        let minimum = self.whole().map_or(MIN_REMAINING_LIFE, |whole| {
            MIN_REMAINING_LIFE.min(whole / 3)
        });
        if remaining >= minimum && !remaining.is_zero() {
            return Ok(());
        }
        let state = match remaining.as_secs() {
            0 => "it has expired".to_owned(),
            remaining => format!("it expires in {remaining} s"),
        };
        Err(BadToken::Expiring(match self.short() {
            Some(whole) => format!(
                "{state}, and was good for only {} s: {TTL_FIX}, and compare this node's clock with the server's",
                whole.as_secs()
            ),
            None => format!(
                "{state}; check the agent's connection to its server, and this node's clock"
            ),
        }))
    }
}

/// Parses a claim of whole seconds since 1970, written as digits.
fn timestamp(name: &str, raw: &RawValue) -> Result<SystemTime, BadToken> {
    let text = raw.get();
    // `1.7e9`, `1.0`, `-1` and `"1700000000"` are rejected here.
    let seconds = text
        .bytes()
        .all(|c| c.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten();
    match seconds.filter(|seconds| *seconds <= MAX_TIMESTAMP) {
        Some(seconds) => Ok(UNIX_EPOCH + Duration::from_secs(seconds)),
        None => wrong(format!(
            "its `{name}` is not written as a whole number of seconds, which STS insists on (SPIRE before 1.9.5 and \
             some credential composers write 1.7e9)"
        )),
    }
}

#[cfg(test)]
pub(crate) mod tests;
