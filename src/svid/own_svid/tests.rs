pub(in crate::svid) mod fake;

use std::path::PathBuf;

use rcgen::IsCa;
use rustls::pki_types::UnixTime;
use tempfile::{TempDir, tempdir};

use super::*;
use crate::captured_log::CapturedLog;
use crate::svid::proto::workload::X509svid;
use fake::{Authority, FakeAgent, Stream};

const ID: &str = "spiffe://example.org/awsvid";
/// Timeout for events that happen at once.
const TIMEOUT: Duration = Duration::from_secs(20);

struct SocketDir {
    dir: TempDir,
    path: PathBuf,
}

fn socket_dir() -> SocketDir {
    let dir = tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    SocketDir { dir, path }
}

fn own_at(socket_dir: &SocketDir) -> OwnSvidSource {
    OwnSvidSource::at(Endpoint::Unix(socket_dir.path.clone()))
}

/// Waits until the state satisfies `condition`.
async fn until(own: &OwnSvidSource, condition: impl Fn(&OwnSvidState) -> bool) -> OwnSvidState {
    let mut now = own.now.clone();
    let now = timeout(TIMEOUT, now.wait_for(|now| condition(now))).await;
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

/// Starts a source that has received one SVID.
async fn source_with_svid(
    socket_dir: &SocketDir,
    authority: &Authority,
) -> (FakeAgent, Stream, OwnSvidSource) {
    let mut agent = FakeAgent::at(&socket_dir.path);
    let own = own_at(socket_dir);
    let stream = agent.next_client().await.accept();
    stream.send(authority.message(ID));
    version(&own, 1).await;
    (agent, stream, own)
}

#[tokio::test]
async fn latest_returns_the_first_identity_of_the_latest_message() {
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let mut agent = FakeAgent::at(&socket_dir.path);
    let own = own_at(&socket_dir);
    let next_client = agent.next_client().await;
    let header: Vec<_> = next_client
        .metadata
        .get_all("workload.spiffe.io")
        .iter()
        .collect();
    assert_eq!(header, ["true"]);
    let stream = next_client.accept();
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
    assert!(own.failure().is_none());
}

/// An identity with several entries, or from an agent that merges the replies of two others.
#[tokio::test]
async fn repeated_identity_is_read_from_a_valid_svid() {
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let (_agent, stream, own) = source_with_svid(&socket_dir, &authority).await;
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
    // If none is valid, the error is that of the first.
    stream.send(X509svidResponse {
        svids: vec![foreign.clone(), foreign, other],
    });
    let now = until(&own, |now| now.failure.is_some()).await;
    assert!(
        now.failure
            .unwrap()
            .to_string()
            .contains("is that of spiffe://example.org/other, not of")
    );
    assert_eq!(now.svid.unwrap().version, 4);
}

#[tokio::test]
async fn unusable_message_keeps_the_previous_svid() {
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let (_agent, stream, own) = source_with_svid(&socket_dir, &authority).await;
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
        (X509svidResponse::default(), "the message has none"),
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
            now.failure
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
        assert!(
            text.contains(&socket_dir.path.display().to_string()),
            "{text}"
        );
    }
    stream.send(authority.message(ID));
    version(&own, 2).await;
    assert!(own.failure().is_none());
}

#[tokio::test]
async fn unusable_first_message_is_reported() {
    let socket_dir = socket_dir();
    let mut agent = FakeAgent::at(&socket_dir.path);
    let own = own_at(&socket_dir);
    let stream = agent.next_client().await.accept();
    stream.send(X509svidResponse::default());
    until(&own, |now| now.failure.is_some()).await;
    let error = own.latest().unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("cannot be used")),
        "{error:?}"
    );
}

#[tokio::test]
async fn denial_withdraws_the_svid() {
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let (mut agent, stream, own) = source_with_svid(&socket_dir, &authority).await;
    stream.fail(Status::permission_denied("no identity issued"));
    let now = until(&own, |now| now.svid.is_none()).await;
    let error = own.latest().unwrap_err();
    assert_eq!(now.failure, Some(error.clone()));
    assert!(
        matches!(&error, SourceError::Denied(text) if text.contains("register awsvid itself") && text.contains("no identity issued")),
        "{error:?}"
    );
    agent
        .next_client()
        .await
        .refuse(Status::permission_denied("no identity issued"));
    agent
        .next_client()
        .await
        .accept()
        .send(authority.message(ID));
    version(&own, 2).await;
}

#[tokio::test]
async fn ended_stream_is_reopened_and_keeps_the_svid() {
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let (mut agent, stream, own) = source_with_svid(&socket_dir, &authority).await;
    let mut stream = Some(stream);
    let ends: [(&str, &dyn Fn(Stream)); 4] = [
        ("ended the stream", &drop),
        ("starting", &|stream| {
            stream.fail(Status::unavailable("starting"))
        }),
        ("check that it is a SPIFFE Workload API", &|stream| {
            stream.fail(Status::unimplemented("what?"))
        }),
        ("check that it is a SPIFFE Workload API", &|stream| {
            stream.fail(Status::invalid_argument("header"))
        }),
    ];
    for (number, (reason, end)) in (2..).zip(ends) {
        end(stream.take().unwrap());
        let now = until(&own, |now| now.failure.is_some()).await;
        assert!(now.failure.unwrap().to_string().contains(reason));
        assert_eq!(own.latest().unwrap().version, number - 1);
        let again = agent.next_client().await.accept();
        again.send(authority.message(ID));
        version(&own, number).await;
        assert!(own.failure().is_none());
        stream = Some(again);
    }
}

#[tokio::test]
async fn missing_agent_is_found_later() {
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let own = own_at(&socket_dir);
    until(&own, |now| now.failure.is_some()).await;
    let error = own.latest().unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("no socket at") && text.contains("`workload_api_socket`")),
        "{error:?}"
    );
    let mut agent = FakeAgent::at(&socket_dir.path);
    agent
        .next_client()
        .await
        .accept()
        .send(authority.message(ID));
    let svid = own.first(TIMEOUT).await.unwrap();
    assert_eq!(svid.version, 1);

    drop(agent);
    until(&own, |now| now.failure.is_some()).await;
    assert_eq!(own.latest().unwrap().version, 1, "it is still good");
    std::fs::remove_file(&socket_dir.path).unwrap();
    let mut agent = FakeAgent::at(&socket_dir.path);
    agent
        .next_client()
        .await
        .accept()
        .send(authority.message(ID));
    version(&own, 2).await;
}

#[tokio::test(start_paused = true)]
async fn replaced_agent_is_used_while_the_old_one_runs() {
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let (_old, stream, own) = source_with_svid(&socket_dir, &authority).await;
    std::fs::rename(&socket_dir.path, socket_dir.dir.path().join("old.sock")).unwrap();
    tokio::time::sleep(3 * SOCKET_POLL).await;
    assert!(own.failure().is_none(), "no successor is known yet");
    let mut new = FakeAgent::at(&socket_dir.path);
    new.next_client().await.accept().send(authority.message(ID));
    stream.closed().await;
    version(&own, 2).await;
}

#[tokio::test(start_paused = true)]
async fn first_ends_at_the_deadline_with_the_reason() {
    let socket_dir = socket_dir();
    let mut agent = FakeAgent::at(&socket_dir.path);
    let own = own_at(&socket_dir);
    let next_client = agent.next_client().await;
    let begun = Instant::now();
    let error = own.first(Duration::from_secs(7)).await.unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("not given awsvid")),
        "{error:?}"
    );
    assert_eq!(begun.elapsed().as_secs(), 7);

    next_client.refuse(Status::permission_denied("no identity issued"));
    let refusing = tokio::spawn(async move {
        loop {
            agent
                .next_client()
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
async fn silent_agent_is_tried_again() {
    let socket_dir = socket_dir();
    let mut agent = FakeAgent::at(&socket_dir.path);
    let own = own_at(&socket_dir);
    let begun = Instant::now();
    let _mute = agent.next_client().await;
    let _empty = agent.next_client().await.accept();
    assert_eq!(begun.elapsed().as_secs(), CALL_TIMEOUT.as_secs());
    let _third = agent.next_client().await;
    let error = own.latest().unwrap_err();
    assert!(
        matches!(&error, SourceError::Unavailable(text) if text.contains("within 35s")),
        "{error:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn denied_source_backs_off() {
    let socket_dir = socket_dir();
    let mut agent = FakeAgent::at(&socket_dir.path);
    let _own = own_at(&socket_dir);
    let mut pauses = Vec::new();
    for _ in 0..14 {
        let begun = Instant::now();
        agent
            .next_client()
            .await
            .refuse(Status::permission_denied("no identity issued"));
        pauses.push(begun.elapsed());
    }
    // The first pause precedes the second try.
    assert!(pauses[1] < Duration::from_millis(50), "{pauses:?}");
    let mut longest = FIRST_PAUSE;
    for pause in &pauses[2..] {
        assert!(
            *pause >= longest / 2 && *pause <= longest + Duration::from_millis(50),
            "{pauses:?}"
        );
        longest = (2 * longest).min(MAX_PAUSE);
    }
}

#[tokio::test(start_paused = true)]
async fn stable_stream_is_reopened_at_once() {
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let (mut agent, stream, _own) = source_with_svid(&socket_dir, &authority).await;
    let mut stream = Some(stream);
    // (lifetime of each stream, minimum delay until the next)
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
        let opened = agent.next_client().await;
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
async fn task_ends_when_the_source_is_dropped() {
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let (mut agent, stream, own) = source_with_svid(&socket_dir, &authority).await;
    drop(own);
    stream.closed().await;
    drop(stream);
    tokio::task::yield_now().await;
    assert!(agent.has_no_client());
}

#[tokio::test]
async fn private_key_is_not_shown() {
    let log = CapturedLog::start();
    let (socket_dir, authority) = (socket_dir(), Authority::new());
    let (_agent, stream, own) = source_with_svid(&socket_dir, &authority).await;
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
    // The secret part, as numbers, as hexadecimal digits and as bytes.
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
fn svid_expires_with_its_certificate() {
    let authority = Authority::new();
    let past =
        |params: &mut rcgen::CertificateParams| params.not_after = rcgen::date_time_ymd(2020, 2, 1);
    let svid = authority.svid_of(ID, authority.sign(&[ID], past));
    let svid = OwnSvid::read(X509svidResponse { svids: vec![svid] }, 1).unwrap();
    assert!(svid.is_expired(UnixTime::now()));
    let then = UnixTime::since_unix_epoch(Duration::from_secs(1_577_836_800));
    assert!(!svid.is_expired(then), "2020-01-01");
    // Servers check everything else.
    let other_authority = Authority::new();
    let mut svid = authority.svid(ID);
    svid.bundle = other_authority.der;
    let svid = OwnSvid::read(X509svidResponse { svids: vec![svid] }, 1).unwrap();
    assert!(!svid.is_expired(UnixTime::now()));
}

#[test]
fn certificate_id_is_its_only_uri() {
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
        let error = of(uris).unwrap_err().to_string();
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
fn concatenated_certificates_are_split() {
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
