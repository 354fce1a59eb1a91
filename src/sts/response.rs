//! Responses of calls that the SDK has no client for.

use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_types::body::SdkBody;
use http_body_util::{BodyExt, Limited};
use zeroize::Zeroizing;

use super::client::MAX_RESPONSE_BYTES;
use super::error::{Failure, causes};
use super::error_response;

/// Returns the body of a successful response, which may have credentials. Fails for any other
/// status, and if the body is too long or ends early.
pub(crate) async fn read_response(
    response: Result<HttpResponse, ConnectorError>,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut response = response.map_err(|error| match error.is_user() {
        true => Failure::InvalidRequest(causes(&error)),
        false => Failure::Unreachable(causes(&error)),
    })?;
    let body = Limited::new(response.take_body(), MAX_RESPONSE_BYTES);
    let body = body
        .collect()
        .await
        .map_err(|_| Failure::Unreachable("the connection broke during the response".to_owned()))?;
    let body = body.to_bytes();
    let status = response.status();
    if status.is_success() {
        return Ok(Zeroizing::new(body.to_vec()));
    }
    *response.body_mut() = SdkBody::from(body);
    let rejection = error_response::read(&response).unwrap_or_default();
    Err(Failure::Rejected {
        code: rejection.code,
        status: status.as_u16(),
        message: rejection.message,
    })
}
