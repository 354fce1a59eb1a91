//! Threads for calls on files whose file system may not respond: FUSE, NFS, an automounter.
//!
//! Such a call blocks its thread, and nothing can cancel it. So each path has one thread at a time,
//! in all parts of the daemon and across reloads. The configuration names the paths, and bounds
//! their number.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// The threads of all paths. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct FileThreads(Arc<Mutex<HashMap<PathBuf, Weak<AsyncMutex<()>>>>>);

/// The right to run the only call on one path.
#[derive(Debug)]
pub struct FileThread(OwnedMutexGuard<()>);

impl FileThreads {
    /// Waits until no other call on `path` runs. Waiting takes no thread, and dropping the future
    /// is safe.
    pub async fn acquire(&self, path: &Path) -> FileThread {
        let lock = self.lock_of(path);
        FileThread(lock.lock_owned().await)
    }

    /// Runs `call` after the other calls on `path`. If the future is dropped, a call that has begun
    /// still runs to its end. Fails if the call panics.
    pub async fn run<T: Send + 'static>(
        &self,
        path: &Path,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        self.acquire(path).await.run(call).await
    }

    /// Runs `call` for `limit` at most. Fails with [`io::ErrorKind::TimedOut`] if it takes longer,
    /// and at once while another call on `path` runs. The result of a call that is late is dropped.
    pub async fn run_within<T: Send + 'static>(
        &self,
        path: &Path,
        limit: Duration,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let lock = self.lock_of(path).try_lock_owned();
        let lock = lock.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
        timeout(limit, FileThread(lock).run(call)).await?
    }

    fn lock_of(&self, path: &Path) -> Arc<AsyncMutex<()>> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = locks.get(path).and_then(Weak::upgrade) {
            return lock;
        }
        locks.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::default();
        locks.insert(path.to_owned(), Arc::downgrade(&lock));
        lock
    }
}

impl FileThread {
    /// Runs `call` on a thread that may block. See [`FileThreads::run`].
    pub async fn run<T: Send + 'static>(
        self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let call = move || {
            // Until the call returns, also if its caller has given up.
            let _thread = self.0;
            call()
        };
        spawn_blocking(call).await.map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    #[tokio::test]
    async fn blocked_call_takes_one_thread_and_stops_only_its_path() {
        let threads = FileThreads::default();
        let (calls, (release, wait)) = (Arc::new(AtomicUsize::new(0)), mpsc::channel::<()>());
        let wait = Arc::new(Mutex::new(wait));
        for _ in 0..20 {
            let (calls, wait) = (calls.clone(), wait.clone());
            let call = move || {
                calls.fetch_add(1, Ordering::Relaxed);
                let _ = wait.lock().unwrap().recv();
            };
            // Its caller gives up, and the call stays blocked.
            let waiting = threads.run(Path::new("/a"), call);
            assert!(timeout(Duration::from_millis(5), waiting).await.is_err());
        }
        assert_eq!(threads.run(Path::new("/b"), || 7).await.unwrap(), 7);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        drop(release);
        assert_eq!(threads.run(Path::new("/a"), || 8).await.unwrap(), 8);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        threads.lock_of(Path::new("/c"));
        assert!(threads.0.lock().unwrap().len() <= 2);
    }

    #[tokio::test]
    async fn blocked_call_stops_later_ones_until_it_returns() {
        let (threads, path) = (FileThreads::default(), Path::new("/a"));
        let (short, long) = (Duration::from_millis(20), Duration::from_secs(60));
        let (release, wait) = mpsc::channel::<()>();
        let kind = |result: io::Result<_>| result.map_err(|error| error.kind());
        let call = move || wait.recv().map_err(drop);
        let blocked = threads.run_within(path, short, call).await;
        assert_eq!(kind(blocked), Err(io::ErrorKind::TimedOut));
        let rejected = threads.run_within(path, long, || Ok(())).await;
        assert_eq!(kind(rejected), Err(io::ErrorKind::TimedOut));
        release.send(()).unwrap();
        drop(threads.acquire(path).await);
        let later = threads.run_within(path, long, || Ok(())).await;
        assert_eq!(kind(later), Ok(Ok(())));
    }
}
