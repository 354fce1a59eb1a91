//! `AssumeRole`: a session of one role assumes another one.
//!
//! Rules: IAM User Guide, "Pass session tags in AWS STS", "Monitor and control actions taken with
//! assumed roles", "Roles terms and concepts: role chaining".

use std::collections::BTreeMap;
use std::time::Duration;

use hyper::Request;
use hyper::body::Bytes;

use super::answer;
use super::rejection::{Code, DevRejection};
use super::request::{Parameters, check_policies, duration, role_session};
use super::sessions::{Session, SessionFacts};
use super::{LoopbackResponse, StsState, sigv4};
use crate::identity::{InvalidName, RoleArn};
use crate::role::parameters::{
    MAX_TAGS, check_external_id, check_source_identity, check_tag_key, check_tag_value,
};

/// Maximum duration of a session that another session starts.
const MAX_DURATION: Duration = Duration::from_secs(3600);
/// Bytes of session policies and tags that fill a session token here. AWS does not publish its
/// packed format.
const MAX_PACKED_BYTES: usize = 4096;

/// The trust policy of a role for the sessions of another one.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone)]
pub struct ChainedTrust {
    pub arn: RoleArn,
    /// The role whose sessions may assume it.
    pub principal: RoleArn,
    /// The condition on `sts:ExternalId`, if there is one.
    pub external_id: Option<String>,
    /// Whether it allows `sts:TagSession`.
    pub tag_session: bool,
    /// Whether it allows `sts:SetSourceIdentity`.
    pub set_source_identity: bool,
}

impl StsState {
    pub(super) fn assume_chained(
        &self,
        request: &Request<Bytes>,
        parameters: &Parameters,
        request_id: &str,
    ) -> Result<LoopbackResponse, DevRejection> {
        let now = self.clock.now();
        let region = &self.account.region;
        let calling = sigv4::authenticate(request, parameters, &self.sessions, region, now)?;
        let (role_arn, session_name) = role_session(parameters)?;
        check_policies(parameters)?;
        let duration = duration(parameters)?;
        if duration > MAX_DURATION {
            let message = "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining";
            return Err(DevRejection::new(Code::ValidationError, message));
        }
        let facts = session_facts(&calling, &role_arn, parameters)?;
        self.check_trust(&calling, &role_arn, parameters)?;
        let packed = packed_percent(parameters, &facts)?;
        let caller = self.caller(&role_arn, &session_name);
        let session = self
            .sessions
            .issue(caller, facts, now, duration)
            .map_err(|error| DevRejection::internal(&error))?;
        self.count_issued();
        Ok(answer::assumed_by_session(&session, packed, request_id))
    }

    /// Fails unless the role's trust policy allows each action of the call.
    fn check_trust(
        &self,
        calling: &Session,
        role_arn: &RoleArn,
        parameters: &Parameters,
    ) -> Result<(), DevRejection> {
        let denied = |action: &str| {
            let message = format!(
                "User: {} is not authorized to perform: {action} on resource: {role_arn}",
                calling.caller.arn
            );
            DevRejection::new(Code::AccessDenied, message)
        };
        let external_id = parameters.get("ExternalId");
        let is_trusted = |trust: &&ChainedTrust| {
            let is_id = |id: &String| external_id == Some(id);
            trust.arn == *role_arn
                && trust.principal == calling.facts.role_arn
                && trust.external_id.as_ref().is_none_or(is_id)
        };
        let trust = self.account.chained.iter().find(is_trusted);
        let trust = trust.ok_or_else(|| denied("sts:AssumeRole"))?;
        // Inherited tags need the action, too.
        let has_tags = !parameters.tags().is_empty() || !calling.facts.transitive_tags.is_empty();
        if has_tags && !trust.tag_session {
            return Err(denied("sts:TagSession"));
        }
        let has_source =
            parameters.get("SourceIdentity").is_some() || calling.facts.source_identity.is_some();
        if has_source && !trust.set_source_identity {
            return Err(denied("sts:SetSourceIdentity"));
        }
        Ok(())
    }
}

fn parameter(name: &str, value: &str, InvalidName(error): InvalidName) -> DevRejection {
    DevRejection::parameter(name, Some(value), &format!("be valid: {error}"))
}

fn contradiction<T>(message: &str) -> Result<T, DevRejection> {
    Err(DevRejection::new(Code::InvalidParameterValue, message))
}

/// Returns the tags and the source identity of the new session, with those that it keeps.
fn session_facts(
    calling: &Session,
    role_arn: &RoleArn,
    parameters: &Parameters,
) -> Result<SessionFacts, DevRejection> {
    let inherited = &calling.facts.transitive_tags;
    let mut facts = SessionFacts::of(role_arn);
    let is_same = |one: &str, other: &str| one.to_lowercase() == other.to_lowercase();
    let requested = parameters.tags();
    if requested.len() > MAX_TAGS {
        let constraint = "have length less than or equal to 50";
        return Err(DevRejection::parameter("tags", Some("..."), constraint));
    }
    for (key, value) in requested {
        check_tag_key(key).map_err(|error| parameter("tags.member.key", key, error))?;
        check_tag_value(value).map_err(|error| parameter("tags.member.value", value, error))?;
        if facts.tags.keys().any(|other| is_same(key, other)) {
            return contradiction(
                "Duplicate tag keys found. Please note that Tag keys are case insensitive.",
            );
        }
        if inherited.iter().any(|other| is_same(key, other)) {
            return contradiction(
                "One of the specified transitive tag keys can't be set because it conflicts with a transitive tag key \
                 from the calling session.",
            );
        }
        facts.tags.insert(key.to_owned(), value.to_owned());
    }
    facts.transitive_tags = transitive_tags(&facts.tags, parameters)?;
    for key in inherited {
        let value = calling.facts.tags.get(key).cloned().unwrap_or_default();
        facts.tags.insert(key.clone(), value);
        facts.transitive_tags.push(key.clone());
    }
    facts.source_identity = source_identity(calling, parameters)?;
    if let Some(id) = parameters.get("ExternalId") {
        check_external_id(id).map_err(|error| parameter("externalId", id, error))?;
    }
    Ok(facts)
}

fn transitive_tags(
    tags: &BTreeMap<String, String>,
    parameters: &Parameters,
) -> Result<Vec<String>, DevRejection> {
    let keys: Vec<String> = parameters
        .list("TransitiveTagKeys.member.")
        .map(str::to_owned)
        .collect();
    match keys.iter().all(|key| tags.contains_key(key)) {
        true => Ok(keys),
        false => contradiction(
            "The specified transitive tag key must be included in the requested tags.",
        ),
    }
}

fn source_identity(
    calling: &Session,
    parameters: &Parameters,
) -> Result<Option<String>, DevRejection> {
    let before = calling.facts.source_identity.as_deref();
    let Some(requested) = parameters.get("SourceIdentity") else {
        return Ok(before.map(str::to_owned));
    };
    check_source_identity(requested)
        .map_err(|error| parameter("sourceIdentity", requested, error))?;
    match before {
        Some(before) if before != requested => {
            contradiction("The source identity of the calling session cannot be changed.")
        }
        Some(_) | None => Ok(Some(requested.to_owned())),
    }
}

/// Returns the share of the session token that policies and tags take, in percent.
fn packed_percent(parameters: &Parameters, facts: &SessionFacts) -> Result<usize, DevRejection> {
    let tags = facts
        .tags
        .iter()
        .map(|(key, value)| key.len() + value.len());
    let arns = parameters.policy_arns().map(str::len);
    let policy = parameters.get("Policy").map_or(0, str::len);
    let bytes = policy + tags.chain(arns).sum::<usize>();
    match bytes * 100 / MAX_PACKED_BYTES {
        percent @ 0..=100 => Ok(percent),
        percent => Err(DevRejection::new(
            Code::PackedPolicyTooLarge,
            format!("Packed size of session tags and policies is {percent}% of the limit."),
        )),
    }
}

#[cfg(test)]
pub(super) mod tests;
