//! Templates in the parameters of roles, and the policies that may have them.

use super::role::RoleNameRules;
use super::toml_reader::{Location, Table};
use crate::identity::{InvalidName, Placeholder, SpiffeIdPattern, Template};
use crate::role::parameters::{
    LimitResult, MAX_POLICY_ARNS, check_policy, check_policy_arn, is_aws_policy_arn,
};

/// A template that was read, and its location.
pub(super) type LocatedTemplate<'a> = (Location, &'a Template);

/// Parses a template, and checks its form by a limit of STS. An error in a text without a
/// placeholder is final; with one, the rendered text is checked again before the call.
pub(super) fn template(
    text: &str,
    check: impl Fn(&str) -> LimitResult,
) -> Result<Template, InvalidName> {
    let template = Template::parse(text)?;
    check(&template.example())?;
    Ok(template)
}

/// Parses a template whose value decides on access, so that no two callers may share one.
pub(super) fn distinct_template(
    text: &str,
    check: impl Fn(&str) -> LimitResult,
) -> Result<Template, InvalidName> {
    let template = template(text, check)?;
    template.check_separators()?;
    Ok(template)
}

/// Reads the key `policy`.
pub(super) fn policy(table: &Table<'_>) -> Option<Template> {
    const FIX: &str = "write a session policy as one JSON object in '''quotes'''";
    table.parse("policy", FIX, |text| {
        match serde_json::from_str(text) {
            Ok(serde_json::Value::Object(_)) => {}
            Ok(_) => return Err(InvalidName("it is not a JSON object".to_owned())),
            Err(error) => return Err(InvalidName(format!("it is not JSON: {error}"))),
        }
        let template = Template::parse_json(text)?;
        if template.is_constant() {
            check_policy(text)?;
        }
        template.check_separators()?;
        Ok(template)
    })
}

/// Reads the key `policy_arns`.
pub(super) fn policy_arns(table: &Table<'_>, names: RoleNameRules) -> Vec<Template> {
    const KEY: &str = "policy_arns";
    const FIX: &str =
        "write the ARNs of managed policies, as in \"arn:aws:iam::aws:policy/ReadOnlyAccess\"";
    let check = |text: &str| match names {
        RoleNameRules::Aws if !is_aws_policy_arn(text) => {
            Err(InvalidName("it is not the ARN of a policy".to_owned()))
        }
        RoleNameRules::Aws | RoleNameRules::Opaque => check_policy_arn(text),
    };
    let listed = table.strings(KEY).unwrap_or_default();
    check_count(table, KEY, listed.len(), MAX_POLICY_ARNS);
    let mut templates = Vec::with_capacity(listed.len());
    for (at, text) in listed {
        match distinct_template(text, check) {
            Ok(template) => templates.push(template),
            Err(error) => table.report.error(&at, format!("{text:?}: {error}"), FIX),
        }
    }
    templates
}

/// Checks the length of a list that STS bounds.
pub(super) fn check_count(table: &Table<'_>, key: &'static str, count: usize, max: usize) {
    if count > max {
        let what = format!("STS takes at most {max}, these are {count}");
        table.error(key, what, "remove some");
    }
}

/// Checks templates by the SPIFFE IDs that have them: segments that not every ID has are errors,
/// and values that other callers share or cover are warnings.
pub(super) fn check_values(
    table: &Table<'_>,
    pattern: &SpiffeIdPattern,
    templates: &[LocatedTemplate<'_>],
) {
    for (at, template) in templates {
        if let Some(placeholder) = template.widened() {
            let what = format!(
                "a wildcard is next to {placeholder}, so it covers the values of other callers: `shop*` covers \
                 `shop-prod`"
            );
            table.report.warn(at, what, "put a `/` between the two");
        }
        for placeholder in template.placeholders() {
            match placeholder {
                Placeholder::Segment(index) => check_segment(table, at, pattern, index),
                Placeholder::Fact(_) => {
                    let what = format!(
                        "{placeholder} differs between callers of one SPIFFE ID, so each value has a session and a cache \
                         entry of its own"
                    );
                    let fix = "use parts of the SPIFFE ID alone, or see that `max_entries` in [cache] is enough";
                    table.report.warn(at, what, fix);
                }
                Placeholder::TrustDomain | Placeholder::SpiffeId | Placeholder::SessionName => {}
            }
        }
    }
}

/// Checks that every SPIFFE ID of the pattern has this segment.
pub(super) fn check_segment(
    table: &Table<'_>,
    at: &Location,
    pattern: &SpiffeIdPattern,
    index: usize,
) {
    let least = pattern.least_segments();
    if index >= least {
        let what = format!("{{path[{index}]}} is not in every SPIFFE ID that `spiffe_id` covers");
        let fix = format!("use {{path[0]}} to {{path[{}]}}", least - 1);
        table.report.error(at, what, fix);
    }
}
