//! Connections at an address of operators: bounded in all and for each source address. A new connection always gets a permit;
//! at a bound, an older one is evicted for it.
//!
//! A probe sends its request with its connection and gets its answer at once, so it is never the oldest. The oldest is a client
//! that sends no request, or does not read its answer.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Counts the connections of one address. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Permits {
    most: usize,
    most_of_one: usize,
    open: Arc<Mutex<Open>>,
}

#[derive(Debug, Default)]
struct Open {
    arrivals: u64,
    /// In the order of their arrival.
    connections: BTreeMap<u64, (Option<IpAddr>, CancellationToken)>,
}

/// One connection's permit, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Permit {
    arrival: u64,
    evicted: CancellationToken,
    open: Arc<Mutex<Open>>,
}

impl Permits {
    /// At most `most` connections, and at most `most_of_one` from one source address.
    pub(super) fn new(most: usize, most_of_one: usize) -> Self {
        Self { most, most_of_one, open: Arc::default() }
    }

    /// A permit for a connection from `source`, `None` on a unix socket. If there are too many from there, the oldest of them
    /// is evicted; if there are too many in all, the oldest of the source that has the most.
    pub(super) fn admit(&self, source: Option<IpAddr>) -> Permit {
        // On a listener for both families IPv4 comes as `::ffff:a.b.c.d`.
        let source = source.map(|source| source.to_canonical());
        let mut open = lock(&self.open);
        if open.count(source) >= self.most_of_one {
            open.evict_oldest_of(source);
        } else if open.connections.len() >= self.most {
            let heaviest = open.heaviest();
            open.evict_oldest_of(heaviest);
        }
        let (arrival, evicted) = (open.arrivals, CancellationToken::new());
        open.arrivals += 1;
        open.connections.insert(arrival, (source, evicted.clone()));
        Permit { arrival, evicted, open: self.open.clone() }
    }
}

impl Open {
    fn count(&self, source: Option<IpAddr>) -> usize {
        self.connections.values().filter(|(other, _)| *other == source).count()
    }

    /// The source with the most connections; of several, that of the oldest connection.
    fn heaviest(&self) -> Option<IpAddr> {
        let mut counts: BTreeMap<Option<IpAddr>, (usize, std::cmp::Reverse<u64>)> = BTreeMap::new();
        for (arrival, (source, _)) in &self.connections {
            counts.entry(*source).or_insert((0, std::cmp::Reverse(*arrival))).0 += 1;
        }
        counts.into_iter().max_by_key(|(_, weight)| *weight).and_then(|(source, _)| source)
    }

    fn evict_oldest_of(&mut self, source: Option<IpAddr>) {
        let oldest = self.connections.iter().find(|(_, (other, _))| *other == source).map(|(arrival, _)| *arrival);
        if let Some((_, evicted)) = oldest.and_then(|arrival| self.connections.remove(&arrival)) {
            evicted.cancel();
        }
    }
}

impl Permit {
    /// Waits until the permit is needed for another connection.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        lock(&self.open).connections.remove(&self.arrival);
    }
}

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, last]))
    }

    fn is_evicted(permit: &Permit) -> bool {
        permit.evicted.is_cancelled()
    }

    #[test]
    fn the_oldest_of_one_source_gives_way_to_its_next() {
        let permits = Permits::new(10, 3);
        let other = permits.admit(from(2));
        let flood: Vec<Permit> = (0..100).map(|_| permits.admit(from(1))).collect();
        let evicted: Vec<bool> = flood.iter().map(is_evicted).collect();
        assert!(evicted[..97].iter().all(|evicted| *evicted) && evicted[97..].iter().all(|evicted| !evicted));
        assert!(!is_evicted(&other));
        drop((flood, other));
        assert!(lock(&permits.open).connections.is_empty());
    }

    #[test]
    fn where_all_are_too_many_who_has_most_gives_way() {
        let permits = Permits::new(6, 3);
        let one = permits.admit(from(1));
        let most: Vec<Permit> = (0..3).map(|_| permits.admit(from(2))).collect();
        let two = [permits.admit(from(3)), permits.admit(from(3))];
        let next = permits.admit(from(4));
        assert!(is_evicted(&most[0]) && ![&one, &two[0], &two[1], &next, &most[1]].into_iter().any(is_evicted));
        // Each has two, one or none: the oldest of those that have two.
        let last = permits.admit(from(5));
        assert!(is_evicted(&most[1]) && ![&one, &two[0], &two[1], &next, &last].into_iter().any(is_evicted));
    }

    #[test]
    fn both_spellings_of_an_address_are_one_source() {
        let permits = Permits::new(10, 1);
        let first = permits.admit(from(1));
        let _second = permits.admit(Some("::ffff:10.0.0.1".parse().unwrap()));
        assert!(is_evicted(&first));
        let unix = permits.admit(None);
        assert!(!is_evicted(&unix));
    }
}
