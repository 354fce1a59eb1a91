//! The command `awsvid serve`: from the configuration file to an exit status, with the signals in between.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;

use crate::app::{App, AppError, Startup};
use crate::attest::{ExecMonitor, StartError};
use crate::config::{self, Config, Exposure, Problem};
use crate::hardening::{self, DaemonFeatures};
use crate::listen::ActivatedSockets;
use crate::metrics::Metrics;
use crate::pods::PodsError;
use crate::telemetry;
use crate::telemetry::Log;

/// sysexits.h: something was found in an unconfigured or misconfigured state. systemd does not restart on it.
const EX_CONFIG: u8 = 78;
/// With a signal's number added: ended by that signal while requests were open. As shells say it of a killed process.
const SIGNAL_EXIT_BASE: u8 = 128;

const NOT_COUNTED: &str = "executions of programs cannot be counted, so callers' processes are not named to the agent (unseen_program)";

/// Runs the daemon with the configuration at `path` until SIGTERM or SIGINT; SIGHUP reads it again. To be called before any
/// thread is started. The exit statuses are in deploy/README.md.
#[expect(
    clippy::print_stderr,
    reason = "before the log is there, standard error is where a person looks"
)]
pub fn serve(path: &Path) -> ExitCode {
    let loaded = match Config::load(path, Exposure::Refused, |name| std::env::var(name).ok()) {
        Ok(loaded) => loaded,
        Err(errors) => {
            eprintln!("{errors}\nawsvid: the configuration has errors and nothing was started");
            return ExitCode::from(EX_CONFIG);
        }
    };
    let config::Loaded { config, warnings } = loaded;
    let metrics = Metrics::default();
    let log = match telemetry::init(
        &config.log.level,
        config.log.format,
        metrics.log_lines_dropped.clone(),
    ) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("{}: [log] level: {error}", path.display());
            return ExitCode::from(EX_CONFIG);
        }
    };
    warn(path, &warnings);
    let does = DaemonFeatures::of(&config);
    // It takes capabilities that are given up right after.
    let exec_monitor = does.names_processes().then(exec_monitor).flatten();
    hardening::harden_before_threads(does);
    if let Err(error) = log.start() {
        eprintln!("awsvid: the log cannot be written: {error}");
        return ExitCode::FAILURE;
    }
    // The default hook writes to standard error directly, and would wait for its reader.
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    let status = start(path, config, (&log, metrics), exec_monitor).unwrap_or_else(|error| {
        tracing::error!(%error, "awsvid did not start");
        // What another start would not change: a variable of the environment, or what the unit or the container lacks.
        match error.downcast_ref() {
            Some(
                AppError::Sts(_)
                | AppError::Attest(StartError::UserNamespace)
                | AppError::Pods(PodsError::Denied(_)),
            ) => ExitCode::from(EX_CONFIG),
            _ => ExitCode::FAILURE,
        }
    });
    log.flush();
    status
}

/// What notices that a caller's process executes a program. Without it nobody is named to an agent, and the log says why.
fn exec_monitor() -> Option<ExecMonitor> {
    ExecMonitor::start()
        .inspect_err(|error| tracing::error!("{NOT_COUNTED}: {error}; {}", error.fix()))
        .ok()
}

fn start(
    path: &Path,
    config: Config,
    (log, metrics): (&Log, Metrics),
    exec_monitor: Option<ExecMonitor>,
) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let inherited = ActivatedSockets::from_environment();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let startup = Startup {
        inherited,
        exec_monitor,
        metrics,
    };
    let ended = runtime.block_on(run(path, config, startup, log));
    // Without waiting for what still blocks a thread, such as the lookup of a name that nobody needs any more.
    runtime.shutdown_background();
    ended
}

async fn run(
    path: &Path,
    config: Config,
    startup: Startup,
    log: &Log,
) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut signals = Signals::catch()?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut app = App::start(config, startup).await?;
    notify(&[NotifyState::Ready]);
    spawn_blocking(seed_tls);
    loop {
        tokio::select! {
            _ = signals.end() => break,
            _ = hangup.recv() => {}
        }
        // A name service may let it wait; the daemon can be ended all the same.
        tokio::select! {
            _ = signals.end() => break,
            () = reload(&mut app, path, log) => {}
        }
    }
    notify(&[NotifyState::Stopping]);
    tracing::info!(
        "ending: no new connections, open ones are finished; a second signal ends at once"
    );
    tokio::select! {
        () = app.drain() => Ok(ExitCode::SUCCESS),
        number = signals.end() => {
            tracing::warn!("ending at once: open requests are cut");
            Ok(ExitCode::from(SIGNAL_EXIT_BASE + number))
        }
    }
}

/// Has the TLS library gather its first randomness, which takes 40 ms of a processor, before a handshake waits for it.
fn seed_tls() {
    // A handshake would fail with the same error, and say so.
    let _ = aws_lc_rs::rand::fill(&mut [0]);
}

/// Reads the configuration again. One that can't be used changes nothing.
async fn reload(app: &mut App, path: &Path, log: &Log) {
    let begun = NotifyState::monotonic_usec_now().ok();
    notify(
        &[Some(NotifyState::Reloading), begun]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>(),
    );
    let loading = {
        let path = path.to_owned();
        spawn_blocking(move || {
            Config::load(&path, Exposure::Refused, |name| std::env::var(name).ok())
        })
    };
    let used = match loading.await {
        Ok(Ok(loaded)) => {
            let (wanted, does) = (
                loaded.config.log.clone(),
                DaemonFeatures::of(&loaded.config),
            );
            app.reload(loaded.config).await.map_err(|error| error.to_string()).inspect(|()| {
                // It was read as a part of the configuration, so there is no error to lose.
                let _ = log.change(&wanted.level, wanted.format);
                warn(path, &loaded.warnings);
                hardening::warn_missing(does);
                if does.names_processes() && !app.counts_executions() {
                    tracing::error!(
                        "{NOT_COUNTED}: that takes privileges which are given up at the start; restart awsvid"
                    );
                }
            })
        }
        Ok(Err(errors)) => Err(errors.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let status = match used {
        Ok(()) => {
            tracing::info!("the configuration was reloaded");
            "Reloaded"
        }
        Err(errors) => {
            app.reload_failed();
            errors.lines().for_each(|line| tracing::error!("{line}"));
            tracing::error!("the configuration was not reloaded: the one before stays in effect");
            "The configuration has errors, see the log: the one before stays in effect"
        }
    };
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

fn warn(path: &Path, warnings: &[Problem]) {
    for warning in warnings {
        tracing::warn!("{}: {warning}", path.display());
    }
}

/// Tells systemd. Not running under it is no error.
fn notify(state: &[NotifyState<'_>]) {
    let _ = sd_notify::notify(state);
}

/// The signals that end the daemon.
struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
        })
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
