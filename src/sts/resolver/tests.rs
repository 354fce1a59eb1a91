use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::mpsc;

use tokio::task::JoinSet;
use tokio::time::{advance, timeout};

use super::*;

const FOUND: [IpAddr; 1] = [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))];

/// A name service that replies only when the test lets it.
#[derive(Clone, Default)]
struct StuckService {
    pending: Arc<Mutex<BTreeMap<String, Vec<PendingLookup>>>>,
}

type PendingLookup = mpsc::Sender<io::Result<Vec<IpAddr>>>;

impl StuckService {
    fn resolver(&self) -> HostResolver {
        let service = self.clone();
        HostResolver::new(move |host| {
            let (reply, replied) = mpsc::channel();
            let mut pending = service.pending.lock().unwrap();
            pending.entry(host.to_owned()).or_default().push(reply);
            drop(pending);
            replied.recv().unwrap()
        })
    }

    /// Waits until this number of lookups has started for `host`.
    fn await_lookups(&self, host: &str, count: usize) {
        let started = || self.pending.lock().unwrap().get(host).map_or(0, Vec::len);
        while started() < count {
            thread::yield_now();
        }
        assert_eq!(started(), count);
    }

    fn reply(&self, host: &str, lookup: usize, result: io::Result<Vec<IpAddr>>) {
        let pending = self.pending.lock().unwrap();
        pending[host][lookup].send(result).unwrap();
    }
}

fn is_same(result: Resolution) -> bool {
    result.is_ok_and(|found| found == FOUND)
}

/// Starts 20 lookups of one host, and waits until each one waits.
async fn start(waiting: &mut JoinSet<Resolution>, resolver: &HostResolver) {
    for _ in 0..20 {
        let resolver = resolver.clone();
        waiting.spawn(async move { resolver.resolve("stuck").await });
    }
    tokio::task::yield_now().await;
}

#[tokio::test(start_paused = true)]
async fn stuck_lookups_of_one_host_take_four_threads() {
    let service = StuckService::default();
    let (resolver, mut waiting) = (service.resolver(), JoinSet::new());
    for lookups in [1, 2, 3, 4, 4, 4] {
        start(&mut waiting, &resolver).await;
        service.await_lookups("stuck", lookups);
        assert_eq!(resolver.0.hosts()["stuck"].running, lookups);
        advance(OVERDUE_AFTER).await;
    }
    // Another host has a thread of its own.
    let (other, to) = (resolver.clone(), service.clone());
    let found = tokio::spawn(async move { other.resolve("other").await });
    tokio::task::yield_now().await;
    service.await_lookups("other", 1);
    to.reply("other", 0, Ok(FOUND.into()));
    assert!(is_same(found.await.unwrap()));
    // The failure of one lookup does not count while others run.
    service.reply("stuck", 0, Err(io::Error::other("SERVFAIL")));
    service.reply("stuck", 3, Ok(FOUND.into()));
    for result in waiting.join_all().await {
        assert!(is_same(result));
    }
}

#[tokio::test]
async fn failed_lookup_is_repeated_by_the_next_connection() {
    let service = StuckService::default();
    let (resolver, mut waiting) = (service.resolver(), JoinSet::new());
    start(&mut waiting, &resolver).await;
    service.await_lookups("stuck", 1);
    service.reply("stuck", 0, Err(io::Error::other("SERVFAIL")));
    for result in waiting.join_all().await {
        assert_eq!(result.unwrap_err().to_string(), "SERVFAIL");
    }
    // A connection that gives up leaves the lookup to the next one.
    let gives_up = resolver.resolve("stuck");
    assert!(timeout(Duration::from_millis(5), gives_up).await.is_err());
    service.await_lookups("stuck", 2);
    let mut waiting = JoinSet::new();
    start(&mut waiting, &resolver).await;
    service.reply("stuck", 1, Ok(FOUND.into()));
    for result in waiting.join_all().await {
        assert!(is_same(result));
    }
    assert_eq!(resolver.0.hosts().len(), 0);
}
