//! The part `entries`: a cache, filled. This is the only file here that knows the cache's own
//! interface.

use std::io::{BufRead, stdin};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use awsvid::accounts::UserNames;
use awsvid::cache::CredentialCache;
use awsvid::caller::{
    AttestError, Caller, CallerFacts, ListenerKind, PeerFacts, PeerProof, ProcessFacts,
};
use awsvid::cgroup::CgroupPath;
use awsvid::clock::Clock;
use awsvid::credentials::Credentials;
use awsvid::exchange::TokenExchanger;
use awsvid::file_threads::FileThreads;
use awsvid::identity::{ArnTemplate, AttestedFacts, SpiffeId, SpiffeIdPattern};
use awsvid::metrics::Metrics;
use awsvid::policy::{CacheLimits, Policy};
use awsvid::role::{FirstExchange, Grant, Identity, RequestedRole, Role, Roles, StsTarget};
use awsvid::sts::{AssumeRole, StsError};
use awsvid::svid::{IdentityBasis, IdentitySource, JwtSvid, SourceError};
use zeroize::Zeroizing;

use crate::BenchError;
use crate::upstream::{TRUST_DOMAIN, token};

const AUDIENCE: &str = "bench";
const HOUR: Duration = Duration::from_secs(3600);

/// Prints a line when its cache exists, fills it when it reads a line, and prints a line when it is
/// full.
pub(crate) fn run(count: usize) -> Result<(), BenchError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let role = Arc::new(role()?);
        let source = Arc::new(Source);
        let roles = Roles {
            defined: vec![role.clone()],
            requested: None,
        };
        let (clock, metrics) = (Clock::system(), Metrics::default());
        let exchanger = TokenExchanger::new(source.clone(), source.clone(), clock, metrics);
        let users = UserNames::new(FileThreads::default());
        let limits = CacheLimits {
            max_entries: count,
            revocation_grace: Duration::ZERO,
        };
        let policy = Policy::new(source, roles, exchanger, users, limits);
        let cache = CredentialCache::new(policy, Clock::system(), Metrics::default());
        println!("empty");
        stdin().lock().read_line(&mut String::new())?;
        for number in 0..count {
            let grant = grant(&role, number)?;
            let caller = Arc::new(caller(number));
            cache.get(&cache.policy(), &grant, &caller).await?;
        }
        println!("full");
        stdin().lock().read_line(&mut String::new())?;
        Ok(())
    })
}

fn role() -> Result<Role, BenchError> {
    Ok(Role {
        name: "bench".to_owned(),
        spiffe_id: SpiffeIdPattern::parse(&format!("spiffe://{TRUST_DOMAIN}/**"))?,
        role_arn: ArnTemplate::parse("arn:aws:iam::123456789012:role/{path[3]}")?,
        audience: AUDIENCE.to_owned(),
        duration: HOUR,
        session_name: None,
        sts: StsTarget {
            region: "eu-central-1".to_owned(),
            endpoint: None,
        },
        policy: None,
        policy_arns: Vec::new(),
        exchange: FirstExchange::WebIdentity,
        chain: Vec::new(),
    })
}

/// Makes a grant as on a large node: each workload has an identity of its own.
fn grant(role: &Arc<Role>, number: usize) -> Result<Grant, BenchError> {
    let spiffe_id = SpiffeId::parse(&format!(
        "spiffe://{TRUST_DOMAIN}/ns/namespace/sa/workload-{number}"
    ))?;
    let roles = Roles {
        defined: vec![role.clone()],
        requested: None,
    };
    Ok(roles.select(
        &[Identity {
            spiffe_id,
            hint: None,
        }],
        &AttestedFacts::default(),
        &RequestedRole::Default,
    )?)
}

/// Returns a caller over TCP with a rule that needs no process.
fn caller(number: usize) -> Caller {
    let cgroup = CgroupPath::parse(&format!(
        "/system.slice/system-workload.slice/workload@{number}.service"
    ));
    Caller {
        listener: ListenerKind::Tcp,
        peer: PeerFacts {
            cgroup,
            ..PeerFacts::of_user(1000)
        },
        process: None,
        proof: Box::new(Facts([0; 128])),
    }
}

/// About the size of what attestation keeps.
#[derive(Debug)]
struct Facts(#[expect(dead_code, reason = "only its size matters")] [u8; 128]);

#[async_trait::async_trait]
impl PeerProof for Facts {
    async fn verify_unchanged(&self) -> Result<(), AttestError> {
        Ok(())
    }
}

/// A source that replies at once.
#[derive(Debug)]
struct Source;

#[async_trait]
impl IdentitySource for Source {
    async fn identify(&self, _: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        Ok(Vec::new())
    }

    async fn token(
        &self,
        _: &Arc<Caller>,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError> {
        Ok(JwtSvid::check(
            token(id.as_str(), audience),
            id,
            audience,
            SystemTime::now(),
        )?)
    }

    fn facts_needed(&self, _: CallerFacts<'_>) -> Option<ProcessFacts> {
        None
    }

    fn basis(&self, _: &SpiffeId) -> IdentityBasis {
        IdentityBasis::Rules(Vec::new())
    }

    async fn ready(&self, _: &str) -> Result<(), SourceError> {
        Ok(())
    }
}

#[async_trait]
impl AssumeRole for Source {
    async fn assume(&self, _: &Grant, _: &JwtSvid) -> Result<Credentials, StsError> {
        Ok(Credentials {
            access_key_id: "ASIAIOSFODNN7EXAMPLE".to_owned(),
            secret_access_key: Zeroizing::new(
                "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY00".to_owned(),
            ),
            session_token: Zeroizing::new("t".repeat(1024)),
            expiration: SystemTime::now() + HOUR,
            first_session_name: None,
        })
    }

    async fn assume_chained(&self, _: &Grant, _: &Credentials) -> Result<Credentials, StsError> {
        unreachable!("no role has a chain")
    }
}
