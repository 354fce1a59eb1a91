//! The command `awsvid dev`: the servers of this module, the daemon between them, and whoever uses it.

use std::error::Error;
use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;

use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use super::{Dev, command};
use crate::app::{App, Startup};
use crate::config::Config;
use crate::environment::{self, Environment};
use crate::listen::ActivatedSockets;
use crate::metrics::Metrics;
use crate::telemetry::{self, Log};

/// The daemon's usual port.
const PORT: u16 = 974;

/// Runs `awsvid dev`: with a command until that ends, with its exit status; without one until SIGINT or SIGTERM.
///
/// The process gives up no privileges, as `serve` does: a command run by root could otherwise not become another user.
#[expect(clippy::print_stderr, reason = "this is a person's terminal")]
pub fn run(command: &[OsString]) -> ExitCode {
    let ran = || Runtime::new()?.block_on(run_dev(command));
    ran().unwrap_or_else(|error: Box<dyn Error>| {
        eprintln!("awsvid dev: {error}");
        ExitCode::FAILURE
    })
}

async fn run_dev(command: &[OsString]) -> Result<ExitCode, Box<dyn Error>> {
    let dev = Dev::start().await?;
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let (log, app) = start(&dev, !command.is_empty()).await?;
    let address = *app.tcp.first().ok_or("the daemon has no TCP address")?;
    if let Some(missing) = app.missing_for_tcp() {
        return Err(format!("the command would be refused over TCP: {missing}").into());
    }
    let environment = dev.environment(address, variable)?;
    let status = if command.is_empty() {
        announce(&dev, &environment, address.port());
        tokio::select! { _ = term.recv() => (), _ = int.recv() => () }
        ExitCode::SUCCESS
    } else {
        ExitCode::from(run_command(command, &environment).await)
    };
    app.drain().await;
    log.flush();
    Ok(status)
}

/// Starts the daemon on its usual port, or where that can't be had (without root, or when another process has it) on one
/// that the kernel picks.
async fn start(dev: &Dev, quiet: bool) -> Result<(Log, App), Box<dyn Error>> {
    let is_free = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).is_ok();
    let port = if is_free { PORT } else { 0 };
    let loaded = Config::parse_for_dev(&dev.configuration(port, quiet), &variable);
    // With `dev`'s own text this can only be about the variables of the environment.
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

#[expect(clippy::print_stderr, reason = "as a shell says it")]
async fn run_command(command: &[OsString], environment: &Environment) -> u8 {
    command::run(command, environment)
        .await
        .unwrap_or_else(|error| {
            let name = command
                .first()
                .map(|name| name.to_string_lossy())
                .unwrap_or_default();
            eprintln!("awsvid dev: {name}: {error}");
            environment::exit_code(&error)
        })
}

/// Lines for another terminal, with comments that a shell skips.
#[expect(clippy::print_stdout, reason = "this is what the command is for")]
fn announce(dev: &Dev, environment: &Environment, port: u16) {
    let port = match port {
        PORT => String::new(),
        other => format!(
            "# The usual port {PORT} needs root, or another process has it; this time it is {other}.\n"
        ),
    };
    let (first, others) = match dev.users() {
        [first, others @ ..] => (first.spiffe_id.as_str(), others.len()),
        [] => ("nobody", 0),
    };
    let others = if others == 0 {
        String::new()
    } else {
        format!(", and {others} more users of this machine")
    };
    println!(
        "# awsvid dev serves {first}{others}. Only this machine can reach it; it knows no AWS account.\n\
         # In another terminal:\n\n{environment}\n\
         # Then, for instance: aws sts get-caller-identity\n\
         # Or without a shell's environment: curl --unix-socket {socket} http://localhost/v1/credentials\n\
         {port}# One audit record per request follows. Ctrl-C ends it, and with it all credentials.",
        socket = dev.socket().display(),
    );
}
