//! The directory in which a container runtime mounts pods' network namespaces.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::file_threads::FileThreads;
use crate::netns::NamespaceId;
use crate::pod_listeners::failure_log::FailureLog;
use crate::pod_listeners::netns_watch::{Change, EventFilter, NetnsWatch, WatchedDirectories};

/// Maximum time for which a file without a mount may belong to a pod that the runtime is creating.
///
/// Creation takes milliseconds, and some seconds when an overloaded machine creates hundreds.
const MOUNT_GRACE: Duration = Duration::from_secs(10);

/// The time for which the daemon waits for calls that take milliseconds.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The directory, with the watch on it.
///
/// Root can mount a file system there whose server does not reply, and so can a pod that may do
/// anything (T25). The daemon then keeps the pods that it serves, and serves new ones once the file
/// system replies.
#[derive(Debug)]
pub(super) struct NetnsDirectory {
    path: PathBuf,
    /// The daemon's own namespace, which does not belong to a pod.
    own: NamespaceId,
    threads: FileThreads,
    watch: NetnsWatch,
    /// The state of the watches, which only the thread changes.
    watched: Arc<Mutex<WatchedDirectories>>,
    /// Files without a mount, since when. `None` after that was logged.
    waiting: HashMap<PathBuf, Option<Instant>>,
    responds: bool,
}

/// The files of the directory.
#[derive(Debug, Default)]
struct Files {
    /// The namespaces, each with one of its files.
    mounted: HashMap<NamespaceId, PathBuf>,
    not_mounted: Vec<PathBuf>,
}

impl NetnsDirectory {
    /// Starts to watch the directory, which may not exist yet, or not respond.
    pub(super) async fn watch(
        path: &Path,
        own: NamespaceId,
        threads: FileThreads,
        log: &mut FailureLog,
    ) -> io::Result<Self> {
        let (watch, watched) = NetnsWatch::new(path)?;
        let mut directory = Self {
            path: path.to_owned(),
            own,
            threads,
            watch,
            watched: Arc::new(Mutex::new(watched)),
            waiting: HashMap::new(),
            responds: true,
        };
        let watched = directory.watched.clone();
        let renewed = directory.run(log, move || lock(&watched).renew());
        if let Some(renewed) = renewed.await {
            directory.follow_watches(renewed?, log);
        }
        Ok(directory)
    }

    /// Returns the namespaces in the directory, each with one of its files. `None` while the
    /// directory does not respond.
    pub(super) async fn scan(
        &mut self,
        log: &mut FailureLog,
    ) -> Option<HashMap<NamespaceId, PathBuf>> {
        let (watched, path, own) = (self.watched.clone(), self.path.clone(), self.own);
        let scanned = self.run(log, move || {
            // Before the scan, so that no change is lost in between.
            let renewed = lock(&watched).renew();
            (renewed, Files::read(&path, own))
        });
        let (renewed, files) = scanned.await?;
        match renewed {
            Ok(filter) => self.follow_watches(filter, log),
            Err(error) => log.unwatched(&self.path, &error),
        }
        self.wait_for_mounts(files.not_mounted, log);
        Some(files.mounted)
    }

    /// Runs `calls` that open files of the directory. `None` while the directory does not respond.
    pub(super) async fn run<T: Send + 'static>(
        &mut self,
        log: &FailureLog,
        calls: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let result = self
            .threads
            .run_within(&self.path, CALL_TIMEOUT, calls)
            .await;
        self.responds = result.is_ok();
        result
            .inspect_err(|error| log.unwatched(&self.path, error))
            .ok()
    }

    /// Returns whether the last calls returned in time. Otherwise they have to be repeated.
    pub(super) fn responds(&self) -> bool {
        self.responds
    }

    /// Returns whether the runtime may be mounting a namespace, which no event may report.
    pub(super) fn awaits_mounts(&self) -> bool {
        self.waiting.values().any(Option::is_some)
    }

    /// Waits for a change of files or mounts.
    pub(super) async fn changed(&self) -> io::Result<Change> {
        self.watch.changed().await
    }

    /// Waits for a change of the set of files.
    pub(super) async fn files_changed(&self) -> io::Result<()> {
        self.watch.files().await
    }

    /// Returns the path of the directory.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn follow_watches(&mut self, filter: EventFilter, log: &mut FailureLog) {
        if !filter.has_directory() {
            log.no_directory(&self.path);
        }
        self.watch.filter = filter;
    }

    /// Records the files without a mount, and reports those that have none for too long.
    fn wait_for_mounts(&mut self, not_mounted: Vec<PathBuf>, log: &mut FailureLog) {
        let mut earlier = std::mem::take(&mut self.waiting);
        for path in not_mounted {
            let mut since = earlier
                .remove(&path)
                .unwrap_or_else(|| Some(Instant::now()));
            if since.is_some_and(|since| since.elapsed() >= MOUNT_GRACE) {
                since = None;
                log.not_mounted(&path, &self.path);
            }
            self.waiting.insert(path, since);
        }
    }
}

impl Files {
    fn read(directory: &Path, own: NamespaceId) -> Self {
        let mut found = Self::default();
        let files = fs::read_dir(directory)
            .into_iter()
            .flatten()
            .filter_map(Result::ok);
        for file in files.filter(|file| file.file_type().is_ok_and(|kind| kind.is_file())) {
            let path = file.path();
            match NamespaceId::at(&path, own) {
                Ok(Some(id)) if id == own => {}
                Ok(Some(id)) => drop(found.mounted.insert(id, path)),
                Ok(None) => found.not_mounted.push(path),
                // The runtime has just removed it.
                Err(_) => {}
            }
        }
        found
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
