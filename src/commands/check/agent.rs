//! Checks of the agent: its socket, the identities of a workload or of this process, and a token.

use std::path::Path;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::ARGUMENTS;
use super::report::CheckReport;
use super::target::CheckTarget;
use crate::clock::Clock;
use crate::commands::live_token;
use crate::config::{Config, Reference, Source};
use crate::identity::{SessionName, SpiffeId};
use crate::role::{Identity, Role};
use crate::socket_endpoint::Endpoint;
use crate::svid::agent::AttestingAgent;
use crate::svid::own_svid::OwnSvidSource;
use crate::svid::spiffe_broker::BrokerApi;
use crate::svid::{JwtSvid, SourceError, SpireDelegated, TTL_FIX, X509Svid, agent_unreachable};

const SOCKET: &str = "agent";
pub(super) const IDENTITY: &str = "identity";
/// Time limit of a token: agents fetch the first one from their server.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const NO_PROCESS_FIX: &str = "run it on the pod's node, in awsvid's pod with hostPID: true, while a container of the pod runs";

/// The source of the tokens.
pub(super) enum TokenSource {
    /// The Workload API, for each identity of the rules.
    WorkloadApi,
    /// An agent that attests `CheckTarget`.
    Agent(Box<dyn AttestingAgent>, CheckTarget),
}

/// Connects to the source. `target` is the workload, where the agent attests callers.
pub(super) async fn connect(
    config: &Config,
    target: CheckTarget,
    report: &mut CheckReport,
) -> Option<TokenSource> {
    if !opens(
        &config.identity.workload_api_socket,
        "workload_api_socket",
        matches!(config.identity.source, Source::SpireDelegated { .. }),
        report,
    )
    .await
    {
        return None;
    }
    let (agent, socket): (Box<dyn AttestingAgent>, &Path) = match &config.identity.source {
        Source::WorkloadApi => {
            if target.is_workload() {
                let saw = format!("{target}: no agent attests callers here, the rules do");
                report.unchecked(ARGUMENTS, saw);
            }
            return Some(TokenSource::WorkloadApi);
        }
        Source::SpireDelegated { socket } => {
            (Box::new(SpireDelegated::new(socket, TOKEN_TIMEOUT)), socket)
        }
        Source::SpiffeBroker {
            socket,
            server,
            reference,
        } => {
            let own = OwnSvidSource::at(config.identity.workload_api_socket.clone());
            let broker = BrokerApi::new(socket, own, server.clone(), TOKEN_TIMEOUT);
            match reference {
                Reference::Auto => (Box::new(broker.naming_pods()), socket),
                Reference::Process => (Box::new(broker), socket),
            }
        }
    };
    report.show_progress("the agent, which attests this process");
    match timeout(TOKEN_TIMEOUT, agent.connect()).await {
        Ok(Ok(())) if agent.supports_pod_references() => {
            report.ok(SOCKET, format!("{} answers", socket.display()))
        }
        Ok(Ok(())) => report.ok(
            SOCKET,
            format!(
                "{} can be opened, and the agent shares this machine's pid namespace",
                socket.display()
            ),
        ),
        Ok(Err(error)) => return report_error(SOCKET, &error, report),
        Err(_) => return report_timeout(SOCKET, report),
    }
    let Some(named) = target.clone().for_agent(agent.as_ref(), config) else {
        let saw = format!("no process of {target} is visible here");
        report.failed(IDENTITY, saw, NO_PROCESS_FIX);
        return None;
    };
    Some(TokenSource::Agent(agent, named))
}

/// Fetches the identities of a workload once, and reports each. `None` if the reason for their
/// absence was reported.
pub(super) async fn identities(
    config: &Config,
    agent: &dyn AttestingAgent,
    target: &CheckTarget,
    report: &mut CheckReport,
) -> Option<Vec<Identity>> {
    report.show_progress(&format!("the identities of {target}"));
    let svids = match target.fetch(agent, &config.identity.audience).await {
        Ok(svids) if svids.is_empty() => return report_denied(&no_identity(), target, report),
        Ok(svids) => svids,
        Err(error @ SourceError::Denied(_)) => return report_denied(&error, target, report),
        Err(error) => return report_error(IDENTITY, &error, report),
    };
    let mut identities = Vec::new();
    for svid in svids {
        let spiffe_id = match SpiffeId::parse(&svid.spiffe_id) {
            Ok(spiffe_id) => spiffe_id,
            Err(error) => {
                let error = SourceError::Misconfigured(error.to_string());
                return report_error(IDENTITY, &error, report);
            }
        };
        let hint = svid.hint.as_ref();
        let hint = hint.map_or(String::new(), |hint| format!(", with the hint {hint:?}"));
        report.ok(IDENTITY, format!("{target} has {spiffe_id}{hint}"));
        identities.push(Identity {
            spiffe_id,
            hint: svid.hint,
        });
    }
    Some(identities)
}

/// Reports that no registration entry matches a workload.
fn report_denied<T>(
    error: &SourceError,
    target: &CheckTarget,
    report: &mut CheckReport,
) -> Option<T> {
    let selectors = match target {
        CheckTarget::Process(_) => "-selector unix:uid:UID",
        _ => "-selector k8s:ns:NAMESPACE -selector k8s:sa:ACCOUNT",
    };
    report.failed(
        IDENTITY,
        format!("no registration entry matches {target}: {error}"),
        format!(
            "compare its selectors with spire-server entry show, then spire-server entry create -spiffeID ID -parentID AGENT {selectors} \
             (deploy/docs/spire-setup.md has the whole command)"
        ),
    );
    None
}

async fn opens(
    endpoint: &Endpoint,
    key: &str,
    may_be_absent: bool,
    report: &mut CheckReport,
) -> bool {
    if may_be_absent {
        return true;
    }
    let connecting = async {
        match endpoint {
            Endpoint::Unix(path) => UnixStream::connect(path).await.map(drop),
            Endpoint::Tcp(address) => TcpStream::connect(address).await.map(drop),
        }
    };
    match timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(Ok(())) => report.ok(SOCKET, format!("{endpoint} can be opened")),
        Ok(Err(error)) => {
            let text = agent_unreachable(endpoint, key, &error);
            let (saw, fix) = text
                .split_once(": ")
                .unwrap_or((&text, "read the agent's log"));
            report.failed(SOCKET, saw, fix);
            return false;
        }
        Err(_) => {
            report.failed(
                SOCKET,
                format!("{endpoint} takes no connection"),
                "the agent hangs: restart it",
            );
            return false;
        }
    }
    true
}

fn report_error<T>(step: &'static str, error: &SourceError, report: &mut CheckReport) -> Option<T> {
    let fix = match error {
        SourceError::Denied(_) => {
            "spire-server entry show, then entry create -spiffeID ID -selector unix:uid:0 (deploy/docs/spire-setup.md has the whole command)"
        }
        SourceError::Unavailable(_) => {
            "read the agent's log, and check its connection to its server"
        }
        SourceError::BadToken(_) => "STS would reject the token: correct it at the SPIFFE provider",
        _ => "correct [identity], or the agent's configuration (deploy/docs/spire-setup.md)",
    };
    report.failed(step, error.to_string(), fix);
    None
}

fn report_timeout<T>(step: &'static str, report: &mut CheckReport) -> Option<T> {
    report.failed(
        step,
        format!("the agent did not answer within {TOKEN_TIMEOUT:?}"),
        "read the agent's log",
    );
    None
}

/// Fetches a token for this role, and describes it. `None` if the reason for its absence was
/// reported.
pub(super) async fn token(
    config: &Config,
    source: &TokenSource,
    role: &Role,
    report: &mut CheckReport,
) -> Option<JwtSvid> {
    let token = fetch(config, source, role, report).await?;
    let left = token
        .expires()
        .duration_since(Clock::system().now())
        .unwrap_or_default();
    report.ok(
        IDENTITY,
        format!(
            "{} for role {:?}: audience {:?}, {}, {} s left, session {}",
            token.spiffe_id(),
            role.name,
            role.audience,
            token.algorithm(),
            left.as_secs(),
            role.session_name
                .clone()
                .unwrap_or_else(|| SessionName::of(token.spiffe_id()))
                .as_str(),
        ),
    );
    if let Some(life) = token.short_life() {
        let saw = format!(
            "tokens for role {:?} are good for only {} s from the start",
            role.name,
            life.as_secs()
        );
        report.info(IDENTITY, saw, TTL_FIX);
    }
    Some(token)
}

async fn fetch(
    config: &Config,
    source: &TokenSource,
    role: &Role,
    report: &mut CheckReport,
) -> Option<JwtSvid> {
    report.show_progress(&format!("a token for the role {:?}", role.name));
    let fetched = match source {
        TokenSource::WorkloadApi => {
            let Some(id) = live_token::example(config, role) else {
                report_no_identity(role, report);
                return None;
            };
            live_token::fetch(config, &id, &role.audience, TOKEN_TIMEOUT).await
        }
        TokenSource::Agent(agent, target) => fetch_selected(agent.as_ref(), target, role).await,
    };
    match fetched {
        Ok(token) => Some(token),
        // The daemon works with such an agent, for pods only. Here no process can be
        // referred to it.
        Err(error @ SourceError::Misconfigured(_)) if matches!(source, TokenSource::Agent(agent, CheckTarget::Itself) if agent.supports_pod_references()) =>
        {
            let how = "awsvid check --pod UID names a pod";
            report.unchecked(
                IDENTITY,
                format!(
                    "role {:?}: {how}; this process cannot be named: {error}",
                    role.name
                ),
            );
            None
        }
        Err(error) => report_error(IDENTITY, &error, report),
    }
}

/// Fetches the X.509-SVID for this role. `None` if the reason for its absence was reported.
pub(super) async fn certificate(
    config: &Config,
    source: &TokenSource,
    role: &Role,
    report: &mut CheckReport,
) -> Option<X509Svid> {
    report.show_progress(&format!("a certificate for the role {:?}", role.name));
    let fetched = match source {
        TokenSource::WorkloadApi => match live_token::example(config, role) {
            Some(id) => live_token::certificate(config, &id, TOKEN_TIMEOUT).await,
            None => {
                report_no_identity(role, report);
                return None;
            }
        },
        TokenSource::Agent(agent, target) => select_x509(agent.as_ref(), target, role).await,
    };
    match fetched {
        Ok(svid) => Some(svid),
        Err(error) => report_error(IDENTITY, &error, report),
    }
}

fn report_no_identity(role: &Role, report: &mut CheckReport) {
    report.info(
        IDENTITY,
        format!(
            "role {:?}: no [[workload]] of this node has an identity that it is for",
            role.name
        ),
        "add a [[workload]], or leave the role out on this node",
    );
}

async fn select_x509(
    agent: &dyn AttestingAgent,
    target: &CheckTarget,
    role: &Role,
) -> Result<X509Svid, SourceError> {
    let svids = target.fetch_x509(agent).await?;
    let ids = svids.iter().map(|svid| svid.spiffe_id.as_str());
    let id = select(ids, role)?;
    X509Svid::check_any(svids, &id, Clock::system().now())?.ok_or_else(no_identity)
}

fn no_identity() -> SourceError {
    SourceError::Denied("the agent has no identity for it".to_owned())
}

/// Selects the identity that the role is for, or the first one. The first one is for awsvid's own
/// token only, with which check tries the agent and the issuer.
fn select<'a>(
    ids: impl Iterator<Item = &'a str> + Clone,
    role: &Role,
) -> Result<SpiffeId, SourceError> {
    let fits = |id: &&str| SpiffeId::parse(id).is_ok_and(|id| role.spiffe_id.matches(&id));
    let id = ids.clone().find(fits).or(ids.clone().next());
    SpiffeId::parse(id.ok_or_else(no_identity)?)
        .map_err(|error| SourceError::Misconfigured(error.to_string()))
}

/// Selects among several identities the one that the role covers.
async fn fetch_selected(
    agent: &dyn AttestingAgent,
    target: &CheckTarget,
    role: &Role,
) -> Result<JwtSvid, SourceError> {
    let svids = target.fetch(agent, &role.audience).await?;
    let id = select(svids.iter().map(|svid| svid.spiffe_id.as_str()), role)?;
    let tokens = svids
        .iter()
        .filter(|svid| svid.spiffe_id == id.as_str())
        .map(|svid| svid.token.clone());
    JwtSvid::check_any(tokens, &id, &role.audience, Clock::system().now())?.ok_or_else(no_identity)
}
