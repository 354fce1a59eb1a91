//! What the daemon has made of a request.

use serde_json::Value;

use super::daemon::Daemon;

/// What it may have made of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Made {
    /// Credentials of this identity.
    Answered(String),
    /// A refusal, for this reason.
    Refused(String),
    /// Nothing that the client saw.
    Silence,
}

impl Made {
    /// What came of `what`, by the whole answer. Whose credentials are in it is read from the first audit record with their key.
    pub(crate) fn of(answer: &str, what: &str, daemon: &Daemon) -> Self {
        let Some((_, body)) = answer.split_once("\r\n\r\n") else {
            return Self::Silence;
        };
        let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{what}: {answer}"));
        if let Some(code) = body["code"].as_str() {
            return refused(code);
        }
        let key = body["AccessKeyId"]
            .as_str()
            .expect("credentials or an error");
        answered(&daemon.first_issued_to(key))
    }
}

pub(crate) fn answered(id: &str) -> Made {
    Made::Answered(id.to_owned())
}

pub(crate) fn refused(reason: &str) -> Made {
    Made::Refused(reason.to_owned())
}
