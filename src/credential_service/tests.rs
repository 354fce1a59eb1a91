use std::path::Path;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::time::sleep;

use super::*;
use crate::accounts::UserNames;
use crate::audit::{Audit, RequestPeer};
use crate::caller::ListenerKind;
use crate::caller::constant_proof::constant_caller;
use crate::clock::Clock;
use crate::config::AuditFile;
use crate::credentials::Credentials;
use crate::exchange::TokenExchanger;
use crate::file_threads::FileThreads;
use crate::identity::{ArnTemplate, SpiffeIdPattern};
use crate::metrics::Metrics;
use crate::policy::CacheLimits;
use crate::protocol::Protocol;
use crate::role::{Grant, Identity, Role, Roles};
use crate::sts::{AssumeRole, StsError};
use crate::svid::{IdentityBasis, IdentitySource, JwtSvid};

const ID: &str = "spiffe://example.org/shop";

/// A source and an STS that answer identities after this time, and never a token.
#[derive(Debug)]
struct SlowUpstream(Duration);

#[async_trait]
impl IdentitySource for SlowUpstream {
    async fn identify(&self, _: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        sleep(self.0).await;
        Ok(vec![Identity {
            spiffe_id: SpiffeId::parse(ID).unwrap(),
            hint: None,
        }])
    }

    async fn token(&self, _: &Arc<Caller>, _: &SpiffeId, _: &str) -> Result<JwtSvid, SourceError> {
        std::future::pending().await
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
impl AssumeRole for SlowUpstream {
    async fn assume(&self, _: &Grant, _: &JwtSvid) -> Result<Credentials, StsError> {
        std::future::pending().await
    }

    async fn assume_chained(&self, _: &Grant, _: &Credentials) -> Result<Credentials, StsError> {
        panic!("no test has a chain")
    }
}

fn role(name: &str) -> Arc<Role> {
    Arc::new(Role {
        name: name.to_owned(),
        spiffe_id: SpiffeIdPattern::parse(ID).unwrap(),
        role_arn: ArnTemplate::parse(&format!("arn:aws:iam::123456789012:role/{name}")).unwrap(),
        ..Role::example()
    })
}

/// Returns the policy of a source that takes `identify` for each answer.
fn policy(identify: Duration, roles: Vec<Arc<Role>>, clock: &Clock) -> Policy {
    let slow = Arc::new(SlowUpstream(identify));
    let roles = Roles {
        defined: roles,
        requested: None,
    };
    let metrics = Metrics::default();
    let exchanger = TokenExchanger::new(slow.clone(), slow.clone(), clock.clone(), metrics);
    let limits = CacheLimits {
        max_entries: 10,
        revocation_grace: Duration::from_secs(300),
    };
    let users = UserNames::new(FileThreads::default());
    Policy::new(slow, roles, exchanger, users, limits)
}

struct ServiceEnv {
    clock: Clock,
    service: CredentialService,
    audit: Arc<Audit>,
}

/// Returns a service that needs this long to identify a caller.
fn env(identify: Duration) -> ServiceEnv {
    let (clock, metrics) = (
        Clock::starting_at(SystemTime::UNIX_EPOCH),
        Metrics::default(),
    );
    let policy = policy(identify, vec![role("shop"), role("reports")], &clock);
    let cache = CredentialCache::new(policy, clock.clone(), metrics.clone());
    let audit = Audit::unopened(false, clock.clone(), metrics);
    audit
        .reopen(&AuditFile::Path(Path::new("/dev/null").to_owned()), false)
        .unwrap();
    ServiceEnv {
        clock,
        service: CredentialService::new(cache),
        audit,
    }
}

impl ServiceEnv {
    async fn request(&self) -> Result<(Arc<CachedCredentials>, CacheResult), ServiceError> {
        let caller = Arc::new(Caller::synthetic());
        let mut record = self.audit.begin(
            self.audit.next_request(),
            (ListenerKind::Unix, Protocol::Container),
            RequestPeer::Attested(caller.clone()),
        );
        self.service
            .credentials_for(&caller, &RequestedRole::Default, &mut record)
            .await
    }
}

/// Covers T45: the tasks of a workload that requests metadata tokens all the time.
#[tokio::test(start_paused = true)]
async fn workload_starts_few_exchanges_ahead_at_a_time() {
    let service = Arc::new(env(Duration::from_secs(3)).service);
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let before = tasks();
    for _ in 0..100 {
        service.start_exchange(Arc::new(Caller::synthetic()), RequestedRole::Default);
    }
    assert_eq!(tasks(), before + MAX_STARTS_PER_WORKLOAD);
    // They end with the source's answer; the flight belongs to the cache.
    sleep(Duration::from_secs(4)).await;
    assert_eq!(
        service
            .starts
            .try_acquire(&Caller::synthetic().peer.workload_key())
            .err(),
        None
    );
}

#[tokio::test(start_paused = true)]
async fn exchange_starts_ahead_for_the_requested_role() {
    for (requested, expected) in [
        (RequestedRole::Default, "shop"),
        (RequestedRole::ByName("reports".to_owned()), "reports"),
    ] {
        let service = Arc::new(env(Duration::from_secs(3)).service);
        service.start_exchange(Arc::new(Caller::synthetic()), requested);
        sleep(Duration::from_secs(4)).await;
        let entries = service.cache.entries();
        let names: Vec<_> = entries.iter().map(|entry| &*entry.role).collect();
        assert_eq!(names, [expected]);
    }
}

#[tokio::test(start_paused = true)]
async fn first_role_needs_no_exchange() {
    let env = env(Duration::ZERO);
    let caller = Arc::new(constant_caller(ListenerKind::Tcp, 7, None, None));
    let mut record = env.audit.begin(
        env.audit.next_request(),
        (ListenerKind::Tcp, Protocol::Imds),
        RequestPeer::Attested(caller.clone()),
    );
    let role = env.service.first_role(&caller, &mut record).await.unwrap();
    assert_eq!(role.name, "shop");
}

#[tokio::test(start_paused = true)]
async fn slow_source_and_exchange_share_one_deadline() {
    let env = env(Duration::from_secs(3));
    let begun = Instant::now();
    let answer = env.request().await;
    assert!(
        matches!(answer, Err(ServiceError::Cache(CacheError::Pending))),
        "{answer:?}"
    );
    assert_eq!(begun.elapsed(), REQUEST_HOLD);
}

/// Covers T17: in the source, and in the exchange.
#[tokio::test(start_paused = true)]
async fn running_request_is_decided_again_after_a_reload() {
    for after in [Duration::from_secs(1), Duration::from_secs(4)] {
        let env = env(Duration::from_secs(3));
        let reload = async {
            sleep(after).await;
            env.service
                .reload(policy(Duration::ZERO, Vec::new(), &env.clock));
        };
        let (answer, ()) = tokio::join!(env.request(), reload);
        assert!(
            matches!(answer, Err(ServiceError::Denied { .. })),
            "{answer:?}"
        );
    }
}
