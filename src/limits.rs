//! Fair limits on what all workloads of a node share: connections, searches, calls to the identity source and to STS. A
//! workload that takes all it can delays itself, and gives way first where a limit of all is reached (T22, T29).

use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;

use crate::caller::{WorkloadKey, WorkloadScope};
use crate::identity::SpiffeId;

mod fair;
mod rate;

pub use fair::{ACQUIRE_TIMEOUT, Exhausted, FairPermit, FairSemaphore};
pub use rate::{KeyedRateLimiter, TokenBucket};

/// What a limit counts by.
pub trait FairKey: fmt::Debug + Eq + Hash + Clone + Send {
    /// What keys have in common that one person may multiply: the users of one unit, for example.
    type Group: fmt::Debug + Eq + Hash + Clone + Send;

    /// The group of this key.
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

/// Where a connection comes from, if it comes over a network.
impl FairKey for IpAddr {
    type Group = Self;

    fn group(&self) -> Self {
        *self
    }
}
