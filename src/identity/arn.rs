//! Names of roles: ARNs at AWS, any text at another STS.

use std::fmt;
use std::sync::Arc;

use super::template::{AttestedFacts, Placeholder, Template, TemplatePart, TemplateValues};
use super::{InvalidName, SpiffeId, invalid, is_iam_character};

/// Length of `RoleArn` at STS, in characters.
const ARN_LENGTH: std::ops::RangeInclusive<usize> = 20..=2048;
/// Maximum length of an IAM role's name, without its path.
const MAX_ROLE_NAME: usize = 64;

/// Name of a role, as in the parameter `RoleArn`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RoleArn(Arc<str>);

impl RoleArn {
    /// Parses the ARN of a role at AWS, `arn:<partition>:iam::<12 digits>:role/<name>`, in any
    /// partition.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if !ARN_LENGTH.contains(&text.len()) {
            return invalid(format!(
                "a role ARN has 20 to 2048 characters, this one {}",
                text.len()
            ));
        }
        if !is_printable(text) {
            return invalid("a role ARN has no spaces and no characters outside ASCII");
        }
        let parts: Vec<&str> = text.splitn(6, ':').collect();
        let [arn, partition, service, region, account, resource] = parts[..] else {
            return invalid(
                "a role ARN has six parts, as in arn:aws:iam::123456789012:role/billing",
            );
        };
        let name = resource.strip_prefix("role/").unwrap_or_default();
        if arn != "arn" || partition.is_empty() || service.is_empty() || name.is_empty() {
            return invalid("it is not of the form arn:aws:iam::123456789012:role/billing");
        }
        if !partition.starts_with("aws") {
            return invalid(format!("AWS has no roles in a partition `{partition}`"));
        }
        let is_account = account.len() == 12 && account.bytes().all(|c| c.is_ascii_digit());
        if service != "iam" || !region.is_empty() || !is_account {
            return invalid("an AWS role's ARN is arn:aws:iam::<12 digits>:role/<name>");
        }
        if !is_aws_role_name(name.rsplit('/').next().unwrap_or_default()) {
            return invalid(
                "an AWS role's name has 1 to 64 of the characters A-Z a-z 0-9 _ + = , . @ -",
            );
        }
        Ok(Self(Arc::from(text)))
    }

    /// Accepts the name of a role at an STS outside AWS unchanged. It has 1 to 2048 printable ASCII
    /// characters and no space, so that logs and audit records show it unchanged.
    pub fn opaque(text: &str) -> Result<Self, InvalidName> {
        if text.is_empty() || text.len() > *ARN_LENGTH.end() {
            return invalid(format!(
                "the name of a role has 1 to {} characters, this one {}",
                ARN_LENGTH.end(),
                text.len()
            ));
        }
        if !is_printable(text) {
            return invalid("the name of a role has no spaces and no characters outside ASCII");
        }
        Ok(Self(Arc::from(text)))
    }

    /// Returns the whole name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the number of the AWS account, or `None` if this is not the ARN of a role at AWS.
    pub fn account(&self) -> Option<&str> {
        self.is_aws().then(|| self.0.split(':').nth(4)).flatten()
    }

    /// Returns the AWS partition, or `None` if this is not the ARN of a role at AWS.
    pub fn partition(&self) -> Option<&str> {
        self.is_aws().then(|| self.0.split(':').nth(1)).flatten()
    }

    /// Returns true if this has the form of a role's ARN at AWS, in any partition. Another STS may
    /// use that form too.
    pub fn is_aws(&self) -> bool {
        Self::parse(&self.0).is_ok()
    }
}

fn is_printable(text: &str) -> bool {
    text.bytes().all(|c| c.is_ascii_graphic())
}

fn is_aws_role_name(name: &str) -> bool {
    (1..=MAX_ROLE_NAME).contains(&name.len()) && name.bytes().all(is_iam_character)
}

impl fmt::Display for RoleArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Template of a role's name, in which `{path[N]}` stands for segment N (from 0) of the caller's
/// SPIFFE ID, and `{trust_domain}` for its trust domain.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ArnTemplate {
    text: String,
    kind: TemplateKind,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum TemplateKind {
    /// The same name for every ID.
    Fixed(RoleArn),
    Rendered(Template, ArnNameRules),
}

/// The names that a template may render.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum ArnNameRules {
    Aws,
    Opaque,
}

impl ArnNameRules {
    fn parse(self, text: &str) -> Result<RoleArn, InvalidName> {
        match self {
            Self::Aws => RoleArn::parse(text),
            Self::Opaque => RoleArn::opaque(text),
        }
    }
}

impl ArnTemplate {
    /// Parses a template for roles at AWS. Without a placeholder it has to be a role's ARN.
    ///
    /// SPIFFE IDs that differ in these segments never render the same ARN. So two placeholders need
    /// a character between them that a segment cannot have (T36).
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let template = Self::read(text, ArnNameRules::Aws)?;
        match &template.kind {
            TemplateKind::Rendered(template, _) if !is_after_role(template) => {
                invalid("a {path[N]} can only follow `role/`; move it into the role's name")
            }
            _ => Ok(template),
        }
    }

    /// Parses a template for roles at an STS outside AWS, which accepts any name.
    pub fn opaque(text: &str) -> Result<Self, InvalidName> {
        Self::read(text, ArnNameRules::Opaque)
    }

    fn read(text: &str, names: ArnNameRules) -> Result<Self, InvalidName> {
        let template = Template::parse(text)?;
        let is_of_path = |value: &Placeholder| {
            matches!(value, Placeholder::Segment(_) | Placeholder::TrustDomain)
        };
        if let Some(other) = template.placeholders().find(|value| !is_of_path(value)) {
            return invalid(format!(
                "{other} cannot be part of a role's name; use {{path[N]}} and {{trust_domain}}"
            ));
        }
        if let Err(InvalidName(error)) = template.check_separators() {
            return invalid(error.replace("one value", "one role"));
        }
        // The form must be valid for every segment.
        let arn = names.parse(&template.example())?;
        let has_values = template.placeholders().next().is_some();
        let kind = if has_values {
            TemplateKind::Rendered(template, names)
        } else {
            TemplateKind::Fixed(arn)
        };
        Ok(Self {
            text: text.to_owned(),
            kind,
        })
    }

    /// Creates a template that renders this name for every ID. Braces in it are literal.
    pub fn fixed(arn: &RoleArn) -> Self {
        Self {
            text: arn.as_str().to_owned(),
            kind: TemplateKind::Fixed(arn.clone()),
        }
    }

    /// Renders the name for this ID. Returns `None` if a segment is missing or the result is too
    /// long.
    pub fn render(&self, id: &SpiffeId) -> Option<RoleArn> {
        match &self.kind {
            TemplateKind::Fixed(arn) => Some(arn.clone()),
            TemplateKind::Rendered(template, names) => {
                let values = TemplateValues {
                    id,
                    session_name: "",
                    facts: &AttestedFacts::default(),
                };
                names.parse(&template.render(&values).ok()?).ok()
            }
        }
    }

    /// Returns the indices (from 0) of the segments that the name refers to, in the name's order.
    pub fn segments(&self) -> Vec<usize> {
        let TemplateKind::Rendered(template, _) = &self.kind else {
            return Vec::new();
        };
        let index = |value: Placeholder| match value {
            Placeholder::Segment(index) => Some(index),
            _ => None,
        };
        template.placeholders().filter_map(index).collect()
    }

    /// Returns the highest segment that the name refers to, if any.
    pub fn highest_segment(&self) -> Option<usize> {
        self.segments().into_iter().max()
    }

    /// Returns the template as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Returns whether all placeholders are in the resource's name. A SPIFFE ID must not select the
/// account or the partition.
fn is_after_role(template: &Template) -> bool {
    matches!(template.parts().first(), Some(TemplatePart::Text(before)) if before.contains(":role/"))
}

#[cfg(test)]
mod tests;
