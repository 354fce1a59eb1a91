//! Limits of STS for the parameters of its calls. They are checked when the configuration is read,
//! as far as a parameter is constant, and before each call.
//!
//! Source: AWS Security Token Service API Reference, version 2011-06-15, `AssumeRole`.

use crate::identity::{InvalidName, SessionName};

/// Maximum length of `Policy`, in characters.
pub const MAX_POLICY_CHARS: usize = 2048;
/// Maximum number of `PolicyArns`.
pub const MAX_POLICY_ARNS: usize = 10;
/// Maximum number of `Tags`, and of `TransitiveTagKeys`.
pub const MAX_TAGS: usize = 50;
/// Maximum length of a tag's key, in characters.
const MAX_TAG_KEY_CHARS: usize = 128;
/// Maximum length of a tag's value, in characters.
pub const MAX_TAG_VALUE_CHARS: usize = 256;
/// Length of `ExternalId`, in characters.
const EXTERNAL_ID_CHARS: std::ops::RangeInclusive<usize> = 2..=1224;
/// Length of a policy's ARN, in characters.
const POLICY_ARN_CHARS: std::ops::RangeInclusive<usize> = 20..=2048;

/// Result of a check. The error is for the author of the configuration.
pub type LimitResult = Result<(), InvalidName>;

fn invalid(text: impl Into<String>) -> LimitResult {
    Err(InvalidName(text.into()))
}

/// Returns whether keys and values of tags may have this character:
/// `[\p{L}\p{Z}\p{N}_.:/=+\-@]`.
///
/// Outside ASCII it also accepts the marks of some scripts, which STS rejects with its own error.
fn is_tag_character(c: char) -> bool {
    let is_separator = !c.is_ascii() && c.is_whitespace() && !c.is_control();
    c.is_alphanumeric()
        || is_separator
        || matches!(c, ' ' | '_' | '.' | ':' | '/' | '=' | '+' | '-' | '@')
}

fn check_tag_text(text: &str, max_chars: usize) -> LimitResult {
    let length = text.chars().count();
    if length > max_chars {
        return invalid(format!(
            "STS takes at most {max_chars} characters here, these are {length}"
        ));
    }
    match text.chars().find(|c| !is_tag_character(*c)) {
        Some(c) => invalid(format!(
            "a tag cannot have {c:?}; use letters, digits, spaces and _ . : / = + - @"
        )),
        None => Ok(()),
    }
}

/// Checks the key of a tag.
pub fn check_tag_key(key: &str) -> LimitResult {
    if key.is_empty() {
        return invalid("the key of a tag is empty");
    }
    if key.to_ascii_lowercase().starts_with("aws:") {
        return invalid("keys that begin with aws: are AWS's own");
    }
    check_tag_text(key, MAX_TAG_KEY_CHARS)
}

/// Checks the value of a tag, which may be empty.
pub fn check_tag_value(value: &str) -> LimitResult {
    check_tag_text(value, MAX_TAG_VALUE_CHARS)
}

/// Checks a source identity, which has the form of a session name.
pub fn check_source_identity(text: &str) -> LimitResult {
    match SessionName::parse(text) {
        Ok(_) if text.to_ascii_lowercase().starts_with("aws:") => {
            invalid("source identities that begin with aws: are AWS's own")
        }
        Ok(_) => Ok(()),
        Err(_) => {
            invalid("a source identity has 2 to 64 of the characters A-Z a-z 0-9 _ + = , . @ -")
        }
    }
}

/// Checks an external ID.
pub fn check_external_id(text: &str) -> LimitResult {
    let is_allowed = |c: u8| {
        c.is_ascii_alphanumeric()
            || matches!(
                c,
                b'_' | b'+' | b'=' | b',' | b'.' | b'@' | b':' | b'/' | b'-'
            )
    };
    if EXTERNAL_ID_CHARS.contains(&text.len()) && text.bytes().all(is_allowed) {
        return Ok(());
    }
    invalid("an external ID has 2 to 1224 of the characters A-Z a-z 0-9 _ + = , . @ : / -")
}

/// Checks the length and the characters of a session policy.
pub fn check_policy(text: &str) -> LimitResult {
    if let Some(c) = text.chars().find(|c| *c > '\u{ff}') {
        return invalid(format!(
            "a session policy cannot have {c:?}; write it as a JSON escape"
        ));
    }
    let length = text.chars().count();
    if length > MAX_POLICY_CHARS {
        return invalid(format!(
            "a session policy has at most {MAX_POLICY_CHARS} characters, this one {length}"
        ));
    }
    Ok(())
}

/// Checks the ARN of a managed policy, as far as every STS has the same rules.
pub fn check_policy_arn(text: &str) -> LimitResult {
    if (1..=*POLICY_ARN_CHARS.end()).contains(&text.len())
        && text.bytes().all(|c| c.is_ascii_graphic())
    {
        return Ok(());
    }
    invalid("it is not the ARN of a policy")
}

/// Returns whether this is the ARN of a managed policy at AWS.
pub fn is_aws_policy_arn(text: &str) -> bool {
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    let name = match parts[..] {
        ["arn", _, _, _, _, resource] => resource.strip_prefix("policy/"),
        _ => None,
    };
    name.is_some_and(|name| !name.is_empty())
        && POLICY_ARN_CHARS.contains(&text.len())
        && check_policy_arn(text).is_ok()
}
