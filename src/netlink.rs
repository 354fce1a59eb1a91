//! Addresses and routes of a network namespace, by `rtnetlink(7)`.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_MULTIPART, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags, SockFlag, SockProtocol, SockType, setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// The index of the loopback device, the first that the kernel creates in a network namespace.
const LOOPBACK_INDEX: u32 = 1;
/// The mark of addresses that awsvid adds (`IFA_PROTO`, from Linux 5.18 on). It has no effect.
const OWN_ADDRESS: AddressProtocol = AddressProtocol::Other(0xa5);
/// The size of the buffer for a datagram of a dump. The kernel fills at most that much.
const DUMP_BYTES: usize = 32 * 1024;
/// The longest prefix of a default route. Two routes of one bit are a default route of a VPN.
const DEFAULT_PREFIX_BITS: u8 = 1;

/// A socket for addresses and routes. It stays in the network namespace in which it was opened, and
/// keeps that alive.
#[derive(Debug)]
pub struct RouteSocket(OwnedFd);

/// The state of an address before it was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addition {
    /// The loopback device did not have the address.
    New,
    /// The loopback device had the address.
    Present,
}

/// The route to an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// The namespace has no route for it.
    Missing,
    /// Only a default route leads there.
    Default,
    /// The namespace has the address, on the loopback device or another.
    Local {
        /// Set if it is on the loopback device.
        is_loopback: bool,
    },
    /// A route for this address or its network, as text for the log.
    Specific(String),
}

impl RouteSocket {
    /// Opens a socket in the current network namespace.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let netlink = socket::socket(
            socket::AddressFamily::Netlink,
            SockType::Raw,
            flags,
            SockProtocol::NetlinkRoute,
        )?;
        // The kernel replies within `send`. The timeout only bounds the wait if that should fail.
        setsockopt(&netlink, sockopt::ReceiveTimeout, &TimeVal::new(1, 0))?;
        Ok(Self(netlink))
    }

    /// Adds the address to the loopback device. Connections to other addresses do not begin at it.
    /// Requires `CAP_NET_ADMIN` in the namespace.
    pub fn add_address(&self, address: IpAddr) -> io::Result<Addition> {
        let message = RouteNetlinkMessage::NewAddress(loopback_address(address));
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        match self.request(message, flags, |_| ()) {
            Ok(()) => Ok(Addition::New),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(Addition::Present),
            Err(error) => Err(error),
        }
    }

    /// Removes the address from the loopback device, if it is there.
    pub fn remove_address(&self, address: IpAddr) -> io::Result<()> {
        let message = RouteNetlinkMessage::DelAddress(loopback_address(address));
        match self.request(message, NLM_F_ACK, |_| ()) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            removed => removed,
        }
    }

    /// Returns whether an instance of awsvid added this address. False on a kernel before 5.18,
    /// which does not report it.
    pub fn has_own_address(&self, address: IpAddr) -> io::Result<bool> {
        let own = [
            AddressAttribute::Address(address),
            AddressAttribute::Protocol(OWN_ADDRESS),
        ];
        let mut has_own = false;
        self.addresses(family(address), |found| {
            let attributes = &found.attributes;
            has_own |= found.header.index == LOOPBACK_INDEX
                && own.iter().all(|attribute| attributes.contains(attribute));
        })?;
        Ok(has_own)
    }

    /// Returns the route by which packets to this address leave.
    pub fn route_to(&self, address: IpAddr) -> io::Result<Route> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(address);
        message.header.destination_prefix_length = prefix_bits(address);
        // The entry of the routing table, not the result for this one address.
        message.header.flags = RouteFlags::FibMatch;
        message
            .attributes
            .push(RouteAttribute::Destination(address.into()));
        let mut found = Route::Missing;
        let request = RouteNetlinkMessage::GetRoute(message);
        let lookup = self.request(request, 0, |reply| {
            if let RouteNetlinkMessage::NewRoute(route) = reply {
                found = Route::of(&route);
            }
        });
        match lookup {
            Ok(()) => Ok(found),
            Err(error) => Route::of_error(error),
        }
    }

    /// Returns whether a device other than loopback has an IPv6 address that other hosts reach.
    pub fn has_global_v6(&self) -> io::Result<bool> {
        let mut has_one = false;
        self.addresses(AddressFamily::Inet6, |found| {
            let scope = found.header.scope;
            has_one |= scope == AddressScope::Universe && found.header.index != LOOPBACK_INDEX;
        })?;
        Ok(has_one)
    }

    /// Calls `each` with every address of this family.
    fn addresses(
        &self,
        family: AddressFamily,
        mut each: impl FnMut(AddressMessage),
    ) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family;
        let request = RouteNetlinkMessage::GetAddress(message);
        self.request(request, NLM_F_DUMP, |reply| match reply {
            RouteNetlinkMessage::NewAddress(found) if found.header.family == family => each(found),
            _ => {}
        })
    }

    /// Sends a request, and calls `each` with every reply to it.
    fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = 1;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        let socket = self.0.as_raw_fd();
        retry(|| socket::send(socket, &bytes, MsgFlags::empty()))?;
        let mut buffer = vec![0; DUMP_BYTES];
        loop {
            let length = retry(|| socket::recv(socket, &mut buffer, MsgFlags::empty()))?;
            if replies(&buffer[..length], &mut each)? == Progress::Complete {
                return Ok(());
            }
        }
    }
}

/// Whether further datagrams belong to a reply.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Partial,
    Complete,
}

/// Reads the messages of one datagram.
fn replies(mut bytes: &[u8], each: &mut impl FnMut(RouteNetlinkMessage)) -> io::Result<Progress> {
    while !bytes.is_empty() {
        let reply = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes);
        let (header, payload) = reply.map_err(io::Error::other)?.into_parts();
        match payload {
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(Progress::Complete),
            NetlinkPayload::InnerMessage(message) => {
                each(message);
                if header.flags & NLM_F_MULTIPART == 0 {
                    return Ok(Progress::Complete);
                }
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        let length = usize::try_from(header.length).map_err(io::Error::other)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(Progress::Partial)
}

impl Route {
    fn of(route: &RouteMessage) -> Self {
        let bits = route.header.destination_prefix_length;
        if route.header.kind == RouteType::Local {
            let device = RouteAttribute::Oif(LOOPBACK_INDEX);
            let is_loopback = route.attributes.contains(&device);
            return Self::Local { is_loopback };
        }
        if bits <= DEFAULT_PREFIX_BITS {
            return Self::Default;
        }
        let mut text = String::new();
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(to) => {
                    text = ip(to).map_or(text, |address| format!("{address}/{bits}"));
                }
                RouteAttribute::Gateway(gateway) => {
                    text.extend(ip(gateway).map(|gateway| format!(" via {gateway}")));
                }
                _ => {}
            }
        }
        Self::Specific(text)
    }

    /// Interprets the error of a lookup, which is the result of a route that rejects packets.
    fn of_error(error: io::Error) -> io::Result<Self> {
        let kind = match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENETUNREACH) => return Ok(Self::Missing),
            Some(Errno::EINVAL) => "blackhole",
            Some(Errno::EHOSTUNREACH) => "unreachable",
            Some(Errno::EACCES) => "prohibit",
            _ => return Err(error),
        };
        Ok(Self::Specific(kind.to_owned()))
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn prefix_bits(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// Returns an address of the loopback device that other connections do not begin at: by its scope
/// for IPv4. IPv6 knows no scope of a host, so the address is deprecated from the start.
fn loopback_address(address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = prefix_bits(address);
    message.header.index = LOOPBACK_INDEX;
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    message
        .attributes
        .push(AddressAttribute::Protocol(OWN_ADDRESS));
    if address.is_ipv4() {
        message.header.scope = AddressScope::Host;
    } else {
        let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
        message.attributes.push(AddressAttribute::Flags(flags));
        let mut lifetime = CacheInfo::default();
        lifetime.ifa_valid = u32::MAX;
        message
            .attributes
            .push(AddressAttribute::CacheInfo(lifetime));
    }
    message
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
