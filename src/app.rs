//! Wires the daemon from its configuration. Only this module knows every other one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::accounts::{Accounts, Nss};
use crate::admin::{Address, Admin, Readiness};
use crate::attest::{Attestor, ExecMonitor};
use crate::audit::Audit;
use crate::cache::CredentialCache;
use crate::clock::Clock;
use crate::config::{self, Config};
use crate::credential_service::CredentialService;
use crate::file_threads::FileThreads;
use crate::hardening::DaemonFeatures;
use crate::http::{CredentialEndpoint, OwnProbe};
use crate::listen::{self, ActivatedSockets, Drain};
use crate::metrics::Metrics;
use crate::pod_listeners::{PodListeners, TakeoverGate};
use crate::readiness::ReadinessProbes;
use crate::sts::BlockingCalls;
use crate::svid::IdentitySource;

mod audit_file;
mod components;
mod endpoint;
mod error;
mod imds_key;
mod listeners;
mod retry;
mod series;
mod token_file;

use audit_file::{audit_error, reopen};
use components::{Components, SourceConfig};
use endpoint::credential_endpoint;
pub use error::AppError;
use listeners::{ListenAddress, bind_all, reset_unclaimed, tcp_address};

/// Time that operators' connections have to end after the workloads' connections have ended.
const ADMIN_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The running daemon, with its listeners and tasks.
#[derive(Debug)]
pub struct App {
    /// TCP addresses for workloads, with the ports that the kernel chose.
    pub tcp: Vec<SocketAddr>,
    /// Address for operators, if one is bound.
    pub admin: Option<SocketAddr>,
    /// The `[listen]` section of the start. A reload does not change it.
    listen: config::ListenConfig,
    /// The `[pods]` section of the start. A reload does not change it.
    pods: config::PodsConfig,
    /// The `[imds]` section of the start. A reload does not change it.
    imds: config::ImdsConfig,
    /// The source in use, with the configuration that it was built from.
    source: (SourceConfig, Arc<dyn IdentitySource>),
    /// The STS endpoints in use.
    sts: Vec<String>,
    own_probe: OwnProbe,
    accounts: Accounts,
    /// Calls that may block, of all configurations.
    blocking: BlockingCalls,
    service: Arc<CredentialService>,
    audit: Arc<Audit>,
    clock: Clock,
    metrics: Metrics,
    readiness: Arc<Readiness>,
    attestor: Arc<Attestor>,
    admin_api: Arc<Admin>,
    probing: Option<JoinHandle<()>>,
    /// Set while pods are served.
    gate: Option<TakeoverGate>,
    workloads: Drain,
    operators: Drain,
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
    /// Threads for calls on files that may block.
    pub file_threads: FileThreads,
}

/// Returns what answers operators.
fn admin(
    config: &Config,
    metrics: &Metrics,
    readiness: &Arc<Readiness>,
    cache: CredentialCache,
    attestor: &Arc<Attestor>,
) -> Arc<Admin> {
    let admin = Admin::new(
        metrics.clone(),
        readiness.clone(),
        cache,
        attestor.clone(),
        config.listen.clone(),
        config.pods.enabled,
    );
    admin.names_processes(DaemonFeatures::of(config).names_processes());
    Arc::new(admin)
}

impl App {
    /// Starts all parts. On return each address is bound, or is tried again in the background. The
    /// daemon serves until [`App::drain`]. Fails if no address can be bound, and for a cause that
    /// another start would meet as well.
    pub async fn start(config: Config, startup: Startup) -> Result<Self, AppError> {
        let Startup {
            mut inherited,
            exec_monitor,
            metrics,
            file_threads,
        } = startup;
        let clock = Clock::system();
        series::create(&metrics, config.imds.is_on());
        let (sts, digest) = (sts_names(&config), config.digest.clone());
        let accounts = Accounts::new(Nss, metrics.clone());
        let blocking = BlockingCalls {
            files: file_threads,
            ..BlockingCalls::default()
        };
        let parts =
            Components::new(&config, None, false, &accounts, &blocking, &clock, &metrics).await?;
        let source = (parts.source, parts.policy.source.clone());
        let cache = CredentialCache::new(parts.policy, clock.clone(), metrics.clone());
        let service = Arc::new(CredentialService::new(cache.clone()));
        let endpoint = credential_endpoint(
            &config,
            exec_monitor,
            service.clone(),
            &clock,
            &metrics,
            &blocking.files,
        )
        .await?;
        let attestor = endpoint.attestor.clone();
        let readiness = Arc::new(Readiness::new(metrics.ready.clone()));
        let admin = admin(&config, &metrics, &readiness, cache, &attestor);
        let mut app = Self {
            attestor,
            admin_api: admin.clone(),
            tcp: Vec::new(),
            admin: None,
            listen: config.listen,
            pods: config.pods,
            imds: config.imds,
            source,
            sts,
            own_probe: endpoint.own_probe.clone(),
            accounts,
            blocking,
            service,
            audit: endpoint.audit.clone(),
            clock,
            readiness,
            probing: None,
            gate: None,
            workloads: Drain::new(metrics.connections.clone()),
            operators: Drain::new(metrics.connections.clone()),
            metrics,
        };
        app.serve_workloads(&mut inherited, &endpoint)?;
        app.serve_pods(endpoint).await?;
        app.serve_operators(&mut inherited, &admin);
        reset_unclaimed(&app.workloads, &mut inherited);
        app.config_loaded(digest.to_string());
        app.probe(parts.probes);
        Ok(app)
    }

    /// Applies another configuration, except `[listen]`, `[pods]` and `[imds]`, which need a
    /// restart, and `[log]`, which the caller applies. An error changes nothing.
    pub async fn reload(&mut self, config: Config) -> Result<(), AppError> {
        let (before, names) = (self.accounts.names(), config.accounts());
        let applied = self.apply(config).await;
        // The names of both configurations are known while it is open which one will count.
        self.accounts
            .keep(if applied.is_ok() { &names } else { &before });
        applied
    }

    async fn apply(&mut self, mut config: Config) -> Result<(), AppError> {
        let changed = [
            ("listen", self.listen.changed(&config.listen)),
            ("pods", self.pods.changed(&config.pods)),
            ("imds", self.imds.changed(&config.imds)),
        ];
        config.listen = self.listen.clone();
        config.pods = self.pods.clone();
        config.imds = self.imds.clone();
        // An agent that attests workloads itself is kept, with the identities cached from it.
        let (built_from, source) = &self.source;
        let reusable = (*built_from == SourceConfig::of(&config)
            && config.identity.source != config::Source::WorkloadApi)
            .then(|| source.clone());
        let parts = Components::new(
            &config,
            reusable,
            true,
            &self.accounts,
            &self.blocking,
            &self.clock,
            &self.metrics,
        )
        .await?;
        let reopened = reopen(&self.audit, &config.audit, &self.blocking.files).await;
        reopened.map_err(|source| audit_error(&config.audit.file, source))?;
        self.source = (parts.source, parts.policy.source.clone());
        self.admin_api
            .names_processes(DaemonFeatures::of(&config).names_processes());
        self.service.reload(parts.policy);
        let endpoints = sts_names(&config);
        for removed in std::mem::replace(&mut self.sts, endpoints) {
            if !self.sts.contains(&removed) {
                self.metrics.remove_sts(removed);
            }
        }
        self.config_loaded(config.digest.to_string());
        self.probe(parts.probes);
        for (table, keys) in changed.iter().filter(|(_, keys)| !keys.is_empty()) {
            let keys = keys.join(", ");
            tracing::warn!(table, keys, "the change needs a restart; restart awsvid");
        }
        Ok(())
    }

    /// Records the configuration that is in effect now.
    fn config_loaded(&self, digest: String) {
        for endpoint in &self.sts {
            self.metrics.add_sts(endpoint.clone());
        }
        self.metrics.config_loaded(digest, self.clock.now());
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
            let probe_task =
                probes.until_ready(self.tcp.clone(), self.gate.clone(), attestor, readiness);
            self.probing = Some(tokio::spawn(probe_task));
        }
    }

    /// Binds and serves the workload addresses. Fails if no address could be bound: another daemon
    /// has them, or none can be served.
    fn serve_workloads(
        &mut self,
        inherited: &mut ActivatedSockets,
        endpoint: &Arc<CredentialEndpoint>,
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
        let admin = self.listen.exposed_admin(self.pods.enabled);
        listen::warn_of_unprivileged_ports(&self.listen.tcp, admin);
        for attempt in attempts {
            let endpoint = endpoint.clone();
            let connection =
                move |stream, pending| endpoint.clone().serve_connection(stream, pending, None);
            listeners::serve(&self.workloads, attempt, "serving workloads", connection);
        }
        Ok(())
    }

    /// Serves pods. On return the present pods are served, unless another daemon is going to pass
    /// their listeners.
    async fn serve_pods(&mut self, endpoint: Arc<CredentialEndpoint>) -> Result<(), AppError> {
        if self.pods.enabled {
            let cgroups = endpoint.attestor.pod_roots();
            tracing::debug!(?cgroups, "found the kubelet's cgroup root");
            if cgroups.is_empty() {
                tracing::warn!(
                    "[pods] enabled: pods cannot be identified: the kubelet's cgroup is missing; in Kubernetes mount the host's \
                     /sys/fs/cgroup by a hostPath volume, with its volumeMount at /host/cgroup, or set `cgroup_root`"
                );
            }
            let (directory, handover) =
                (&self.pods.netns_dir, self.pods.handover_socket.as_deref());
            let serves_metadata = self.imds.mode == config::ImdsMode::Address;
            let drain = self.workloads.handle();
            let (pods, gate) = PodListeners::start(
                directory,
                handover,
                serves_metadata,
                endpoint,
                self.blocking.files.clone(),
                self.metrics.clone(),
                drain.clone(),
            )
            .await?;
            self.gate = Some(gate);
            tracing::info!(directory = %directory.display(), "serving workloads in pods");
            drain.spawn(pods.run());
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
        for (kind, listen_address) in address.into_iter().chain(status) {
            for attempt in bind_all(vec![listen_address], inherited) {
                self.admin = self.admin.or(tcp_address(&attempt));
                let admin = admin.clone();
                let connection =
                    move |stream, pending| admin.clone().connection(kind, stream, pending);
                listeners::serve(&self.operators, attempt, "serving operators", connection);
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
        self.workloads.drain().await;
        // A slow reader of metrics does not delay the end.
        let _ = timeout(ADMIN_DRAIN_TIMEOUT, self.operators.drain()).await;
    }
}

/// Returns the names by which metrics and `/status` know the STS endpoints of a configuration.
fn sts_names(config: &Config) -> Vec<String> {
    let roles = &config.roles;
    let sts = roles.sts_targets().into_iter().map(ToString::to_string);
    let roles_anywhere = roles.roles_anywhere_targets().into_iter();
    sts.chain(roles_anywhere.map(ToString::to_string)).collect()
}
