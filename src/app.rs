//! Wires the daemon from its configuration. The only file that knows every module.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use thiserror::Error;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use zeroize::Zeroizing;

use crate::admin::{Address, Admin, Readiness};
use crate::attest::{Attestor, StartError};
use crate::audit::Audit;
use crate::broker::Broker;
use crate::cache::{self, CredentialCache};
use crate::clock::Clock;
use crate::config::{self, AuditFile, Config};
use crate::http::{Authorization, Front};
use crate::issue::Issuer;
use crate::listen::{self, Bound, Inherited, Limits, ListenError, Shares};
use crate::metrics::Metrics;
use crate::readiness::Probes;
use crate::rule::{self, Decision};
use crate::sts::{InvalidSetting, Network, Settings, Sts};
use crate::svid::WorkloadApi;

/// Why the daemon does not start.
#[derive(Debug, Error)]
pub enum AppError {
    /// Nobody could be attested.
    #[error(transparent)]
    Attest(#[from] StartError),
    /// An address can't be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No audit log.
    #[error("[audit] file {path}: {source}", path = path.display())]
    Audit {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No token file.
    #[error("[listen] token_file {path}: {source}", path = path.display())]
    Token {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The client for STS can't be made.
    #[error(transparent)]
    Sts(#[from] InvalidSetting),
}

/// A running daemon.
#[derive(Debug)]
pub struct App {
    /// The TCP addresses for workloads, with the ports that the kernel chose.
    pub tcp: Vec<SocketAddr>,
    /// The operators' address.
    pub admin: Option<SocketAddr>,
    readiness: Arc<Readiness>,
    stop: watch::Sender<bool>,
    listeners: JoinSet<()>,
}

impl App {
    /// Starts everything. When it returns each address is bound; it serves until [`App::drain`].
    pub async fn start(config: Config, mut inherited: Inherited) -> Result<Self, AppError> {
        let (metrics, clock) = (Metrics::default(), Clock::system());
        let rules = config.workloads.clone();
        let needs_process = {
            let rules = rules.clone();
            Arc::new(move |caller: &_| rule::decide(&rules, caller) == Decision::NeedsProcess)
        };
        let attestor = Attestor::new(needs_process)?;
        let source = Arc::new(WorkloadApi::new(config.identity.socket.clone(), rules, clock.clone()));
        let sts = Arc::new(sts(&config, clock.clone())?);
        let issuer = Issuer::new(source.clone(), sts.clone(), clock.clone(), metrics.clone());
        let cache = CredentialCache::new(issuer, clock.clone(), metrics.clone(), limits(&config.cache));
        let audit = open_audit(&config, clock, metrics.clone())?;
        let probes = Probes::new(&config, source.clone(), sts);
        let front = Arc::new(Front {
            attestor,
            broker: Broker::new(source, config.roles, cache.clone()),
            audit,
            metrics: metrics.clone(),
            authorization: authorization(&config.listen)?,
            shares: Shares::new(config.listen.max_connections_per_workload),
        });
        let readiness = Arc::new(Readiness::new(metrics.ready.clone()));
        let admin = Arc::new(Admin { metrics: metrics.clone(), readiness: readiness.clone(), cache });
        let limits = Limits { connections: Arc::new(Semaphore::new(config.listen.max_connections)), metrics };
        let mut app = Self {
            tcp: Vec::new(),
            admin: None,
            readiness: readiness.clone(),
            stop: watch::Sender::new(false),
            listeners: JoinSet::new(),
        };
        app.serve_workloads(&config.listen, &mut inherited, &front, &limits).await?;
        app.serve_operators(&config.listen, &mut inherited, &admin, &limits).await?;
        inherited.all_taken()?;
        app.listeners.spawn(probes.until_ready(app.tcp.clone(), readiness, app.stop.subscribe()));
        Ok(app)
    }

    async fn serve_workloads(
        &mut self,
        listen: &config::Listen,
        inherited: &mut Inherited,
        front: &Arc<Front>,
        limits: &Limits,
    ) -> Result<(), AppError> {
        let mut bound = Vec::new();
        if let Some(path) = &listen.unix {
            bound.push(Bound::unix(path, 0o666, inherited)?);
        }
        for address in &listen.tcp {
            match Bound::tcp(*address, inherited).await {
                Ok(listener) => bound.push(listener),
                Err(error) if address.is_ipv6() && error.is_unavailable_family() => {
                    tracing::warn!(%address, "this machine has no IPv6; clients use 127.0.0.1");
                }
                Err(error) => return Err(error.into()),
            }
        }
        for listener in bound {
            if let Bound::Tcp { address, .. } = &listener {
                self.tcp.push(*address);
            }
            tracing::info!(address = listener.name(), "serving workloads");
            let front = front.clone();
            let connection = move |stream| front.clone().connection(stream);
            self.listeners.spawn(listen::serve(listener, limits.clone(), self.stop.subscribe(), connection));
        }
        Ok(())
    }

    /// With a bound of its own: workloads that use up theirs don't hide the daemon's state.
    async fn serve_operators(
        &mut self,
        listen: &config::Listen,
        inherited: &mut Inherited,
        admin: &Arc<Admin>,
        limits: &Limits,
    ) -> Result<(), AppError> {
        let limits = Limits { connections: Arc::new(Semaphore::new(64)), metrics: limits.metrics.clone() };
        let mut bound = Vec::new();
        if let Some(address) = listen.admin {
            bound.push((Address::Admin, Bound::tcp(address, inherited).await?));
        }
        if let Some(path) = &listen.status {
            bound.push((Address::Status, Bound::unix(path, 0o600, inherited)?));
        }
        for (kind, listener) in bound {
            if let Bound::Tcp { address, .. } = &listener {
                self.admin = Some(*address);
            }
            tracing::info!(address = listener.name(), "serving operators");
            let admin = admin.clone();
            let connection = move |stream| admin.clone().connection(kind, stream);
            self.listeners.spawn(listen::serve(listener, limits.clone(), self.stop.subscribe(), connection));
        }
        Ok(())
    }

    /// Takes no more connections and lets those that are open end.
    pub async fn drain(mut self) {
        self.readiness.ending();
        self.stop.send_replace(true);
        while self.listeners.join_next().await.is_some() {}
    }
}

fn limits(cache: &config::CacheConfig) -> cache::Limits {
    cache::Limits { max_entries: cache.max_entries, revocation_grace: cache.revocation_grace }
}

fn sts(config: &Config, clock: Clock) -> Result<Sts, InvalidSetting> {
    let settings = Settings {
        timeout: config.sts.timeout,
        max_concurrent: config.sts.max_concurrent,
        ca_file: config.sts.ca_file.clone(),
        network: Network::from_env(|name| std::env::var(name).ok())?,
    };
    Sts::new(settings, clock)
}

fn open_audit(config: &Config, clock: Clock, metrics: Metrics) -> Result<Arc<Audit>, AppError> {
    let path = match &config.audit.file {
        AuditFile::Path(path) => path.clone(),
        AuditFile::Stdout => PathBuf::from("standard output"),
    };
    Audit::open(&config.audit.file, config.audit.required, clock, metrics)
        .map_err(|source| AppError::Audit { path, source })
}

/// The token file is always there: one SDK uses the endpoint only if it is given a token by file.
fn authorization(listen: &config::Listen) -> Result<Authorization, AppError> {
    let token =
        token(&listen.token_file).map_err(|source| AppError::Token { path: listen.token_file.clone(), source })?;
    Ok(match listen.authorization {
        config::Authorization::Present => Authorization::Present,
        config::Authorization::Token => Authorization::Token(token),
        config::Authorization::Off => Authorization::Off,
    })
}

/// The node's token: that of an earlier start, so that workloads that have read it keep working, or a new one.
///
/// 32 random bytes in base64url, without a newline, since some SDKs send the file's bytes as they are.
fn token(path: &Path) -> io::Result<Zeroizing<String>> {
    let valid = |text: &String| text.len() == 43 && URL_SAFE_NO_PAD.decode(text).is_ok();
    if let Some(text) = std::fs::read_to_string(path).ok().filter(|text| valid(text)) {
        return Ok(Zeroizing::new(text));
    }
    let mut bytes = Zeroizing::new([0_u8; 32]);
    aws_lc_rs::rand::fill(&mut *bytes).map_err(|_| io::Error::other("the system gives no random numbers"))?;
    let text = Zeroizing::new(URL_SAFE_NO_PAD.encode(*bytes));
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let new = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&new)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())?;
    std::fs::rename(&new, path)?;
    Ok(text)
}
