//! The `awsvid` command.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use awsvid::app::App;
use awsvid::config::{self, Config};
use awsvid::listen::Inherited;
use awsvid::{dev, hardening, telemetry};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// sysexits.h: something was found in an unconfigured or misconfigured state. systemd does not restart on it.
const EX_CONFIG: u8 = 78;
/// With a signal's number added: ended by that signal while requests were open. As shells say it of a killed process.
const KILLED: u8 = 128;

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
    start(config).unwrap_or_else(|error| {
        tracing::error!(%error, "awsvid did not start");
        ExitCode::FAILURE
    })
}

fn start(config: Config) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let inherited = Inherited::from_environment();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(run(config, inherited));
    // Without waiting for what still blocks a thread, such as the lookup of a name that nobody needs any more.
    runtime.shutdown_background();
    ended
}

async fn run(config: Config, inherited: Inherited) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut signals = Signals::catch()?;
    let app = App::start(config, inherited).await?;
    // Not running under systemd is no error.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    signals.end().await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("ending: no new connections, open ones are finished; a second signal ends at once");
    tokio::select! {
        () = app.drain() => Ok(ExitCode::SUCCESS),
        number = signals.end() => {
            tracing::warn!("ending at once: open requests are cut");
            Ok(ExitCode::from(KILLED + number))
        }
    }
}

/// The signals that end the daemon.
struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// Waits for one of them; its number.
    async fn end(&mut self) -> u8 {
        const SIGINT: u8 = 2;
        const SIGTERM: u8 = 15;
        tokio::select! {
            _ = self.term.recv() => SIGTERM,
            _ = self.int.recv() => SIGINT,
        }
    }
}
