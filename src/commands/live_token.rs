//! A token as workloads of this node get it, with its claims.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

use crate::clock::Clock;
use crate::config::{Config, Source};
use crate::identity::SpiffeId;
use crate::metrics::Metrics;
use crate::role::Role;
use crate::svid::own_svid::OwnSvidSource;
use crate::svid::{JwtSvid, SourceError, WorkloadApi};

/// One token, fetched as the daemon fetches it.
pub(super) struct LiveToken {
    pub(super) svid: JwtSvid,
    header: Value,
    claims: Value,
}

impl LiveToken {
    /// Fetches a token for this identity. Safe while the daemon runs: an agent issues tokens
    /// without a limit.
    pub(super) async fn fetch(
        config: &Config,
        id: &SpiffeId,
        audience: &str,
        deadline: Duration,
    ) -> Result<Self, SourceError> {
        let source = WorkloadApi::new(
            config.identity.workload_api_socket.clone(),
            Vec::new(),
            Clock::system(),
            Metrics::default(),
        );
        Ok(Self::of(
            source.with_deadline(deadline).fetch(id, audience).await?,
        ))
    }

    pub(super) fn of(svid: JwtSvid) -> Self {
        // Every token has passed a check that parsed both.
        let mut parts = svid.secret().split('.').map(|part| {
            let bytes = URL_SAFE_NO_PAD.decode(part).unwrap_or_default();
            serde_json::from_slice(&bytes).unwrap_or_default()
        });
        let (header, claims) = (
            parts.next().unwrap_or_default(),
            parts.next().unwrap_or_default(),
        );
        drop(parts);
        Self {
            svid,
            header,
            claims,
        }
    }

    /// Returns `iss`, which selects the IAM provider in STS.
    pub(super) fn issuer(&self) -> Option<&str> {
        self.claims["iss"]
            .as_str()
            .filter(|issuer| !issuer.is_empty())
    }

    /// Returns the id of the key that the header names.
    pub(super) fn key_id(&self) -> Option<&str> {
        self.header["kid"].as_str().filter(|id| !id.is_empty())
    }
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
