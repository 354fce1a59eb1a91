//! Identities that certificates prove, while the agent has no tokens.

use rcgen::{CertificateParams, date_time_ymd};

use super::*;

const OTHER: &str = "spiffe://example.org/other";

/// Returns a source whose agent has no tokens, and its certificates for other processes, if they
/// are not those of the agent's script.
fn without_tokens(
    certificates: Option<Result<Vec<X509svid>, SourceError>>,
) -> (Arc<AgentScript>, AgentSource) {
    let agent = AgentScript::reply(shop);
    agent.has_no_tokens.store(true, Ordering::SeqCst);
    *agent.certificates.lock().unwrap() = certificates;
    let source = source_with(&agent, true);
    (agent, source)
}

/// Returns an SVID of [`SHOP`], after `change` has changed its certificate.
fn changed(change: impl FnOnce(&mut CertificateParams)) -> X509svid {
    let authority = Authority::new();
    authority.svid_of(SHOP, authority.sign(&[SHOP], change))
}

#[tokio::test(start_paused = true)]
async fn certificate_proves_the_identity_of_a_new_process() {
    let hinted = X509svid {
        hint: "shop".to_owned(),
        ..Authority::new().svid(SHOP)
    };
    let (agent, source) = without_tokens(Some(Ok(vec![hinted])));
    let identities = source.identify(&caller(1)).await.unwrap();
    let expected = Identity {
        spiffe_id: shop_id(),
        hint: Some("shop".to_owned()),
    };
    assert_eq!(identities, [expected]);
    // One query for tokens, and one for certificates. The next request has the cached result.
    source.identify(&caller(1)).await.unwrap();
    assert_eq!(agent.calls(), 2);
    // A token proves it as before, and no certificate is requested.
    agent.has_no_tokens.store(false, Ordering::SeqCst);
    assert_eq!(ids(source.identify(&caller(2)).await), [SHOP]);
    assert_eq!(agent.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn certificates_are_not_requested_where_no_role_uses_them() {
    let (agent, _) = without_tokens(None);
    let error = source(&agent).identify(&caller(1)).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable(_)), "{error}");
    assert_eq!(agent.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn certificate_is_checked_as_a_token_is() {
    let authority = Authority::new();
    let foreign = authority.svid_of(SHOP, authority.sign(&[OTHER], |_| {}));
    let other_key = X509svid {
        x509_svid_key: Authority::new().svid(SHOP).x509_svid_key,
        ..Authority::new().svid(SHOP)
    };
    let expired = changed(|leaf| leaf.not_after = date_time_ymd(2020, 1, 1));
    let early = changed(|leaf| leaf.not_before = date_time_ymd(4000, 1, 1));
    let own = Authority::new().svid(AWSVID);
    let no_id = Authority::new().svid_of("shop", authority.sign(&[SHOP], |_| {}));
    for (name, reply) in [
        ("foreign", Ok(vec![foreign])),
        ("other key", Ok(vec![other_key])),
        ("expired", Ok(vec![expired])),
        ("early", Ok(vec![early])),
        ("own", Ok(vec![own.clone()])),
        ("no SPIFFE ID", Ok(vec![no_id])),
        ("none", Ok(Vec::new())),
        ("denied", Err(denied())),
    ] {
        let (_, source) = without_tokens(Some(reply));
        let error = source.identify(&caller(1)).await.unwrap_err();
        // The outage is the error, and no denial is cached: the server's return heals it.
        let text = SourceError::Unavailable("could not fetch JWT-SVID".to_owned());
        assert_eq!(error, text, "{name}");
    }
    // The daemon's own identity is left out of several.
    let (_, source) = without_tokens(Some(Ok(vec![own, Authority::new().svid(SHOP)])));
    assert_eq!(ids(source.identify(&caller(1)).await), [SHOP]);
}

#[tokio::test(start_paused = true)]
async fn certificate_proves_nothing_for_a_process_that_changed() {
    let (_, source) = without_tokens(None);
    // The query for tokens reads the process twice, and so does that for certificates.
    for changes_at in [1, 3] {
        let changed = caller_with(1001, 10 + changes_at, Some(changes_at), None);
        let error = source.identify(&changed).await.unwrap_err();
        let expected = SourceError::Caller(AttestError::IdentityChanged);
        assert_eq!(error, expected, "{changes_at}");
    }
    let executing = executing_caller(20, 2 * u32::try_from(EXEC_RETRY_PAUSES.len()).unwrap());
    let error = source.identify(&executing).await.unwrap_err();
    let expected = SourceError::Caller(AttestError::ProcessExecuting);
    assert_eq!(error, expected);
}

#[tokio::test(start_paused = true)]
async fn certificates_do_not_revalidate() {
    let (agent, source) = without_tokens(Some(Ok(vec![Authority::new().svid(OTHER)])));
    agent.has_no_tokens.store(false, Ordering::SeqCst);
    assert_eq!(ids(source.identify(&caller(1)).await), [SHOP]);
    agent.has_no_tokens.store(true, Ordering::SeqCst);
    let calls = agent.calls();
    sleep(Duration::from_secs(120)).await;
    assert!(agent.calls() > calls, "the identity was not revalidated");
    assert_eq!(ids(source.identify(&caller(1)).await), [SHOP]);
    // A new process has what its certificate proves.
    assert_eq!(ids(source.identify(&caller(2)).await), [OTHER]);
}

#[tokio::test(start_paused = true)]
async fn without_its_own_identities_the_daemon_serves_none() {
    let agent = AgentScript::reply(|pid| match pid == std::process::id() {
        true => Err(SourceError::Unavailable("no token".to_owned())),
        false => Ok(vec![SHOP]),
    });
    agent.has_no_tokens.store(true, Ordering::SeqCst);
    let source = source_with(&agent, true);
    let error = source.identify(&caller(1)).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable(_)), "{error}");
    // Those that were learnt before the outage count.
    agent.set_reply(shop);
    source.ready(AUDIENCE).await.unwrap();
    agent.set_reply(|pid| match pid == std::process::id() {
        true => Err(SourceError::Unavailable("no token".to_owned())),
        false => Ok(vec![SHOP]),
    });
    sleep(2 * OWN_ID_TTL).await;
    assert_eq!(ids(source.identify(&caller(2)).await), [SHOP]);
}
