//! The fuzz target for the messages of a handover, with arbitrary bytes.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::message::{HandoverMessage, LENGTH};
use crate::listen::{METADATA_ADDRESSES, POD_ADDRESSES};

/// Checks a message after a byte that states whether a descriptor came with it. A message that is
/// accepted is the one that its sender encodes.
pub(crate) fn handover(bytes: &[u8]) -> bool {
    let Some((sent, bytes)) = bytes.split_first() else {
        return false;
    };
    let Ok(bytes) = <[u8; LENGTH]>::try_from(bytes) else {
        return false;
    };
    let descriptor = (sent % 2 == 1).then(|| {
        UnixStream::pair().map_or_else(
            |error| panic!("no sockets: {error}"),
            |(one, _)| OwnedFd::from(one),
        )
    });
    let has_descriptor = descriptor.is_some();
    let Ok(message) = HandoverMessage::decode(bytes, descriptor) else {
        return false;
    };
    let (again, descriptor) = match message.encode() {
        Ok(encoded) => encoded,
        Err(error) => panic!("{message:?} is not a message of a sender: {error}"),
    };
    assert_eq!(descriptor.is_some(), has_descriptor);
    assert_eq!(again[0], bytes[0]);
    match &message {
        HandoverMessage::Listener((_, address), _) => {
            assert_eq!(again, bytes);
            assert!(POD_ADDRESSES.contains(address) || METADATA_ADDRESSES.contains(address));
        }
        HandoverMessage::Request(_) => {
            assert_eq!(again[1..LENGTH - 1], [0; LENGTH - 2]);
            assert_eq!(again[LENGTH - 1], bytes[LENGTH - 1] & 3);
        }
        _ => assert_eq!(again[1..], [0; LENGTH - 1], "only a listener has a key"),
    }
    true
}
