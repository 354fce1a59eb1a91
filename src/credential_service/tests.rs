use std::path::Path;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::time::sleep;

use super::*;
use crate::audit::Audit;
use crate::caller::ListenerKind;
use crate::clock::Clock;
use crate::config::AuditFile;
use crate::credentials::Credentials;
use crate::identity::{ArnTemplate, SpiffeIdPattern};
use crate::metrics::Metrics;
use crate::role::{Identity, Role, StsTarget};
use crate::sts::{AssumeRole, StsError};
use crate::svid::JwtSvid;

const ID: &str = "spiffe://example.org/shop";

/// A source and an STS that answer identities after this time, and never a token.
#[derive(Debug)]
struct Slow(Duration);

#[async_trait]
impl IdentitySource for Slow {
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

    fn facts_needed(&self, _: &Caller) -> Option<ProcessFacts> {
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
impl AssumeRole for Slow {
    async fn assume(&self, _: &Grant, _: &JwtSvid) -> Result<Credentials, StsError> {
        std::future::pending().await
    }
}

fn role() -> Arc<Role> {
    Arc::new(Role {
        name: "shop".to_owned(),
        spiffe_id: SpiffeIdPattern::parse(ID).unwrap(),
        role_arn: ArnTemplate::parse("arn:aws:iam::123456789012:role/shop").unwrap(),
        audience: "sts.amazonaws.com".to_owned(),
        duration: Duration::from_secs(3600),
        session_name: None,
        sts: StsTarget {
            region: "eu-central-1".to_owned(),
            endpoint: None,
        },
        policy: None,
        policy_arns: Vec::new(),
    })
}

#[tokio::test(start_paused = true)]
async fn slow_source_and_exchange_share_one_deadline() {
    let slow = Arc::new(Slow(Duration::from_secs(3)));
    let (clock, metrics) = (
        Clock::starting_at(SystemTime::UNIX_EPOCH),
        Metrics::default(),
    );
    let exchanger = TokenExchanger::new(slow.clone(), slow.clone(), clock.clone(), metrics.clone());
    let limits = Limits {
        max_entries: 10,
        revocation_grace: Duration::from_secs(300),
    };
    let cache = CredentialCache::new(exchanger, clock.clone(), metrics.clone(), limits);
    let policy = Policy {
        source: slow,
        roles: Roles {
            defined: vec![role()],
            requested: None,
        },
    };
    let service = CredentialService::new(policy, cache);
    let audit = Audit::unopened(false, clock, metrics);
    audit
        .reopen(&AuditFile::Path(Path::new("/dev/null").to_owned()), false)
        .unwrap();
    let caller = Arc::new(Caller::synthetic());
    let mut record = audit.begin(
        audit.next_request(),
        ListenerKind::Unix,
        Some(caller.clone()),
    );
    let begun = Instant::now();
    let answer = service
        .credentials_for(&caller, &RequestedRole::Default, &mut record)
        .await;
    assert!(
        matches!(answer, Err(ServiceError::Cache(CacheError::Pending))),
        "{answer:?}"
    );
    assert_eq!(begun.elapsed(), REQUEST_HOLD);
}
