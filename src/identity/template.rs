//! Templates: texts in which placeholders stand for parts of a SPIFFE ID, and for facts about a
//! caller that awsvid attested.
//!
//! A value is inserted once and never parsed as a template, so a value cannot name another one.

use std::fmt;
use std::sync::Arc;

use super::{InvalidName, SpiffeId, invalid, is_iam_character, is_segment_character};

/// A fact about a caller that awsvid attested itself. Nothing that the author of a pod writes is
/// one, such as its labels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AttestedFact {
    /// The UID of the caller's pod, from its cgroup.
    PodUid,
    /// The outermost systemd unit of the caller's cgroup that is not a slice.
    SystemdUnit,
    /// The name of the caller's user in `/etc/passwd`, for callers outside containers.
    User,
}

impl AttestedFact {
    /// All facts, in their order in documents.
    pub const ALL: [Self; 3] = [Self::PodUid, Self::SystemdUnit, Self::User];

    fn name(self) -> &'static str {
        match self {
            Self::PodUid => "pod_uid",
            Self::SystemdUnit => "systemd_unit",
            Self::User => "user",
        }
    }
}

/// The attested facts of one caller, as far as they are known and needed.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub struct AttestedFacts {
    /// The value of [`AttestedFact::PodUid`], if the caller is in a pod.
    pub pod_uid: Option<Arc<str>>,
    /// The value of [`AttestedFact::SystemdUnit`], if the caller is in a unit.
    pub systemd_unit: Option<Arc<str>>,
    /// The value of [`AttestedFact::User`], if the caller has one.
    pub user: Option<Arc<str>>,
}

impl AttestedFacts {
    /// Returns the value of a fact, if it is known.
    pub fn get(&self, fact: AttestedFact) -> Option<&str> {
        match fact {
            AttestedFact::PodUid => self.pod_uid.as_deref(),
            AttestedFact::SystemdUnit => self.systemd_unit.as_deref(),
            AttestedFact::User => self.user.as_deref(),
        }
    }

    /// Returns only these facts.
    pub fn only(&self, facts: &[AttestedFact]) -> Self {
        let used = |fact| facts.contains(&fact);
        Self {
            pod_uid: self.pod_uid.clone().filter(|_| used(AttestedFact::PodUid)),
            systemd_unit: self
                .systemd_unit
                .clone()
                .filter(|_| used(AttestedFact::SystemdUnit)),
            user: self.user.clone().filter(|_| used(AttestedFact::User)),
        }
    }
}

/// Returns whether a fact may have this character. The others would have a meaning in a policy,
/// such as `*`, `?` and `$`, or would not be allowed in a tag.
fn is_fact_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '@' | ':' | '\\' | '+')
}

/// A value that a template refers to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Placeholder {
    /// A segment of the SPIFFE ID's path, from 0.
    Segment(usize),
    /// The trust domain's name.
    TrustDomain,
    /// The whole SPIFFE ID.
    SpiffeId,
    /// The name of the first session, which is made from the SPIFFE ID unless it is configured.
    SessionName,
    /// A fact about the caller.
    Fact(AttestedFact),
}

impl fmt::Display for Placeholder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(index) => write!(f, "{{path[{index}]}}"),
            Self::TrustDomain => f.write_str("{trust_domain}"),
            Self::SpiffeId => f.write_str("{spiffe_id}"),
            Self::SessionName => f.write_str("{session_name}"),
            Self::Fact(fact) => write!(f, "{{{}}}", fact.name()),
        }
    }
}

impl Placeholder {
    /// Parses the name between the braces.
    fn parse(name: &str) -> Option<Self> {
        let digits = name
            .strip_prefix("path[")
            .and_then(|rest| rest.strip_suffix(']'));
        if let Some(digits) = digits {
            // `parse` would also accept a sign.
            let is_number = digits.bytes().all(|c| c.is_ascii_digit());
            return digits.parse().ok().filter(|_| is_number).map(Self::Segment);
        }
        match name {
            "trust_domain" => Some(Self::TrustDomain),
            "spiffe_id" => Some(Self::SpiffeId),
            "session_name" => Some(Self::SessionName),
            _ => AttestedFact::ALL
                .into_iter()
                .find(|fact| fact.name() == name)
                .map(Self::Fact),
        }
    }

    /// Returns whether it is a fact about the caller.
    pub fn is_fact(self) -> bool {
        matches!(self, Self::Fact(_))
    }

    /// Returns a value with each kind of character that every value has.
    fn example(self) -> &'static str {
        match self {
            Self::Segment(_) | Self::TrustDomain | Self::Fact(AttestedFact::User) => "xx",
            Self::SpiffeId => "spiffe://x/x",
            Self::SessionName => "x=x",
            Self::Fact(AttestedFact::PodUid) => "00000000-0000-0000-0000-000000000000",
            Self::Fact(AttestedFact::SystemdUnit) => "x.service",
        }
    }

    /// Returns whether a value may have this character.
    fn may_contain(self, c: char) -> bool {
        let by_byte = |is_allowed: fn(u8) -> bool| u8::try_from(c).is_ok_and(is_allowed);
        match self {
            Self::Segment(_) | Self::TrustDomain => by_byte(is_segment_character),
            Self::SpiffeId => by_byte(is_segment_character) || matches!(c, ':' | '/'),
            Self::SessionName => by_byte(is_iam_character),
            Self::Fact(_) => is_fact_character(c),
        }
    }
}

/// The values for one caller.
#[derive(Clone, Copy, Debug)]
pub struct TemplateValues<'a> {
    /// The SPIFFE ID of the caller.
    pub id: &'a SpiffeId,
    /// The name of the first session.
    pub session_name: &'a str,
    /// The facts about the caller.
    pub facts: &'a AttestedFacts,
}

impl<'a> TemplateValues<'a> {
    fn get(&self, placeholder: Placeholder) -> Result<&'a str, InvalidName> {
        let value = match placeholder {
            Placeholder::Segment(index) => self.id.segments().nth(index),
            Placeholder::TrustDomain => Some(self.id.trust_domain()),
            Placeholder::SpiffeId => Some(self.id.as_str()),
            Placeholder::SessionName => Some(self.session_name),
            Placeholder::Fact(fact) => self.facts.get(fact),
        };
        let Some(value) = value else {
            return invalid(format!("{placeholder} has no value for this caller"));
        };
        let is_fact = matches!(placeholder, Placeholder::Fact(_));
        if is_fact && !value.chars().all(is_fact_character) {
            return invalid(format!(
                "the value of {placeholder} has a character other than A-Z a-z 0-9 _ . - @ : \\ +"
            ));
        }
        Ok(value)
    }
}

/// A text with placeholders.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Template {
    text: String,
    parts: Vec<TemplatePart>,
    is_json: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum TemplatePart {
    Text(String),
    Value(Placeholder),
}

impl Template {
    /// Parses a text in which each `{` begins a placeholder.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (placeholder, tail) = placeholder(after)?;
            parts.extend([
                TemplatePart::Text(before.to_owned()),
                TemplatePart::Value(placeholder),
            ]);
            rest = tail;
        }
        parts.push(TemplatePart::Text(rest.to_owned()));
        Ok(Self {
            text: text.to_owned(),
            parts,
            is_json: false,
        })
    }

    /// Parses a JSON text, in which a `{` begins a placeholder only within a string. `${...}` there
    /// is a variable of IAM and stays. The caller has to check that the text is JSON.
    pub fn parse_json(text: &str) -> Result<Self, InvalidName> {
        let mut parts = Vec::new();
        let (mut in_string, mut before, mut at) = (false, 0, 0);
        while let Some(c) = text[at..].chars().next() {
            let after = at + c.len_utf8();
            at = match c {
                '"' => {
                    in_string = !in_string;
                    after
                }
                '\\' if in_string => after + text[after..].chars().next().map_or(0, char::len_utf8),
                '$' if in_string && text[after..].starts_with('{') => text[after..]
                    .find('}')
                    .map_or(text.len(), |end| after + end),
                '{' if in_string => {
                    let (placeholder, tail) = placeholder(&text[after..])?;
                    parts.push(TemplatePart::Text(text[before..at].to_owned()));
                    parts.push(TemplatePart::Value(placeholder));
                    before = text.len() - tail.len();
                    before
                }
                _ => after,
            };
        }
        parts.push(TemplatePart::Text(text[before..].to_owned()));
        Ok(Self {
            text: text.to_owned(),
            parts,
            is_json: true,
        })
    }

    /// Fails if two callers with different values could get one text, since the value before a
    /// separator could contain the separator. `{path[1]}-{path[3]}` renders one text for
    /// `shop-prod/billing` and `shop/prod-billing` (T36).
    pub fn check_separators(&self) -> Result<(), InvalidName> {
        for between in self.parts.windows(3) {
            let [
                TemplatePart::Value(one),
                TemplatePart::Text(text),
                TemplatePart::Value(other),
            ] = between
            else {
                continue;
            };
            // A role has one trust domain.
            if *one != Placeholder::TrustDomain && text.chars().all(|c| one.may_contain(c)) {
                return invalid(format!(
                    "two SPIFFE IDs could give one value, since {one} can hold everything that stands between {one} \
                     and {other}; put a `=`, `,` or `/` between them, whichever may stand here"
                ));
            }
        }
        Ok(())
    }

    /// Returns the first placeholder next to a wildcard of IAM, such as `{path[1]}*`. It covers the
    /// values of other callers too: `shop*` covers `shop-prod`.
    pub fn widened(&self) -> Option<Placeholder> {
        let is_wildcard = |c: Option<char>| matches!(c, Some('*' | '?'));
        let mut adjacent = self.parts.windows(2).filter_map(|pair| match pair {
            [TemplatePart::Value(value), TemplatePart::Text(text)] => {
                is_wildcard(text.chars().next()).then_some(*value)
            }
            [TemplatePart::Text(text), TemplatePart::Value(value)] => {
                is_wildcard(text.chars().next_back()).then_some(*value)
            }
            _ => None,
        });
        adjacent.find(|value| *value != Placeholder::TrustDomain)
    }

    /// Renders the text for these values. Fails if one has no value, or one that is not allowed.
    pub fn render(&self, values: &TemplateValues<'_>) -> Result<String, InvalidName> {
        let mut text = String::with_capacity(self.text.len());
        for part in &self.parts {
            match part {
                TemplatePart::Text(part) => text.push_str(part),
                // The other characters of values are the same in JSON.
                TemplatePart::Value(value) if self.is_json => {
                    text.push_str(&values.get(*value)?.replace('\\', "\\\\"));
                }
                TemplatePart::Value(value) => text.push_str(values.get(*value)?),
            }
        }
        Ok(text)
    }

    /// Renders the text with a short value for each placeholder, to check its form.
    pub fn example(&self) -> String {
        let part = |part: &'_ TemplatePart| match part {
            TemplatePart::Text(text) => text.clone(),
            TemplatePart::Value(value) => value.example().to_owned(),
        };
        self.parts.iter().map(part).collect()
    }

    pub(super) fn parts(&self) -> &[TemplatePart] {
        &self.parts
    }

    /// Returns the placeholders, in the order of the text.
    pub fn placeholders(&self) -> impl Iterator<Item = Placeholder> {
        self.parts.iter().filter_map(|part| match part {
            TemplatePart::Value(value) => Some(*value),
            TemplatePart::Text(_) => None,
        })
    }

    /// Returns true if the text is the same for every caller of one role with one trust domain.
    pub fn is_constant(&self) -> bool {
        self.placeholders()
            .all(|value| value == Placeholder::TrustDomain)
    }

    /// Returns the template as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Parses the rest of a placeholder after its `{`. Returns it with the text after its `}`.
fn placeholder(after: &str) -> Result<(Placeholder, &str), InvalidName> {
    let Some((name, tail)) = after.split_once('}') else {
        return invalid("a `{` is not closed");
    };
    match Placeholder::parse(name) {
        Some(placeholder) => Ok((placeholder, tail)),
        None => invalid(format!(
            "`{{{name}}}` is not known; known are {{path[0]}} for the first segment of the SPIFFE ID's path, \
             {{trust_domain}}, {{spiffe_id}}, {{session_name}}, {{pod_uid}}, {{systemd_unit}} and {{user}}"
        )),
    }
}

#[cfg(test)]
mod tests;
