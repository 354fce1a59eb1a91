//! `awsvid exec -- CMD`: a command with the variables by which SDKs find awsvid, and without those by which they find others.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Args;
use hyper::Uri;

use super::{ConfigFile, DaemonEndpoints};
use crate::config::{AuthorizationMode, Listen};
use crate::environment::{self, Environment, HIGHER_PRECEDENCE_VARS};

mod over_tcp;
mod profile;

/// As env(1) and timeout(1) end where it is them that failed, and not the command.
const OWN_FAILURE: u8 = 125;
/// The path that the daemon serves.
const PATH: &str = "/v1/credentials";
/// What SDKs take over plain HTTP besides loopback: the addresses of ECS and EKS.
const CONTAINER_HOSTS: [&str; 3] = ["169.254.170.2", "169.254.170.23", "fd00:ec2::23"];

/// Runs a command with awsvid's credentials.
///
/// Sets the variables by which every AWS SDK and the AWS CLI find awsvid, removes those by which they would find other
/// credentials first (and says which), and becomes the command: same process, same terminal, its exit status. Credentials
/// are fetched by the command itself, and renewed by it for as long as it runs. Where awsvid refuses all callers over TCP
/// (unsupported_kernel) the command is not started.
///
/// Profiles come first as well. One that leads to awsvid is kept, as one with `credential_source = EcsContainer` or with
/// `credential_process = awsvid credential-process`. Instead of one that leads to other credentials the command gets
/// another profile with all other settings of that one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  awsvid exec -- aws sts get-caller-identity
  awsvid exec --role backup -- restic backup /srv
  awsvid exec --url http://127.0.0.1:974 -- ./server   without a configuration

Exit status: that of the command, 127 if the command does not exist, 126 if it
cannot be run, 125 if awsvid itself fails.")]
pub struct Exec {
    #[command(flatten)]
    config: ConfigFile,
    /// Where awsvid is, instead of what the configuration says: `http://127.0.0.1:974`, with or without a path.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// One of several roles, by the name of its `[[role]]`.
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    /// The daemon's token file, instead of what the configuration says.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Don't say what was removed.
    #[arg(long, short)]
    quiet: bool,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// The variables, and what a person should know about them.
struct Prepared {
    /// Where the command asks for credentials.
    uri: String,
    environment: Environment,
    notes: Vec<String>,
}

impl Exec {
    /// Becomes the command. Returns only if that is not possible.
    #[expect(
        clippy::print_stderr,
        reason = "what a person has to know before the command takes over the terminal"
    )]
    pub fn run(&self) -> ExitCode {
        let prepared = self.prepare(|name| std::env::var(name).ok());
        let prepared =
            prepared.and_then(|prepared| over_tcp::check(&prepared.uri).map(|()| prepared));
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                eprintln!("awsvid exec: {error}");
                return ExitCode::from(OWN_FAILURE);
            }
        };
        if !self.quiet {
            prepared
                .notes
                .iter()
                .for_each(|note| eprintln!("awsvid exec: {note}"));
        }
        let error = match self.command.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                prepared.environment.apply(command.args(arguments));
                command.exec()
            }
            None => io::Error::other("there is no command"),
        };
        let name = self
            .command
            .first()
            .map(|name| name.to_string_lossy())
            .unwrap_or_default();
        eprintln!("awsvid exec: {name}: {error}");
        ExitCode::from(environment::exit_code(&error))
    }

    fn prepare(&self, inherited: impl Fn(&str) -> Option<String>) -> Result<Prepared, String> {
        let beside = if self.url.is_some() && self.config.config.is_none() {
            DaemonEndpoints {
                listen: Listen::default(),
                region: None,
            }
        } else {
            let hint =
                "give --url http://127.0.0.1:974 if the configuration is not for this user to read";
            self.config
                .daemon_endpoints()
                .map_err(|errors| format!("{errors}\n{hint}"))?
        };
        let url = self
            .url
            .as_deref()
            .map_or_else(|| loopback(&beside.listen), endpoint)?;
        let uri = match &self.role {
            Some(role) => format!("{}/{}", url.uri, role_in_path(role)?),
            None => url.uri,
        };
        let mut environment = Environment::new(uri.clone(), &url.host, &inherited);
        self.give_token(&mut environment, &beside.listen)?;
        let mut notes = Vec::new();
        let there: Vec<&str> = HIGHER_PRECEDENCE_VARS
            .into_iter()
            .map(|(name, _)| name)
            .filter(|name| environment.removed().contains(name) && inherited(name).is_some())
            // These may lead to awsvid.
            .filter(|name| !profile::VARIABLES.contains(name))
            .collect();
        if !there.is_empty() {
            let why = "SDKs take credentials from there before they ask awsvid";
            notes.push(format!(
                "removed from the command's environment: {} ({why})",
                there.join(", ")
            ));
        }
        let judged = profile::judge(&mut environment, &mut notes, &inherited);
        let is_set = inherited("AWS_REGION")
            .or_else(|| inherited("AWS_DEFAULT_REGION"))
            .is_some()
            || judged.has_region;
        let region = judged.hidden_region.or(beside.region).filter(|_| !is_set);
        if let Some(region) = region {
            environment.set("AWS_REGION", region.as_str());
            environment.set("AWS_DEFAULT_REGION", region);
        }
        Ok(Prepared {
            uri,
            environment,
            notes,
        })
    }

    /// The token both ways with one content: old SDKs know only the variable, one client (object_store) uses the endpoint
    /// only with the file, and where the two differed it would depend on the SDK which one is sent.
    fn give_token(&self, environment: &mut Environment, listen: &Listen) -> Result<(), String> {
        let path = self.token_file.as_deref().unwrap_or(&listen.token_file);
        let needed = self.token_file.is_some() || listen.authorization == AuthorizationMode::Token;
        match read_token(path) {
            Ok(token) => {
                environment.set("AWS_CONTAINER_AUTHORIZATION_TOKEN", token);
                environment.set(
                    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
                    path.display().to_string(),
                );
            }
            Err(error) if needed => {
                let fix =
                    "awsvid writes it when it starts; is it running, and is this its --token-file?";
                return Err(format!("the token file {}: {error}; {fix}", path.display()));
            }
            // Any value will do.
            Err(_) => environment.set("AWS_CONTAINER_AUTHORIZATION_TOKEN", "any"),
        }
        Ok(())
    }
}

/// The daemon's URL.
#[derive(Debug, PartialEq, Eq)]
struct Url {
    /// Without a trailing slash.
    uri: String,
    host: String,
}

/// An address of the configuration, best 127.0.0.1: the one form that every SDK accepts.
fn loopback(listen: &Listen) -> Result<Url, String> {
    let address = listen
        .tcp
        .iter()
        .find(|address| address.is_ipv4())
        .or(listen.tcp.first());
    let Some(address) = address else {
        return Err(
            "the configuration has no `tcp` address, and SDKs can't ask over the unix socket; \
                    add one, or use `awsvid credential-process` in ~/.aws/config"
                .to_owned(),
        );
    };
    if address.port() == 0 {
        return Err(
            "the configuration has port 0, so only the daemon's log knows the port; give --url"
                .to_owned(),
        );
    }
    endpoint(&format!("http://{address}"))
}

/// Reads a URL as somebody would write it, and refuses what SDKs would refuse with fewer words.
fn endpoint(text: &str) -> Result<Url, String> {
    const FORM: &str = "write it as http://127.0.0.1:974";
    let failed = |what: &str| Err(format!("--url {text:?}: {what}; {FORM}"));
    let Ok(url) = text.parse::<Uri>() else {
        return failed("it is no URL");
    };
    let (Some(scheme), Some(authority)) = (url.scheme_str(), url.authority()) else {
        return failed("it has no scheme or no host");
    };
    if authority.as_str().contains('@') || url.query().is_some() {
        return failed("some SDKs drop users and queries");
    }
    let host = authority.host();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let is_near = match bare.parse::<IpAddr>() {
        Ok(address) => address.is_loopback() || CONTAINER_HOSTS.contains(&bare),
        Err(_) => bare == "localhost",
    };
    match scheme {
        "https" => {}
        "http" if is_near => {}
        "http" => return failed("over plain HTTP SDKs ask only loopback"),
        _ => return failed("SDKs know http and https"),
    }
    // With an empty path some SDKs ask for nothing.
    let path = match url.path().trim_end_matches('/') {
        "" => PATH,
        path => path,
    };
    Ok(Url {
        uri: format!("{scheme}://{authority}{path}"),
        host: bare.to_owned(),
    })
}

/// A role's name, or its ARN in percent-encoding.
pub(super) fn role_in_path(role: &str) -> Result<String, String> {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
    const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'_').remove(b'-');
    match role {
        "" | "." | ".." => Err(format!("--role {role:?} is no role's name")),
        _ => Ok(utf8_percent_encode(role, ESCAPED).to_string()),
    }
}

/// Some SDKs send what is in the file as it is, others refuse a line break in it.
fn read_token(path: &Path) -> io::Result<String> {
    let text = std::fs::read_to_string(path)?;
    if text.is_empty() || !text.bytes().all(|c| c.is_ascii_graphic()) {
        return Err(io::Error::new(ErrorKind::InvalidData, "it holds no token"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
