//! The issuer's URL, as IAM takes it.

use thiserror::Error;

#[cfg(any(test, fuzzing))]
pub(in crate::commands) mod fuzzing;

/// IAM's limit for the URL of an OIDC provider.
const MAX_URL_LENGTH: usize = 255;

/// Reason why IAM does not accept an issuer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(in crate::commands::trust_policy) enum InvalidIssuer {
    /// The text has no scheme.
    #[error("the issuer {0:?} is not a URL; write it with https://")]
    NoUrl(String),
    /// The URL has no host, is too long, or has characters that IAM does not accept.
    #[error(
        "IAM does not accept the issuer {0:?}; use a host and a path of at most {MAX_URL_LENGTH} characters"
    )]
    BadUrl(String),
}

/// The issuer of the tokens, as the URL that IAM compares byte by byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::commands::trust_policy) struct PlannedIssuer(String);

impl PlannedIssuer {
    pub(in crate::commands::trust_policy) fn parse(text: &str) -> Result<Self, InvalidIssuer> {
        let rest = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"));
        let rest = rest.ok_or_else(|| InvalidIssuer::NoUrl(text.to_owned()))?;
        let plain = |c: u8| c.is_ascii_alphanumeric() || b"-._~:/%[]".contains(&c);
        if rest.is_empty() || text.len() > MAX_URL_LENGTH || !rest.bytes().all(plain) {
            return Err(InvalidIssuer::BadUrl(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }

    pub(in crate::commands::trust_policy) fn url(&self) -> &str {
        &self.0
    }

    /// Returns the prefix of condition keys, and of the provider's name in its ARN: the URL without
    /// its scheme.
    pub(in crate::commands::trust_policy) fn key(&self) -> &str {
        self.0.split_once("://").map_or("", |(_, rest)| rest)
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let (host, url) = (self.key().split('/').next().unwrap_or_default(), &self.0);
        let table = [
            (!url.starts_with("https://"), "IAM accepts only https"),
            (
                url.ends_with('/'),
                "it ends with a slash, which IAM and SPIRE treat differently; remove it from `jwt_issuer`",
            ),
            (
                host.contains(':'),
                "by IAM's documentation an issuer has no port; serve it at 443",
            ),
            (
                host.bytes().any(|c| c.is_ascii_uppercase()),
                "its host has capital letters, and IAM compares byte by byte",
            ),
        ];
        table
            .iter()
            .filter(|(wrong, _)| *wrong)
            .map(|(_, what)| format!("issuer {url}: {what}"))
            .collect()
    }
}
