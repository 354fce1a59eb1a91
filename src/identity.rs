//! Names that decisions depend on: SPIFFE IDs, role ARNs, session names.
//!
//! Each is parsed once and is valid from then on. Grammar of SPIFFE IDs: SPIFFE-ID.md, sections 2.1
//! to 2.3.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use thiserror::Error;

mod arn;
mod template;

pub use arn::{ArnTemplate, RoleArn};
pub use template::{AttestedFact, AttestedFacts, Placeholder, Template, TemplateValues};

/// Maximum length of a SPIFFE ID that the standard requires implementations to support, in bytes.
const MAX_SPIFFE_ID_BYTES: usize = 2048;
/// Maximum length of a trust domain name, in bytes.
const MAX_TRUST_DOMAIN_BYTES: usize = 255;
/// Length of a `RoleSessionName` at STS, in characters of `[\w+=,.@-]`.
const SESSION_NAME_LENGTH: std::ops::RangeInclusive<usize> = 2..=64;
/// Length of the readable start of a shortened session name. `=` and 16 hex digits follow.
const SESSION_NAME_PREFIX: usize = 47;

/// Reason why a name is invalid. The text is for the author of the name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct InvalidName(pub String);

fn invalid<T>(text: impl Into<String>) -> Result<T, InvalidName> {
    Err(InvalidName(text.into()))
}

/// A SPIFFE ID, for example `spiffe://example.org/ns/shop/sa/billing`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<str>);

impl SpiffeId {
    /// Parses a SPIFFE ID. It rejects an ID without a path, which is that of a trust domain and not
    /// of a workload.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if text.len() > MAX_SPIFFE_ID_BYTES {
            return invalid(format!(
                "a SPIFFE ID has at most {MAX_SPIFFE_ID_BYTES} bytes, this one {}",
                text.len()
            ));
        }
        let (domain, path) = split(text)?;
        if !is_trust_domain(domain) {
            return invalid(format!(
                "`{domain}` is not a trust domain name: use a-z, 0-9, '.', '-' and '_'"
            ));
        }
        if path.is_empty() {
            return invalid(
                "it names a trust domain, not a workload: add a path, as in spiffe://example.org/billing",
            );
        }
        if let Some(bad) = path.split('/').find(|segment| !is_path_segment(segment)) {
            return invalid(format!(
                "`{bad}` is not a path segment: use A-Z, a-z, 0-9, '.', '-' and '_', and not '' or '.' or '..' alone"
            ));
        }
        Ok(Self(Arc::from(text)))
    }

    /// Returns the whole ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the trust domain's name, for example `example.org`.
    pub fn trust_domain(&self) -> &str {
        split(&self.0).map_or("", |(domain, _)| domain)
    }

    /// Returns the path's segments, in order.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        split(&self.0).map_or("", |(_, path)| path).split('/')
    }
}

/// Splits `spiffe://domain/a/b` into (`domain`, `a/b`).
fn split(text: &str) -> Result<(&str, &str), InvalidName> {
    let Some(rest) = text.strip_prefix("spiffe://") else {
        return invalid("a SPIFFE ID begins with spiffe://");
    };
    Ok(rest.split_once('/').unwrap_or((rest, "")))
}

fn is_trust_domain(name: &str) -> bool {
    let allowed =
        |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_');
    (1..=MAX_TRUST_DOMAIN_BYTES).contains(&name.len()) && name.bytes().all(allowed)
}

fn is_path_segment(segment: &str) -> bool {
    !matches!(segment, "" | "." | "..") && segment.bytes().all(is_segment_character)
}

/// Returns true for `[A-Za-z0-9._-]`, the only characters of a path segment (SPIFFE-ID.md, section
/// 2.2).
fn is_segment_character(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_')
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Pattern of SPIFFE IDs: exact, or with `*` for one segment and a last `**` for one or more.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SpiffeIdPattern {
    text: String,
    domain: String,
    segments: Vec<PatternSegment>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum PatternSegment {
    Exact(String),
    One,
    Rest,
}

impl SpiffeIdPattern {
    /// Parses a pattern. The trust domain is always exact. `**` may only be the last segment.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if text.len() > MAX_SPIFFE_ID_BYTES {
            return invalid(format!(
                "a SPIFFE ID has at most {MAX_SPIFFE_ID_BYTES} bytes, this pattern {}",
                text.len()
            ));
        }
        let (domain, path) = split(text)?;
        if !is_trust_domain(domain) {
            return invalid(format!(
                "`{domain}` is not a trust domain name, and a pattern's trust domain has no wildcard"
            ));
        }
        if path.is_empty() {
            return invalid("a pattern needs a path, as in spiffe://example.org/ns/shop/sa/*");
        }
        let count = path.split('/').count();
        let mut segments = Vec::with_capacity(count);
        for (i, segment) in path.split('/').enumerate() {
            segments.push(match segment {
                "*" => PatternSegment::One,
                "**" if i + 1 == count => PatternSegment::Rest,
                "**" => return invalid("`**` stands for the rest of the path, so it can only be the last segment"),
                exact if is_path_segment(exact) => PatternSegment::Exact(exact.to_owned()),
                other => {
                    return invalid(format!(
                        "`{other}` is not a path segment; use `*` for a whole segment, `**` for the rest"
                    ));
                }
            });
        }
        Ok(Self {
            text: text.to_owned(),
            domain: domain.to_owned(),
            segments,
        })
    }

    /// Returns true if the pattern matches this ID.
    pub fn matches(&self, id: &SpiffeId) -> bool {
        if id.trust_domain() != self.domain {
            return false;
        }
        let mut requested = self.segments.iter();
        for segment in id.segments() {
            match requested.next() {
                Some(PatternSegment::Rest) => return true,
                Some(PatternSegment::One) => {}
                Some(PatternSegment::Exact(exact)) if exact == segment => {}
                Some(PatternSegment::Exact(_)) | None => return false,
            }
        }
        requested.next().is_none()
    }

    /// Returns the ID itself if the pattern has no wildcard.
    pub fn exact(&self) -> Option<SpiffeId> {
        self.segments
            .iter()
            .all(|part| matches!(part, PatternSegment::Exact(_)))
            .then(|| SpiffeId(Arc::from(self.text.as_str())))
    }

    /// Returns true if this pattern matches every ID that `other` matches.
    pub fn covers(&self, other: &Self) -> bool {
        let (mut own, mut others) = (self.segments.iter(), other.segments.iter());
        loop {
            match (own.next(), others.next()) {
                (Some(PatternSegment::Rest), Some(_)) | (None, None) => {
                    return self.domain == other.domain;
                }
                (
                    Some(PatternSegment::One),
                    Some(PatternSegment::One | PatternSegment::Exact(_)),
                ) => {}
                (Some(PatternSegment::Exact(one)), Some(PatternSegment::Exact(other)))
                    if one == other => {}
                _ => return false,
            }
        }
    }

    /// Returns true if the pattern has no fixed segment, as in `spiffe://example.org/**`.
    pub fn is_all_wildcards(&self) -> bool {
        !self
            .segments
            .iter()
            .any(|part| matches!(part, PatternSegment::Exact(_)))
    }

    /// Returns true if a `*` is open although a later segment decides, as in `ns/*/sa/billing`. A
    /// workload that can create the wildcard's part could then claim the later one (T13). A segment
    /// decides if it is a fixed last one, or a wildcard that the role's name depends on. `used` has
    /// the indices of the latter, and a `*` among them is not open.
    pub fn has_open_wildcard(&self, used: &[usize]) -> bool {
        let last = self.segments.len() - 1;
        let decides = |(index, part): (usize, &PatternSegment)| match part {
            PatternSegment::Exact(_) => index == last,
            PatternSegment::One => used.contains(&index),
            PatternSegment::Rest => used.iter().any(|used| *used >= index),
        };
        let is_open = |(index, part): (usize, &PatternSegment)| {
            *part == PatternSegment::One && !used.contains(&index)
        };
        let open = self.segments.iter().enumerate().position(is_open);
        open.is_some_and(|open| self.segments.iter().enumerate().skip(open + 1).any(decides))
    }

    /// Returns the minimum number of segments of an ID that matches.
    pub fn least_segments(&self) -> usize {
        self.segments.len()
    }

    /// Returns the trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.domain
    }

    /// Returns the pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Name of a role session, which CloudTrail shows.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SessionName(Arc<str>);

impl SessionName {
    /// Returns the name for a SPIFFE ID: its text without the scheme, each `/` as `=`.
    ///
    /// A name over 64 characters becomes the first 47, `=`, and 16 hex digits of the whole ID's
    /// SHA-256. An ID with a text of that form (16 hex digits as the last segment at that position)
    /// is shortened too. So no workload gets the name of another by the choice of its path. A
    /// SPIFFE ID does not contain `=`, so two IDs never share a name.
    pub fn of(id: &SpiffeId) -> Self {
        let id_text = id.as_str();
        let name = id_text
            .strip_prefix("spiffe://")
            .unwrap_or(id_text)
            .replace('/', "=");
        if name.len() <= *SESSION_NAME_LENGTH.end() && !has_shortened_form(&name) {
            return Self(name.into());
        }
        let digest = Sha256::digest(id.as_str().as_bytes());
        let tail: String = digest
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        // A SPIFFE ID is ASCII, so this cuts between characters.
        Self(format!("{}={tail}", &name[..SESSION_NAME_PREFIX]).into())
    }

    /// Parses a session name from the configuration.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if SESSION_NAME_LENGTH.contains(&text.len()) && text.bytes().all(is_iam_character) {
            return Ok(Self(Arc::from(text)));
        }
        invalid("a session name has 2 to 64 of the characters A-Z a-z 0-9 _ + = , . @ -")
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Returns true for `[\w+=,.@-]`, which IAM accepts in names of roles and sessions.
fn is_iam_character(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'+' | b'=' | b',' | b'.' | b'@' | b'-')
}

/// Returns true if a name has the form of a name that [`SessionName::of`] shortened.
fn has_shortened_form(name: &str) -> bool {
    let tail = (name.len() == *SESSION_NAME_LENGTH.end())
        .then(|| name[SESSION_NAME_PREFIX..].strip_prefix('='))
        .flatten();
    tail.is_some_and(|tail| tail.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')))
}

#[cfg(test)]
mod tests;
