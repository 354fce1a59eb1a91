//! The `awsvid serve` command: configuration, start, signals, exit status.

use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sd_notify::NotifyState;
use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;

use crate::app::{App, AppError, Startup};
use crate::attest::ExecMonitor;
use crate::config::{self, Config, Exposure, IdentityConfig, Problem, socket_exposures};
use crate::exit_status::ExitStatus;
use crate::file_threads::FileThreads;
use crate::hardening::{self, DaemonFeatures};
use crate::listen::ActivatedSockets;
use crate::metrics::Metrics;
use crate::telemetry;
use crate::telemetry::Log;
use crate::watchdog;

mod config_watch;
mod notifier;

use config_watch::ConfigWatch;
use notifier::Notifier;

/// The reason why the daemon does not start.
#[derive(Debug, Error)]
enum StartFailure {
    #[error(transparent)]
    App(#[from] AppError),
    /// No thread, or no signal handler.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl StartFailure {
    fn exit_status(&self) -> ExitStatus {
        match self {
            Self::App(error) => error.exit_status(),
            Self::Io(_) => ExitStatus::Failure,
        }
    }
}

/// The time within which worker threads have to make progress where systemd sets none.
const WATCHDOG_TIME: Duration = Duration::from_secs(60);

const NOT_COUNTED: &str =
    "executions of programs cannot be counted: callers are rejected (unseen_program)";

/// Runs the daemon with the configuration at `path` until SIGTERM or SIGINT. SIGHUP reloads it, and
/// with `watch` so does a change of its files.
///
/// Has to be called before any thread is started. The exit statuses are in deploy/docs/cli.md.
#[expect(
    clippy::print_stderr,
    reason = "before the log is started, errors go to standard error"
)]
pub fn serve(path: &Path, watch: bool) -> ExitStatus {
    // Before the files are loaded, so that no change is lost in between.
    let threads = FileThreads::default();
    let watch = watch.then(|| ConfigWatch::new(path, threads.clone()));
    let loaded = match Config::load(path, Exposure::Rejected, |name| std::env::var(name).ok()) {
        Ok(loaded) => loaded,
        Err(errors) => {
            eprintln!(
                "{errors}\nawsvid: not started: the configuration has errors; correct the lines above"
            );
            return ExitStatus::Config;
        }
    };
    let config::LoadedConfig {
        config, warnings, ..
    } = loaded;
    let metrics = Metrics::default();
    let log = match telemetry::init(
        &config.log.level,
        config.log.format,
        metrics.log_lines_dropped.clone(),
    ) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("{}: [log] level: {error}", path.display());
            return ExitStatus::Config;
        }
    };
    warn(path, &warnings);
    let features = DaemonFeatures::of(&config);
    // The monitor needs capabilities that are dropped right after.
    let exec_monitor = features.names_processes().then(exec_monitor).flatten();
    hardening::harden_before_threads(features);
    if let Err(error) = log.start() {
        eprintln!("awsvid: the log cannot be written: {error}");
        return ExitStatus::Failure;
    }
    // The default hook writes to standard error directly, and would block on its reader.
    std::panic::set_hook(Box::new(
        |panic| tracing::error!(%panic, "a thread panicked"),
    ));
    let files = WatchedConfig {
        path: path.to_owned(),
        watch,
        threads,
    };
    let status = start(files, config, &log, metrics, exec_monitor).unwrap_or_else(|error| {
        tracing::error!(%error, "awsvid did not start");
        error.exit_status()
    });
    log.flush();
    status
}

/// Starts the monitor of program executions. Without it no process is referred to an agent, and the
/// log has the reason.
fn exec_monitor() -> Option<ExecMonitor> {
    ExecMonitor::start()
        .inspect_err(|error| tracing::error!(%error, fix = error.fix(), "{NOT_COUNTED}"))
        .ok()
}

/// The file of the configuration, and the watch on it if it is watched.
struct WatchedConfig {
    path: PathBuf,
    watch: Option<ConfigWatch>,
    /// Threads for calls on files, those of the daemon's other parts included.
    threads: FileThreads,
}

impl WatchedConfig {
    /// Waits until the watch reports another content.
    async fn changed(&mut self) {
        match &mut self.watch {
            Some(watch) => watch.changed().await,
            None => pending().await,
        }
    }

    /// Prevents that the watch reports the content that is loaded now.
    async fn skip_current(&mut self) {
        if let Some(watch) = &mut self.watch {
            watch.skip_current().await;
        }
    }

    /// Logs each way in which another user could put its own socket at an agent's path. It does not
    /// delay the start, because a file system may not respond.
    fn warn_exposed_sockets(&self, identity: &IdentityConfig) -> impl Future<Output = ()> + use<> {
        let (path, threads) = (self.path.clone(), self.threads.clone());
        let sockets = identity.agent_sockets().into_iter();
        let sockets: Vec<_> = sockets
            .map(|(key, socket)| (key, socket.to_owned()))
            .collect();
        async move {
            for (key, socket) in sockets {
                let find = {
                    let socket = socket.clone();
                    move || socket_exposures(&socket)
                };
                let found = threads.run(&socket, find).await.unwrap_or_default();
                let found = found.into_iter().map(|problem| problem.with_key(key));
                warn(&path, &found.collect::<Vec<_>>());
            }
        }
    }

    fn follow_ca_file(&mut self, ca_file: Option<PathBuf>) {
        if let Some(watch) = &mut self.watch {
            watch.follow_ca_file(ca_file);
        }
    }
}

fn start(
    files: WatchedConfig,
    config: Config,
    log: &Log,
    metrics: Metrics,
    exec_monitor: Option<ExecMonitor>,
) -> Result<ExitStatus, StartFailure> {
    let inherited = ActivatedSockets::from_environment();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let startup = Startup {
        inherited,
        exec_monitor,
        metrics,
        file_threads: files.threads.clone(),
    };
    let ended = runtime.block_on(run(files, config, startup, log));
    // Does not wait for blocked threads, such as the lookup of a name that is not needed any more.
    runtime.shutdown_background();
    ended
}

async fn run(
    mut files: WatchedConfig,
    config: Config,
    startup: Startup,
    log: &Log,
) -> Result<ExitStatus, StartFailure> {
    let mut signals = Signals::catch()?;
    let mut hangup = signal(SignalKind::hangup())?;
    let notifier = Notifier::start();
    files.follow_ca_file(config.sts.ca_file.clone());
    tokio::spawn(files.warn_exposed_sockets(&config.identity));
    let mut app = App::start(config, startup).await?;
    notifier.notify(vec![NotifyState::Ready]).await;
    let limit = sd_notify::watchdog_enabled();
    let report = report_workers(limit.map(|_| notifier.clone()));
    tokio::spawn(watchdog::watch(limit.unwrap_or(WATCHDOG_TIME), report));
    spawn_blocking(seed_tls);
    loop {
        tokio::select! {
            _ = signals.end() => break,
            _ = hangup.recv() => files.skip_current().await,
            () = files.changed() => tracing::info!("configuration files changed"),
        }
        // A name service may block the reload. The signals still end the daemon.
        tokio::select! {
            _ = signals.end() => break,
            () = reload(&mut app, &mut files, log, &notifier) => {}
        }
    }
    notifier.notify(vec![NotifyState::Stopping]).await;
    tracing::info!("draining: open requests are finished; a second signal cuts them");
    tokio::select! {
        () = app.drain() => Ok(ExitStatus::Success),
        number = signals.end() => {
            tracing::warn!("stopped before open requests were finished");
            Ok(ExitStatus::Signal(number))
        }
    }
}

/// Returns what logs that worker threads are blocked. While none is, it notifies `watchdog`, if
/// systemd has one for this process.
fn report_workers(watchdog: Option<Notifier>) -> impl Fn(usize) {
    move |workers| match (workers, &watchdog) {
        (0, Some(watchdog)) => watchdog.notify_later(vec![NotifyState::Watchdog]),
        (0, None) => {}
        (workers, _) => tracing::error!(workers, "worker threads are blocked"),
    }
}

/// Lets the TLS library gather its first randomness, 40 ms of CPU time, before a handshake needs
/// it.
fn seed_tls() {
    // A handshake would fail with the same error and report it.
    let _ = aws_lc_rs::rand::fill(&mut [0]);
}

/// Reloads the configuration. One with errors changes nothing.
async fn reload(app: &mut App, files: &mut WatchedConfig, log: &Log, notifier: &Notifier) {
    let reload_start = NotifyState::monotonic_usec_now().ok();
    let reloading = [Some(NotifyState::Reloading), reload_start];
    notifier
        .notify(reloading.into_iter().flatten().collect())
        .await;
    let loading = {
        let path = files.path.clone();
        let load = move || Config::load(&path, Exposure::Rejected, |name| std::env::var(name).ok());
        files.threads.run(&files.path, load)
    };
    let used = match loading.await {
        Ok(Ok(loaded)) => {
            let (log_config, features) = (
                loaded.config.log.clone(),
                DaemonFeatures::of(&loaded.config),
            );
            let ca_file = loaded.config.sts.ca_file.clone();
            app.reload(loaded.config)
                .await
                .map_err(|error| error.to_string())
                .inspect(|()| {
                    // It was checked with the configuration, so it cannot fail here.
                    let _ = log.change(&log_config.level, log_config.format);
                    warn(&files.path, &loaded.warnings);
                    files.follow_ca_file(ca_file);
                    hardening::warn_missing(features);
                    if features.names_processes() && !app.counts_executions() {
                        tracing::error!(
                            error = "the privileges for that were dropped at the start",
                            fix = "restart awsvid",
                            "{NOT_COUNTED}"
                        );
                    }
                })
        }
        Ok(Err(errors)) => Err(errors.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let status = match used {
        Ok(()) => {
            tracing::info!("configuration reloaded");
            "Reloaded"
        }
        Err(errors) => {
            app.reload_failed();
            for error in errors.lines() {
                tracing::error!(%error, "the configuration has a mistake");
            }
            tracing::error!("configuration not reloaded: the previous one stays in effect");
            "The new configuration has errors, see the log; the previous one stays in effect"
        }
    };
    notifier
        .notify(vec![NotifyState::Ready, NotifyState::Status(status)])
        .await;
}

fn warn(path: &Path, warnings: &[Problem]) {
    for warning in warnings {
        let warning = format!("{}: {warning}", warning.location(path));
        tracing::warn!(%warning, "the configuration has a warning");
    }
}

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

    /// Waits for a signal that ends the daemon, and returns its number.
    async fn end(&mut self) -> u8 {
        const SIGINT: u8 = 2;
        const SIGTERM: u8 = 15;
        tokio::select! {
            _ = self.term.recv() => SIGTERM,
            _ = self.int.recv() => SIGINT,
        }
    }
}
