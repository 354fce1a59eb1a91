//! A token as workloads of this node get it, and what stands in it.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

use crate::clock::Clock;
use crate::config::{Config, Source};
use crate::identity::SpiffeId;
use crate::metrics::Metrics;
use crate::role::Role;
use crate::svid::own::OwnSvidSource;
use crate::svid::{JwtSvid, SourceError, WorkloadApi};

/// One token, asked for as the daemon asks for it.
pub(super) struct LiveToken {
    pub(super) svid: JwtSvid,
    header: Value,
    claims: Value,
}

impl LiveToken {
    /// For this identity of the daemon's. Safe beside the running daemon: an agent gives a token as often as it is asked.
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
        // The check that every token has passed has read both.
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

    /// `iss`, which decides the IAM provider that STS looks for.
    pub(super) fn issuer(&self) -> Option<&str> {
        self.claims["iss"]
            .as_str()
            .filter(|issuer| !issuer.is_empty())
    }

    /// The key that it says it is signed with.
    pub(super) fn key_id(&self) -> Option<&str> {
        self.header["kid"].as_str().filter(|id| !id.is_empty())
    }
}

/// Whose token stands for all of a role's, on this node; `None` if no rule gives anybody an identity that it is for.
pub(super) fn example(config: &Config, role: &Role) -> Option<SpiffeId> {
    config
        .workloads
        .iter()
        .map(|workload| workload.rule.spiffe_id())
        .find(|id| role.spiffe_id.matches(id))
        .cloned()
}

/// awsvid's own identity: where the agent attests callers, tokens of others are given for living processes only.
pub(super) async fn own(config: &Config, deadline: Duration) -> Result<SpiffeId, SourceError> {
    let own = OwnSvidSource::at(config.identity.workload_api_socket.clone());
    Ok(own.first(deadline).await?.spiffe_id.clone())
}

/// Whether `[[workload]]` rules say who has which identity.
pub(super) fn by_rules(config: &Config) -> bool {
    config.identity.source == Source::WorkloadApi
}

/// What is wrong with a token without `iss`.
pub(super) const NO_ISSUER: &str = "the token has no `iss`, so STS cannot know whose it is: set `jwt_issuer` in the SPIRE server's \
     configuration to the URL of the OIDC discovery provider, without a slash at its end";

/// Where OpenID Connect Discovery 1.0, section 4, puts the document.
pub(super) fn discovery_url(issuer: &str) -> String {
    format!(
        "{}/.well-known/openid-configuration",
        issuer.trim_end_matches('/')
    )
}
