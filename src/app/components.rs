//! Builds the parts of the daemon that a reload replaces.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use tokio::time::timeout;

use super::AppError;
use crate::accounts::{Accounts, LiveRules, UserNames};
use crate::clock::Clock;
use crate::config::{self, Config, IdentityConfig};
use crate::exchange::TokenExchanger;
use crate::file_threads::FileThreads;
use crate::metrics::Metrics;
use crate::policy::{CacheLimits, Policy};
use crate::readiness::ReadinessProbes;
use crate::roles_anywhere::RolesAnywhere;
use crate::sts::{BlockingCalls, InvalidSetting, NetworkSettings, Settings, Sts};
use crate::svid::agent::AttestingAgent;
use crate::svid::own_svid::OwnSvidSource;
use crate::svid::spiffe_broker::BrokerApi;
use crate::svid::{self, AgentSource, IdentitySource, SourceError, SpireDelegated, WorkloadApi};

/// Maximum time that a start waits for the check of the identity source.
///
/// A local agent needs a few milliseconds, more on a busy machine. Only an agent that hangs uses
/// all of it.
const SOURCE_CHECK_TIMEOUT: Duration = Duration::from_secs(3);

/// Parts that a reload replaces: those of all tables but `[listen]`, `[pods]`, `[imds]`, `[audit]`
/// and `[log]`.
pub(super) struct Components {
    pub(super) source: SourceConfig,
    pub(super) policy: Policy,
    pub(super) probes: ReadinessProbes,
}

/// The part of a configuration that an identity source is built from.
#[derive(Debug, PartialEq)]
pub(super) struct SourceConfig {
    pub(super) identity: IdentityConfig,
    uses_certificates: bool,
}

impl SourceConfig {
    pub(super) fn of(config: &Config) -> Self {
        Self {
            identity: config.identity.clone(),
            uses_certificates: !config.roles.roles_anywhere_targets().is_empty(),
        }
    }
}

impl Components {
    /// Builds the parts, around `source` if this configuration can keep using one. A source that is
    /// misconfigured makes a reload fail, but not a start.
    pub(super) async fn new(
        config: &Config,
        source: Option<Arc<dyn IdentitySource>>,
        is_reload: bool,
        accounts: &Accounts,
        blocking: &BlockingCalls,
        clock: &Clock,
        metrics: &Metrics,
    ) -> Result<Self, AppError> {
        // This runs before the rules take effect, so that the names in them nearly always have
        // their numbers by then.
        accounts.add(config.accounts(), SOURCE_CHECK_TIMEOUT).await;
        let built_from = SourceConfig::of(config);
        let source = match source {
            Some(source) => source,
            None => {
                let settings = (config, &built_from);
                let files = &blocking.files;
                identity_source(settings, is_reload, accounts, files, clock, metrics).await?
            }
        };
        let sts = Arc::new(sts(config, clock.clone(), blocking.clone()).await?);
        let roles_anywhere = roles_anywhere(config, clock.clone(), blocking.clone()).await?;
        let exchanger =
            TokenExchanger::new(source.clone(), sts.clone(), clock.clone(), metrics.clone())
                .with_roles_anywhere(roles_anywhere.clone());
        Ok(Self {
            source: built_from,
            probes: ReadinessProbes::new(
                config,
                source.clone(),
                sts.clone(),
                roles_anywhere.clone(),
                metrics.clone(),
                blocking.files.clone(),
            ),
            policy: Policy::new(
                source,
                config.roles.clone(),
                exchanger,
                UserNames::new(blocking.files.clone()),
                limits(&config.cache),
            ),
        })
    }
}

fn limits(cache: &config::CacheConfig) -> CacheLimits {
    CacheLimits {
        max_entries: cache.max_entries,
        revocation_grace: cache.revocation_grace,
    }
}

/// Builds the source that the configuration names. A source that is misconfigured makes a reload
/// fail. A source that does not answer yet does not.
async fn identity_source(
    (config, built_from): (&Config, &SourceConfig),
    is_reload: bool,
    accounts: &Accounts,
    threads: &FileThreads,
    clock: &Clock,
    metrics: &Metrics,
) -> Result<Arc<dyn IdentitySource>, AppError> {
    let identity = &built_from.identity;
    let agent: Arc<dyn AttestingAgent> = match &identity.source {
        config::Source::WorkloadApi => {
            let rules: Vec<_> = config
                .workloads
                .iter()
                .map(|workload| workload.rule.clone().with_threads(threads))
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
        tracing::error!(%error, "the identity source is misconfigured: callers are rejected");
    }
    let most = remembered_processes();
    Ok(Arc::new(AgentSource::new(
        agent,
        identity.audience.clone(),
        built_from.uses_certificates,
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

async fn sts(
    config: &Config,
    clock: Clock,
    blocking: BlockingCalls,
) -> Result<Sts, InvalidSetting> {
    let sts = Sts::new(
        settings(config, config.sts.ca_file.clone(), blocking),
        clock,
    );
    sts.prepare(&config.roles.sts_targets()).await?;
    Ok(sts)
}

async fn roles_anywhere(
    config: &Config,
    clock: Clock,
    blocking: BlockingCalls,
) -> Result<Arc<RolesAnywhere>, InvalidSetting> {
    let ca_file = config.roles_anywhere.ca_file.clone();
    let client = RolesAnywhere::new(settings(config, ca_file, blocking), clock);
    client
        .prepare(&config.roles.roles_anywhere_targets())
        .await?;
    Ok(Arc::new(client))
}

fn settings(config: &Config, ca_file: Option<PathBuf>, blocking: BlockingCalls) -> Settings {
    Settings {
        timeout: config.sts.timeout,
        max_concurrent: config.sts.max_concurrent,
        ca_file,
        network: NetworkSettings::from_env(|name| std::env::var(name).ok()),
        blocking,
    }
}
