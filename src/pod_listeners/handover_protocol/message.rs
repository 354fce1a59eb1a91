//! The messages of a handover.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::listen::{METADATA_ADDRESSES, POD_ADDRESSES};
use crate::netns::NamespaceId;

/// Length of each message in bytes: kind, namespace, index of the address.
pub(super) const LENGTH: usize = 1 + NamespaceId::LENGTH + 1;

/// Key of a listener: its namespace and address.
pub(in crate::pod_listeners) type HandoverKey = (NamespaceId, SocketAddr);

/// Parts of the instance metadata service that the next instance takes over. One that serves none,
/// or is older than the service, takes none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::pod_listeners) struct MetadataParts {
    /// The key of metadata tokens.
    pub(in crate::pod_listeners) key: bool,
    /// The listeners at the metadata addresses.
    pub(in crate::pod_listeners) listeners: bool,
}

impl MetadataParts {
    fn to_byte(self) -> u8 {
        u8::from(self.key) | u8::from(self.listeners) << 1
    }

    fn from_byte(byte: u8) -> Self {
        Self {
            key: byte & 1 != 0,
            listeners: byte & 2 != 0,
        }
    }
}

/// Returns the addresses by their index in a message.
fn addresses() -> impl Iterator<Item = SocketAddr> {
    POD_ADDRESSES.into_iter().chain(METADATA_ADDRESSES)
}

/// One message between two instances.
#[derive(Debug, Clone)]
pub(in crate::pod_listeners) enum HandoverMessage {
    /// The next instance could serve, and requests the listeners.
    Request(MetadataParts),
    /// The previous one passes a listener. The receiver has not verified it yet.
    Listener(HandoverKey, Arc<OwnedFd>),
    /// The previous one passes the key of its metadata tokens.
    TokenKey(Arc<OwnedFd>),
    /// The previous one passes its connection of an earlier handover.
    Earlier(Arc<OwnedFd>),
    /// The previous one has passed all of them.
    End,
    /// The next instance serves the listeners.
    Serving,
    /// The previous one has stopped accepting, and removed the path of the socket.
    Done,
}

impl HandoverMessage {
    /// Returns the bytes of the message, and the descriptor that belongs to them.
    ///
    /// Fails for a listener on an address that pods do not have.
    pub(super) fn encode(&self) -> io::Result<([u8; LENGTH], Option<BorrowedFd<'_>>)> {
        let mut bytes = [0; LENGTH];
        let [kind, id @ .., index] = &mut bytes;
        let descriptor = match self {
            Self::End | Self::Serving | Self::Done => None,
            Self::Request(parts) => {
                *index = parts.to_byte();
                None
            }
            Self::Earlier(descriptor) | Self::TokenKey(descriptor) => Some(descriptor.as_fd()),
            Self::Listener((namespace, address), listener) => {
                *id = namespace.to_bytes();
                *index = addresses()
                    .position(|known| known == *address)
                    .and_then(|index| u8::try_from(index).ok())
                    .ok_or_else(|| io::Error::other("not an address of a pod"))?;
                Some(listener.as_fd())
            }
        };
        *kind = self.kind();
        Ok((bytes, descriptor))
    }

    /// Reads a message. Fails with [`io::ErrorKind::InvalidData`] at an unknown kind or address,
    /// and where a descriptor is missing or superfluous.
    pub(super) fn decode(bytes: [u8; LENGTH], descriptor: Option<OwnedFd>) -> io::Result<Self> {
        let [kind, id @ .., index] = bytes;
        let address = addresses().nth(usize::from(index));
        match (kind, descriptor.map(Arc::new), address) {
            (b'G', None, _) => Ok(Self::Request(MetadataParts::from_byte(index))),
            (b'L', Some(listener), Some(address)) => {
                let key = (NamespaceId::from_bytes(id), address);
                Ok(Self::Listener(key, listener))
            }
            (b'K', Some(key), _) => Ok(Self::TokenKey(key)),
            (b'B', Some(connection), _) => Ok(Self::Earlier(connection)),
            (b'E', None, _) => Ok(Self::End),
            (b'S', None, _) => Ok(Self::Serving),
            (b'D', None, _) => Ok(Self::Done),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Request(_) => b'G',
            Self::Listener(..) => b'L',
            Self::TokenKey(_) => b'K',
            Self::Earlier(_) => b'B',
            Self::End => b'E',
            Self::Serving => b'S',
            Self::Done => b'D',
        }
    }
}
