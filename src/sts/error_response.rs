//! Code and message of an STS rejection, in every form in use.
//!
//! AWS's STS sends `<ErrorResponse><Error><Code>`. Ceph and RustFS omit the outer element, as S3
//! does. Others omit the namespace or the message, or send JSON. A load balancer in front of an STS
//! sends HTML, or a status alone.

use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_xml::decode::{Document, try_data};
use serde_json::Value;

/// Header with the code, from AWS services that speak JSON and from gateways in front of others.
const CODE_HEADER: &str = "x-amzn-errortype";
/// Maximum length of a code, in bytes.
const MAX_CODE_BYTES: usize = 128;
/// Maximum depth of the search in JSON.
const MAX_JSON_DEPTH: usize = 4;

/// Code and message of a rejection.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct StsErrorResponse {
    /// The code as on the wire.
    pub(super) code: Option<String>,
    pub(super) message: String,
}

/// Parses a rejection. Returns `None` if the response has neither a code nor a message.
pub(super) fn read(response: &HttpResponse) -> Option<StsErrorResponse> {
    let body = response.body().bytes().unwrap_or_default();
    let text = String::from_utf8_lossy(body);
    let text = text.trim_start_matches('\u{feff}').trim();
    let mut error = match text.bytes().next() {
        Some(b'<') => of_xml(text),
        Some(b'{') => serde_json::from_str(text)
            .map(|value| of_json(&value, 0))
            .unwrap_or_default(),
        _ => StsErrorResponse::default(),
    };
    if error.code.is_none() {
        error.code = response.headers().get(CODE_HEADER).and_then(code);
        // Services with the code in the header send JSON with the message alone.
        if error.code.is_some() && error.message.is_empty() {
            error.message =
                serde_json::from_str(text).map_or_else(|_| String::new(), |value| message(&value));
        }
    }
    (error != StsErrorResponse::default()).then_some(error)
}

/// Finds the first `Code` and `Message`, at any depth and in any namespace, up to the first XML
/// error.
fn of_xml(text: &str) -> StsErrorResponse {
    let mut document = Document::new(text);
    let mut error = StsErrorResponse::default();
    while let Some(element) = document.next_start_element() {
        let (is_code, is_message) = (element.local() == "Code", element.local() == "Message");
        if !is_code && !is_message {
            continue;
        }
        let data = try_data(&mut document.scoped_to(element))
            .map(|data| data.trim().to_owned())
            .unwrap_or_default();
        if is_code && error.code.is_none() {
            error.code = code(&data);
        } else if is_message && error.message.is_empty() {
            error.message = data;
        }
    }
    // A message without a code does not belong to a rejection.
    if error.code.is_some() {
        error
    } else {
        StsErrorResponse::default()
    }
}

/// Parses `{"Error": {"Code", "Message"}}`, `{"__type", "message"}`, `{"code", "message"}` and
/// OAuth's `{"error", "error_description"}`.
fn of_json(value: &Value, depth: usize) -> StsErrorResponse {
    const CODES: [&str; 5] = ["Code", "code", "__type", "errorCode", "error"];
    let Some(fields) = value.as_object().filter(|_| depth < MAX_JSON_DEPTH) else {
        return StsErrorResponse::default();
    };
    let text = |name: &&str| fields.get(*name).and_then(Value::as_str);
    let own = CODES.iter().filter_map(text).find_map(code);
    let inner = || {
        fields
            .values()
            .map(|value| of_json(value, depth + 1))
            .find(|inner| inner.code.is_some())
    };
    let Some(code) = own else {
        return inner().unwrap_or_default();
    };
    StsErrorResponse {
        code: Some(code),
        message: message(value),
    }
}

/// Returns the message of a JSON object.
fn message(value: &Value) -> String {
    const MESSAGES: [&str; 5] = [
        "Message",
        "message",
        "errorMessage",
        "error_description",
        "detail",
    ];
    let text = MESSAGES.iter().find_map(|name| value.get(name)?.as_str());
    text.unwrap_or_default().to_owned()
}

/// Returns the code in `com.amazonaws.sts#ExpiredToken:http://internal/`, which is one word.
/// Returns `None` for other texts.
fn code(text: &str) -> Option<String> {
    let word = text.trim().split(':').next().unwrap_or_default();
    let word = word.rsplit('#').next().unwrap_or_default();
    let is_word = (1..=MAX_CODE_BYTES).contains(&word.len())
        && word
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-'));
    is_word.then(|| word.to_owned())
}

#[cfg(test)]
mod tests;
