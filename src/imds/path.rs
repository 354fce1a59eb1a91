//! The paths of the instance metadata service that the daemon serves.

/// The longest name of a role in bytes, as in the configuration.
const MAX_ROLE_NAME_BYTES: usize = 64;
/// The most segments of a path that is served.
const MAX_SEGMENTS: usize = 5;

/// A path of the instance metadata service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetadataPath<'a> {
    /// `api/token`: a new metadata token.
    Token,
    /// `meta-data/iam/security-credentials`: the name of the caller's first role.
    RoleName,
    /// The name of a role below that, or below `security-credentials-extended`.
    Role {
        /// The name, which may be unknown.
        name: &'a str,
        /// Whether the answer has the account.
        extended: bool,
    },
    /// `meta-data/placement/region`: the region of the caller's first role.
    Region,
    /// `meta-data/placement/availability-zone`: a zone of that region.
    Zone,
    /// `dynamic/instance-identity/document`: a document with that region.
    Document,
    /// A path that the daemon does not serve.
    Unknown,
}

impl<'a> MetadataPath<'a> {
    /// Parses a path as it came. SDKs double its slashes, and end it with one or none. No name of a
    /// path that is served has a character to encode.
    pub fn parse(path: &'a str, query: Option<&str>) -> Self {
        // Some clients write the `?` also without a parameter.
        if !path.starts_with('/') || query.is_some_and(|query| !query.is_empty()) {
            return Self::Unknown;
        }
        let segments = path.split('/').filter(|segment| !segment.is_empty());
        let segments: Vec<&str> = segments.take(MAX_SEGMENTS + 1).collect();
        match segments[..] {
            ["latest", "api", "token"] => Self::Token,
            ["latest", "meta-data", "iam", list] if extends(list).is_some() => Self::RoleName,
            ["latest", "meta-data", "iam", list, name] if is_role_name(name) => {
                extends(list).map_or(Self::Unknown, |extended| Self::Role { name, extended })
            }
            ["latest", "meta-data", "placement", "region"] => Self::Region,
            ["latest", "meta-data", "placement", "availability-zone"] => Self::Zone,
            ["latest", "dynamic", "instance-identity", "document"] => Self::Document,
            _ => Self::Unknown,
        }
    }
}

/// Returns whether a list of roles is the one with the account; `None` if it is not a list.
fn extends(list: &str) -> Option<bool> {
    match list {
        "security-credentials" => Some(false),
        "security-credentials-extended" => Some(true),
        _ => None,
    }
}

fn is_role_name(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-' | b'~');
    name.len() <= MAX_ROLE_NAME_BYTES && name.bytes().all(allowed) && !matches!(name, "." | "..")
}

/// Returns whether a path belongs to the instance metadata service, whether or not it is served.
pub fn is_metadata(path: &str) -> bool {
    let below = path.trim_start_matches('/').strip_prefix("latest");
    path.starts_with('/') && below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests;
