//! The call of a chain's next role: `AssumeRole`, signed with the credentials of the session before
//! it.

use aws_sdk_sts::Client;
use aws_sdk_sts::config::{Config, Credentials as SigningCredentials, IdentityCache};
use aws_sdk_sts::error::{BuildError, SdkError};
use aws_sdk_sts::operation::assume_role::{AssumeRoleError, AssumeRoleOutput};
use aws_sdk_sts::types::Tag;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use super::policy_descriptors;
use crate::credentials::Credentials;
use crate::role::ChainedSession;

/// Sends one `AssumeRole` with these parameters.
pub(super) async fn send(
    client: Client,
    session: &ChainedSession,
    previous: &Credentials,
) -> Result<AssumeRoleOutput, SdkError<AssumeRoleError, HttpResponse>> {
    let signing = SigningCredentials::new(
        previous.access_key_id.as_str(),
        previous.secret_access_key.as_str(),
        Some(previous.session_token.to_string()),
        None,
        "previous session",
    );
    // The credentials are those of this call alone, and no cache keeps them.
    let signed = Config::builder()
        .credentials_provider(signing)
        .identity_cache(IdentityCache::no_cache());
    let transitive = &session.transitive_tags;
    client
        .assume_role()
        .role_arn(session.role_arn.as_str())
        .role_session_name(session.session_name.as_str())
        .duration_seconds(i32::try_from(session.duration.as_secs()).unwrap_or(i32::MAX))
        .set_external_id(session.external_id.clone())
        .set_source_identity(session.source_identity.clone())
        .set_tags(tags(session).map_err(SdkError::construction_failure)?)
        .set_transitive_tag_keys((!transitive.is_empty()).then(|| transitive.clone()))
        .set_policy(session.policy.clone())
        .set_policy_arns(policy_descriptors(&session.policy_arns))
        .customize()
        .config_override(signed)
        .send()
        .await
}

/// Returns the parameter `Tags`, which is absent without tags.
fn tags(session: &ChainedSession) -> Result<Option<Vec<Tag>>, BuildError> {
    if session.tags.is_empty() {
        return Ok(None);
    }
    let tag = |(key, value): &(String, String)| Tag::builder().key(key).value(value).build();
    session
        .tags
        .iter()
        .map(tag)
        .collect::<Result<_, _>>()
        .map(Some)
}
