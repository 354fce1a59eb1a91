//! Wires the daemon from its configuration. This is the only file that knows every module.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use thiserror::Error;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::accounts::{Accounts, LiveRules, Nss};
use crate::admin::{Address, Admin, Readiness};
use crate::attest::{Attestor, ExecMonitor, StartError};
use crate::audit::Audit;
use crate::cache::{self, CredentialCache};
use crate::cgroup::PodRoots;
use crate::clock::Clock;
use crate::config::{self, Config, IdentityConfig};
use crate::credential_service::{CredentialService, Policy};
use crate::exchange::TokenExchanger;
use crate::hardening::DaemonFeatures;
use crate::http::{Authorization, CredentialEndpoint, OwnProbe};
use crate::limits::FairSemaphore;
use crate::listen::{self, ActivatedSockets, ListenError};
use crate::metrics::Metrics;
use crate::pod_listeners::{PodListeners, PodsError, TakeoverGate};
use crate::readiness::ReadinessProbes;
use crate::sts::{InvalidSetting, NetworkSettings, Settings, Sts};
use crate::svid::agent::AttestingAgent;
use crate::svid::own_svid::OwnSvidSource;
use crate::svid::spiffe_broker::BrokerApi;
use crate::svid::{self, AgentSource, IdentitySource, SourceError, SpireDelegated, WorkloadApi};

mod audit_file;
mod listeners;
mod series;
mod token_file;

use audit_file::{audit_error, open_audit};
use listeners::{AcceptLoops, ListenAddress, bind_all, tcp_address};
use token_file::{NodeToken, write_later};

/// Time that operators' connections have to end after the workloads' connections have ended.
const ADMIN_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum time that a start waits for the check of the identity source.
///
/// A local agent needs a few milliseconds, more on a busy machine. Only an agent that hangs uses
/// all of it.
const SOURCE_CHECK_TIMEOUT: Duration = Duration::from_secs(3);

/// Reason why the daemon does not start, or keeps its old configuration.
#[derive(Debug, Error)]
pub enum AppError {
    /// The attestor cannot be started.
    #[error(transparent)]
    Attest(#[from] StartError),
    /// An address cannot be bound.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The audit file cannot be opened.
    #[error("[audit] file {path}: {source}", path = path.display())]
    Audit {
        /// Path of the audit file.
        path: PathBuf,
        /// Error of the open call.
        source: io::Error,
    },
    /// The token file cannot be read or written.
    #[error("[listen] token_file {path}: {source}", path = path.display())]
    Token {
        /// Path of the token file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// Pods' network namespaces cannot be served.
    #[error(transparent)]
    Pods(#[from] PodsError),
    /// The identity source is misconfigured and cannot work.
    #[error("[identity] {0}")]
    Source(SourceError),
    /// The STS client cannot be built.
    #[error(transparent)]
    Sts(#[from] InvalidSetting),
}

/// The running daemon, with its listeners and tasks.
#[derive(Debug)]
pub struct App {
    /// TCP addresses for workloads, with the ports that the kernel chose.
    pub tcp: Vec<SocketAddr>,
    /// Address for operators, if one is bound.
    pub admin: Option<SocketAddr>,
    /// The `[listen]` section of the start. A reload does not change it.
    listen: config::Listen,
    /// The `[pods]` section of the start. A reload does not change it.
    pods: config::PodsConfig,
    /// The source in use, with the configuration that it was built from.
    source: (IdentityConfig, Arc<dyn IdentitySource>),
    /// The STS endpoints in use.
    sts: Vec<String>,
    own_probe: OwnProbe,
    accounts: Accounts,
    broker: Arc<CredentialService>,
    audit: Arc<Audit>,
    clock: Clock,
    metrics: Metrics,
    readiness: Arc<Readiness>,
    attestor: Arc<Attestor>,
    status: Arc<Admin>,
    probing: Option<JoinHandle<()>>,
    /// Set while pods are served.
    gate: Option<TakeoverGate>,
    workloads: AcceptLoops,
    operators: AcceptLoops,
}

/// Resources that are acquired before the daemon starts anything.
#[derive(Debug)]
pub struct Startup {
    /// Sockets that systemd passed to the daemon.
    pub inherited: ActivatedSockets,
    /// Monitor of program executions. Without it the daemon refers no process to an agent.
    pub exec_monitor: Option<ExecMonitor>,
    /// Registry of all metrics, those of the log included.
    pub metrics: Metrics,
}

/// Parts that a reload replaces: all but `[listen]`, `[audit]` and `[log]`.
struct Components {
    identity: IdentityConfig,
    policy: Policy,
    issuer: TokenExchanger,
    limits: cache::Limits,
    probes: ReadinessProbes,
}

impl Components {
    /// Builds the parts, around `source` if this configuration can keep using one.
    async fn new(
        config: &Config,
        (source, is_reload): (Option<Arc<dyn IdentitySource>>, bool),
        accounts: &Accounts,
        (clock, metrics): (&Clock, &Metrics),
    ) -> Result<Self, AppError> {
        // This runs before the rules take effect, so that the names in them nearly always have
        // their numbers by then.
        accounts
            .follow(config.accounts(), SOURCE_CHECK_TIMEOUT)
            .await;
        let source = match source {
            Some(source) => source,
            None => identity_source(config, accounts, is_reload, (clock, metrics)).await?,
        };
        let sts = Arc::new(sts(config, clock.clone()).await?);
        Ok(Self {
            identity: config.identity.clone(),
            issuer: TokenExchanger::new(
                source.clone(),
                sts.clone(),
                clock.clone(),
                metrics.clone(),
            ),
            limits: limits(&config.cache),
            probes: ReadinessProbes::new(config, source.clone(), sts, metrics.clone()),
            policy: Policy {
                source,
                roles: config.roles.clone(),
            },
        })
    }
}

impl App {
    /// Starts all parts. On return each address is bound. The daemon serves until [`App::drain`].
    pub async fn start(config: Config, startup: Startup) -> Result<Self, AppError> {
        let Startup {
            mut inherited,
            exec_monitor,
            metrics,
        } = startup;
        let clock = Clock::system();
        series::create(&metrics);
        let (sts, digest) = (sts_names(&config), config.digest.clone());
        let accounts = Accounts::new(Nss, metrics.clone());
        let parts = Components::new(&config, (None, false), &accounts, (&clock, &metrics)).await?;
        let source = (parts.identity, parts.policy.source.clone());
        let cache =
            CredentialCache::new(parts.issuer, clock.clone(), metrics.clone(), parts.limits);
        let broker = Arc::new(CredentialService::new(parts.policy, cache.clone()));
        let pod_roots = config
            .pods
            .cgroup_root
            .clone()
            .map_or_else(PodRoots::defaults, PodRoots::at);
        let attestor = Arc::new(Attestor::new(pod_roots, exec_monitor)?);
        let own_probe = OwnProbe::new();
        let front = Arc::new(CredentialEndpoint {
            attestor: attestor.clone(),
            broker: broker.clone(),
            audit: open_audit(&config.audit, clock.clone(), metrics.clone()),
            metrics: metrics.clone(),
            authorization: authorization(&config.listen)?,
            own_probe: own_probe.clone(),
            connections: FairSemaphore::new(
                config.listen.max_connections,
                config.listen.max_connections_per_workload,
            ),
        });
        let readiness = Arc::new(Readiness::new(metrics.ready.clone()));
        let admin = Arc::new(Admin::new(
            metrics.clone(),
            readiness.clone(),
            cache,
            (attestor.clone(), config.listen.clone(), config.pods.enabled),
        ));
        admin.names_processes(DaemonFeatures::of(&config).names_processes());
        let mut app = Self {
            attestor,
            status: admin.clone(),
            tcp: Vec::new(),
            admin: None,
            listen: config.listen,
            pods: config.pods,
            source,
            sts,
            own_probe,
            accounts,
            broker,
            audit: front.audit.clone(),
            clock,
            readiness,
            probing: None,
            gate: None,
            workloads: AcceptLoops::new(&metrics),
            operators: AcceptLoops::new(&metrics),
            metrics,
        };
        app.serve_workloads(&mut inherited, &front)?;
        app.serve_pods(front).await?;
        app.serve_operators(&mut inherited, &admin);
        app.workloads.refuse_rest(&mut inherited);
        app.metrics
            .config_loaded(digest.to_string(), app.clock.now());
        app.probe(parts.probes);
        Ok(app)
    }

    /// Applies another configuration, except `[listen]` and `[pods]`, which need a
    /// restart, and `[log]`. An error changes nothing.
    pub async fn reload(&mut self, mut config: Config) -> Result<(), AppError> {
        let changed = [
            ("listen", self.listen.changed(&config.listen)),
            ("pods", self.pods.changed(&config.pods)),
        ];
        config.listen = self.listen.clone();
        config.pods = self.pods.clone();
        // An agent that attests workloads itself is kept, with the identities cached from it.
        let (identity, source) = &self.source;
        let reusable = (*identity == config.identity
            && identity.source != config::Source::WorkloadApi)
            .then(|| source.clone());
        let parts = Components::new(
            &config,
            (reusable, true),
            &self.accounts,
            (&self.clock, &self.metrics),
        )
        .await?;
        let reopened = self.audit.reopen(&config.audit.file, config.audit.required);
        reopened.map_err(|source| audit_error(&config.audit.file, source))?;
        self.source = (parts.identity, parts.policy.source.clone());
        self.status
            .names_processes(DaemonFeatures::of(&config).names_processes());
        self.broker.reload(parts.policy, parts.issuer, parts.limits);
        let endpoints = sts_names(&config);
        for removed in std::mem::replace(&mut self.sts, endpoints) {
            if !self.sts.contains(&removed) {
                self.metrics.remove_sts(removed);
            }
        }
        self.metrics
            .config_loaded(config.digest.to_string(), self.clock.now());
        self.probe(parts.probes);
        for (table, keys) in changed.iter().filter(|(_, keys)| !keys.is_empty()) {
            let keys = keys.join(", ");
            tracing::warn!("[{table}] {keys}: the change needs a restart; restart awsvid");
        }
        Ok(())
    }

    /// Records that a reload failed, so that the previous configuration stays in effect.
    pub fn reload_failed(&self) {
        self.metrics.config_rejected();
    }

    /// Reports whether executions by callers' processes are observed. Without that no process is
    /// referred to an agent.
    pub fn counts_executions(&self) -> bool {
        self.attestor.counts_executions()
    }

    /// Forwards the call to [`Attestor::missing_for_tcp`].
    pub fn missing_for_tcp(&self) -> Option<String> {
        self.attestor.missing_for_tcp()
    }

    /// Probes each dependency until it has answered once, then stops probing it.
    fn probe(&mut self, probes: ReadinessProbes) {
        if let Some(before) = self.probing.take() {
            before.abort();
        }
        if !self.readiness.is_ready() {
            let (attestor, readiness) = (self.attestor.clone(), self.readiness.clone());
            let probes = probes.marked_by(self.own_probe.clone());
            let asking =
                probes.until_ready(self.tcp.clone(), self.gate.clone(), attestor, readiness);
            self.probing = Some(tokio::spawn(asking));
        }
    }

    /// Binds and serves the workload addresses. Fails if no address could be bound: another daemon
    /// has them, or none can be served.
    fn serve_workloads(
        &mut self,
        inherited: &mut ActivatedSockets,
        front: &Arc<CredentialEndpoint>,
    ) -> Result<(), AppError> {
        let unix = self
            .listen
            .unix
            .iter()
            .map(|path| ListenAddress::Unix(path.clone(), 0o666));
        let addresses = unix
            .chain(self.listen.tcp.iter().copied().map(ListenAddress::Tcp))
            .collect();
        let mut attempts = bind_all(addresses, inherited);
        if !self.pods.enabled && attempts.iter().all(|(_, bound)| bound.is_err()) {
            let error = attempts.drain(..).find_map(|(_, bound)| bound.err());
            return error.map_or(Ok(()), |error| Err(error.into()));
        }
        self.tcp = attempts.iter().filter_map(tcp_address).collect();
        let chosen = |bound: &SocketAddr| {
            let is_it = |address: &SocketAddr| address.port() == 0 && address.ip() == bound.ip();
            self.listen.tcp.iter().any(is_it)
        };
        let named: Vec<_> = self
            .tcp
            .iter()
            .filter(|bound| !chosen(bound))
            .copied()
            .collect();
        listen::warn_of_unprivileged_ports(&named);
        for attempt in attempts {
            let front = front.clone();
            let connection = move |stream, arrival| front.clone().connection(stream, arrival, None);
            self.workloads
                .serve(attempt, "serving workloads", connection);
        }
        Ok(())
    }

    /// Serves pods. On return the present pods are served, unless another daemon is going to pass
    /// their listeners.
    async fn serve_pods(&mut self, front: Arc<CredentialEndpoint>) -> Result<(), AppError> {
        if self.pods.enabled {
            let cgroups = front.attestor.pod_roots();
            tracing::debug!(?cgroups, "found the kubelet's cgroup root");
            if cgroups.is_empty() {
                tracing::warn!(
                    "[pods] enabled: pods cannot be identified: the kubelet's cgroup is missing; in Kubernetes mount the host's \
                     /sys/fs/cgroup by a hostPath volume, with its volumeMount at /host/cgroup, or set `cgroup_root`"
                );
            }
            let (directory, handover) =
                (&self.pods.netns_dir, self.pods.handover_socket.as_deref());
            let (stop, connections) = (
                self.workloads.stop.subscribe(),
                self.workloads.connections.clone(),
            );
            let (pods, gate) = PodListeners::start(
                (directory, handover),
                front,
                connections,
                self.metrics.clone(),
                stop,
            )
            .await?;
            self.gate = Some(gate);
            tracing::info!(directory = %directory.display(), "serving workloads in pods");
            self.workloads.loops.spawn(pods.run());
        }
        Ok(())
    }

    /// Serves operators within `Admin`'s own limits: workloads that exhaust theirs do not block
    /// access to the daemon's state.
    fn serve_operators(&mut self, inherited: &mut ActivatedSockets, admin: &Arc<Admin>) {
        let address = self
            .listen
            .admin
            .map(|admin| (Address::Admin, ListenAddress::Tcp(admin)));
        let status = self
            .listen
            .status
            .clone()
            .map(|path| (Address::Status, ListenAddress::Unix(path, 0o600)));
        for (kind, wanted) in address.into_iter().chain(status) {
            for attempt in bind_all(vec![wanted], inherited) {
                self.admin = self.admin.or(tcp_address(&attempt));
                let admin = admin.clone();
                let connection =
                    move |stream, arrival| admin.clone().connection(kind, stream, arrival);
                self.operators
                    .serve(attempt, "serving operators", connection);
            }
        }
    }

    /// Stops accepting, and returns when the open connections have ended. Operators are served
    /// until then: `/readyz` reports that the daemon is draining.
    pub async fn drain(mut self) {
        self.readiness.set_draining();
        if let Some(probing) = self.probing.take() {
            probing.abort();
            // After that the prober opens no more connections, and its open ones end with the
            // others.
            let _ = probing.await;
        }
        self.workloads.end().await;
        // A slow reader of metrics does not delay the end.
        let _ = timeout(ADMIN_DRAIN_TIMEOUT, self.operators.end()).await;
    }
}

/// Returns the names by which metrics and `/status` know the STS endpoints of a configuration.
fn sts_names(config: &Config) -> Vec<String> {
    let targets = config.roles.sts_targets();
    targets.iter().map(ToString::to_string).collect()
}

fn limits(cache: &config::CacheConfig) -> cache::Limits {
    cache::Limits {
        max_entries: cache.max_entries,
        revocation_grace: cache.revocation_grace,
    }
}

/// Builds the source that the configuration names. A source that is misconfigured makes a reload
/// fail. A source that does not answer yet does not.
async fn identity_source(
    config: &Config,
    accounts: &Accounts,
    is_reload: bool,
    (clock, metrics): (&Clock, &Metrics),
) -> Result<Arc<dyn IdentitySource>, AppError> {
    let identity = &config.identity;
    let agent: Arc<dyn AttestingAgent> = match &identity.source {
        config::Source::WorkloadApi => {
            let rules: Vec<_> = config
                .workloads
                .iter()
                .map(|workload| workload.rule.clone())
                .collect();
            let rules = LiveRules::new(rules, accounts);
            let source = WorkloadApi::new(
                identity.workload_api_socket.clone(),
                rules,
                clock.clone(),
                metrics.clone(),
            );
            return Ok(Arc::new(source));
        }
        config::Source::SpireDelegated { socket } => {
            Arc::new(SpireDelegated::new(socket, svid::CALL_TIMEOUT))
        }
        config::Source::SpiffeBroker {
            socket,
            server,
            reference,
        } => {
            let own = OwnSvidSource::at(identity.workload_api_socket.clone());
            let broker = BrokerApi::new(socket, own, server.clone(), svid::CALL_TIMEOUT);
            match reference {
                config::Reference::Auto => Arc::new(broker.naming_pods()),
                config::Reference::Process => Arc::new(broker),
            }
        }
    };
    // An agent that answers later than that is checked while callers are served.
    if let Ok(Err(error @ SourceError::Misconfigured(_))) =
        timeout(SOURCE_CHECK_TIMEOUT, agent.connect()).await
    {
        if is_reload {
            return Err(AppError::Source(error));
        }
        // Another agent may listen there in a moment. Until then each query fails with the same
        // error.
        tracing::error!(%error, "the identity source is misconfigured: callers are refused");
    }
    let most = remembered_processes();
    Ok(Arc::new(AgentSource::new(
        agent,
        identity.audience.clone(),
        most,
        clock.clone(),
        metrics.clone(),
    )))
}

/// Returns how many processes may be cached. Each needs up to three descriptors, and connections
/// need some too.
fn remembered_processes() -> usize {
    const MAX_REMEMBERED_PROCESSES: u64 = 8192;
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    usize::try_from((descriptors / 8).min(MAX_REMEMBERED_PROCESSES)).unwrap_or(1024)
}

async fn sts(config: &Config, clock: Clock) -> Result<Sts, InvalidSetting> {
    let settings = Settings {
        timeout: config.sts.timeout,
        max_concurrent: config.sts.max_concurrent,
        ca_file: config.sts.ca_file.clone(),
        network: NetworkSettings::from_env(|name| std::env::var(name).ok()),
    };
    let sts = Sts::new(settings, clock);
    sts.prepare(&config.roles.sts_targets()).await?;
    Ok(sts)
}

/// Loads the token, and starts writing its file. One SDK uses the endpoint only if it gets the
/// token by a file.
fn authorization(listen: &config::Listen) -> Result<Authorization, AppError> {
    let path = &listen.token_file;
    let node = NodeToken::load(path).map_err(|source| AppError::Token {
        path: path.clone(),
        source,
    })?;
    if let Some(error) = node.unwritten {
        let path = path.display();
        tracing::warn!(%path, %error, "[listen] token_file cannot be written yet: retrying every 5 seconds");
        tokio::spawn(write_later(listen.token_file.clone(), node.token.clone()));
    }
    Ok(match listen.authorization {
        config::AuthorizationMode::Present => Authorization::Present,
        config::AuthorizationMode::Token => Authorization::Token(node.token),
        config::AuthorizationMode::Off => Authorization::Off,
    })
}
