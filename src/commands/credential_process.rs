//! `awsvid credential-process`, for `~/.aws/config`: fetches credentials over the unix socket.

use std::borrow::Cow;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::time::{Instant, sleep};
use zeroize::Zeroizing;

use super::ConfigFile;
use super::exec::{InvalidRoleName, role_in_path};
use super::local_client::{self, LocalResponse};
use super::trusted_socket::{self, SocketError};
use crate::config::ConfigErrors;
use crate::exit_status::ExitStatus;

/// Total time of all attempts. SDKs run the command once and use its result.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause between attempts if the daemon sends no `Retry-After`, and the maximum pause.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(5);
/// Maximum size of a response. SDKs do not accept larger ones either.
const MAX_RESPONSE: usize = 64 * 1024;

/// Prints credentials for `credential_process` in ~/.aws/config
///
/// In ~/.aws/config:
///
///   [profile billing]
///   credential_process = /usr/bin/awsvid credential-process --role billing
///
/// SDKs run this command whenever they need new credentials. It fetches them over
/// awsvid's unix socket, after it has verified that the directory, the file and
/// the listener of the socket belong to root. The output is secret.
///
/// Rules by `exe` never match, because the caller is awsvid's own executable. User,
/// groups and cgroup are those of the process that runs it. Programs with the
/// variables of `awsvid exec` fetch credentials themselves, and match.
#[derive(Debug, Args)]
#[command(
    verbatim_doc_comment,
    after_help = "\
Exit status: 0 with the credentials on standard output, 1 with the reason on
standard error."
)]
pub struct CredentialProcess {
    #[command(flatten)]
    config: ConfigFile,
    /// Path of awsvid's unix socket, instead of the configuration's
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// Name of the `[[role]]`, if the workload has several
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    /// Trusts a daemon that runs as this user, too, such as `awsvid dev`
    #[arg(long)]
    same_user: bool,
}

/// The daemon's response with credentials.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ProcessCredentials<'a> {
    #[serde(borrow)]
    access_key_id: Cow<'a, str>,
    #[serde(borrow)]
    secret_access_key: Cow<'a, str>,
    #[serde(borrow)]
    token: Cow<'a, str>,
    #[serde(borrow)]
    expiration: Cow<'a, str>,
}

/// The daemon's response without credentials.
#[derive(Deserialize)]
struct DaemonError {
    code: String,
    message: String,
}

/// Reason why the command has no credentials.
#[derive(Debug, Error)]
enum CredentialProcessError {
    #[error("{0}\nor give the socket with --socket")]
    Config(#[from] ConfigErrors),
    #[error(
        "the configuration has no unix socket; set `unix` in [listen], or give SDKs the variables of `awsvid exec`"
    )]
    NoSocket,
    #[error(transparent)]
    Role(#[from] InvalidRoleName),
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The daemon rejects the request, with this message.
    #[error("{0}")]
    Rejected(String),
    /// The daemon rejects it because no rule matches, with this message.
    #[error(
        "{0} (rules by `exe` never match here, because the caller is awsvid's own executable: see --help)"
    )]
    NoIdentity(String),
    #[error("unexpected response with status {status}: not from awsvid; give the right --socket")]
    Unexpected { status: u16 },
    /// The daemon's last answer, which is transient, when no time is left.
    #[error("{answer} (no other answer within {} s)", TOTAL_TIMEOUT.as_secs())]
    Late { answer: Box<Self> },
    /// No runtime could be started, or the output could not be written.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The format that AWS documents ("Process credential provider"): these keys and no others.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ProcessOutput<'a> {
    version: u8,
    access_key_id: &'a str,
    secret_access_key: &'a str,
    session_token: &'a str,
    expiration: &'a str,
}

impl CredentialProcess {
    /// Prints the credentials, or the error on standard error.
    #[expect(
        clippy::print_stderr,
        reason = "SDKs show standard error to their user"
    )]
    pub fn run(&self) -> ExitStatus {
        let fetched = local_client::block_on(self.fetch());
        let fetched = fetched.unwrap_or_else(|error| Err(error.into()));
        match fetched.and_then(|output| Ok(io::stdout().write_all(&output)?)) {
            Ok(()) => ExitStatus::Success,
            Err(error) => {
                eprintln!("awsvid credential-process: {error}");
                ExitStatus::Failure
            }
        }
    }

    async fn fetch(&self) -> Result<Zeroizing<Vec<u8>>, CredentialProcessError> {
        let socket = match &self.socket {
            Some(socket) => socket.clone(),
            None => {
                let unix = self.config.daemon_endpoints()?.listen.unix;
                unix.ok_or(CredentialProcessError::NoSocket)?
            }
        };
        let path = match &self.role {
            Some(role) => format!("/v1/credentials/{}", role_in_path(role)?),
            None => "/v1/credentials".to_owned(),
        };
        let mut owners = vec![0];
        owners.extend(self.same_user.then(|| geteuid().as_raw()));
        fetch_from(&socket, &owners, &path).await
    }
}

/// Requests `path` from the daemon at `socket` until it answers with credentials or a final error,
/// for at most [`TOTAL_TIMEOUT`].
async fn fetch_from(
    socket: &Path,
    owners: &[u32],
    path: &str,
) -> Result<Zeroizing<Vec<u8>>, CredentialProcessError> {
    let deadline = Instant::now() + TOTAL_TIMEOUT;
    let mut transient = None;
    loop {
        let answer = trusted_socket::get(socket, owners, path, MAX_RESPONSE, deadline).await;
        let answer = match (answer, transient) {
            (Ok(answer), _) => answer,
            // The text of the timeout would hide the cause, which the daemon knows.
            (Err(error), Some(answer)) if error.is_timeout() => return Err(late(&answer)),
            (Err(error), _) => return Err(error.into()),
        };
        match answer.status {
            200 => return output(&answer.body),
            503 if Instant::now() + pause(&answer) < deadline => sleep(pause(&answer)).await,
            503 => return Err(late(&answer)),
            _ => return Err(daemon_error(&answer)),
        }
        transient = Some(answer);
    }
}

fn late(answer: &LocalResponse) -> CredentialProcessError {
    CredentialProcessError::Late {
        answer: Box::new(daemon_error(answer)),
    }
}

fn pause(answer: &LocalResponse) -> Duration {
    answer
        .retry_after
        .unwrap_or(RETRY_PAUSE)
        .clamp(Duration::from_millis(100), MAX_RETRY_PAUSE)
}

/// Returns the daemon's error, with its message for the user of the workload.
fn daemon_error(answer: &LocalResponse) -> CredentialProcessError {
    match serde_json::from_slice::<DaemonError>(&answer.body) {
        Ok(DaemonError { code, message }) => {
            let message = message.replace(char::is_control, " ");
            match code.as_str() {
                "no_identity" => CredentialProcessError::NoIdentity(message),
                _ => CredentialProcessError::Rejected(message),
            }
        }
        Err(_) => CredentialProcessError::Unexpected {
            status: answer.status,
        },
    }
}

fn output(body: &[u8]) -> Result<Zeroizing<Vec<u8>>, CredentialProcessError> {
    // Without the parser's own message, which may quote the input.
    let issued: ProcessCredentials<'_> = serde_json::from_slice(body)
        .map_err(|_| CredentialProcessError::Unexpected { status: 200 })?;
    let output = ProcessOutput {
        version: 1,
        access_key_id: &issued.access_key_id,
        secret_access_key: &issued.secret_access_key,
        session_token: &issued.token,
        expiration: &issued.expiration,
    };
    // No larger than the response, except for longer names: a buffer that grows leaves copies of
    // the secrets behind.
    let mut text = Zeroizing::new(Vec::with_capacity(body.len() + 256));
    serde_json::to_writer(&mut *text, &output).map_err(io::Error::from)?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    #[test]
    fn output_has_the_format_that_aws_documents() {
        let body = r#"{"Code":"Success","AccessKeyId":"ASIA1","SecretAccessKey":"a/b+c","Token":"t==","Expiration":"2026-01-02T03:04:05Z","AccountId":"123456789012","RoleArn":"arn:aws:iam::123456789012:role/a"}"#;
        let text = output(body.as_bytes()).unwrap();
        let expected = "{\"Version\":1,\"AccessKeyId\":\"ASIA1\",\"SecretAccessKey\":\"a/b+c\",\"SessionToken\":\"t==\",\"Expiration\":\"2026-01-02T03:04:05Z\"}\n";
        assert_eq!(std::str::from_utf8(&text).unwrap(), expected);
        for wrong in [
            "",
            "[]",
            &body.replace("SecretAccessKey", "SecretKey"),
            &body.replace("a/b+c", "s3cret\u{1}"),
        ] {
            let error = output(wrong.as_bytes()).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("s3cret"));
        }
    }

    #[test]
    fn daemon_error_has_the_daemons_message() {
        let answer = |body: &str| LocalResponse {
            status: 403,
            retry_after: None,
            body: Zeroizing::new(body.as_bytes().to_vec()),
        };
        let text = |body| daemon_error(&answer(body)).to_string();
        let rejected =
            text(r#"{"code":"no_role","message":"add a role\u001b[2J","Code":"","Message":""}"#);
        assert_eq!(rejected, "add a role [2J");
        assert!(text(r#"{"code":"no_identity","message":"m"}"#).contains("`exe` never match"));
        assert!(text("<html>").contains("status 403"));
    }

    /// Answers with 503 to this number of requests, and holds those after them.
    async fn serve_transient_errors(listener: UnixListener, count: usize) {
        let body = r#"{"code":"source_unavailable","message":"no socket at /a: start it"}"#;
        let length = body.len();
        let text = format!(
            "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        let mut held = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert_ne!(stream.read(&mut [0; 1024]).await.unwrap(), 0);
            if held.len() < count {
                stream.write_all(text.as_bytes()).await.unwrap();
            }
            held.push(stream);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn last_answer_is_reported_at_the_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let answered = "no socket at /a: start it (no other answer within 20 s)";
        for (name, count, expected) in [
            ("held", 3, answered),
            ("answers", usize::MAX, answered),
            ("silent", 0, "timed out; find the cause in the log"),
        ] {
            let socket = folder.path().join(name);
            let server = serve_transient_errors(UnixListener::bind(&socket).unwrap(), count);
            let server = tokio::spawn(server);
            let fetched = fetch_from(&socket, &[geteuid().as_raw()], "/v1/credentials").await;
            let error = fetched.unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
            server.abort();
        }
    }
}
