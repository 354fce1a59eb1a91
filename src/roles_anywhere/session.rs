//! The response of `CreateSession`.

use std::time::UNIX_EPOCH;

use serde::Deserialize;
use zeroize::Zeroizing;

use crate::credentials::Credentials;
use crate::identity::SessionName;
use crate::sts::Failure;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SessionResponse {
    credential_set: Vec<CredentialSet>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CredentialSet {
    assumed_role_user: Option<AssumedRoleUser>,
    credentials: SessionCredentials,
}

#[derive(Deserialize)]
struct AssumedRoleUser {
    arn: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SessionCredentials {
    access_key_id: String,
    secret_access_key: String,
    session_token: String,
    expiration: String,
}

/// Reads the credentials of a successful response. An expiration that cannot be read counts as
/// past. The session's name is noted where it is not the requested one.
pub(super) fn read(body: &[u8], requested: &SessionName) -> Result<Credentials, Failure> {
    let response: Option<SessionResponse> = serde_json::from_slice(body).ok();
    let mut sets = response.map_or_else(Vec::new, |response| response.credential_set);
    // One request is for one role.
    let (Some(set), true) = (sets.pop(), sets.is_empty()) else {
        return Err(Failure::InvalidResponse(
            "the response has no credentials, or several".to_owned(),
        ));
    };
    let name = set
        .assumed_role_user
        .and_then(|user| session_name(&user.arn));
    let credentials = set.credentials;
    let expiration = humantime::parse_rfc3339(&credentials.expiration).unwrap_or(UNIX_EPOCH);
    Ok(Credentials {
        access_key_id: credentials.access_key_id,
        secret_access_key: Zeroizing::new(credentials.secret_access_key),
        session_token: Zeroizing::new(credentials.session_token),
        expiration,
        first_session_name: name.filter(|name| name != requested),
    })
}

/// Returns the name in `arn:aws:sts::123456789012:assumed-role/role/name`.
fn session_name(arn: &str) -> Option<SessionName> {
    let (_, name) = arn.rsplit_once('/')?;
    SessionName::parse(name).ok()
}
