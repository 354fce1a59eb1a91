use std::collections::VecDeque;
use std::sync::Mutex;

use async_trait::async_trait;
use zeroize::Zeroizing;

use super::*;
use crate::caller::unchanged::unchanged;
use crate::caller::{ListenerKind, ProcessFacts};
use crate::identity::SpiffeId;
use crate::role::{Identity, StsTarget};
use crate::sts::Sts;
use crate::sts::tests::fake::FakeSts;
use crate::sts::tests::{good, grant, plain, refusal, settings};
use crate::svid::IdentityBasis;
use crate::svid::jwt::tests::{billing, now, raw_token, svid_for};

/// Answers in turn, each after some time; the last one for ever.
#[derive(Debug)]
struct Scripted<T> {
    answers: Mutex<VecDeque<(Duration, T)>>,
    calls: Mutex<Vec<String>>,
}

impl<T: Clone> Scripted<T> {
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

type Tokens = Scripted<Result<JwtSvid, SourceError>>;
type FakeStsReplies = Scripted<Result<Credentials, StsError>>;

#[async_trait]
impl IdentitySource for Tokens {
    async fn identify(&self, _: &Arc<Caller>) -> Result<Vec<Identity>, SourceError> {
        panic!("nobody asks here")
    }

    async fn token(
        &self,
        _: &Arc<Caller>,
        id: &SpiffeId,
        audience: &str,
    ) -> Result<JwtSvid, SourceError> {
        self.next(format!("{id} {audience}")).await
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
impl AssumeRole for FakeStsReplies {
    async fn assume(&self, _: &Grant, token: &JwtSvid) -> Result<Credentials, StsError> {
        self.next(token.secret().to_owned()).await
    }
}

fn caller() -> Arc<Caller> {
    Arc::new(unchanged(ListenerKind::Unix, 1001, None, None))
}

fn target() -> StsTarget {
    StsTarget {
        region: "eu-central-1".to_owned(),
        endpoint: None,
    }
}

async fn issue(
    source: &Arc<Tokens>,
    sts: &Arc<FakeStsReplies>,
) -> Result<Credentials, ExchangeError> {
    let issuer = TokenExchanger::new(
        source.clone(),
        sts.clone(),
        Clock::starting_at(now()),
        Metrics::default(),
    );
    issuer.exchange(&caller(), &grant(&target())).await
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
    })
}

fn refused(again: RetryPolicy) -> Result<Credentials, StsError> {
    let what = "STS refused".to_owned();
    Err(StsError {
        again,
        reason: "sts_refused",
        code: "Code".to_owned(),
        what,
        fix: None,
    })
}

/// What was asked for, with how many calls each, and how long it took.
async fn run(
    source: Arc<Tokens>,
    sts: Arc<FakeStsReplies>,
) -> (Result<Credentials, ExchangeError>, usize, usize, Duration) {
    let start = Instant::now();
    let result = issue(&source, &sts).await;
    (
        result,
        source.calls().len(),
        sts.calls().len(),
        start.elapsed(),
    )
}

#[tokio::test(start_paused = true)]
async fn a_token_is_exchanged() {
    let (source, sts) = (Scripted::new([token(1)]), Scripted::new([credentials()]));
    let issued = issue(&source, &sts).await.unwrap();
    assert_eq!(issued.access_key_id, "ASIAEXAMPLE");
    assert_eq!(
        source.calls(),
        ["spiffe://example.org/billing sts.amazonaws.com"]
    );
    assert_eq!(sts.calls(), [token(1).unwrap().secret()]);
}

#[tokio::test(start_paused = true)]
async fn what_passes_quickly_is_tried_again() {
    let recovers = Scripted::new([Err(unavailable()), Err(unavailable()), token(1)]);
    let (result, tokens, calls, took) = run(recovers, Scripted::new([credentials()])).await;
    assert!(
        result.is_ok() && (tokens, calls) == (3, 1),
        "{result:?} {tokens} {calls}"
    );
    assert!(took >= RETRY_PAUSE && took < RETRY_WINDOW, "{took:?}");

    let recovers = Scripted::new([
        refused(RetryPolicy::Later),
        refused(RetryPolicy::Later),
        refused(RetryPolicy::Later),
        credentials(),
    ]);
    let (result, tokens, calls, took) = run(Scripted::new([token(1)]), recovers).await;
    assert!(
        result.is_ok() && (tokens, calls) == (1, 4),
        "the token is still good: {result:?} {tokens} {calls}"
    );
    assert!(took < RETRY_WINDOW, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn what_lasts_is_given_up() {
    let (result, tokens, calls, took) = run(
        Scripted::new([Err(unavailable())]),
        Scripted::new([credentials()]),
    )
    .await;
    assert_eq!(result.unwrap_err(), ExchangeError::Source(unavailable()));
    assert_eq!((tokens, calls), (4, 0));
    assert!(took < RETRY_WINDOW, "{took:?}");

    let (result, tokens, calls, took) = run(
        Scripted::new([token(1)]),
        Scripted::new([refused(RetryPolicy::Later)]),
    )
    .await;
    assert!(result.unwrap_err().is_transient());
    assert_eq!((tokens, calls), (1, 4));
    assert!(took < RETRY_WINDOW, "{took:?}");

    // The tries are those of the whole issue, not of each of its steps.
    let both = (
        Scripted::new([Err(unavailable()), Err(unavailable()), token(1)]),
        Scripted::new([refused(RetryPolicy::Later)]),
    );
    let (_, tokens, calls, _) = run(both.0, both.1).await;
    assert_eq!((tokens, calls), (3, 2));
}

#[tokio::test(start_paused = true)]
async fn what_is_slow_is_not_tried_again() {
    let hangs = Scripted::slow(Duration::from_secs(35), [Err(unavailable())]);
    let (result, tokens, _, took) = run(hangs, Scripted::new([credentials()])).await;
    assert!(
        result.is_err() && tokens == 1 && took == Duration::from_secs(35),
        "{tokens} {took:?}"
    );

    let hangs = Scripted::slow(Duration::from_secs(5), [refused(RetryPolicy::Later)]);
    let (result, _, calls, took) = run(Scripted::new([token(1)]), hangs).await;
    assert!(
        result.is_err() && calls == 1 && took == Duration::from_secs(5),
        "{calls} {took:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn refusals_are_not_tried_again() {
    let refusals = [
        SourceError::Denied("no".to_owned()),
        SourceError::Misconfigured("no".to_owned()),
        SourceError::BadToken(BadToken::Wrong("no".to_owned())),
        SourceError::BadToken(BadToken::Expiring("soon".to_owned())),
    ];
    for refusal in refusals {
        let (result, tokens, calls, took) = run(
            Scripted::new([Err(refusal.clone())]),
            Scripted::new([credentials()]),
        )
        .await;
        assert_eq!(result.unwrap_err(), ExchangeError::Source(refusal));
        assert_eq!((tokens, calls, took), (1, 0, Duration::ZERO));
    }
    let (result, tokens, calls, took) = run(
        Scripted::new([token(1)]),
        Scripted::new([refused(RetryPolicy::Never)]),
    )
    .await;
    assert!(!result.unwrap_err().is_transient());
    assert_eq!((tokens, calls, took), (1, 1, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_token_that_sts_refuses_is_replaced_once() {
    let (source, sts) = (
        Scripted::new([token(1), token(2)]),
        Scripted::new([refused(RetryPolicy::NewToken), credentials()]),
    );
    issue(&source, &sts).await.unwrap();
    assert_eq!(
        sts.calls(),
        [token(1).unwrap().secret(), token(2).unwrap().secret()]
    );

    let (source, sts) = (
        Scripted::new([token(1), token(2), token(3)]),
        Scripted::new([refused(RetryPolicy::NewToken)]),
    );
    let (result, tokens, calls, _) = run(source, sts).await;
    let error = result.unwrap_err();
    assert_eq!((tokens, calls), (2, 2));
    assert!(
        !error.is_transient()
            && error
                .to_string()
                .contains("a new token was refused as well"),
        "{error}"
    );

    // An agent that answers from its cache. What STS has refused it would refuse again.
    let (result, tokens, calls, _) = run(
        Scripted::new([token(1)]),
        Scripted::new([refused(RetryPolicy::NewToken)]),
    )
    .await;
    let error = result.unwrap_err();
    assert_eq!((tokens, calls), (2, 1));
    assert!(
        !error.is_transient() && error.to_string().contains("the same token again"),
        "{error}"
    );

    // What else happens to the new token is judged like the first.
    let sts = Scripted::new([
        refused(RetryPolicy::NewToken),
        refused(RetryPolicy::Later),
        credentials(),
    ]);
    let (result, tokens, calls, _) = run(Scripted::new([token(1), token(2)]), sts).await;
    assert!(result.is_ok() && (tokens, calls) == (2, 3));
    let sts = Scripted::new([refused(RetryPolicy::NewToken), refused(RetryPolicy::Never)]);
    let (result, ..) = run(Scripted::new([token(1), token(2)]), sts).await;
    assert_eq!(result.unwrap_err().to_string(), "STS refused");
    let (result, _, calls, _) = run(
        Scripted::new([token(1), Err(unavailable())]),
        Scripted::new([refused(RetryPolicy::NewToken)]),
    )
    .await;
    assert!(result.unwrap_err().is_transient() && calls == 1);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_expires_between_two_tries_is_not_sent_again() {
    let brief = svid_for(&billing(), 30, 1);
    let sts = Scripted::slow(Duration::from_secs(2), [refused(RetryPolicy::Later)]);
    let issuer = TokenExchanger::new(
        Scripted::new([Ok(brief.clone())]),
        sts.clone(),
        // By now it has a second left: a source or a queue took its time.
        Clock::starting_at(brief.expires() - Duration::from_secs(1)),
        Metrics::default(),
    );
    issuer
        .exchange(&caller(), &grant(&target()))
        .await
        .unwrap_err();
    assert_eq!(sts.calls().len(), 1);
}

/// Tokens of few seconds queue for STS, and are refused as expired: that says nothing of the role.
#[tokio::test(start_paused = true)]
async fn tokens_that_expire_on_their_way_are_an_outage() {
    let brief = |serial| svid_for(&billing(), 9, serial);
    let sts = Scripted::slow(Duration::from_secs(10), [refused(RetryPolicy::NewToken)]);
    let (result, tokens, calls, _) = run(Scripted::new([Ok(brief(1)), Ok(brief(2))]), sts).await;
    let error = result.unwrap_err();
    assert_eq!((tokens, calls), (2, 2));
    assert!(
        error.is_transient() && error.to_string().contains("was good for only 9 s"),
        "{error}"
    );
    // One that STS takes for expired while it is not: its clock, or its own idea of how long a token has to be good.
    let (result, ..) = run(
        Scripted::new([Ok(brief(1)), Ok(brief(2))]),
        Scripted::new([refused(RetryPolicy::NewToken)]),
    )
    .await;
    let error = result.unwrap_err();
    assert!(!error.is_transient(), "{error}");
    for part in [
        "a new token was refused as well",
        "good for only 9 s",
        "`default_jwt_svid_ttl`",
        "clock",
    ] {
        assert!(error.to_string().contains(part), "{part:?}: {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_of_another_never_reaches_sts() {
    let other = SpiffeId::parse("spiffe://example.org/other").unwrap();
    let elsewhere = raw_token(
        r#"{"alg":"ES256"}"#,
        r#"{"sub":"spiffe://example.org/billing","aud":"minio","exp":1867225600}"#,
    );
    let elsewhere = JwtSvid::check(elsewhere, &billing(), "minio", now()).unwrap();
    for token in [svid_for(&other, 300, 1), elsewhere] {
        let (result, tokens, calls, _) =
            run(Scripted::new([Ok(token)]), Scripted::new([credentials()])).await;
        assert_eq!(result.unwrap_err().reason(), "bad_token");
        assert_eq!((tokens, calls), (1, 0));
    }
}

#[tokio::test]
async fn with_the_real_client_an_expired_token_is_replaced() {
    let server = FakeSts::start(|number, _| match number {
        0 => refusal(400, "ExpiredTokenException", "Token expired"),
        1 => refusal(
            400,
            "InvalidIdentityToken",
            "Couldn't retrieve verification key from your identity provider",
        ),
        _ => good(),
    });
    let server = server.await;
    let clock = Clock::starting_at(now());
    let sts = Arc::new(Sts::new(settings(), clock.clone()));
    let issuer = TokenExchanger::new(
        Scripted::new([token(1), token(2)]),
        sts,
        clock,
        Metrics::default(),
    );
    let issued = issuer
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
fn each_error_has_its_label_and_lasts_or_not() {
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
    for (again, transient) in [
        (RetryPolicy::Later, true),
        (RetryPolicy::NewToken, false),
        (RetryPolicy::Never, false),
    ] {
        let error = ExchangeError::from(refused(again).unwrap_err());
        assert_eq!(
            (error.reason(), error.is_transient()),
            ("sts_refused", transient)
        );
    }
}
