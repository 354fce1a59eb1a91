//! The JWT-SVID and the check that each one passes before it is sent anywhere.
//!
//! The signature is STS's to verify: it knows the issuer's keys, awsvid doesn't. What is checked here is that the token
//! is the one that was asked for, and that STS can't misread it. Format: JWT-SVID.md, sections 2 and 3.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::identity::SpiffeId;

/// STS: `WebIdentityToken` has at most 20000 characters.
const LENGTH_MAX: usize = 20_000;
/// Minimum remaining life of a token, so that it does not expire while it waits for STS. Of a token with a short life a third
/// is enough: SPIRE's agent renews its tokens at about half of their life.
const MIN_REMAINING_LIFE: Duration = Duration::from_secs(30);
/// Up to this whole life an error about it names the setting that lengthens it.
const SHORT_LIFE: Duration = Duration::from_secs(90);
/// How to lengthen the life of tokens.
pub const TTL_FIX: &str = "give it a longer life (in SPIRE the entry's `-jwtSVIDTTL`, or the server's `default_jwt_svid_ttl`, which is \
     5 minutes unless it is set)";
/// How far another clock may be ahead of this one.
const SKEW_MAX: Duration = Duration::from_secs(300);
/// The last second of the year 9999. Anything later is in milliseconds, or nonsense.
const TIMESTAMP_MAX: u64 = 253_402_300_799;
/// What the standard allows. AWS STS takes all of them but `PS*`; other STS do, so those are left to STS to refuse.
const ALGORITHMS: [&str; 9] = [
    "RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512",
];

/// A token that passed the check. It is a secret: whoever has it can assume the workload's roles until it expires.
#[derive(Clone)]
pub struct JwtSvid {
    token: Zeroizing<String>,
    spiffe_id: SpiffeId,
    audience: String,
    algorithm: &'static str,
    life: Life,
}

/// The validity period of a token.
#[derive(Debug, Clone, Copy)]
struct Life {
    /// `iat`. Without it the whole life is unknown.
    issued: Option<SystemTime>,
    expires: SystemTime,
}

/// Why a token must not be used. The texts never hold the token.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadToken {
    /// It has expired or is about to: the source may have a new one soon.
    #[error("{0}")]
    Expiring(String),
    /// It is not what was asked for, or STS could misread it.
    #[error("{0}")]
    Wrong(String),
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    typ: Option<String>,
}

/// serde's derived code refuses a claim that appears twice. That is on purpose: two readers could each believe another
/// one.
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
    /// Takes `token` if it is a JWT-SVID of `expected` for `audience` alone, with 30 s or a third of its life left at `now`.
    ///
    /// `expected` includes the trust domain. Timestamps are judged on their JSON text: STS refuses `1.7e9` and `1.0`,
    /// which a parser would take for integers. `iat` and `nbf` may be absent, and at most 5 minutes ahead of `now`.
    pub fn check(
        token: impl Into<Zeroizing<String>>,
        expected: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<Self, BadToken> {
        let token = token.into();
        if token.len() > LENGTH_MAX {
            return wrong(format!(
                "it has {} characters, and STS takes at most {LENGTH_MAX}",
                token.len()
            ));
        }
        let (header, claims) = decode(&token)?;
        let algorithm = check_header(&header)?;
        let claims: Claims<'_> =
            serde_json::from_slice(&claims).map_err(|error| unreadable("claims", &error))?;
        expect_subject(&claims.sub, expected)?;
        expect_audience(&claims.aud, audience)?;
        let life = check_times(&claims, now)?;
        life.check(now)?;
        Ok(Self {
            token,
            spiffe_id: expected.clone(),
            audience: audience.to_owned(),
            algorithm,
            life,
        })
    }

    /// Returns the one of `tokens` that passes [`Self::check`] and expires last; `None` without a token. If none passes, the
    /// error is that of the first. All of them came with the label `expected`. An agent that merges the answers of two others
    /// returns an identity several times, and may label a token wrongly.
    pub fn check_any(
        tokens: impl IntoIterator<Item = impl Into<Zeroizing<String>>>,
        expected: &SpiffeId,
        audience: &str,
        now: SystemTime,
    ) -> Result<Option<Self>, BadToken> {
        let mut best: Option<Result<Self, BadToken>> = None;
        for token in tokens {
            best = match (best, Self::check(token, expected, audience, now)) {
                (None, checked) => Some(checked),
                (Some(Ok(best)), Ok(other)) if best.expires() < other.expires() => Some(Ok(other)),
                (Some(Err(_)), Ok(other)) => Some(Ok(other)),
                (best, _) => best,
            };
        }
        best.transpose()
    }

    /// Checks only the `sub` of `token`.
    pub fn check_subject(token: &str, expected: &SpiffeId) -> Result<(), BadToken> {
        let (_, claims) = decode(token)?;
        let claims: Claims<'_> =
            serde_json::from_slice(&claims).map_err(|error| unreadable("claims", &error))?;
        expect_subject(&claims.sub, expected)
    }

    /// Checks that enough of its life remains, for use after a wait.
    pub fn check_life(&self, now: SystemTime) -> Result<(), BadToken> {
        self.life.check(now)
    }

    /// The token itself, for STS and nobody else.
    pub fn secret(&self) -> &str {
        &self.token
    }

    /// Whose it is.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.spiffe_id
    }

    /// For whom it is meant, and nobody else.
    pub fn audience(&self) -> &str {
        &self.audience
    }

    /// The signature's algorithm, for example `ES256`.
    pub fn algorithm(&self) -> &'static str {
        self.algorithm
    }

    /// When it expires.
    pub fn expires(&self) -> SystemTime {
        self.life.expires
    }

    /// Returns its whole life if that is short. [`TTL_FIX`] is the advice for it.
    pub fn short_life(&self) -> Option<Duration> {
        self.life.short()
    }

    /// Whether the two are one and the same token, as from a source that answers from its cache.
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

/// serde_json's own words may quote the value that they complain about, so only the kind of trouble is kept.
fn unreadable(part: &str, error: &serde_json::Error) -> BadToken {
    let text = match error.classify() {
        serde_json::error::Category::Data => "lack a claim, have one twice, or one of a wrong type",
        _ => "are no valid JSON",
    };
    BadToken::Wrong(format!("its {part} {text}"))
}

/// The header and the claims of a JWS in compact form.
fn decode(token: &str) -> Result<(Header, Zeroizing<Vec<u8>>), BadToken> {
    let parts: Vec<&str> = token.split('.').collect();
    let [header, claims, signature] = parts[..] else {
        return wrong("it is no JWT: that has three parts");
    };
    let part = |text: &str| {
        URL_SAFE_NO_PAD
            .decode(text)
            .ok()
            .filter(|bytes| !bytes.is_empty())
    };
    let (Some(header), Some(claims), Some(_)) = (part(header), part(claims), part(signature))
    else {
        return wrong("it is no signed JWT: one of its parts is empty or not base64url");
    };
    let claims = Zeroizing::new(claims);
    // serde's derived code would also take an array, with the values in the order of the fields.
    if ![&header, &*claims]
        .iter()
        .all(|part| part.trim_ascii_start().starts_with(b"{"))
    {
        return wrong("it is no JWT: its header and claims are not both JSON objects");
    }
    let header =
        serde_json::from_slice(&header).map_err(|error| unreadable("header's fields", &error))?;
    Ok((header, claims))
}

fn check_header(header: &Header) -> Result<&'static str, BadToken> {
    if !matches!(header.typ.as_deref(), None | Some("JWT" | "JOSE")) {
        return wrong("its type is neither JWT nor JOSE, so it is no JWT-SVID");
    }
    match ALGORITHMS.iter().find(|known| **known == header.alg) {
        Some(known) => Ok(known),
        None => wrong(
            "its signature's algorithm is none that JWT-SVIDs may have (RS, ES or PS with 256, 384 or 512)",
        ),
    }
}

fn expect_subject(sub: &str, expected: &SpiffeId) -> Result<(), BadToken> {
    if sub == expected.as_str() {
        return Ok(());
    }
    // Not whose it is: the text may reach a workload, which has no business to know.
    wrong(format!("its subject is not {expected}"))
}

fn expect_audience(aud: &Audience, wanted: &str) -> Result<(), BadToken> {
    let right = match aud {
        Audience::One(one) => one == wanted,
        Audience::Several(several) => matches!(&several[..], [one] if one == wanted),
    };
    if right {
        return Ok(());
    }
    // With another audience beside ours, whoever that is could use the token here; AWS refuses it too.
    wrong(format!("its audience is not exactly `{wanted}`"))
}

/// Reads the validity period.
fn check_times(claims: &Claims<'_>, now: SystemTime) -> Result<Life, BadToken> {
    let expires = timestamp("exp", claims.exp)?;
    let from = |name: &str, raw: Option<&RawValue>| {
        let Some(raw) = raw else { return Ok(None) };
        let from = timestamp(name, raw)?;
        if from >= expires {
            return wrong(format!("its `{name}` is not before its `exp`"));
        }
        if from > now + SKEW_MAX {
            return wrong(format!(
                "its `{name}` is more than 5 minutes in the future: compare this node's clock"
            ));
        }
        Ok(Some(from))
    };
    let issued = from("iat", claims.iat)?;
    from("nbf", claims.nbf)?;
    Ok(Life { issued, expires })
}

impl Life {
    /// Returns its length, if known.
    fn whole(self) -> Option<Duration> {
        self.expires.duration_since(self.issued?).ok()
    }

    /// Returns its length, if short.
    fn short(self) -> Option<Duration> {
        self.whole().filter(|whole| *whole <= SHORT_LIFE)
    }

    fn check(self, now: SystemTime) -> Result<(), BadToken> {
        let left = self.expires.duration_since(now).unwrap_or_default();
        let least = self.whole().map_or(MIN_REMAINING_LIFE, |whole| {
            MIN_REMAINING_LIFE.min(whole / 3)
        });
        if left >= least && !left.is_zero() {
            return Ok(());
        }
        let state = match left.as_secs() {
            0 => "it has expired".to_owned(),
            left => format!("it expires in {left} s"),
        };
        Err(BadToken::Expiring(match self.short() {
            Some(whole) => format!(
                "{state}, and was good for only {} s: {TTL_FIX}, and compare this node's clock with the server's",
                whole.as_secs()
            ),
            None => format!(
                "{state}: look at the agent's connection to its server, and at this node's clock"
            ),
        }))
    }
}

/// A claim in whole seconds since 1970, written as such.
fn timestamp(name: &str, raw: &RawValue) -> Result<SystemTime, BadToken> {
    let text = raw.get();
    // Digits only: `1.7e9`, `1.0`, `-1` and `"1700000000"` are refused here.
    let seconds = text
        .bytes()
        .all(|c| c.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten();
    match seconds.filter(|seconds| *seconds <= TIMESTAMP_MAX) {
        Some(seconds) => Ok(UNIX_EPOCH + Duration::from_secs(seconds)),
        None => wrong(format!(
            "its `{name}` is not written as a whole number of seconds, which STS insists on (SPIRE before 1.9.5 and \
             some credential composers write 1.7e9)"
        )),
    }
}

#[cfg(test)]
pub(crate) mod tests;
