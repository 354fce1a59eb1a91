//! How many connections each workload has open, so that one that opens thousands leaves room for the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::caller::Caller;

/// A workload for this purpose: its user and its outermost unit.
type Owner = (u32, Option<String>);

/// Counts connections by workload. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shares {
    max: usize,
    open: Arc<Mutex<HashMap<Owner, usize>>>,
}

/// One connection's place, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    shares: Shares,
    owner: Owner,
}

impl Shares {
    /// At most `max` connections for each workload.
    pub fn new(max: usize) -> Self {
        Self { max, open: Arc::default() }
    }

    /// A place for a connection of `caller`; `None` if it has as many as it may.
    pub fn enter(&self, caller: &Caller) -> Option<Place> {
        let unit = caller.cgroup.as_ref().and_then(|cgroup| cgroup.systemd_unit());
        let owner = (caller.uid, unit.map(str::to_owned));
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(owner.clone()).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(Place { shares: self.clone(), owner })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.shares.open.lock().unwrap_or_else(PoisonError::into_inner);
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
    use crate::caller::{Evidence, Listener, Refusal};
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
        Caller { listener: Listener::Tcp, uid, cgroup, process: None, evidence: Box::new(Always) }
    }

    #[test]
    fn each_user_and_unit_has_its_own_share() {
        let shares = Shares::new(2);
        let first = shares.enter(&caller(1, "/system.slice/a.service")).unwrap();
        let _second = shares.enter(&caller(1, "/system.slice/a.service/below")).unwrap();
        assert!(shares.enter(&caller(1, "/system.slice/a.service")).is_none());
        assert!(shares.enter(&caller(2, "/system.slice/a.service")).is_some());
        assert!(shares.enter(&caller(1, "/system.slice/b.service")).is_some());
        drop(first);
        assert!(shares.enter(&caller(1, "/system.slice/a.service")).is_some());
        assert_eq!(shares.open.lock().unwrap().len(), 1);
    }
}
