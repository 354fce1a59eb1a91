//! Fair limits on the resources that all workloads of a node share: connections, searches, and
//! calls to the identity source and to STS. And limits for lines that the log would repeat.
//!
//! A workload that takes all it can get delays only itself. Where a shared limit is reached, its
//! permits are the first to be evicted (T22, T29).
//!
//! [`FairSemaphore`] is that mechanism. Lookup threads (`attest::LookupThreads`) have another one.
//! A thread that the kernel blocks cannot be cancelled, so an evicted permit would not free it.
//! Such a thread may never return, and so never release its permit either. So they are limited in
//! advance. One workload has two threads, and a scope gets another one only while more are left
//! than it has. If all are blocked, each request is rejected after its hold (`search_busy`), and
//! the I/O threads still run.

use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;

use crate::caller::{WorkloadKey, WorkloadScope};
use crate::identity::SpiffeId;

mod fair;
mod log;
mod rate;

pub use fair::{ACQUIRE_TIMEOUT, AcquireError, FairPermit, FairSemaphore};
pub use log::{KeyedLogQuota, LogOnce, LogQuota};
pub use rate::{KeyedRateLimiter, TokenBucket};

/// The key by which a limit counts permits.
pub trait FairKey: fmt::Debug + Eq + Hash + Clone + Send {
    /// A group of keys that one party can multiply at will, for example all users of one systemd
    /// unit.
    type Group: fmt::Debug + Eq + Hash + Clone + Send;

    /// Returns the group of this key.
    fn group(&self) -> Self::Group;
}

impl FairKey for SpiffeId {
    type Group = Self;

    fn group(&self) -> Self {
        self.clone()
    }
}

impl FairKey for WorkloadKey {
    type Group = WorkloadScope;

    fn group(&self) -> WorkloadScope {
        self.scope().clone()
    }
}

/// The address of a client, for connections that arrive over a network.
impl FairKey for IpAddr {
    type Group = Self;

    fn group(&self) -> Self {
        *self
    }
}
