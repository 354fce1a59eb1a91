//! How many connections each workload has open, so that one that opens thousands leaves room for the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::caller::Owner;

/// Counts connections by workload. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shares {
    max: usize,
    open: Arc<Mutex<HashMap<Owner, usize>>>,
}

/// One connection's place, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    open: Arc<Mutex<HashMap<Owner, usize>>>,
    owner: Owner,
}

impl Shares {
    /// At most `max` connections for each workload.
    pub fn new(max: usize) -> Self {
        Self { max, open: Arc::default() }
    }

    /// A place for a connection of `owner`'s; `None` if it has as many as it may.
    pub fn enter(&self, owner: Owner) -> Option<Place> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(owner.clone()).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(Place { open: self.open.clone(), owner })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.owner) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caller::{Caller, Evidence, Listener, Refusal};
    use crate::cgroup::CgroupPath;

    #[derive(Debug)]
    struct Always;

    impl Evidence for Always {
        fn still_same(&self) -> Result<(), Refusal> {
            Ok(())
        }
    }

    fn caller(uid: u32, cgroup: &str) -> Caller {
        let cgroup = CgroupPath::parse(cgroup);
        Caller {
            listener: Listener::Tcp,
            uid,
            cgroup,
            pod: None,
            namespace: None,
            process: None,
            evidence: Box::new(Always),
        }
    }

    fn enter(shares: &Shares, uid: u32, cgroup: &str) -> Option<Place> {
        shares.enter(Owner::of(&caller(uid, cgroup)))
    }

    #[test]
    fn each_user_and_unit_has_its_own_share() {
        let shares = Shares::new(2);
        let first = enter(&shares, 1, "/system.slice/a.service").unwrap();
        let _second = enter(&shares, 1, "/system.slice/a.service/below").unwrap();
        assert!(enter(&shares, 1, "/system.slice/a.service").is_none());
        assert!(enter(&shares, 2, "/system.slice/a.service").is_some());
        assert!(enter(&shares, 1, "/system.slice/b.service").is_some());
        assert!(shares.enter(Owner::unknown()).is_some());
        drop(first);
        assert!(enter(&shares, 1, "/system.slice/a.service").is_some());
        assert_eq!(shares.open.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_pod_has_one_share_whoever_its_users_are() {
        let shares = Shares::new(1);
        let pod = |number: u8| format!("/kubepods/burstable/pod72f7f152-440c-66ac-9084-e0fc1d8a91{number:02}/x");
        let _first = enter(&shares, 0, &pod(1)).unwrap();
        assert!(enter(&shares, 1000, &pod(1)).is_none());
        assert!(enter(&shares, 0, &pod(2)).is_some());
    }
}
