//! A token as workloads of this node get it, for commands.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use thiserror::Error;

use crate::clock::Clock;
use crate::config::{Config, Source};
use crate::identity::SpiffeId;
use crate::metrics::Metrics;
use crate::role::Role;
use crate::svid::own_svid::OwnSvidSource;
use crate::svid::{JwtSvid, SourceError, WorkloadApi, X509Svid};

/// Reason why a command could not get an SVID of this node, or learn its issuer.
#[derive(Debug, Error)]
pub(super) enum NoLiveSvid {
    #[error("no rule gives an identity that a role covers")]
    NoIdentity,
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("{NO_ISSUER}")]
    NoClaim,
}

/// Fetches a token for this identity, as the daemon does. Safe while the daemon runs: an agent
/// issues tokens without a limit.
pub(super) async fn fetch(
    config: &Config,
    id: &SpiffeId,
    audience: &str,
    deadline: Duration,
) -> Result<JwtSvid, SourceError> {
    let source = WorkloadApi::new(
        config.identity.workload_api_socket.clone(),
        Vec::new(),
        Clock::system(),
        Metrics::default(),
    );
    source.with_deadline(deadline).fetch(id, audience).await
}

/// Fetches the X.509-SVID of this identity, likewise.
pub(super) async fn certificate(
    config: &Config,
    id: &SpiffeId,
    deadline: Duration,
) -> Result<X509Svid, SourceError> {
    let source = WorkloadApi::new(
        config.identity.workload_api_socket.clone(),
        Vec::new(),
        Clock::system(),
        Metrics::default(),
    );
    source.with_deadline(deadline).fetch_x509(id).await
}

/// Fetches the CAs of this node's trust domain.
pub(super) async fn bundle(
    config: &Config,
    deadline: Duration,
) -> Result<Vec<CertificateDer<'static>>, NoLiveSvid> {
    let mut roles = config.roles.defined.iter();
    let id = match roles.find_map(|role| example(config, role)) {
        Some(id) if by_rules(config) => id,
        _ if by_rules(config) => return Err(NoLiveSvid::NoIdentity),
        _ => own(config, deadline).await?,
    };
    let svid = certificate(config, &id, deadline).await?;
    Ok(svid.bundle().to_vec())
}

/// Returns an identity of this node that the role covers, as an example for all. `None` if no rule
/// gives one.
pub(super) fn example(config: &Config, role: &Role) -> Option<SpiffeId> {
    config
        .workloads
        .iter()
        .map(|workload| workload.rule.spiffe_id())
        .find(|id| role.spiffe_id.matches(id))
        .cloned()
}

/// Returns awsvid's own identity. Where the agent attests callers, it issues tokens of others for
/// living processes only.
pub(super) async fn own(config: &Config, deadline: Duration) -> Result<SpiffeId, SourceError> {
    let own = OwnSvidSource::at(config.identity.workload_api_socket.clone());
    Ok(own.first(deadline).await?.spiffe_id.clone())
}

/// Reports whether `[[workload]]` rules decide the identity of callers.
pub(super) fn by_rules(config: &Config) -> bool {
    config.identity.source == Source::WorkloadApi
}

/// The problem of a token without `iss`, and its fix.
pub(super) const NO_ISSUER: &str = "the token has no `iss`, so STS cannot know its issuer; set `jwt_issuer` in the SPIRE server's \
     configuration to the URL of the OIDC discovery provider, without a slash at its end";

/// Returns the document's URL by OpenID Connect Discovery 1.0, section 4.
pub(super) fn discovery_url(issuer: &str) -> String {
    format!(
        "{}/.well-known/openid-configuration",
        issuer.trim_end_matches('/')
    )
}
