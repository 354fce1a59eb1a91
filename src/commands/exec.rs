//! `awsvid exec -- CMD`: runs a command with the variables by which SDKs find awsvid, and without
//! those with precedence.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use hyper::Uri;

use super::{ConfigFile, DaemonEndpoints};
use crate::config::{AuthorizationMode, ListenConfig};
use crate::exit_status::ExitStatus;
use crate::sdk_environment::{Environment, HIGHER_PRECEDENCE_VARS, leads_to_metadata};

mod error;
mod over_tcp;
mod profile;

use error::ExecError;
pub(super) use error::InvalidRoleName;

/// Path that the daemon serves.
const PATH: &str = "/v1/credentials";
/// Addresses of ECS and EKS, which SDKs use over plain HTTP in addition to loopback.
const CONTAINER_HOSTS: [&str; 3] = ["169.254.170.2", "169.254.170.23", "fd00:ec2::23"];

/// Runs a command with awsvid's credentials
///
/// Sets the variables by which every AWS SDK and the AWS CLI find awsvid. Removes those that would
/// take precedence, and reports their names. Then it becomes the command: same process, same
/// terminal, its exit status. The command itself fetches and renews its credentials. If awsvid
/// rejects all callers over TCP (unsupported_kernel), the command is not started.
///
/// Profiles take precedence as well. A profile that leads to awsvid is kept: one with
/// `credential_source = EcsContainer` or with `credential_process = awsvid credential-process`. A
/// profile that leads to other credentials is replaced by another one with all its other settings.
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
    /// URL of awsvid, instead of the configuration's: `http://127.0.0.1:974`, with or without a
    /// path
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Name of the `[[role]]`, if the workload has several
    #[arg(long, value_name = "NAME")]
    role: Option<String>,
    /// Path of the daemon's token file, instead of the configuration's
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Omits the report of removed variables
    #[arg(long, short)]
    quiet: bool,
    /// Command to run, with its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Environment of the command, and notes for the user.
struct PreparedCommand {
    /// URI from which the command fetches credentials.
    uri: String,
    environment: Environment,
    notes: Vec<String>,
}

impl Exec {
    /// Becomes the command. Returns only on failure.
    #[expect(
        clippy::print_stderr,
        reason = "notes and errors go to standard error before the command takes over the terminal"
    )]
    pub fn run(&self) -> ExitStatus {
        let prepared = self.prepare(|name| std::env::var(name).ok());
        let prepared = prepared.and_then(|prepared| {
            over_tcp::check(&prepared.uri)?;
            Ok(prepared)
        });
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                eprintln!("awsvid exec: {error}");
                return ExitStatus::OwnFailure;
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
            None => io::Error::other("the command is missing"),
        };
        let name = self
            .command
            .first()
            .map(|name| name.to_string_lossy())
            .unwrap_or_default();
        eprintln!("awsvid exec: {name}: {error}");
        ExitStatus::of_unstarted(&error)
    }

    fn prepare(
        &self,
        inherited: impl Fn(&str) -> Option<String>,
    ) -> Result<PreparedCommand, ExecError> {
        let daemon = if self.url.is_some() && self.config.config.is_none() {
            DaemonEndpoints::default()
        } else {
            self.config.daemon_endpoints()?
        };
        let url = self
            .url
            .as_deref()
            .map_or_else(|| loopback(&daemon.listen), endpoint)?;
        let uri = match &self.role {
            Some(role) => format!("{}/{}", url.uri, role_in_path(role)?),
            None => url.uri,
        };
        // Without a configuration, as in a pod, the environment may have been injected.
        let serves_imds = daemon
            .serves_imds
            .unwrap_or_else(|| leads_to_metadata(&url.origin, &inherited));
        let metadata = serves_imds.then_some(url.origin);
        let endpoints = (uri.clone(), metadata);
        let mut environment = Environment::new(endpoints, &url.host, &inherited);
        // An ARN is not the name of a role there.
        let by_name = self
            .role
            .as_deref()
            .filter(|role| !role.starts_with("arn:"));
        match by_name.filter(|_| serves_imds) {
            Some(role) => environment.set("AWS_EC2_INSTANCE_PROFILE_NAME", role),
            None => environment.remove("AWS_EC2_INSTANCE_PROFILE_NAME"),
        }
        self.set_token(&mut environment, &daemon.listen)?;
        let mut notes = Vec::from_iter(note_of_removed(&environment, &inherited));
        let has_region = profile::replace(&mut environment, &mut notes, &inherited)?;
        let is_set = inherited("AWS_REGION")
            .or_else(|| inherited("AWS_DEFAULT_REGION"))
            .is_some()
            || has_region;
        let region = daemon.region.filter(|_| !is_set);
        if let Some(region) = region {
            environment.set("AWS_REGION", region.as_str());
            environment.set("AWS_DEFAULT_REGION", region);
        }
        Ok(PreparedCommand {
            uri,
            environment,
            notes,
        })
    }

    /// Sets the token by both variables, with one content.
    ///
    /// Old SDKs know only the variable with the token, and one client (object_store) uses the
    /// endpoint only with the file. If the two differed, each SDK would send another one.
    fn set_token(
        &self,
        environment: &mut Environment,
        listen: &ListenConfig,
    ) -> Result<(), ExecError> {
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
                let path = path.to_owned();
                return Err(ExecError::TokenFile { path, error });
            }
            // Any value will do.
            Err(_) => environment.set("AWS_CONTAINER_AUTHORIZATION_TOKEN", "any"),
        }
        Ok(())
    }
}

/// Returns a note with the variables that were set, and that the command does not get.
fn note_of_removed(
    environment: &Environment,
    inherited: impl Fn(&str) -> Option<String>,
) -> Option<String> {
    let removed: Vec<&str> = HIGHER_PRECEDENCE_VARS
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| environment.removed().contains(name) && inherited(name).is_some())
        // These may lead to awsvid.
        .filter(|name| !profile::VARIABLES.contains(name))
        .collect();
    (!removed.is_empty()).then(|| {
        format!(
            "removed from the command's environment: {} (SDKs prefer them to awsvid)",
            removed.join(", ")
        )
    })
}

/// URL of the daemon's endpoint.
#[derive(Debug, PartialEq, Eq)]
struct Url {
    /// The URI, without a trailing slash.
    uri: String,
    /// The URI without a path.
    origin: String,
    host: String,
}

/// Returns an address of the configuration, preferably 127.0.0.1, the only form that every SDK
/// accepts.
fn loopback(listen: &ListenConfig) -> Result<Url, ExecError> {
    let address = listen
        .tcp
        .iter()
        .find(|address| address.is_ipv4())
        .or(listen.tcp.first());
    let Some(address) = address else {
        return Err(ExecError::NoTcpAddress);
    };
    if address.port() == 0 {
        return Err(ExecError::UnknownPort);
    }
    endpoint(&format!("http://{address}"))
}

/// Parses a URL leniently, and rejects what SDKs would reject, with a better message.
fn endpoint(text: &str) -> Result<Url, ExecError> {
    let failed = |what| {
        Err(ExecError::Url {
            text: text.to_owned(),
            what,
        })
    };
    let Ok(url) = text.parse::<Uri>() else {
        return failed("not a URL");
    };
    let (Some(scheme), Some(authority)) = (url.scheme_str(), url.authority()) else {
        return failed("it has no scheme or no host");
    };
    if authority.as_str().contains('@') || url.query().is_some() {
        return failed("some SDKs drop users and queries");
    }
    let host = authority.host();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let is_local = match bare.parse::<IpAddr>() {
        Ok(address) => address.is_loopback() || CONTAINER_HOSTS.contains(&bare),
        Err(_) => bare == "localhost",
    };
    match scheme {
        "https" => {}
        "http" if is_local => {}
        "http" => return failed("over plain HTTP SDKs accept only loopback addresses"),
        _ => return failed("SDKs support only http and https"),
    }
    // With an empty path some SDKs send no request.
    let path = match url.path().trim_end_matches('/') {
        "" => PATH,
        path => path,
    };
    Ok(Url {
        uri: format!("{scheme}://{authority}{path}"),
        origin: format!("{scheme}://{authority}"),
        host: bare.to_owned(),
    })
}

/// Returns the role's name, or its ARN in percent-encoding.
pub(super) fn role_in_path(role: &str) -> Result<String, InvalidRoleName> {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
    const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'_').remove(b'-');
    match role {
        "" | "." | ".." => Err(InvalidRoleName(role.to_owned())),
        _ => Ok(utf8_percent_encode(role, ESCAPED).to_string()),
    }
}

/// Reads the token. Some SDKs send the file's content unchanged, others reject a line break in it.
fn read_token(path: &Path) -> io::Result<String> {
    let text = std::fs::read_to_string(path)?;
    if text.is_empty() || !text.bytes().all(|c| c.is_ascii_graphic()) {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            "the content is not a token",
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
