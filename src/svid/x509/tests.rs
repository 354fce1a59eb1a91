use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rcgen::date_time_ymd;
use tempfile::tempdir;
use tonic::Status;

use super::*;
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::socket_endpoint::Endpoint;
use crate::svid::own_svid::tests::fake::{Authority, FakeAgent};
use crate::svid::proto::workload::X509svidResponse;
use crate::svid::{SourceError, WorkloadApi};

const ID: &str = "spiffe://example.org/billing";
const OTHER: &str = "spiffe://example.org/shop";

fn id() -> SpiffeId {
    SpiffeId::parse(ID).unwrap()
}

/// 2026-06-30, within the validity of certificates without dates of their own.
fn now() -> SystemTime {
    SystemTime::from(date_time_ymd(2026, 6, 30))
}

fn received(svid: workload::X509svid) -> ReceivedX509Svid {
    svid.into()
}

fn rejection_of(svid: ReceivedX509Svid) -> String {
    match X509Svid::check(svid, &id(), now()).unwrap_err() {
        BadToken::Wrong(text) => text,
        BadToken::Expiring(text) => format!("expiring: {text}"),
    }
}

#[test]
fn svid_of_the_identity_with_its_key_is_accepted() {
    let authority = Authority::new();
    let mut message = authority.svid(ID);
    let key = message.x509_svid_key.clone();
    message.x509_svid.extend_from_slice(&authority.der);
    let svid = X509Svid::check(message.into(), &id(), now()).unwrap();
    assert_eq!(svid.chain().len(), 2);
    assert_eq!(svid.bundle(), [authority.der.clone().into()]);
    assert_eq!(svid.secret(), key);
    assert_eq!(svid.spiffe_id(), &id());
    assert_eq!(
        format!("{svid:?}"),
        format!("X509Svid {{ spiffe_id: {ID}, .. }}")
    );
}

#[test]
fn svid_that_is_not_the_identitys_is_rejected() {
    let authority = Authority::new();
    let labelled = |uris: &[&str]| received(authority.svid_of(ID, authority.sign(uris, |_| {})));
    let text = rejection_of(labelled(&[OTHER]));
    assert_eq!(text, format!("its certificate is not that of {ID}"));
    let text = rejection_of(labelled(&[ID, OTHER]));
    assert!(text.contains("several URIs"), "{text}");
    let text = rejection_of(labelled(&[]));
    assert!(text.contains("has no SPIFFE ID"), "{text}");

    let mut other_key = authority.svid(ID);
    other_key.x509_svid_key = authority.sign(&[ID], |_| {}).key;
    let text = rejection_of(other_key.into());
    assert_eq!(text, "its private key is not that of its certificate");
    for (certificates, key, expected) in [
        (vec![0x30], None, "its certificates are not DER"),
        (vec![], None, "it has no certificate"),
        (
            authority.svid(ID).x509_svid,
            Some(vec![1, 2]),
            "its private key cannot be read",
        ),
    ] {
        let mut svid = authority.svid(ID);
        svid.x509_svid = certificates;
        svid.x509_svid_key = key.unwrap_or(svid.x509_svid_key);
        assert_eq!(rejection_of(svid.into()), expected);
    }
}

/// The private number in the PKCS #8 of a key of the curve P-256.
const SCALAR: Range<usize> = 36..68;

/// The message of an SVID, with a view of the memory of its key. Nothing is allocated for a view:
/// that would use the memory of a key that was freed.
struct ObservedKey {
    memory: File,
    address: usize,
    scalar: [u8; 32],
}

impl ObservedKey {
    fn new(svid: &workload::X509svid) -> Self {
        let key = &svid.x509_svid_key;
        assert_eq!(key[SCALAR.start - 2..SCALAR.start], [4, 32], "{key:?}");
        Self {
            memory: File::open("/proc/self/mem").unwrap(),
            address: key.as_ptr().addr(),
            scalar: key[SCALAR].try_into().unwrap(),
        }
    }

    /// Returns whether the key is at its address. The memory may be in use again, or unmapped.
    fn is_there(&self) -> bool {
        let mut bytes = [0; 32];
        let start = u64::try_from(self.address + SCALAR.start).unwrap();
        let read = self.memory.read_exact_at(&mut bytes, start);
        read.is_ok() && bytes == self.scalar
    }
}

#[test]
fn key_has_one_copy_which_is_cleared() {
    let authority = Authority::new();
    // The one of the message is moved, not copied.
    let svid = authority.svid(ID);
    let key = ObservedKey::new(&svid);
    let svid = X509Svid::check(svid.into(), &id(), now()).unwrap();
    assert_eq!(svid.secret().as_ptr().addr(), key.address);
    assert!(key.is_there());
    drop(svid);
    assert!(!key.is_there());

    let svid = authority.svid(OTHER);
    let key = ObservedKey::new(&svid);
    let svid = received(svid);
    assert!(key.is_there());
    rejection_of(svid);
    assert!(!key.is_there());

    let svid = authority.svid(OTHER);
    let key = ObservedKey::new(&svid);
    let received = [received(svid)];
    assert!(key.is_there());
    let chosen = X509Svid::check_any(received, &id(), now());
    assert!(chosen.unwrap().is_none() && !key.is_there());
}

#[test]
fn svid_out_of_its_validity_is_rejected() {
    let authority = Authority::new();
    let until = |year, month, day| {
        let certificate = authority.sign(&[ID], |params| {
            params.not_after = date_time_ymd(year, month, day);
        });
        received(authority.svid_of(ID, certificate))
    };
    assert!(
        rejection_of(until(2026, 6, 30)).starts_with("expiring: its certificate expires in 0 s")
    );
    assert!(X509Svid::check(until(2026, 7, 1), &id(), now()).is_ok());
    let later = authority.sign(&[ID], |params| {
        params.not_before = date_time_ymd(2026, 7, 1);
    });
    let text = rejection_of(authority.svid_of(ID, later).into());
    assert!(text.contains("not valid yet"), "{text}");

    // Of several, the last to expire is taken, and one that cannot be used does not matter.
    let svids = [until(2026, 6, 30), until(2026, 8, 1), until(2026, 7, 1)];
    let best = X509Svid::check_any(svids, &id(), now()).unwrap().unwrap();
    assert_eq!(best.expires(), SystemTime::from(date_time_ymd(2026, 8, 1)));
    let other = received(authority.svid(OTHER));
    assert!(
        X509Svid::check_any([other], &id(), now())
            .unwrap()
            .is_none()
    );
}

fn workload_api(socket: &Path) -> WorkloadApi {
    WorkloadApi::new(
        Endpoint::Unix(socket.to_owned()),
        [],
        Clock::starting_at(now()),
        Metrics::default(),
    )
}

#[tokio::test]
async fn workload_api_gives_the_identity_of_the_first_message() {
    let (folder, authority) = (tempdir().unwrap(), Authority::new());
    let socket = folder.path().join("agent.sock");
    let mut agent = FakeAgent::at(&socket);
    let api = workload_api(&socket);
    let fetching = tokio::spawn(async move { api.fetch_x509(&id()).await });
    let client = agent.next_client().await;
    let header = client.metadata.get("workload.spiffe.io");
    assert_eq!(header.unwrap(), "true");
    let stream = client.accept();
    let svids = [OTHER, ID].map(|id| authority.svid(id)).to_vec();
    let key = svids[1].x509_svid_key.clone();
    stream.send(X509svidResponse { svids });
    let svid = fetching.await.unwrap().unwrap();
    assert_eq!((svid.spiffe_id(), svid.secret()), (&id(), &*key));
    // No stream is kept.
    stream.closed().await;
}

#[tokio::test]
async fn workload_api_without_the_identity_is_a_denial() {
    let (folder, authority) = (tempdir().unwrap(), Authority::new());
    let socket = folder.path().join("agent.sock");
    let mut agent = FakeAgent::at(&socket);
    for reply in [
        Ok(authority.message(OTHER)),
        Err(Status::permission_denied("no identity issued")),
    ] {
        let api = workload_api(&socket);
        let fetching = tokio::spawn(async move { api.fetch_x509(&id()).await });
        let client = agent.next_client().await;
        let stream = match reply {
            Ok(message) => {
                let stream = client.accept();
                stream.send(message);
                Some(stream)
            }
            Err(status) => {
                client.reject(status);
                None
            }
        };
        let error = fetching.await.unwrap().unwrap_err();
        assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
        assert!(error.to_string().contains(ID), "{error}");
        drop(stream);
    }
}
