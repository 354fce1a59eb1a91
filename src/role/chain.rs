//! The roles of a chain after the first one, and their sessions.
//!
//! STS assumes each of them with the credentials of the session before it (`AssumeRole`).

use std::time::Duration;

use super::first_exchange::FirstExchange;
use super::parameters::{
    LimitResult, check_external_id, check_policy, check_policy_arn, check_source_identity,
    check_tag_value,
};
use crate::identity::{ArnTemplate, InvalidName, RoleArn, SessionName, Template, TemplateValues};

/// Maximum number of roles after the first one.
pub const MAX_CHAINED_ROLES: usize = 2;
/// Maximum duration of a session that another session's credentials start.
pub const MAX_CHAINED_DURATION: Duration = Duration::from_secs(3600);

/// A role of a chain after the first one, as `[[role.chain]]` defines it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChainedRole {
    /// ARN of the IAM role, or a template of it.
    pub role_arn: ArnTemplate,
    /// The ID that the trust policy of another account's role compares.
    pub external_id: Option<Template>,
    /// Name of the session, by default the first session's.
    pub session_name: Template,
    /// The identity that all later sessions keep.
    pub source_identity: Option<Template>,
    /// Session tags by their keys, in the order of the keys.
    pub tags: Vec<(String, Template)>,
    /// Keys of the tags that all later sessions keep.
    pub transitive_tags: Vec<String>,
    /// Session policy (JSON) that narrows the role.
    pub policy: Option<Template>,
    /// ARNs of managed session policies.
    pub policy_arns: Vec<Template>,
    /// Duration of the session: 15 minutes to 1 hour.
    pub duration: Duration,
}

/// The parameters of one `AssumeRole`: those of a [`ChainedRole`] for one caller.
#[expect(
    missing_docs,
    reason = "the fields have the names of those in ChainedRole"
)]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChainedSession {
    pub role_arn: RoleArn,
    pub external_id: Option<String>,
    pub session_name: SessionName,
    pub source_identity: Option<String>,
    pub tags: Vec<(String, String)>,
    pub transitive_tags: Vec<String>,
    pub policy: Option<String>,
    pub policy_arns: Vec<String>,
    pub duration: Duration,
}

impl ChainedRole {
    /// Returns all templates but that of the ARN, each with its key in the configuration. Those of
    /// tags also have the name of the tag.
    pub fn templates(&self) -> impl Iterator<Item = (&'static str, Option<&str>, &Template)> {
        let optional = [
            ("external_id", &self.external_id),
            ("source_identity", &self.source_identity),
            ("policy", &self.policy),
        ];
        let optional = optional
            .into_iter()
            .filter_map(|(key, template)| Some((key, None, template.as_ref()?)));
        let tags = self.tags.iter();
        let arns = self.policy_arns.iter();
        std::iter::once(("session_name", None, &self.session_name))
            .chain(optional)
            .chain(tags.map(|(name, template)| ("tags", Some(name.as_str()), template)))
            .chain(arns.map(|template| ("policy_arns", None, template)))
    }

    /// Renders the parameters for a caller. Fails with the key of one that STS would reject.
    pub(super) fn render(
        &self,
        values: &TemplateValues<'_>,
    ) -> Result<ChainedSession, InvalidName> {
        let role_arn = self
            .role_arn
            .render(values.id)
            .ok_or_else(|| InvalidName("`role_arn`: it is too long for a role".to_owned()))?;
        let session_name = self.session_name.render(values);
        let session_name = session_name.and_then(|text| SessionName::parse(&text));
        let mut tags = Vec::with_capacity(self.tags.len());
        for (key, template) in &self.tags {
            let value = rendered(&format!("tags.{key}"), template, values, check_tag_value)?;
            tags.push((key.clone(), value));
        }
        Ok(ChainedSession {
            role_arn,
            external_id: optional("external_id", &self.external_id, values, check_external_id)?,
            session_name: session_name.map_err(|error| at_key("session_name", &error))?,
            source_identity: optional(
                "source_identity",
                &self.source_identity,
                values,
                check_source_identity,
            )?,
            tags,
            transitive_tags: self.transitive_tags.clone(),
            policy: optional("policy", &self.policy, values, check_policy)?,
            policy_arns: policy_arns(&self.policy_arns, values)?,
            duration: self.duration,
        })
    }
}

fn at_key(key: &str, InvalidName(error): &InvalidName) -> InvalidName {
    InvalidName(format!("`{key}`: {error}"))
}

fn rendered(
    key: &str,
    template: &Template,
    values: &TemplateValues<'_>,
    check: impl Fn(&str) -> LimitResult,
) -> Result<String, InvalidName> {
    template
        .render(values)
        .and_then(|text| check(&text).map(|()| text))
        .map_err(|error| at_key(key, &error))
}

/// Renders a template, if there is one, and checks the result.
pub(super) fn optional(
    key: &str,
    template: &Option<Template>,
    values: &TemplateValues<'_>,
    check: impl Fn(&str) -> LimitResult,
) -> Result<Option<String>, InvalidName> {
    let template = template.as_ref();
    template
        .map(|template| rendered(key, template, values, check))
        .transpose()
}

/// Renders the ARNs of managed policies.
pub(super) fn policy_arns(
    templates: &[Template],
    values: &TemplateValues<'_>,
) -> Result<Vec<String>, InvalidName> {
    templates
        .iter()
        .map(|template| rendered("policy_arns", template, values, check_policy_arn))
        .collect()
}

/// Returns the actions that the trust policy of the last of these roles has to allow to the role
/// before it. A session keeps the transitive tags and the source identity of those before it, and
/// needs the action for each. The common name of a certificate is such a source identity.
pub fn required_actions(first: &FirstExchange, chain: &[ChainedRole]) -> Vec<&'static str> {
    let Some((last, before)) = chain.split_last() else {
        return Vec::new();
    };
    let keeps_tags = before.iter().any(|role| !role.transitive_tags.is_empty());
    let has_source =
        first.roles_anywhere().is_some() || chain.iter().any(|role| role.source_identity.is_some());
    let mut actions = vec!["sts:AssumeRole"];
    actions.extend((keeps_tags || !last.tags.is_empty()).then_some("sts:TagSession"));
    actions.extend(has_source.then_some("sts:SetSourceIdentity"));
    actions
}
