pub(in crate::svid) mod fake;

use std::path::PathBuf;

use rcgen::IsCa;
use rustls::pki_types::UnixTime;
use tempfile::{TempDir, tempdir};

use super::*;
use crate::svid::jwt::tests::CapturedLog;
use crate::svid::proto::workload::X509svid;
use fake::{Authority, FakeAgent, Stream};

const ID: &str = "spiffe://example.org/awsvid";
/// For what happens at once.
const SOON: Duration = Duration::from_secs(20);

struct Place {
    dir: TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let dir = tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    Place { dir, path }
}

fn own_at(place: &Place) -> OwnSvidSource {
    OwnSvidSource::at(Endpoint::Unix(place.path.clone()))
}

/// Waits until it is known that `wanted`.
async fn until(own: &OwnSvidSource, wanted: impl Fn(&OwnSvidState) -> bool) -> OwnSvidState {
    let mut now = own.now.clone();
    let now = timeout(SOON, now.wait_for(|now| wanted(now))).await;
    now.expect("in time").expect("the task runs").clone()
}

async fn version(own: &OwnSvidSource, version: u64) -> Arc<OwnSvid> {
    until(own, |now| {
        now.svid
            .as_ref()
            .is_some_and(|svid| svid.version == version)
    })
    .await
    .svid
    .unwrap()
}

/// An identity that has been given once, with all that takes part.
async fn given(place: &Place, authority: &Authority) -> (FakeAgent, Stream, OwnSvidSource) {
    let mut agent = FakeAgent::at(&place.path);
    let own = own_at(place);
    let stream = agent.asked().await.accept();
    stream.send(authority.message(ID));
    version(&own, 1).await;
    (agent, stream, own)
}

#[tokio::test]
async fn the_first_identity_of_the_latest_message_is_the_one() {
    let (place, authority) = (place(), Authority::new());
    let mut agent = FakeAgent::at(&place.path);
    let own = own_at(&place);
    let asked = agent.asked().await;
    let header: Vec<_> = asked
        .metadata
        .get_all("workload.spiffe.io")
        .iter()
        .collect();
    assert_eq!(header, ["true"]);
    let stream = asked.accept();
    for (number, ids) in [
        (1, [ID, "spiffe://example.org/x"]),
        (2, ["spiffe://example.org/x", ID]),
    ] {
        let mut svids = ids.map(|id| authority.svid(id)).to_vec();
        svids[0].x509_svid.extend_from_slice(&authority.der);
        let leaf = svids[0].x509_svid[..svids[0].x509_svid.len() - authority.der.len()].to_vec();
        stream.send(X509svidResponse { svids });
        let svid = version(&own, number).await;
        assert_eq!(svid.spiffe_id.as_str(), ids[0]);
        assert_eq!(
            svid.certified.cert,
            [leaf.into(), authority.der.clone().into()]
        );
        assert_eq!(svid.roots.len(), 1);
        assert!(!svid.is_expired(UnixTime::now()));
        assert_eq!(own.latest().unwrap().version, number);
    }
    assert!(own.trouble().is_none());
}

/// As of several registrations, or from an agent that puts two others' answers together.
#[tokio::test]
async fn an_identity_that_comes_several_times_is_taken_from_one_that_is_its_own() {
    let (place, authority) = (place(), Authority::new());
    let (_agent, stream, own) = given(&place, &authority).await;
    let (good, other) = (
        authority.svid(ID),
        authority.svid("spiffe://example.org/other"),
    );
    let foreign = X509svid {
        spiffe_id: ID.to_owned(),
        ..other.clone()
    };
    let no_key = X509svid {
        x509_svid_key: Vec::new(),
        ..good.clone()
    };
    for (number, svids) in [
        (2, vec![good.clone(), good.clone()]),
        (3, vec![foreign.clone(), other.clone(), good.clone()]),
        (
            4,
            vec![no_key.clone(), foreign.clone(), good.clone(), no_key],
        ),
    ] {
        stream.send(X509svidResponse { svids });
        let svid = version(&own, number).await;
        assert_eq!(
            (svid.spiffe_id.as_str(), &*svid.certified.cert[0]),
            (ID, &good.x509_svid[..])
        );
    }
    // Where none is its own, that is said of the first.
    stream.send(X509svidResponse {
        svids: vec![foreign.clone(), foreign, other],
    });
    let now = until(&own, |now| now.trouble.is_some()).await;
    assert!(
        now.trouble
            .unwrap()
            .to_string()
            .contains("is that of spiffe://example.org/other, not of")
    );
    assert_eq!(now.svid.unwrap().version, 4);
}

#[tokio::test]
async fn a_message_that_cannot_be_used_keeps_the_one_before() {
    let (place, authority) = (place(), Authority::new());
    let (_agent, stream, own) = given(&place, &authority).await;
    let change = |change: &dyn Fn(&mut X509svid)| {
        let mut message = authority.message(ID);
        change(&mut message.svids[0]);
        message
    };
    let other = authority.svid("spiffe://example.org/other");
    let certified = |uris: &[&str]| {
        let svid = authority.svid_of(ID, authority.sign(uris, |_| {}));
        X509svidResponse { svids: vec![svid] }
    };
    let table = [
        (X509svidResponse::default(), "there is none in it"),
        (
            change(&|svid| svid.spiffe_id.clear()),
            "begins with spiffe://",
        ),
        (
            change(&|svid| svid.spiffe_id = "spiffe://example.org".to_owned()),
            "names a trust domain",
        ),
        (
            change(&|svid| svid.spiffe_id = other.spiffe_id.clone()),
            "is that of spiffe://example.org/awsvid, not of",
        ),
        (change(&|svid| svid.x509_svid.clear()), "has no certificate"),
        (
            change(&|svid| svid.x509_svid.truncate(100)),
            "certificates are not DER",
        ),
        (
            change(&|svid| svid.x509_svid = b"0\x02\x05\x00".to_vec()),
            "certificate cannot be read",
        ),
        (
            change(&|svid| svid.x509_svid_key.clear()),
            "private key cannot be read",
        ),
        (
            change(&|svid| svid.x509_svid_key = other.x509_svid_key.clone()),
            "private key is not that",
        ),
        (change(&|svid| svid.bundle.clear()), "bundle is empty"),
        (
            change(&|svid| svid.bundle.truncate(50)),
            "bundle is not DER",
        ),
        (
            change(&|svid| svid.bundle = b"0\x02\x05\x00".to_vec()),
            "CA that cannot be used",
        ),
        (certified(&[]), "has no SPIFFE ID"),
        (certified(&[ID, ID]), "several URIs"),
    ];
    for (message, reason) in table {
        let log = CapturedLog::start();
        stream.send(message);
        let now = until(&own, |now| {
            now.trouble
                .as_ref()
                .is_some_and(|why| why.to_string().contains(reason))
        })
        .await;
        assert_eq!(now.svid.unwrap().version, 1, "{reason}");
        assert_eq!(own.latest().unwrap().version, 1, "{reason}");
        let text = log.text();
        assert!(
            text.contains("cannot be used") && text.contains(reason),
            "{reason}: {text}"
        );
        assert!(text.contains(&place.path.display().to_string()), "{text}");
    }
    stream.send(authority.message(ID));
    version(&own, 2).await;
    assert!(own.trouble().is_none());
}

#[tokio::test]
async fn a_first_message_that_cannot_be_used_says_so() {
    let place = place();
    let mut agent = FakeAgent::at(&place.path);
    let own = own_at(&place);
    let stream = agent.asked().await.accept();
    stream.send(X509svidResponse::default());
    until(&own, |now| now.trouble.is_some()).await;
    let error = own.latest().unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("cannot be used")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_refusal_takes_the_identity_back_until_the_agent_gives_one_again() {
    let (place, authority) = (place(), Authority::new());
    let (mut agent, stream, own) = given(&place, &authority).await;
    stream.fail(Status::permission_denied("no identity issued"));
    let now = until(&own, |now| now.svid.is_none()).await;
    let error = own.latest().unwrap_err();
    assert_eq!(now.trouble, Some(error.clone()));
    assert!(
        matches!(&error, SourceError::Denied(text) if text.contains("register awsvid itself") && text.contains("no identity issued")),
        "{error:?}"
    );
    agent
        .asked()
        .await
        .refuse(Status::permission_denied("no identity issued"));
    agent.asked().await.accept().send(authority.message(ID));
    version(&own, 2).await;
}

#[tokio::test]
async fn a_stream_that_ends_or_breaks_takes_nothing_back_and_is_opened_again() {
    let (place, authority) = (place(), Authority::new());
    let (mut agent, stream, own) = given(&place, &authority).await;
    let mut stream = Some(stream);
    let ends: [(&str, &dyn Fn(Stream)); 4] = [
        ("ended the stream", &drop),
        ("starting", &|stream| {
            stream.fail(Status::unavailable("starting"))
        }),
        ("is it a SPIFFE Workload API?", &|stream| {
            stream.fail(Status::unimplemented("what?"))
        }),
        ("is it a SPIFFE Workload API?", &|stream| {
            stream.fail(Status::invalid_argument("header"))
        }),
    ];
    for (number, (reason, end)) in (2..).zip(ends) {
        end(stream.take().unwrap());
        let now = until(&own, |now| now.trouble.is_some()).await;
        assert!(now.trouble.unwrap().to_string().contains(reason));
        assert_eq!(own.latest().unwrap().version, number - 1);
        let again = agent.asked().await.accept();
        again.send(authority.message(ID));
        version(&own, number).await;
        assert!(own.trouble().is_none());
        stream = Some(again);
    }
}

#[tokio::test]
async fn an_agent_that_is_away_comes_back() {
    let (place, authority) = (place(), Authority::new());
    let own = own_at(&place);
    until(&own, |now| now.trouble.is_some()).await;
    let error = own.latest().unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("there is no socket") && text.contains("`workload_api_socket`")),
        "{error:?}"
    );
    let mut agent = FakeAgent::at(&place.path);
    agent.asked().await.accept().send(authority.message(ID));
    let svid = own.first(SOON).await.unwrap();
    assert_eq!(svid.version, 1);

    drop(agent);
    until(&own, |now| now.trouble.is_some()).await;
    assert_eq!(own.latest().unwrap().version, 1, "it is still good");
    std::fs::remove_file(&place.path).unwrap();
    let mut agent = FakeAgent::at(&place.path);
    agent.asked().await.accept().send(authority.message(ID));
    version(&own, 2).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_took_over_the_path_is_asked_even_while_the_old_one_lives() {
    let (place, authority) = (place(), Authority::new());
    let (_old, stream, own) = given(&place, &authority).await;
    std::fs::rename(&place.path, place.dir.path().join("old.sock")).unwrap();
    tokio::time::sleep(3 * SOCKET_POLL).await;
    assert!(own.trouble().is_none(), "nobody has taken its place yet");
    let mut new = FakeAgent::at(&place.path);
    new.asked().await.accept().send(authority.message(ID));
    stream.left().await;
    version(&own, 2).await;
}

#[tokio::test(start_paused = true)]
async fn waiting_for_the_first_one_ends_at_the_deadline_with_the_reason() {
    let place = place();
    let mut agent = FakeAgent::at(&place.path);
    let own = own_at(&place);
    let asked = agent.asked().await;
    let begun = Instant::now();
    let error = own.first(Duration::from_secs(7)).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("not given awsvid")),
        "{error:?}"
    );
    assert_eq!(begun.elapsed().as_secs(), 7);

    asked.refuse(Status::permission_denied("no identity issued"));
    let refusing = tokio::spawn(async move {
        loop {
            agent
                .asked()
                .await
                .refuse(Status::permission_denied("no identity issued"));
        }
    });
    let error = own.first(Duration::from_secs(7)).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Denied(text) if text.contains("register awsvid itself")),
        "{error:?}"
    );
    refusing.abort();
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_says_nothing_is_asked_again() {
    let place = place();
    let mut agent = FakeAgent::at(&place.path);
    let own = own_at(&place);
    let begun = Instant::now();
    let _mute = agent.asked().await;
    let _empty = agent.asked().await.accept();
    assert_eq!(begun.elapsed().as_secs(), CALL_TIMEOUT.as_secs());
    let _third = agent.asked().await;
    let error = own.latest().unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("within 35s")),
        "{error:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn who_is_refused_asks_at_once_and_then_ever_more_rarely() {
    let place = place();
    let mut agent = FakeAgent::at(&place.path);
    let _own = own_at(&place);
    let mut pauses = Vec::new();
    for _ in 0..14 {
        let begun = Instant::now();
        agent
            .asked()
            .await
            .refuse(Status::permission_denied("no identity issued"));
        pauses.push(begun.elapsed());
    }
    // The first is the first try of all.
    assert!(pauses[1] < Duration::from_millis(50), "{pauses:?}");
    let mut longest = PAUSE;
    for pause in &pauses[2..] {
        assert!(
            *pause >= longest / 2 && *pause <= longest + Duration::from_millis(50),
            "{pauses:?}"
        );
        longest = (2 * longest).min(MAX_PAUSE);
    }
}

#[tokio::test(start_paused = true)]
async fn only_a_stream_that_lasted_is_followed_by_another_at_once() {
    let (place, authority) = (place(), Authority::new());
    let (mut agent, stream, _own) = given(&place, &authority).await;
    let mut stream = Some(stream);
    // How long each lasts, and how long it takes at least to the next.
    let table = [
        (STABLE_AFTER, 0),
        (Duration::ZERO, 100),
        (Duration::ZERO, 200),
        (Duration::ZERO, 400),
        (STABLE_AFTER, 0),
    ];
    for (lasts, least) in table {
        let again = stream.take().unwrap();
        tokio::time::sleep(lasts).await;
        drop(again);
        let begun = Instant::now();
        let opened = agent.asked().await;
        let pause = begun.elapsed();
        let most = if least == 0 { 50 } else { 2 * least + 50 };
        assert!(
            pause >= Duration::from_millis(least) && pause <= Duration::from_millis(most),
            "{least}: {pause:?}"
        );
        let opened = opened.accept();
        opened.send(authority.message(ID));
        stream = Some(opened);
    }
}

#[tokio::test]
async fn the_task_ends_with_its_owner() {
    let (place, authority) = (place(), Authority::new());
    let (mut agent, stream, own) = given(&place, &authority).await;
    drop(own);
    stream.left().await;
    drop(stream);
    tokio::task::yield_now().await;
    assert!(agent.is_left_alone());
}

#[tokio::test]
async fn the_private_key_is_shown_by_nothing() {
    let log = CapturedLog::start();
    let (place, authority) = (place(), Authority::new());
    let (_agent, stream, own) = given(&place, &authority).await;
    let message = authority.message(ID);
    let key = message.svids[0].x509_svid_key.clone();
    let mut texts = vec![format!("{message:?}")];
    stream.send(message);
    let svid = version(&own, 2).await;
    texts.extend([
        format!("{svid:?}"),
        format!("{own:?}"),
        format!("{:?}", own.latest()),
        log.text(),
    ]);
    assert!(texts[1].contains(ID), "{texts:?}");
    assert!(
        texts[4].contains("awsvid's own X.509-SVID is renewed"),
        "{}",
        texts[4]
    );
    // The part that is the secret, as numbers, as hexadecimal digits and as it is.
    let secret = &key[36..60];
    let numbers = secret
        .iter()
        .map(u8::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let digits: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let plain = String::from_utf8_lossy(secret);
    for text in texts {
        for shown in [numbers.as_str(), &digits, &digits.to_uppercase(), &plain] {
            assert!(!text.contains(shown), "{text}");
        }
    }
}

#[test]
fn an_svid_is_over_when_its_certificate_is() {
    let authority = Authority::new();
    let past =
        |params: &mut rcgen::CertificateParams| params.not_after = rcgen::date_time_ymd(2020, 2, 1);
    let svid = authority.svid_of(ID, authority.sign(&[ID], past));
    let svid = OwnSvid::read(X509svidResponse { svids: vec![svid] }, 1).unwrap();
    assert!(svid.is_expired(UnixTime::now()));
    let then = UnixTime::since_unix_epoch(Duration::from_secs(1_577_836_800));
    assert!(!svid.is_expired(then), "2020-01-01");
    // Whoever is shown it decides about everything else.
    let stranger = Authority::new();
    let mut svid = authority.svid(ID);
    svid.bundle = stranger.der;
    let svid = OwnSvid::read(X509svidResponse { svids: vec![svid] }, 1).unwrap();
    assert!(!svid.is_expired(UnixTime::now()));
}

#[test]
fn a_certificate_says_whose_it_is_by_one_uri() {
    let authority = Authority::new();
    let of = |uris: &[&str]| id_of(&authority.sign(uris, |_| {}).certificate.into());
    assert_eq!(of(&[ID]).unwrap().as_str(), ID);
    for (uris, reason) in [
        (&[][..], "no SPIFFE ID"),
        (&["https://example.org/awsvid"], "begins with spiffe://"),
        (&["spiffe://example.org"], "not a workload"),
        (
            &["spiffe://example.org/a", "spiffe://example.org/b"],
            "several URIs",
        ),
        (
            &["spiffe://example.org/a", "https://example.org/"],
            "several URIs",
        ),
    ] {
        let error = of(uris).unwrap_err();
        assert!(error.contains(reason), "{uris:?}: {error}");
    }
    let named = authority.sign(&[ID], |params| {
        params.subject_alt_names.push(rcgen::SanType::DnsName(
            "awsvid.example.org".try_into().unwrap(),
        ));
        params.is_ca = IsCa::ExplicitNoCa;
    });
    assert_eq!(
        id_of(&named.certificate.into()).unwrap().as_str(),
        ID,
        "other kinds of names do not matter"
    );
}

#[test]
fn certificates_that_stand_one_after_the_other_are_told_apart() {
    use certificates::split;
    let of = |length: usize, head: &[u8]| [head, &vec![7; length]].concat();
    let table = [
        (vec![], Some(vec![])),
        (of(0, &[0x30, 0]), Some(vec![2])),
        (of(127, &[0x30, 0x7f]), Some(vec![129])),
        (of(200, &[0x30, 0x81, 200]), Some(vec![203])),
        (of(300, &[0x30, 0x82, 1, 44]), Some(vec![304])),
        (
            [
                of(3, &[0x30, 3]),
                of(200, &[0x30, 0x81, 200]),
                of(1, &[0x30, 1]),
            ]
            .concat(),
            Some(vec![5, 203, 3]),
        ),
        (of(2, &[0x30, 3]), None),
        (of(199, &[0x30, 0x81, 200]), None),
        (vec![0x30], None),
        (vec![0x30, 0x81], None),
        (vec![0x30, 0x82, 1], None),
        // The indefinite length, one of three bytes, and another kind of value.
        (of(3, &[0x30, 0x80]), None),
        (of(70_000, &[0x30, 0x83, 1, 17, 112]), None),
        (of(3, &[0x31, 3]), None),
        ([of(3, &[0x30, 3]), vec![0]].concat(), None),
    ];
    for (bytes, lengths) in table {
        let found =
            split(&bytes).map(|found| found.iter().map(|one| one.len()).collect::<Vec<_>>());
        assert_eq!(found, lengths, "{:?}", &bytes[..bytes.len().min(6)]);
        assert!(
            split(&bytes).is_none_or(|found| found.iter().flat_map(|one| one.as_ref()).eq(&bytes))
        );
    }
}
