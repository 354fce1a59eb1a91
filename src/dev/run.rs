//! The command `awsvid dev`: the servers of `dev`, the daemon between them, and the user's command.

use std::error::Error;
use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};

use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use super::{Dev, child};
use crate::app::{App, Startup};
use crate::config::Config;
use crate::exit_status::ExitStatus;
use crate::file_threads::FileThreads;
use crate::listen::ActivatedSockets;
use crate::metrics::Metrics;
use crate::sdk_environment::Environment;
use crate::telemetry::{self, Log};

/// Usual port of the daemon.
const DEFAULT_PORT: u16 = 974;

/// Runs `awsvid dev`: with a command until the command ends, else until SIGINT or SIGTERM. Returns
/// the exit status.
///
/// Unlike `serve`, the process drops no privileges. Otherwise a command that root runs could not
/// become another user.
#[expect(
    clippy::print_stderr,
    reason = "errors of this command go to standard error"
)]
pub fn run(command: &[OsString]) -> ExitStatus {
    let result = || Runtime::new()?.block_on(run_dev(command));
    result().unwrap_or_else(|error: Box<dyn Error>| {
        eprintln!("awsvid dev: {error}");
        ExitStatus::Failure
    })
}

async fn run_dev(command: &[OsString]) -> Result<ExitStatus, Box<dyn Error>> {
    let dev = Dev::start().await?;
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let (log, app) = start(&dev, !command.is_empty()).await?;
    let address = *app.tcp.first().ok_or("the daemon has no TCP address")?;
    if let Some(missing) = app.missing_for_tcp() {
        return Err(format!("the command would be rejected over TCP: {missing}").into());
    }
    let environment = dev.environment(address, variable)?;
    let status = if command.is_empty() {
        announce(&dev, &environment, address.port());
        tokio::select! { _ = term.recv() => (), _ = int.recv() => () }
        ExitStatus::Success
    } else {
        run_command(command, &environment).await
    };
    app.drain().await;
    log.flush();
    Ok(status)
}

/// Starts the daemon on its usual port. If that port is not available (not root, or in use), the
/// kernel picks one.
async fn start(dev: &Dev, quiet: bool) -> Result<(Log, App), Box<dyn Error>> {
    let is_free = TcpListener::bind((Ipv4Addr::LOCALHOST, DEFAULT_PORT)).is_ok();
    let port = if is_free { DEFAULT_PORT } else { 0 };
    let loaded = Config::parse_for_dev(&dev.configuration(port, quiet), &variable);
    // The text is `dev`'s own, so an error can only be about environment variables.
    let loaded = loaded.map_err(|problems| {
        problems
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n")
    })?;
    let (config, metrics) = (loaded.config, Metrics::default());
    let log = telemetry::init(
        &config.log.level,
        config.log.format,
        metrics.log_lines_dropped.clone(),
    )?;
    log.start()?;
    match App::start(
        config,
        Startup {
            inherited: ActivatedSockets::default(),
            exec_monitor: None,
            metrics,
            file_threads: FileThreads::default(),
        },
    )
    .await
    {
        Ok(app) => Ok((log, app)),
        Err(error) => {
            log.flush();
            Err(error.into())
        }
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

#[expect(
    clippy::print_stderr,
    reason = "errors of this command go to standard error"
)]
async fn run_command(command: &[OsString], environment: &Environment) -> ExitStatus {
    child::run(command, environment)
        .await
        .unwrap_or_else(|error| {
            let name = command
                .first()
                .map(|name| name.to_string_lossy())
                .unwrap_or_default();
            eprintln!("awsvid dev: {name}: {error}");
            ExitStatus::of_unstarted(&error)
        })
}

/// Prints lines for another terminal, with comments for the shell.
#[expect(clippy::print_stdout, reason = "the output of this command")]
fn announce(dev: &Dev, environment: &Environment, port: u16) {
    let port = match port {
        DEFAULT_PORT => String::new(),
        other => {
            format!(
                "# The usual port {DEFAULT_PORT} needs root, or is in use: this run has {other}.\n"
            )
        }
    };
    let (first, others) = match dev.users() {
        [first, others @ ..] => (first.spiffe_id.as_str(), others.len()),
        [] => ("no user", 0),
    };
    let others = if others == 0 {
        String::new()
    } else {
        format!(", and {others} more users of this machine")
    };
    println!(
        "# awsvid dev serves {first}{others}. Only this machine can reach it, and AWS does not know it.\n\
         # In another terminal:\n\n{environment}\n\
         # Then, for instance: aws sts get-caller-identity\n\
         # Or without a shell's environment: curl --unix-socket {socket} http://localhost/v1/credentials\n\
         {port}# One audit record per request follows. Ctrl-C ends it and all its credentials.",
        socket = dev.socket().display(),
    );
}
