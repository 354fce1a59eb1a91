//! `awsvid credential-process`: for `~/.aws/config`, over the unix socket.

use std::borrow::Cow;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::exec::role_in_path;
use super::http_client::LocalResponse;
use super::{ConfigFile, trusted_socket};

/// SDKs run it once and take what it says, so it tries as long as a person would wait.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between tries, if the daemon says nothing else; and at most, whatever it says.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// No SDK takes more from the daemon.
const ANSWER_MAX: usize = 64 * 1024;

/// Prints credentials for `credential_process` in ~/.aws/config
///
/// In ~/.aws/config:
///
///   [profile billing]
///   credential_process = /usr/bin/awsvid credential-process --role billing
///
/// SDKs run this command whenever they need new credentials. It asks over awsvid's unix socket, after it has made sure that
/// the socket is awsvid's: directory, file and listener belong to root. What it prints is secret.
///
/// Rules by `exe` never match: it is this command that asks, with the user, the groups and the cgroup of whoever runs it,
/// but with awsvid's own executable. Programs that set the variables of `awsvid exec` ask themselves, and match.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct CredentialProcess {
    #[command(flatten)]
    config: ConfigFile,
    /// awsvid's unix socket, instead of what the configuration says.
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// One of several roles, by the name of its `[[role]]`.
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    /// Also trusts a daemon that runs as this very user, such as `awsvid dev`.
    #[arg(long)]
    same_user: bool,
}

/// What the daemon says.
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

/// What it says if there are none.
#[derive(Deserialize)]
struct ProcessRefusal {
    code: String,
    message: String,
}

/// The format of AWS's documentation ("Process credential provider"): these keys and no others.
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
    /// Prints them, or on standard error why not.
    #[expect(clippy::print_stderr, reason = "SDKs show it to whoever runs them")]
    pub fn run(&self) -> ExitCode {
        match self.fetch().and_then(|output| {
            io::stdout()
                .write_all(&output)
                .map_err(|error| error.to_string())
        }) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("awsvid credential-process: {error}");
                ExitCode::FAILURE
            }
        }
    }

    fn fetch(&self) -> Result<Zeroizing<Vec<u8>>, String> {
        let socket = match &self.socket {
            Some(socket) => socket.clone(),
            None => self.config.daemon_endpoints().map_err(|errors| format!("{errors}\nor name the socket with --socket"))?.listen.unix.ok_or(
                "the configuration has no unix socket; set `unix` in [listen], or give SDKs the variables of `awsvid exec`",
            )?,
        };
        let path = match &self.role {
            Some(role) => format!("/v1/credentials/{}", role_in_path(role)?),
            None => "/v1/credentials".to_owned(),
        };
        let mut owners = vec![0];
        owners.extend(self.same_user.then(|| geteuid().as_raw()));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = trusted_socket::get(&socket, &owners, &path, ANSWER_MAX, deadline)?;
            match answer.status {
                200 => return output(&answer.body),
                503 if Instant::now() + pause(&answer) < deadline => thread::sleep(pause(&answer)),
                _ => return Err(refusal(&answer)),
            }
        }
    }
}

fn pause(answer: &LocalResponse) -> Duration {
    answer
        .retry_after
        .unwrap_or(PAUSE)
        .clamp(Duration::from_millis(100), PAUSE_MAX)
}

/// What the daemon said, which is for whoever runs the workload.
fn refusal(answer: &LocalResponse) -> String {
    match serde_json::from_slice::<ProcessRefusal>(&answer.body) {
        Ok(ProcessRefusal { code, message }) => {
            let exe =
                "rules by `exe` never match here, since awsvid's own executable asks: see --help";
            let hint = if code == "no_identity" {
                format!(" ({exe})")
            } else {
                String::new()
            };
            format!("{}{hint}", message.replace(char::is_control, " "))
        }
        Err(_) => format!(
            "the answer has status {} and is not awsvid's; is --socket the right one?",
            answer.status
        ),
    }
}

fn output(body: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
    // Without the parser's words: it may quote what it read.
    let issued: ProcessCredentials<'_> =
        serde_json::from_slice(body).map_err(|_| "the answer is not awsvid's".to_owned())?;
    let output = ProcessOutput {
        version: 1,
        access_key_id: &issued.access_key_id,
        secret_access_key: &issued.secret_access_key,
        session_token: &issued.token,
        expiration: &issued.expiration,
    };
    // No larger than the answer but for longer names: a buffer that grows leaves copies of the secrets behind.
    let mut text = Zeroizing::new(Vec::with_capacity(body.len() + 256));
    serde_json::to_writer(&mut *text, &output).map_err(|error| error.to_string())?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_is_as_aws_documents_it() {
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
            assert!(!output(wrong.as_bytes()).unwrap_err().contains("s3cret"));
        }
    }

    #[test]
    fn a_refusal_is_the_daemons_own_words() {
        let answer = |body: &str| LocalResponse {
            status: 403,
            retry_after: None,
            body: Zeroizing::new(body.as_bytes().to_vec()),
        };
        let refused = refusal(&answer(
            r#"{"code":"no_role","message":"add a role\u001b[2J","Code":"","Message":""}"#,
        ));
        assert_eq!(refused, "add a role [2J");
        assert!(
            refusal(&answer(r#"{"code":"no_identity","message":"m"}"#))
                .contains("`exe` never match")
        );
        assert!(refusal(&answer("<html>")).contains("status 403"));
    }
}
