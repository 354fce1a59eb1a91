//! Parameters of a request in the query protocol, with the bounds that STS sets.

use std::time::Duration;

use hyper::Request;
use hyper::body::Bytes;
use hyper::header::CONTENT_TYPE;

use super::rejection::{Code, DevRejection};
use crate::identity::{RoleArn, SessionName};

/// Length of a web identity token, in characters.
const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 4..=20_000;
/// Bounds of `DurationSeconds`, in seconds.
const DURATION: std::ops::RangeInclusive<u32> = 900..=43_200;
/// Duration of a request without `DurationSeconds`, in seconds.
const DEFAULT_DURATION: u32 = 3600;
/// Maximum length of a session policy, in characters.
const MAX_POLICY_LENGTH: usize = 2048;
/// Maximum number of managed session policies.
const MAX_POLICY_ARNS: usize = 10;

/// The parameters of the URL, then those of a form.
#[derive(Debug)]
pub(super) struct Parameters(Vec<(String, String)>);

impl Parameters {
    pub(super) fn of(request: &Request<Bytes>) -> Self {
        let content_type = request
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok());
        let is_form = content_type
            .is_some_and(|value| value.starts_with("application/x-www-form-urlencoded"));
        let form: &[u8] = if is_form { request.body() } else { &[] };
        let query = request.uri().query().unwrap_or_default().as_bytes();
        let parameters = form_urlencoded::parse(query)
            .into_owned()
            .chain(form_urlencoded::parse(form).into_owned());
        Self(parameters.collect())
    }

    /// Returns the first parameter with this name.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(found, _)| found == name)
            .map(|(_, value)| value.as_str())
    }

    /// Returns the items of the list `PolicyArns`.
    pub(super) fn policy_arns(&self) -> impl Iterator<Item = &str> {
        self.list("PolicyArns.member.")
    }

    /// Returns the values of the parameters with this prefix, in their order.
    pub(super) fn list(&self, prefix: &str) -> impl Iterator<Item = &str> {
        self.0
            .iter()
            .filter(move |(name, _)| name.starts_with(prefix))
            .map(|(_, value)| value.as_str())
    }

    /// Returns the keys and values of the list `Tags`.
    pub(super) fn tags(&self) -> Vec<(&str, &str)> {
        let number = |name: &str| -> Option<String> {
            let name = name.strip_prefix("Tags.member.")?;
            name.strip_suffix(".Key").map(str::to_owned)
        };
        let keys = self
            .0
            .iter()
            .filter_map(|(name, key)| Some((number(name)?, key)));
        keys.map(|(number, key)| {
            let value = self.get(&format!("Tags.member.{number}.Value"));
            (key.as_str(), value.unwrap_or_default())
        })
        .collect()
    }
}

/// A request for `AssumeRoleWithWebIdentity`, with all checks that do not need the token.
#[derive(Debug)]
pub(super) struct WebIdentityRequest<'a> {
    pub(super) token: &'a str,
    pub(super) role_arn: RoleArn,
    pub(super) session_name: SessionName,
    pub(super) duration: Duration,
}

impl<'a> WebIdentityRequest<'a> {
    /// Parses the parameters, with the errors of STS's validation.
    pub(super) fn of(parameters: &'a Parameters) -> Result<Self, DevRejection> {
        let token = required(parameters, "WebIdentityToken", "webIdentityToken")?;
        if !TOKEN_LENGTH.contains(&token.len()) {
            let bound = if token.len() > 4 {
                "less than or equal to 20000"
            } else {
                "greater than or equal to 4"
            };
            // The token itself is a secret, so the message does not repeat it.
            let constraint = format!("have length {bound}");
            return Err(DevRejection::parameter(
                "webIdentityToken",
                Some("***"),
                &constraint,
            ));
        }
        let (role_arn, session_name) = role_session(parameters)?;
        if parameters.get("ProviderId").is_some() {
            let message = "ProviderId is for OAuth 2.0 access tokens; an OpenID Connect token goes without it";
            return Err(DevRejection::new(Code::ValidationError, message));
        }
        check_policies(parameters)?;
        Ok(Self {
            token,
            role_arn,
            session_name,
            duration: duration(parameters)?,
        })
    }
}

/// Parses the role and the name of the session.
pub(super) fn role_session(
    parameters: &Parameters,
) -> Result<(RoleArn, SessionName), DevRejection> {
    let role_arn = required(parameters, "RoleArn", "roleArn")?;
    let role_arn = RoleArn::parse(role_arn).map_err(|_| {
        DevRejection::new(Code::ValidationError, format!("{role_arn:.128} is invalid"))
    })?;
    let session_name = required(parameters, "RoleSessionName", "roleSessionName")?;
    let session_name =
        SessionName::parse(session_name).map_err(|_| session_name_rejected(session_name))?;
    Ok((role_arn, session_name))
}

fn required<'a>(
    parameters: &'a Parameters,
    wire: &str,
    member: &str,
) -> Result<&'a str, DevRejection> {
    parameters
        .get(wire)
        .ok_or_else(|| DevRejection::parameter(member, None, "not be null"))
}

fn session_name_rejected(name: &str) -> DevRejection {
    let constraint = match name.len() {
        0..2 => "have length greater than or equal to 2",
        65.. => "have length less than or equal to 64",
        _ => "satisfy regular expression pattern: [\\w+=,.@-]*",
    };
    DevRejection::parameter("roleSessionName", Some(name), constraint)
}

/// Parses the duration of the session.
pub(super) fn duration(parameters: &Parameters) -> Result<Duration, DevRejection> {
    let Some(text) = parameters.get("DurationSeconds") else {
        return Ok(Duration::from_secs(DEFAULT_DURATION.into()));
    };
    let rejected = |constraint| DevRejection::parameter("durationSeconds", Some(text), constraint);
    let seconds: u32 = text.parse().map_err(|_| rejected("be an integer"))?;
    if seconds < *DURATION.start() {
        return Err(rejected("have value greater than or equal to 900"));
    }
    if seconds > *DURATION.end() {
        return Err(rejected("have value less than or equal to 43200"));
    }
    Ok(Duration::from_secs(seconds.into()))
}

/// Checks the form of session policies. They can only narrow a role, and the role of `dev` has no
/// permissions to narrow.
pub(super) fn check_policies(parameters: &Parameters) -> Result<(), DevRejection> {
    if let Some(policy) = parameters.get("Policy") {
        if policy.is_empty() || policy.len() > MAX_POLICY_LENGTH {
            return Err(DevRejection::parameter(
                "policy",
                Some(policy),
                "have length between 1 and 2048",
            ));
        }
        let document = serde_json::from_str::<serde_json::Value>(policy).ok();
        if document.is_none_or(|document| document.get("Statement").is_none()) {
            return Err(DevRejection::new(
                Code::MalformedPolicyDocument,
                "The policy is not in the valid JSON format.",
            ));
        }
    }
    if parameters.policy_arns().count() > MAX_POLICY_ARNS {
        return Err(DevRejection::parameter(
            "policyArns",
            Some("..."),
            "have length less than or equal to 10",
        ));
    }
    match parameters
        .policy_arns()
        .find(|arn| !arn.starts_with("arn:"))
    {
        Some(arn) => Err(DevRejection::new(
            Code::ValidationError,
            format!("ARN {arn:.128} is not valid."),
        )),
        None => Ok(()),
    }
}
