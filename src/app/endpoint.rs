//! The endpoint that serves the workloads' connections.

use std::sync::Arc;

use tokio::sync::Notify;

use super::AppError;
use super::audit_file::open_audit;
use super::imds_key::token_key;
use super::token_file::authorization;
use crate::attest::{Attestor, ExecMonitor};
use crate::cgroup::PodRoots;
use crate::clock::Clock;
use crate::config::{Config, ImdsConfig};
use crate::credential_service::CredentialService;
use crate::file_threads::FileThreads;
use crate::http::{CredentialEndpoint, KernelFailures, OwnProbe};
use crate::imds::Imds;
use crate::limits::FairSemaphore;
use crate::metrics::Metrics;
use crate::netns::NamespaceId;

/// Creates the endpoint with its attestor and its audit. Fails if callers cannot be attested here,
/// or if the token file is neither readable nor writable.
pub(super) async fn credential_endpoint(
    config: &Config,
    exec_monitor: Option<ExecMonitor>,
    service: Arc<CredentialService>,
    clock: &Clock,
    metrics: &Metrics,
    files: &FileThreads,
) -> Result<Arc<CredentialEndpoint>, AppError> {
    let pod_roots = config.pods.cgroup_root.clone();
    let pod_roots = pod_roots.map_or_else(PodRoots::defaults, PodRoots::at);
    let attestor = Arc::new(Attestor::new(pod_roots, exec_monitor)?);
    let audit = open_audit(&config.audit, clock.clone(), metrics.clone(), files).await;
    let token_needed = Arc::<Notify>::default();
    Ok(Arc::new(CredentialEndpoint {
        attestor,
        service,
        audit,
        metrics: metrics.clone(),
        authorization: authorization(&config.listen, &token_needed)?,
        token_needed,
        imds: imds(&config.imds, clock)?,
        own_probe: OwnProbe::new(),
        connections: FairSemaphore::new(
            config.listen.max_connections,
            config.listen.max_connections_per_workload,
        ),
        kernel_failures: KernelFailures::default(),
    }))
}

/// Creates the instance metadata service if it is on.
fn imds(config: &ImdsConfig, clock: &Clock) -> Result<Option<Imds>, AppError> {
    if !config.is_on() {
        return Ok(None);
    }
    let netns = NamespaceId::own().map_err(AppError::OwnNetns)?;
    let mode = config.mode.word();
    tracing::info!(mode, "serving the instance metadata service");
    Ok(Some(Imds {
        tokens: token_key(&config.key_file)?,
        serves_region: config.region,
        netns,
        clock: clock.clone(),
    }))
}
