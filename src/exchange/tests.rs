use std::collections::VecDeque;
use std::sync::Mutex;

use async_trait::async_trait;
use zeroize::Zeroizing;

use super::*;
use crate::caller::constant_proof::constant_caller;
use crate::caller::{CallerFacts, ListenerKind, ProcessFacts};
use crate::identity::SpiffeId;
use crate::role::{Identity, StsTarget};
use crate::sts::tests::fake::FakeSts;
use crate::sts::tests::{good, grant, plain, rejection, settings};
use crate::sts::{Sts, StsReason};
use crate::svid::IdentityBasis;
use crate::svid::jwt::tests::{billing, now, raw_token, svid_for};

/// Replies in order, each after a delay. The last one repeats.
#[derive(Debug)]
struct ScriptedReplies<T> {
    answers: Mutex<VecDeque<(Duration, T)>>,
    calls: Mutex<Vec<String>>,
}

impl<T: Clone> ScriptedReplies<T> {
    fn new(answers: impl IntoIterator<Item = T>) -> Arc<Self> {
        Self::slow(Duration::ZERO, answers)
    }

    fn slow(each: Duration, answers: impl IntoIterator<Item = T>) -> Arc<Self> {
        let answers = answers.into_iter().map(|answer| (each, answer)).collect();
        Arc::new(Self {
            answers: Mutex::new(answers),
            calls: Mutex::default(),
        })
    }

    async fn next(&self, call: String) -> T {
        self.calls.lock().unwrap().push(call);
        let (after, answer) = {
            let mut answers = self.answers.lock().unwrap();
            if answers.len() > 1 {
                answers.pop_front().unwrap()
            } else {
                answers[0].clone()
            }
        };
        sleep(after).await;
        answer
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

type Tokens = ScriptedReplies<Result<JwtSvid, SourceError>>;
type FakeStsReplies = ScriptedReplies<Result<Credentials, StsError>>;

#[async_trait]
impl IdentitySource for Tokens {
    async fn identify(&self, _: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        panic!("no test calls this")
    }

    async fn token(
        &self,
        _: &Arc<Caller>,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError> {
        self.next(format!("{id} {audience}")).await
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
impl AssumeRole for FakeStsReplies {
    async fn assume(&self, _: &Grant, token: &JwtSvid) -> Result<Credentials, StsError> {
        self.next(token.secret().to_owned()).await
    }

    async fn assume_chained(
        &self,
        _: &Grant,
        previous: &Credentials,
    ) -> Result<Credentials, StsError> {
        self.next(previous.access_key_id.clone()).await
    }
}

fn caller() -> Arc<Caller> {
    Arc::new(constant_caller(ListenerKind::Unix, 1001, None, None))
}

fn target() -> StsTarget {
    StsTarget {
        region: "eu-central-1".to_owned(),
        endpoint: None,
    }
}

async fn exchange_once(
    source: &Arc<Tokens>,
    sts: &Arc<FakeStsReplies>,
) -> Result<Credentials, ExchangeError> {
    let exchanger = TokenExchanger::new(
        source.clone(),
        sts.clone(),
        Clock::starting_at(now()),
        Metrics::default(),
    );
    exchanger.exchange(&caller(), &grant(&target())).await
}

fn token(serial: u32) -> Result<JwtSvid, SourceError> {
    Ok(svid_for(&billing(), 300, serial))
}

fn unavailable() -> SourceError {
    SourceError::Unavailable("down".to_owned())
}

fn credentials() -> Result<Credentials, StsError> {
    Ok(Credentials {
        access_key_id: "ASIAEXAMPLE".to_owned(),
        secret_access_key: Zeroizing::new("secret".to_owned()),
        session_token: Zeroizing::new("token".to_owned()),
        expiration: now() + Duration::from_secs(3600),
        first_session_name: None,
    })
}

fn rejected(retry: RetryPolicy) -> Result<Credentials, StsError> {
    let what = "STS rejected".to_owned();
    Err(StsError {
        retry,
        reason: StsReason::Refused,
        code: "Code".to_owned(),
        what,
        fix: None,
    })
}

/// Returns the result, the number of calls of each kind, and the duration.
async fn run(
    source: Arc<Tokens>,
    sts: Arc<FakeStsReplies>,
) -> (Result<Credentials, ExchangeError>, usize, usize, Duration) {
    let start = Instant::now();
    let result = exchange_once(&source, &sts).await;
    (
        result,
        source.calls().len(),
        sts.calls().len(),
        start.elapsed(),
    )
}

#[tokio::test(start_paused = true)]
async fn exchange_sends_the_token_to_sts() {
    let (source, sts) = (
        ScriptedReplies::new([token(1)]),
        ScriptedReplies::new([credentials()]),
    );
    let issued = exchange_once(&source, &sts).await.unwrap();
    assert_eq!(issued.access_key_id, "ASIAEXAMPLE");
    assert_eq!(
        source.calls(),
        ["spiffe://example.org/billing sts.amazonaws.com"]
    );
    assert_eq!(sts.calls(), [token(1).unwrap().secret()]);
}

#[tokio::test(start_paused = true)]
async fn exchange_retries_short_outages() {
    let recovers = ScriptedReplies::new([Err(unavailable()), Err(unavailable()), token(1)]);
    let (result, tokens, calls, took) = run(recovers, ScriptedReplies::new([credentials()])).await;
    assert!(
        result.is_ok() && (tokens, calls) == (3, 1),
        "{result:?} {tokens} {calls}"
    );
    assert!(took >= RETRY_PAUSE && took < RETRY_WINDOW, "{took:?}");

    let recovers = ScriptedReplies::new([
        rejected(RetryPolicy::Later),
        rejected(RetryPolicy::Later),
        rejected(RetryPolicy::Later),
        credentials(),
    ]);
    let (result, tokens, calls, took) = run(ScriptedReplies::new([token(1)]), recovers).await;
    assert!(
        result.is_ok() && (tokens, calls) == (1, 4),
        "the token is still good: {result:?} {tokens} {calls}"
    );
    assert!(took < RETRY_WINDOW, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn exchange_fails_after_its_retries() {
    let (result, tokens, calls, took) = run(
        ScriptedReplies::new([Err(unavailable())]),
        ScriptedReplies::new([credentials()]),
    )
    .await;
    assert_eq!(result.unwrap_err(), ExchangeError::Source(unavailable()));
    assert_eq!((tokens, calls), (4, 0));
    assert!(took < RETRY_WINDOW, "{took:?}");

    let (result, tokens, calls, took) = run(
        ScriptedReplies::new([token(1)]),
        ScriptedReplies::new([rejected(RetryPolicy::Later)]),
    )
    .await;
    assert!(result.unwrap_err().is_transient());
    assert_eq!((tokens, calls), (1, 4));
    assert!(took < RETRY_WINDOW, "{took:?}");

    // The bound is for the whole exchange, not for each of its steps.
    let both = (
        ScriptedReplies::new([Err(unavailable()), Err(unavailable()), token(1)]),
        ScriptedReplies::new([rejected(RetryPolicy::Later)]),
    );
    let (_, tokens, calls, _) = run(both.0, both.1).await;
    assert_eq!((tokens, calls), (3, 2));
}

#[tokio::test(start_paused = true)]
async fn exchange_does_not_retry_slow_failures() {
    let hangs = ScriptedReplies::slow(Duration::from_secs(35), [Err(unavailable())]);
    let (result, tokens, _, took) = run(hangs, ScriptedReplies::new([credentials()])).await;
    assert!(
        result.is_err() && tokens == 1 && took == Duration::from_secs(35),
        "{tokens} {took:?}"
    );

    let hangs = ScriptedReplies::slow(Duration::from_secs(5), [rejected(RetryPolicy::Later)]);
    let (result, _, calls, took) = run(ScriptedReplies::new([token(1)]), hangs).await;
    assert!(
        result.is_err() && calls == 1 && took == Duration::from_secs(5),
        "{calls} {took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn exchange_does_not_retry_rejections() {
    let rejections = [
        SourceError::Denied("no".to_owned()),
        SourceError::Misconfigured("no".to_owned()),
        SourceError::BadToken(BadToken::Wrong("no".to_owned())),
        SourceError::BadToken(BadToken::Expiring("soon".to_owned())),
    ];
    for rejection in rejections {
        let (result, tokens, calls, took) = run(
            ScriptedReplies::new([Err(rejection.clone())]),
            ScriptedReplies::new([credentials()]),
        )
        .await;
        assert_eq!(result.unwrap_err(), ExchangeError::Source(rejection));
        assert_eq!((tokens, calls, took), (1, 0, Duration::ZERO));
    }
    let (result, tokens, calls, took) = run(
        ScriptedReplies::new([token(1)]),
        ScriptedReplies::new([rejected(RetryPolicy::Never)]),
    )
    .await;
    assert!(!result.unwrap_err().is_transient());
    assert_eq!((tokens, calls, took), (1, 1, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn exchange_replaces_a_rejected_token_once() {
    let (source, sts) = (
        ScriptedReplies::new([token(1), token(2)]),
        ScriptedReplies::new([rejected(RetryPolicy::NewToken), credentials()]),
    );
    exchange_once(&source, &sts).await.unwrap();
    assert_eq!(
        sts.calls(),
        [token(1).unwrap().secret(), token(2).unwrap().secret()]
    );

    let (source, sts) = (
        ScriptedReplies::new([token(1), token(2), token(3)]),
        ScriptedReplies::new([rejected(RetryPolicy::NewToken)]),
    );
    let (result, tokens, calls, _) = run(source, sts).await;
    let error = result.unwrap_err();
    assert_eq!((tokens, calls), (2, 2));
    assert!(
        !error.is_transient()
            && error
                .to_string()
                .contains("STS rejected a new token as well"),
        "{error}"
    );

    // An agent that replies from its cache. STS would reject the same token again.
    let (result, tokens, calls, _) = run(
        ScriptedReplies::new([token(1)]),
        ScriptedReplies::new([rejected(RetryPolicy::NewToken)]),
    )
    .await;
    let error = result.unwrap_err();
    assert_eq!((tokens, calls), (2, 1));
    assert!(
        !error.is_transient() && error.to_string().contains("returned the same token again"),
        "{error}"
    );

    // The result of the new token is classified like that of the first.
    let sts = ScriptedReplies::new([
        rejected(RetryPolicy::NewToken),
        rejected(RetryPolicy::Later),
        credentials(),
    ]);
    let (result, tokens, calls, _) = run(ScriptedReplies::new([token(1), token(2)]), sts).await;
    assert!(result.is_ok() && (tokens, calls) == (2, 3));
    let sts = ScriptedReplies::new([
        rejected(RetryPolicy::NewToken),
        rejected(RetryPolicy::Never),
    ]);
    let (result, ..) = run(ScriptedReplies::new([token(1), token(2)]), sts).await;
    assert_eq!(result.unwrap_err().to_string(), "STS rejected");
    let (result, _, calls, _) = run(
        ScriptedReplies::new([token(1), Err(unavailable())]),
        ScriptedReplies::new([rejected(RetryPolicy::NewToken)]),
    )
    .await;
    assert!(result.unwrap_err().is_transient() && calls == 1);
}

#[tokio::test(start_paused = true)]
async fn exchange_does_not_resend_an_expired_token() {
    let brief = svid_for(&billing(), 30, 1);
    let sts = ScriptedReplies::slow(Duration::from_secs(2), [rejected(RetryPolicy::Later)]);
    let exchanger = TokenExchanger::new(
        ScriptedReplies::new([Ok(brief.clone())]),
        sts.clone(),
        // The token has a second left: a source or a queue has delayed it.
        Clock::starting_at(brief.expires() - Duration::from_secs(1)),
        Metrics::default(),
    );
    exchanger
        .exchange(&caller(), &grant(&target()))
        .await
        .unwrap_err();
    assert_eq!(sts.calls().len(), 1);
}

/// A short-lived token that expires in a queue before STS is not evidence against the role.
#[tokio::test(start_paused = true)]
async fn token_that_expires_in_a_queue_is_an_outage() {
    let brief = |serial| svid_for(&billing(), 9, serial);
    let sts = ScriptedReplies::slow(Duration::from_secs(10), [rejected(RetryPolicy::NewToken)]);
    let (result, tokens, calls, _) =
        run(ScriptedReplies::new([Ok(brief(1)), Ok(brief(2))]), sts).await;
    let error = result.unwrap_err();
    assert_eq!((tokens, calls), (2, 2));
    assert!(
        error.is_transient() && error.to_string().contains("was good for only 9 s"),
        "{error}"
    );
    // STS takes a valid token for expired, because of its clock or of its own minimum lifetime.
    let (result, ..) = run(
        ScriptedReplies::new([Ok(brief(1)), Ok(brief(2))]),
        ScriptedReplies::new([rejected(RetryPolicy::NewToken)]),
    )
    .await;
    let error = result.unwrap_err();
    assert!(!error.is_transient(), "{error}");
    for part in [
        "STS rejected a new token as well",
        "good for only 9 s",
        "`default_jwt_svid_ttl`",
        "clock",
    ] {
        assert!(error.to_string().contains(part), "{part:?}: {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn token_of_another_identity_does_not_reach_sts() {
    let other = SpiffeId::parse("spiffe://example.org/other").unwrap();
    let elsewhere = raw_token(
        r#"{"alg":"ES256"}"#,
        r#"{"sub":"spiffe://example.org/billing","aud":"minio","exp":1867225600}"#,
    );
    let elsewhere = JwtSvid::check(elsewhere, &billing(), "minio", now()).unwrap();
    for token in [svid_for(&other, 300, 1), elsewhere] {
        let (result, tokens, calls, _) = run(
            ScriptedReplies::new([Ok(token)]),
            ScriptedReplies::new([credentials()]),
        )
        .await;
        assert_eq!(result.unwrap_err().reason(), "bad_token");
        assert_eq!((tokens, calls), (1, 0));
    }
}

#[tokio::test]
async fn sts_client_error_replaces_an_expired_token() {
    let server = FakeSts::start(|number, _| match number {
        0 => rejection(400, "ExpiredTokenException", "Token expired"),
        1 => rejection(
            400,
            "InvalidIdentityToken",
            "Couldn't retrieve verification key from your identity provider",
        ),
        _ => good(),
    });
    let server = server.await;
    let clock = Clock::starting_at(now());
    let sts = Arc::new(Sts::new(settings(), clock.clone()));
    let exchanger = TokenExchanger::new(
        ScriptedReplies::new([token(1), token(2)]),
        sts,
        clock,
        Metrics::default(),
    );
    let issued = exchanger
        .exchange(&caller(), &grant(&plain(&server)))
        .await
        .unwrap();
    assert_eq!(issued.access_key_id, "ASIAEXAMPLE");
    let sent: Vec<_> = server
        .received()
        .iter()
        .map(|request| request.form["WebIdentityToken"].clone())
        .collect();
    assert_eq!(
        sent,
        [1, 2, 2].map(|serial| token(serial).unwrap().secret().to_owned())
    );
}

#[test]
fn exchange_error_has_label_and_transience() {
    let source = |error: SourceError| {
        (
            ExchangeError::from(error.clone()).reason(),
            ExchangeError::from(error).is_transient(),
        )
    };
    assert_eq!(
        source(SourceError::Denied(String::new())),
        ("source_denied", false)
    );
    assert_eq!(source(unavailable()), ("source_unavailable", true));
    assert_eq!(
        source(SourceError::Misconfigured(String::new())),
        ("source_misconfigured", false)
    );
    assert_eq!(
        source(BadToken::Wrong(String::new()).into()),
        ("bad_token", false)
    );
    assert_eq!(
        source(BadToken::Expiring(String::new()).into()),
        ("bad_token", true)
    );
    for (retry, transient) in [
        (RetryPolicy::Later, true),
        (RetryPolicy::NewToken, false),
        (RetryPolicy::Never, false),
    ] {
        let error = ExchangeError::from(rejected(retry).unwrap_err());
        assert_eq!(
            (error.reason(), error.is_transient()),
            ("sts_refused", transient)
        );
    }
}

#[test]
fn kind_of_failure_ignores_texts() {
    let sts = |reason, what: &str| {
        let mut error = StsError::samples().remove(0);
        (error.reason, error.what) = (reason, what.to_owned());
        ExchangeError::Sts(error)
    };
    let unavailable = |text: &str| ExchangeError::from(SourceError::Unavailable(text.to_owned()));
    let throttled = sts(StsReason::Throttled, "a");
    for (one, other, same) in [
        (unavailable("a"), unavailable("b"), true),
        (unavailable("a"), SourceError::Busy.into(), false),
        (unavailable("a"), throttled.clone(), false),
        (throttled.clone(), sts(StsReason::Throttled, "b"), true),
        (throttled, sts(StsReason::AccessDenied, "a"), false),
        (ExchangeError::TooOften, ExchangeError::TooOften, true),
        (ExchangeError::TooOften, ExchangeError::TooShort, false),
    ] {
        assert_eq!(one.is_same_kind(&other), same, "{one:?}, {other:?}");
    }
}
