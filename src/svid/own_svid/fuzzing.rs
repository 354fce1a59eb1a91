//! The fuzz target for the daemon's own X.509-SVID, with arbitrary messages of the agent.

use prost::Message;

use super::certificates::{OwnSvid, id_of, split};
use crate::svid::proto::workload::X509svidResponse;

/// Checks a message of the Workload API: a usable SVID has the first identity of the message, and
/// its key.
pub(crate) fn certificates(bytes: &[u8]) -> bool {
    if let Some(certificates) = split(bytes) {
        let whole: Vec<u8> = certificates.iter().flat_map(|one| one.to_vec()).collect();
        assert_eq!(whole, bytes, "a certificate lost bytes");
    }
    let Ok(message) = X509svidResponse::decode(bytes) else {
        return false;
    };
    let (ids, keys): (Vec<_>, Vec<_>) = message
        .svids
        .iter()
        .map(|svid| (svid.spiffe_id.clone(), svid.x509_svid_key.clone()))
        .unzip();
    let svid = match OwnSvid::read(message, 7) {
        Ok(svid) => svid,
        Err(error) => {
            // The error may quote an ID, and that of a certificate, but no key.
            let error = format!("{error} {error:?}");
            for key in keys.iter().filter_map(|key| key.first_chunk::<4>()) {
                let quoted = format!("{key:?}");
                let quoted = quoted.trim_end_matches(']');
                assert!(!error.contains(quoted), "{error} quotes a key");
            }
            return false;
        }
    };
    assert_eq!((svid.version, &svid.all), (7, &ids));
    assert_eq!(
        Some(svid.spiffe_id.as_str()),
        ids.first().map(String::as_str)
    );
    let leaf = svid.certified.cert.first();
    assert_eq!(
        leaf.map(|leaf| id_of(leaf)),
        Some(Ok(svid.spiffe_id.clone()))
    );
    assert!(svid.certified.keys_match().is_ok() && !svid.roots.is_empty());
    assert!(keys.iter().any(|key| !key.is_empty()));
    true
}
