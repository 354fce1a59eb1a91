use std::collections::VecDeque;
use std::sync::Mutex;

use async_trait::async_trait;
use rcgen::{CertificateParams, KeyPair, SanType};
use zeroize::Zeroizing;

use super::super::token_outages::OUTAGE_RETRY;
use super::*;
use crate::caller::constant_proof::constant_caller;
use crate::caller::{CallerFacts, ListenerKind, ProcessFacts};
use crate::clock::Clock;
use crate::identity::SpiffeId;
use crate::metrics::Metrics;
use crate::role::{FirstExchange, Identity, Role};
use crate::roles_anywhere::CreateSession;
use crate::sts::tests::grant as granted;
use crate::sts::{AssumeRole, StsError, StsReason};
use crate::svid::jwt::tests::{now, svid_for};
use crate::svid::{IdentityBasis, IdentitySource, JwtSvid, ReceivedX509Svid};

type Replies<T> = Mutex<VecDeque<T>>;

/// All upstreams of an exchange. Each replies in order, and its last reply repeats.
#[derive(Debug)]
struct Upstreams {
    tokens: Replies<Result<(), SourceError>>,
    token_delay: Mutex<Duration>,
    certificates: Replies<Result<(), SourceError>>,
    /// The identity of the certificates, if it is another one than the requested.
    other_identity: Mutex<Option<SpiffeId>>,
    sts: Replies<Result<(), StsError>>,
    sessions: Replies<Result<(), StsError>>,
    calls: Mutex<Vec<&'static str>>,
}

impl Upstreams {
    fn new() -> Self {
        let available = || Mutex::new(VecDeque::from([Ok(())]));
        Self {
            tokens: available(),
            token_delay: Mutex::default(),
            certificates: available(),
            other_identity: Mutex::default(),
            sts: Mutex::new(VecDeque::from([Ok(())])),
            sessions: Mutex::new(VecDeque::from([Ok(())])),
            calls: Mutex::default(),
        }
    }

    fn reply<T: Clone>(&self, name: &'static str, replies: &Replies<T>) -> T {
        self.calls.lock().unwrap().push(name);
        let mut replies = replies.lock().unwrap();
        match replies.len() {
            1 => replies[0].clone(),
            _ => replies.pop_front().unwrap(),
        }
    }

    fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

fn set<T>(replies: &Replies<T>, all: impl IntoIterator<Item = T>) {
    *replies.lock().unwrap() = all.into_iter().collect();
}

fn credentials(access_key_id: &str) -> Credentials {
    Credentials {
        access_key_id: access_key_id.to_owned(),
        secret_access_key: Zeroizing::new("secret".to_owned()),
        session_token: Zeroizing::new("token".to_owned()),
        expiration: now() + Duration::from_secs(3600),
        first_session_name: None,
    }
}

fn certificate(id: &SpiffeId) -> X509Svid {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
    let certificate = params.self_signed(&key).unwrap();
    let received = ReceivedX509Svid {
        hint: None,
        spiffe_id: id.to_string(),
        chain: Some(vec![certificate.der().clone()]),
        bundle: Vec::new(),
        key: Zeroizing::new(key.serialize_der()),
    };
    X509Svid::check(received, id, now()).unwrap()
}

#[async_trait]
impl IdentitySource for Upstreams {
    async fn identify(&self, _: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        panic!("no test calls this")
    }

    async fn token(&self, _: &Arc<Caller>, id: &SpiffeId, _: &str) -> Result<JwtSvid, SourceError> {
        let token = self.reply("token", &self.tokens);
        let delay = *self.token_delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        token.map(|()| svid_for(id, 300, 1))
    }

    async fn x509_svid(&self, _: &Arc<Caller>, id: &SpiffeId) -> Result<X509Svid, SourceError> {
        let svid = self.reply("certificate", &self.certificates);
        let other = self.other_identity.lock().unwrap();
        svid.map(|()| certificate(other.as_ref().unwrap_or(id)))
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
impl AssumeRole for Upstreams {
    async fn assume(&self, _: &Grant, _: &JwtSvid) -> Result<Credentials, StsError> {
        let session = self.reply("sts", &self.sts);
        session.map(|()| credentials("ASIATOKEN"))
    }

    async fn assume_chained(&self, _: &Grant, _: &Credentials) -> Result<Credentials, StsError> {
        panic!("no test has a chain")
    }
}

#[async_trait]
impl CreateSession for Upstreams {
    async fn create_session(
        &self,
        grant: &Grant,
        _: &RolesAnywhereTarget,
        svid: &X509Svid,
    ) -> Result<Credentials, StsError> {
        assert_eq!(svid.spiffe_id(), &grant.spiffe_id);
        let session = self.reply("session", &self.sessions);
        session.map(|()| credentials("ASIACERTIFICATE"))
    }
}

fn sts_target() -> StsTarget {
    StsTarget {
        region: "eu-central-1".to_owned(),
        endpoint: None,
    }
}

fn grant(kind: fn(Arc<RolesAnywhereTarget>) -> FirstExchange) -> Grant {
    let target = RolesAnywhereTarget {
        trust_anchor_arn: String::new(),
        profile_arn: String::new(),
        region: "eu-central-1".to_owned(),
        endpoint: None,
    };
    let grant = granted(&sts_target());
    let role = Role {
        exchange: kind(Arc::new(target)),
        ..(*grant.role).clone()
    };
    Grant {
        role: Arc::new(role),
        ..grant
    }
}

fn exchanger(upstreams: &Arc<Upstreams>) -> TokenExchanger {
    TokenExchanger::new(
        upstreams.clone(),
        upstreams.clone(),
        Clock::starting_at(now()),
        Metrics::default(),
    )
    .with_roles_anywhere(upstreams.clone())
}

async fn exchange(exchanger: &TokenExchanger, grant: &Grant) -> Result<String, ExchangeError> {
    let caller = Arc::new(constant_caller(ListenerKind::Unix, 1001, None, None));
    let credentials = exchanger.exchange(&caller, grant).await?;
    Ok(credentials.access_key_id)
}

fn failure(retry: RetryPolicy, reason: StsReason) -> StsError {
    StsError {
        retry,
        reason,
        code: String::new(),
        what: "failed".to_owned(),
        fix: None,
    }
}

fn outage() -> StsError {
    failure(RetryPolicy::Later, StsReason::IssuerUnreachable)
}

fn down() -> SourceError {
    SourceError::Unavailable("down".to_owned())
}

#[tokio::test(start_paused = true)]
async fn certificate_of_another_identity_signs_nothing() {
    let upstreams = Arc::new(Upstreams::new());
    let exchanger = exchanger(&upstreams);
    let other = SpiffeId::parse("spiffe://example.org/other").unwrap();
    *upstreams.other_identity.lock().unwrap() = Some(other);
    let grant = grant(FirstExchange::RolesAnywhere);
    let error = exchange(&exchanger, &grant).await.unwrap_err();
    assert!(error.to_string().contains("another SPIFFE ID"), "{error}");
    assert_eq!(upstreams.calls(), ["certificate"]);
}

#[tokio::test(start_paused = true)]
async fn certificate_is_exchanged_and_outages_are_retried() {
    let upstreams = Arc::new(Upstreams::new());
    let exchanger = exchanger(&upstreams);
    let grant = grant(FirstExchange::RolesAnywhere);
    assert_eq!(
        exchange(&exchanger, &grant).await.unwrap(),
        "ASIACERTIFICATE"
    );
    assert_eq!(upstreams.calls(), ["certificate", "session"]);

    set(&upstreams.certificates, [Err(down()), Ok(())]);
    let throttled = failure(RetryPolicy::Later, StsReason::Throttled);
    set(&upstreams.sessions, [Err(throttled.clone()), Ok(())]);
    exchange(&exchanger, &grant).await.unwrap();
    assert_eq!(
        upstreams.calls(),
        ["certificate", "certificate", "session", "session"]
    );

    let denied = failure(RetryPolicy::Never, StsReason::AccessDenied);
    set(&upstreams.sessions, [Err(denied.clone())]);
    assert_eq!(exchange(&exchanger, &grant).await, Err(denied.into()));
    assert_eq!(upstreams.calls(), ["certificate", "session"]);
    set(&upstreams.sessions, [Err(throttled.clone())]);
    assert_eq!(exchange(&exchanger, &grant).await, Err(throttled.into()));
}

#[tokio::test(start_paused = true)]
async fn outage_of_tokens_falls_over_to_the_certificate() {
    let grant = grant(FirstExchange::Both);
    for (tokens, sts, first_calls) in [
        (Err(down()), Ok(()), &["token"][..]),
        (Ok(()), Err(outage()), &["token", "sts"]),
        (
            Ok(()),
            Err(failure(RetryPolicy::Later, StsReason::Unreachable)),
            &["token", "sts"],
        ),
    ] {
        let upstreams = Arc::new(Upstreams::new());
        let exchanger = exchanger(&upstreams);
        assert_eq!(exchange(&exchanger, &grant).await.unwrap(), "ASIATOKEN");
        assert_eq!(upstreams.calls(), ["token", "sts"]);
        set(&upstreams.tokens, [tokens]);
        set(&upstreams.sts, [sts]);
        assert_eq!(
            exchange(&exchanger, &grant).await.unwrap(),
            "ASIACERTIFICATE"
        );
        let expected = [first_calls, &["certificate", "session"]].concat();
        assert_eq!(upstreams.calls(), expected, "without a retry");
        // An STS that hangs would delay each exchange.
        assert_eq!(
            exchange(&exchanger, &grant).await.unwrap(),
            "ASIACERTIFICATE"
        );
        assert_eq!(upstreams.calls(), ["certificate", "session"]);

        set(&upstreams.tokens, [Ok(())]);
        set(&upstreams.sts, [Ok(())]);
        tokio::time::advance(OUTAGE_RETRY).await;
        assert_eq!(exchange(&exchanger, &grant).await.unwrap(), "ASIATOKEN");
        assert_eq!(upstreams.calls(), ["token", "sts"]);
        assert_eq!(exchange(&exchanger, &grant).await.unwrap(), "ASIATOKEN");
    }
}

#[tokio::test(start_paused = true)]
async fn token_that_does_not_come_in_time_is_an_outage() {
    let upstreams = Arc::new(Upstreams::new());
    let exchanger = exchanger(&upstreams);
    *upstreams.token_delay.lock().unwrap() = Duration::from_secs(30);
    let start = Instant::now();
    let grant = grant(FirstExchange::Both);
    assert_eq!(
        exchange(&exchanger, &grant).await.unwrap(),
        "ASIACERTIFICATE"
    );
    assert_eq!(start.elapsed(), TOKEN_TIMEOUT);
    assert_eq!(upstreams.calls(), ["token", "certificate", "session"]);
}

/// Returns whether the next exchange tries a token first.
async fn tries_token(exchanger: &TokenExchanger, upstreams: &Upstreams, grant: &Grant) -> bool {
    upstreams.calls();
    let _ = exchange(exchanger, grant).await;
    upstreams.calls().first() == Some(&"token")
}

fn of_identity(grant: Grant, id: &str) -> Grant {
    Grant {
        spiffe_id: SpiffeId::parse(id).unwrap(),
        ..grant
    }
}

#[tokio::test(start_paused = true)]
async fn outage_of_the_source_is_that_of_one_identity() {
    let one = grant(FirstExchange::Both);
    let other = of_identity(one.clone(), "spiffe://example.org/other");
    let expiring = SourceError::from(BadToken::Expiring("soon".to_owned()));
    for (token, delay) in [(Err(expiring), 0), (Err(down()), 0), (Ok(()), 30)] {
        let upstreams = Arc::new(Upstreams::new());
        let exchanger = exchanger(&upstreams);
        set(&upstreams.tokens, [token]);
        *upstreams.token_delay.lock().unwrap() = Duration::from_secs(delay);
        assert!(tries_token(&exchanger, &upstreams, &one).await);
        set(&upstreams.tokens, [Ok(())]);
        *upstreams.token_delay.lock().unwrap() = Duration::ZERO;
        assert!(!tries_token(&exchanger, &upstreams, &one).await);
        assert!(tries_token(&exchanger, &upstreams, &other).await);
    }
    // That of STS is that of all.
    let upstreams = Arc::new(Upstreams::new());
    let exchanger = exchanger(&upstreams);
    set(&upstreams.sts, [Err(outage())]);
    assert!(tries_token(&exchanger, &upstreams, &one).await);
    assert!(!tries_token(&exchanger, &upstreams, &other).await);
}

#[tokio::test(start_paused = true)]
async fn only_a_response_of_sts_ends_an_outage() {
    let one = grant(FirstExchange::Both);
    let other = of_identity(one.clone(), "spiffe://example.org/other");
    let gone = SourceError::from(crate::caller::AttestError::CallerGone);
    let denied = SourceError::Denied("no".to_owned());
    let busy = failure(RetryPolicy::Later, StsReason::Busy);
    let access_denied = failure(RetryPolicy::Never, StsReason::AccessDenied);
    for (token, sts, ends) in [
        (Err(gone), Ok(()), false),
        (Err(denied), Ok(()), false),
        (Ok(()), Err(busy), false),
        (Ok(()), Err(access_denied), true),
        (Ok(()), Ok(()), true),
    ] {
        let upstreams = Arc::new(Upstreams::new());
        let exchanger = exchanger(&upstreams);
        set(&upstreams.sts, [Err(outage())]);
        assert!(tries_token(&exchanger, &upstreams, &one).await);
        // The certificate is rejected, so the token is tried although the outage is recent.
        let rejected = failure(RetryPolicy::Never, StsReason::AccessDenied);
        set(&upstreams.sessions, [Err(rejected)]);
        set(&upstreams.tokens, [token.clone()]);
        set(&upstreams.sts, [sts.clone()]);
        let _ = exchange(&exchanger, &one).await;
        assert_eq!(
            tries_token(&exchanger, &upstreams, &other).await,
            ends,
            "{token:?} {sts:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn rejected_token_does_not_fall_over() {
    let grant = grant(FirstExchange::Both);
    let rejections = [
        failure(RetryPolicy::Never, StsReason::AccessDenied),
        failure(RetryPolicy::Never, StsReason::BadRequest),
        failure(RetryPolicy::NewToken, StsReason::InvalidToken),
        // A limit of this node.
        failure(RetryPolicy::Later, StsReason::Busy),
    ];
    for rejection in rejections {
        let upstreams = Arc::new(Upstreams::new());
        set(&upstreams.sts, [Err(rejection)]);
        exchange(&exchanger(&upstreams), &grant).await.unwrap_err();
        assert!(!upstreams.calls().contains(&"certificate"));
    }
    for denial in [
        SourceError::Denied("no".to_owned()),
        SourceError::Misconfigured("no".to_owned()),
        crate::caller::AttestError::CallerGone.into(),
    ] {
        let upstreams = Arc::new(Upstreams::new());
        set(&upstreams.tokens, [Err(denial.clone())]);
        let error = exchange(&exchanger(&upstreams), &grant).await.unwrap_err();
        assert_eq!(error, denial.into());
        assert_eq!(upstreams.calls(), ["token"]);
    }
}

#[tokio::test(start_paused = true)]
async fn outage_is_the_result_whatever_the_certificate_lacks() {
    let grant = grant(FirstExchange::Both);
    let source = |error| (Err(error), Ok(()), &["certificate"][..]);
    let rejected = failure(RetryPolicy::Never, StsReason::AccessDenied);
    let wrong = BadToken::Wrong("another".to_owned());
    for (certificate, session, calls) in [
        (Ok(()), Err(rejected), &["certificate", "session"][..]),
        source(SourceError::Denied("no certificate".to_owned())),
        source(SourceError::Misconfigured("unimplemented".to_owned())),
        source(wrong.into()),
        source(SourceError::Busy),
    ] {
        let upstreams = Arc::new(Upstreams::new());
        let exchanger = exchanger(&upstreams);
        set(&upstreams.sts, [Err(outage())]);
        set(&upstreams.certificates, [certificate.clone()]);
        set(&upstreams.sessions, [session]);
        let error = exchange(&exchanger, &grant).await.unwrap_err();
        assert_eq!(error, outage().into(), "{certificate:?}");
        assert!(error.is_transient());
        let tokens = &["token", "sts"][..];
        assert_eq!(upstreams.calls(), [tokens, calls].concat());
        // Within the pause, the certificate goes first.
        let error = exchange(&exchanger, &grant).await.unwrap_err();
        assert_eq!(error, outage().into(), "{certificate:?}");
        assert_eq!(upstreams.calls(), [calls, tokens].concat());
        set(&upstreams.sts, [Ok(())]);
        assert_eq!(exchange(&exchanger, &grant).await.unwrap(), "ASIATOKEN");
        assert_eq!(upstreams.calls(), [calls, tokens].concat());
        assert!(tries_token(&exchanger, &upstreams, &grant).await);
    }
}

#[tokio::test(start_paused = true)]
async fn token_is_tried_within_the_pause_if_no_certificate_comes() {
    let grant = grant(FirstExchange::Both);
    let upstreams = Arc::new(Upstreams::new());
    let exchanger = exchanger(&upstreams);
    set(&upstreams.sts, [Err(outage())]);
    set(&upstreams.certificates, [Err(down())]);
    let error = exchange(&exchanger, &grant).await.unwrap_err();
    assert_eq!(error, outage().into());
    set(&upstreams.sts, [Ok(())]);
    assert_eq!(exchange(&exchanger, &grant).await.unwrap(), "ASIATOKEN");
}

#[tokio::test(start_paused = true)]
async fn denial_of_a_token_withdraws_within_the_pause() {
    let grant = grant(FirstExchange::Both);
    let upstreams = Arc::new(Upstreams::new());
    let exchanger = exchanger(&upstreams);
    set(&upstreams.sts, [Err(outage())]);
    let denial = SourceError::Denied("no longer".to_owned());
    set(&upstreams.certificates, [Err(denial.clone())]);
    exchange(&exchanger, &grant).await.unwrap_err();
    upstreams.calls();
    set(&upstreams.tokens, [Err(denial.clone())]);
    let error = exchange(&exchanger, &grant).await.unwrap_err();
    assert_eq!(error, denial.into());
    assert_eq!(upstreams.calls(), ["certificate", "token"]);
}

#[tokio::test(start_paused = true)]
async fn caller_that_is_gone_is_the_result() {
    let grant = grant(FirstExchange::Both);
    let upstreams = Arc::new(Upstreams::new());
    let exchanger = exchanger(&upstreams);
    set(&upstreams.sts, [Err(outage())]);
    let gone = SourceError::from(crate::caller::AttestError::CallerGone);
    set(&upstreams.certificates, [Err(gone.clone())]);
    for calls in [&["token", "sts", "certificate"][..], &["certificate"]] {
        let error = exchange(&exchanger, &grant).await.unwrap_err();
        assert_eq!(error, gone.clone().into());
        assert_eq!(upstreams.calls(), calls);
    }
}
