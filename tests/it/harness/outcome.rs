//! The outcome of one request at the daemon.

use serde_json::Value;

use super::daemon::Daemon;

/// The outcome of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Credentials of this identity.
    Issued(String),
    /// A rejection with this reason.
    Rejected(String),
    /// No response that the client received.
    NoResponse,
}

impl Outcome {
    /// Reads the outcome from the whole response to the request `what`. The identity is that of the
    /// first audit record with the response's access key id.
    pub(crate) fn of(answer: &str, what: &str, daemon: &Daemon) -> Self {
        let Some((_, body)) = answer.split_once("\r\n\r\n") else {
            return Self::NoResponse;
        };
        let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{what}: {answer}"));
        if let Some(code) = body["code"].as_str() {
            return rejected(code);
        }
        let key = body["AccessKeyId"]
            .as_str()
            .expect("credentials or an error");
        credentials_of(&daemon.first_issued_to(key))
    }
}

pub(crate) fn credentials_of(id: &str) -> Outcome {
    Outcome::Issued(id.to_owned())
}

pub(crate) fn rejected(reason: &str) -> Outcome {
    Outcome::Rejected(reason.to_owned())
}
