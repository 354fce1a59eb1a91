//! The `awsvid` command.

use std::path::PathBuf;
use std::process::ExitCode;

use awsvid::app::App;
use awsvid::config::{self, Config};
use awsvid::listen::Inherited;
use awsvid::{dev, hardening, telemetry};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// sysexits.h: something was found in an unconfigured or misconfigured state. systemd does not restart on it.
const EX_CONFIG: u8 = 78;

/// Gives each workload on this machine its own AWS credentials, by its SPIFFE identity.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the daemon.
    Serve {
        /// The configuration file.
        #[arg(long, env = "AWSVID_CONFIG", default_value = "/etc/awsvid/awsvid.toml")]
        config: PathBuf,
    },
    /// Tries the whole path on this machine: no AWS account and no SPIRE needed.
    Dev {
        /// A command to run with the credentials endpoint in its environment; without one, `dev` prints the variables.
        #[arg(last = true)]
        command: Vec<std::ffi::OsString>,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve { config } => serve(&config),
        Command::Dev { command } => dev::run(&command),
    }
}

#[expect(clippy::print_stderr, reason = "before the log is there, standard error is where a person looks")]
fn serve(path: &std::path::Path) -> ExitCode {
    let loaded = match Config::load(path, |name| std::env::var(name).ok()) {
        Ok(loaded) => loaded,
        Err(errors) => {
            eprintln!("{errors}\nawsvid: the configuration has errors and nothing was started");
            return ExitCode::from(EX_CONFIG);
        }
    };
    let config::Loaded { config, warnings } = loaded;
    if let Err(error) = telemetry::init(&config.log.level, config.log.format) {
        eprintln!("{}: [log] level: {error}", path.display());
        return ExitCode::from(EX_CONFIG);
    }
    for warning in warnings {
        tracing::warn!("{}: {warning}", path.display());
    }
    hardening::before_threads();
    match start(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "awsvid did not start");
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let inherited = Inherited::from_environment();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let app = App::start(config, inherited).await?;
        // Not running under systemd is no error.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        tokio::select! { _ = term.recv() => (), _ = int.recv() => () }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        tracing::info!("ending: no new connections, open ones are finished; a second signal ends at once");
        tokio::select! { () = app.drain() => (), _ = term.recv() => (), _ = int.recv() => () }
        Ok(())
    })
}
