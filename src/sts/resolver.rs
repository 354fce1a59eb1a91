//! Lookups of host names, on threads of their own.
//!
//! `getaddrinfo(3)` blocks until a DNS server or another name service has replied, and cannot be
//! cancelled. On the runtime's threads for blocking calls it would take one for each connection,
//! and in the end all of them. So all connections to one host share a lookup.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError};
use tokio::sync::broadcast;
use tokio::time::Instant;

use crate::file_threads::FileThreads;

/// Maximum number of threads that resolve one host. The configuration bounds the number of hosts.
const MAX_LOOKUPS_PER_HOST: usize = 4;
/// The age at which a lookup is overdue, and the next connection starts another one. It may succeed
/// where an earlier one still waits: the node may have another DNS server by then.
const OVERDUE_AFTER: Duration = Duration::from_secs(3);

/// Threads for calls that may block, shared by all clients of the daemon, also across reloads.
#[derive(Debug, Clone, Default)]
pub struct BlockingCalls {
    /// Threads for calls on files.
    pub files: FileThreads,
    /// Lookups of host names.
    pub hosts: HostResolver,
}

/// Resolver of host names. Clones share its lookups.
#[derive(Clone)]
pub struct HostResolver(Arc<ResolverInner>);

struct ResolverInner {
    lookup: Box<ResolveHost>,
    /// The hosts that are being resolved.
    hosts: Mutex<HashMap<String, HostLookups>>,
}

/// Returns the addresses of a host. Blocks.
type ResolveHost = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// The running lookups of one host.
struct HostLookups {
    running: usize,
    /// The time at which the newest one has started.
    newest: Instant,
    result: broadcast::Sender<Resolution>,
}

type Resolution = Result<Vec<IpAddr>, Arc<io::Error>>;

impl Default for HostResolver {
    fn default() -> Self {
        Self::new(|host| {
            let addresses = (host, 0).to_socket_addrs()?;
            Ok(addresses.map(|address: SocketAddr| address.ip()).collect())
        })
    }
}

impl HostResolver {
    fn new(lookup: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ResolverInner {
            lookup: Box::new(lookup),
            hosts: Mutex::default(),
        }))
    }

    /// Returns the addresses of `host`. Waits for the name service. Dropping the future is safe.
    async fn resolve(&self, host: &str) -> Resolution {
        let mut result = self.0.join(host)?;
        // The sender is dropped only after it has sent the result.
        let result = result.recv().await;
        result.unwrap_or_else(|error| Err(Arc::new(io::Error::other(error))))
    }
}

impl ResolverInner {
    fn hosts(&self) -> MutexGuard<'_, HashMap<String, HostLookups>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the receiver of the result. Starts a lookup if none runs, or if the newest one is
    /// overdue.
    fn join(
        self: &Arc<Self>,
        host: &str,
    ) -> Result<broadcast::Receiver<Resolution>, Arc<io::Error>> {
        let mut hosts = self.hosts();
        let lookups = hosts.entry(host.to_owned()).or_insert_with(|| HostLookups {
            running: 0,
            newest: Instant::now(),
            result: broadcast::channel(1).0,
        });
        let result = lookups.result.subscribe();
        let is_overdue = lookups.newest.elapsed() >= OVERDUE_AFTER;
        if lookups.running == 0 || (is_overdue && lookups.running < MAX_LOOKUPS_PER_HOST) {
            if lookups.running > 0 {
                tracing::warn!(
                    host,
                    running = lookups.running,
                    "the lookup of a host name has not returned; starting another one"
                );
            }
            let (shared, name) = (self.clone(), host.to_owned());
            let run = move || shared.finish(&name, (shared.lookup)(&name));
            let started = thread::Builder::new()
                .name("awsvid-hosts".to_owned())
                .spawn(run);
            match started {
                Ok(_) => {
                    lookups.running += 1;
                    lookups.newest = Instant::now();
                }
                Err(error) if lookups.running == 0 => {
                    hosts.remove(host);
                    return Err(Arc::new(error));
                }
                // The running lookups go on.
                Err(_) => {}
            }
        }
        Ok(result)
    }

    /// Sends the result of one lookup to all that wait. A failure counts only if no other lookup of
    /// the host runs.
    fn finish(&self, host: &str, found: io::Result<Vec<IpAddr>>) {
        let mut hosts = self.hosts();
        let Entry::Occupied(mut lookups) = hosts.entry(host.to_owned()) else {
            return;
        };
        lookups.get_mut().running -= 1;
        let is_last = lookups.get().running == 0;
        if is_last || found.is_ok() {
            // An error means that no connection waits any more.
            let _ = lookups.get().result.send(found.map_err(Arc::new));
        }
        if is_last {
            lookups.remove();
        }
    }
}

impl ResolveDns for HostResolver {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        DnsFuture::new(async move { self.resolve(name).await.map_err(ResolveDnsError::new) })
    }
}

impl fmt::Debug for HostResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = self.0.hosts();
        f.debug_struct("HostResolver")
            .field("hosts", &hosts.keys().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
