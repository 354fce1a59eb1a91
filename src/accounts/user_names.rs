//! Names of local users by their numbers.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::time::timeout;

use super::LOOKUP_WAIT;
use super::local::{LocalAccounts, PASSWD};
use crate::file_threads::FileThreads;

/// The users of `/etc/passwd`, which is read again when it has changed.
///
/// Only root can change that file. A directory server is not queried, since requests must not wait
/// for one.
#[derive(Clone)]
pub struct UserNames {
    threads: FileThreads,
    current: Arc<ArcSwap<LocalAccounts>>,
}

impl UserNames {
    /// Creates the table without reading the file.
    pub fn new(threads: FileThreads) -> Self {
        let current = Arc::default();
        Self { threads, current }
    }

    /// Returns the name of the user with this number. `None` if the file has no such user or
    /// several, and if its file system does not answer in time.
    pub async fn name(&self, uid: u32) -> Option<Arc<str>> {
        let current = self.current.clone();
        let reading = self.threads.run(Path::new(PASSWD), move || {
            let accounts = LocalAccounts::read(&current.load_full());
            current.store(accounts.clone());
            accounts.user_name(uid).map(Arc::from)
        });
        timeout(LOOKUP_WAIT, reading).await.ok()?.ok()?
    }
}

impl fmt::Debug for UserNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserNames").finish_non_exhaustive()
    }
}
