//! The names that everything else is decided by: SPIFFE IDs, role ARNs, session names.
//!
//! Each is parsed once and valid from then on. Grammar of SPIFFE IDs: SPIFFE-ID.md, sections 2.1 to 2.3.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use thiserror::Error;

/// The longest SPIFFE ID that the standard asks implementations to support, in bytes.
const SPIFFE_ID_MAX: usize = 2048;
/// The longest trust domain name, in bytes.
const TRUST_DOMAIN_MAX: usize = 255;
/// STS: `RoleArn` has 20 to 2048 characters.
const ROLE_ARN_LENGTH: std::ops::RangeInclusive<usize> = 20..=2048;
/// IAM: the longest name of a role, without its path.
const ROLE_NAME_MAX: usize = 64;
/// STS: `RoleSessionName` has 2 to 64 characters of `[\w+=,.@-]`.
const SESSION_NAME_LENGTH: std::ops::RangeInclusive<usize> = 2..=64;
/// How much of a long SPIFFE ID stays readable in its session name, before `=` and 16 hex digits.
const SESSION_NAME_HEAD: usize = 47;

/// Why a name is not what it should be. The text is for whoever wrote the name.
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
    /// Parses a SPIFFE ID; an ID without a path (that of a trust domain itself) names no workload and is refused.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if text.len() > SPIFFE_ID_MAX {
            return invalid(format!("a SPIFFE ID has at most {SPIFFE_ID_MAX} bytes, this one {}", text.len()));
        }
        let (domain, path) = split(text)?;
        if !is_trust_domain(domain) {
            return invalid(format!("`{domain}` is no trust domain name: it takes a-z, 0-9, '.', '-' and '_'"));
        }
        if path.is_empty() {
            return invalid("it names a trust domain, not a workload: add a path, as in spiffe://example.org/billing");
        }
        if let Some(bad) = path.split('/').find(|segment| !is_path_segment(segment)) {
            return invalid(format!(
                "`{bad}` is no path segment: it takes A-Z, a-z, 0-9, '.', '-' and '_', and is not empty, '.' or '..'"
            ));
        }
        Ok(Self(Arc::from(text)))
    }

    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The trust domain's name, for example `example.org`.
    pub fn trust_domain(&self) -> &str {
        split(&self.0).map_or("", |(domain, _)| domain)
    }

    /// The path's segments, in order.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        split(&self.0).map_or("", |(_, path)| path).split('/')
    }
}

/// `spiffe://domain/a/b` as (`domain`, `a/b`).
fn split(text: &str) -> Result<(&str, &str), InvalidName> {
    let Some(rest) = text.strip_prefix("spiffe://") else {
        return invalid("a SPIFFE ID begins with spiffe://");
    };
    Ok(rest.split_once('/').unwrap_or((rest, "")))
}

fn is_trust_domain(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_');
    (1..=TRUST_DOMAIN_MAX).contains(&name.len()) && name.bytes().all(allowed)
}

fn is_path_segment(segment: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-' | b'_');
    !matches!(segment, "" | "." | "..") && segment.bytes().all(allowed)
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

/// Which SPIFFE IDs a role is for: exact, or with `*` for one segment and a last `**` for one or more.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SpiffeIdPattern {
    text: String,
    domain: String,
    segments: Vec<Part>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Part {
    Exact(String),
    One,
    Rest,
}

impl SpiffeIdPattern {
    /// Parses a pattern. The trust domain is always exact; `**` is allowed as the last segment only.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if text.len() > SPIFFE_ID_MAX {
            return invalid(format!("a SPIFFE ID has at most {SPIFFE_ID_MAX} bytes, this pattern {}", text.len()));
        }
        let (domain, path) = split(text)?;
        if !is_trust_domain(domain) {
            return invalid(format!(
                "`{domain}` is no trust domain name, and a pattern's trust domain has no wildcard"
            ));
        }
        if path.is_empty() {
            return invalid("a pattern needs a path, as in spiffe://example.org/ns/shop/sa/*");
        }
        let count = path.split('/').count();
        let mut segments = Vec::with_capacity(count);
        for (i, segment) in path.split('/').enumerate() {
            segments.push(match segment {
                "*" => Part::One,
                "**" if i + 1 == count => Part::Rest,
                "**" => return invalid("`**` stands for the rest of the path, so it can only be the last segment"),
                exact if is_path_segment(exact) => Part::Exact(exact.to_owned()),
                other => {
                    return invalid(format!(
                        "`{other}` is no path segment; `*` stands for a whole segment, `**` for the rest"
                    ));
                }
            });
        }
        Ok(Self { text: text.to_owned(), domain: domain.to_owned(), segments })
    }

    /// Whether the pattern covers this ID.
    pub fn matches(&self, id: &SpiffeId) -> bool {
        if id.trust_domain() != self.domain {
            return false;
        }
        let mut wanted = self.segments.iter();
        for segment in id.segments() {
            match wanted.next() {
                Some(Part::Rest) => return true,
                Some(Part::One) => {}
                Some(Part::Exact(exact)) if exact == segment => {}
                Some(Part::Exact(_)) | None => return false,
            }
        }
        wanted.next().is_none()
    }

    /// The ID itself, where the pattern has no wildcard.
    pub fn exact(&self) -> Option<SpiffeId> {
        self.segments.iter().all(|part| matches!(part, Part::Exact(_))).then(|| SpiffeId(Arc::from(self.text.as_str())))
    }

    /// Whether a wildcard stands before a fixed last segment, as in `ns/*/sa/billing`: whoever can create the
    /// wildcard's part can then claim the last one (attack 13).
    pub fn wildcard_before_fixed_end(&self) -> bool {
        matches!(self.segments.last(), Some(Part::Exact(_))) && self.segments.contains(&Part::One)
    }

    /// How many segments every ID that matches has at least.
    pub fn least_segments(&self) -> usize {
        self.segments.len()
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.domain
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// The ARN of a role to assume. Any partition and service: S3-compatible systems have ARNs of their own.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RoleArn(Arc<str>);

impl RoleArn {
    /// Parses `arn:<partition>:<service>:<region>:<account>:role/<name>`.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if !ROLE_ARN_LENGTH.contains(&text.len()) {
            return invalid(format!("a role ARN has 20 to 2048 characters, this one {}", text.len()));
        }
        if !text.bytes().all(|c| c.is_ascii_graphic()) {
            return invalid("a role ARN has no spaces and no characters outside ASCII");
        }
        let parts: Vec<&str> = text.splitn(6, ':').collect();
        let [arn, partition, service, region, account, resource] = parts[..] else {
            return invalid("a role ARN has six parts, as in arn:aws:iam::123456789012:role/billing");
        };
        let name = resource.strip_prefix("role/").unwrap_or_default();
        if arn != "arn" || partition.is_empty() || service.is_empty() || name.is_empty() {
            return invalid("it is not of the form arn:aws:iam::123456789012:role/billing");
        }
        if partition.starts_with("aws") {
            let is_account = account.len() == 12 && account.bytes().all(|c| c.is_ascii_digit());
            if service != "iam" || !region.is_empty() || !is_account {
                return invalid("an AWS role's ARN is arn:aws:iam::<12 digits>:role/<name>");
            }
            if !is_aws_role_name(name.rsplit('/').next().unwrap_or_default()) {
                return invalid("an AWS role's name has 1 to 64 of the characters A-Z a-z 0-9 _ + = , . @ -");
            }
        }
        Ok(Self(Arc::from(text)))
    }

    /// The whole ARN.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The account's number, where the ARN has one.
    pub fn account(&self) -> Option<&str> {
        self.0.split(':').nth(4).filter(|account| !account.is_empty())
    }

    /// Whether it is a role at AWS, in any of its partitions.
    pub fn is_aws(&self) -> bool {
        self.0.split(':').nth(1).is_some_and(|partition| partition.starts_with("aws"))
    }
}

fn is_aws_role_name(name: &str) -> bool {
    (1..=ROLE_NAME_MAX).contains(&name.len()) && name.bytes().all(is_iam_character)
}

/// `[\w+=,.@-]`, which IAM takes in names of roles and sessions.
fn is_iam_character(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'+' | b'=' | b',' | b'.' | b'@' | b'-')
}

impl fmt::Display for RoleArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A role ARN in which `{path[N]}` stands for the Nth segment (from 0) of the caller's SPIFFE ID.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ArnTemplate {
    text: String,
    /// None where `whole` is there.
    pieces: Vec<Piece>,
    /// The ARN itself, where it is the same for all.
    whole: Option<RoleArn>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Piece {
    Text(String),
    Segment(usize),
}

impl ArnTemplate {
    /// Parses a template; one without `{path[N]}` has to be a role ARN as it stands.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let Some((name, behind)) = after.split_once('}') else {
                return invalid("a `{` is not closed");
            };
            let digits = name.strip_prefix("path[").and_then(|rest| rest.strip_suffix(']'));
            // `parse` would also take a sign.
            let digits = digits.filter(|digits| digits.bytes().all(|c| c.is_ascii_digit()));
            let Some(index) = digits.and_then(|digits| digits.parse().ok()) else {
                return invalid(format!(
                    "`{{{name}}}` is not known; {{path[0]}} stands for the first segment of the SPIFFE ID's path"
                ));
            };
            pieces.extend([Piece::Text(before.to_owned()), Piece::Segment(index)]);
            rest = behind;
        }
        pieces.push(Piece::Text(rest.to_owned()));
        let template = Self { text: text.to_owned(), pieces, whole: None };
        // Whatever a segment holds, the shape must be an ARN's.
        let arn = RoleArn::parse(&template.fill(|_| Some("x")).unwrap_or_default())?;
        Ok(if template.highest_segment().is_some() { template } else { Self::fixed(&arn) })
    }

    /// This ARN for every ID: whatever is in it stands for itself, braces too.
    pub fn fixed(arn: &RoleArn) -> Self {
        Self { text: arn.as_str().to_owned(), pieces: Vec::new(), whole: Some(arn.clone()) }
    }

    /// The ARN for this ID; `None` where a segment is missing or the result is too long.
    pub fn render(&self, id: &SpiffeId) -> Option<RoleArn> {
        if let Some(arn) = &self.whole {
            return Some(arn.clone());
        }
        let arn = self.fill(|index| id.segments().nth(index))?;
        RoleArn::parse(&arn).ok()
    }

    fn fill<'a>(&'a self, segment: impl Fn(usize) -> Option<&'a str>) -> Option<String> {
        self.pieces
            .iter()
            .map(|piece| match piece {
                Piece::Text(text) => Some(text.as_str()),
                Piece::Segment(index) => segment(*index),
            })
            .collect()
    }

    /// The highest segment that is referred to, if any is.
    pub fn highest_segment(&self) -> Option<usize> {
        self.pieces
            .iter()
            .filter_map(|piece| match piece {
                Piece::Segment(index) => Some(*index),
                Piece::Text(_) => None,
            })
            .max()
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// What CloudTrail shows as the role session's name.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SessionName(Arc<str>);

impl SessionName {
    /// The name for a SPIFFE ID: its text without the scheme, each `/` as `=`.
    ///
    /// Over 64 characters: the first 47, `=`, and 16 hex digits of the whole ID's SHA-256. An ID whose own text would
    /// read like that (its last segment has 16 hex digits in just this place) is shortened, too, so that nobody gets
    /// the name of another by choosing his path. No SPIFFE ID contains `=`, so two IDs never share a name.
    pub fn of(id: &SpiffeId) -> Self {
        let id_text = id.as_str();
        let name = id_text.strip_prefix("spiffe://").unwrap_or(id_text).replace('/', "=");
        if name.len() <= *SESSION_NAME_LENGTH.end() && !reads_as_shortened(&name) {
            return Self(name.into());
        }
        let digest = Sha256::digest(id.as_str().as_bytes());
        let tail: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        // A SPIFFE ID is ASCII, so this cuts between characters.
        Self(format!("{}={tail}", &name[..SESSION_NAME_HEAD]).into())
    }

    /// A name from the configuration.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if SESSION_NAME_LENGTH.contains(&text.len()) && text.bytes().all(is_iam_character) {
            return Ok(Self(Arc::from(text)));
        }
        invalid("a session name has 2 to 64 of the characters A-Z a-z 0-9 _ + = , . @ -")
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a name has the form that [`SessionName::of`] gives long ones.
fn reads_as_shortened(name: &str) -> bool {
    let tail =
        (name.len() == *SESSION_NAME_LENGTH.end()).then(|| name[SESSION_NAME_HEAD..].strip_prefix('=')).flatten();
    tail.is_some_and(|tail| tail.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')))
}

#[cfg(test)]
mod tests;
