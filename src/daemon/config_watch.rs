//! Waits until the configuration's files have another content.
//!
//! Editors replace or rewrite files. The kubelet replaces a symbolic link in a ConfigMap's volume,
//! through which all of its files pass. So the watch is on each directory with a symbolic link on
//! the way to a file, and on the one with the file itself. Only the content decides: an event
//! without another content has no effect.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, timeout};

use crate::config::{ConfigFiles, path_steps};
use crate::file_threads::FileThreads;
use crate::pod_listeners::watch_descriptor;

/// Time without an event after which the files count as complete. A writer may need several steps.
const SETTLE_TIME: Duration = Duration::from_millis(200);
/// Maximum time that further events delay the comparison.
const MAX_SETTLE_TIME: Duration = Duration::from_secs(5);
/// Maximum time that a reload by a signal waits for the watch.
const MAX_SKIP_TIME: Duration = Duration::from_secs(1);
/// Interval at which the content is compared without an event. A network file system reports no
/// change of another machine.
const COMPARE_INTERVAL: Duration = Duration::from_secs(60);

/// Watch on the configuration's files, and on the CA file that it names.
///
/// All reads but the first run on [`FileThreads`]. While a file system does not reply, the watch
/// waits, and a signal still reloads.
#[derive(Debug)]
pub(super) struct ConfigWatch {
    configuration: WatchedFiles<String>,
    ca_file: Option<WatchedFiles<Vec<u8>>>,
    directories: Directories,
    /// All watches that the kernel has.
    watches: Vec<WatchDescriptor>,
    threads: FileThreads,
}

/// Files of which one path leads to all.
#[derive(Debug)]
struct WatchedFiles<T> {
    path: PathBuf,
    /// Returns the paths of the files.
    paths: fn(&Path) -> Vec<PathBuf>,
    /// Returns what is compared.
    read: fn(&Path) -> T,
    /// The content that was read last. Nothing before the first read.
    content: Option<T>,
    /// Watches on the directories through which the files are found.
    watches: Vec<WatchDescriptor>,
}

/// Events of directories. Without inotify there are none.
#[derive(Debug, Default)]
enum Directories {
    #[default]
    New,
    Watched {
        inotify: Arc<Inotify>,
        events: AsyncFd<OwnedFd>,
    },
    Unwatched,
}

impl ConfigWatch {
    /// Returns a watch for a change of the content from now on. Reads the configuration on this
    /// thread.
    pub(super) fn new(path: &Path, threads: FileThreads) -> Self {
        let mut configuration = WatchedFiles::configuration(path.to_owned());
        configuration.content = Some(ConfigFiles::fingerprint(path));
        Self {
            configuration,
            ca_file: None,
            directories: Directories::default(),
            watches: Vec::new(),
            threads,
        }
    }

    /// Also watches the CA file of the configuration that is in effect now. Reads no file.
    pub(super) fn follow_ca_file(&mut self, ca_file: Option<PathBuf>) {
        let before = self.ca_file.as_ref().map(|files| &files.path);
        if before != ca_file.as_ref() {
            self.ca_file = ca_file.map(WatchedFiles::ca_file);
        }
    }

    /// Waits until the content differs from the last one. It may be called again after it was
    /// cancelled.
    pub(super) async fn changed(&mut self) {
        while !self.read().await {
            self.directories.event().await;
        }
    }

    /// Records the content that is loaded now for another reason. If that takes too long, the
    /// content is reported later, and loaded once more.
    pub(super) async fn skip_current(&mut self) {
        let _ = timeout(MAX_SKIP_TIME, self.read()).await;
    }

    /// Reads the files, and watches the directories through which they are found now. Returns
    /// whether the content differs from the last one.
    async fn read(&mut self) -> bool {
        if let Directories::New = self.directories {
            self.directories = Directories::create().unwrap_or_else(|error| {
                tracing::warn!(%error, "the configuration is read every minute: its files cannot be watched");
                Directories::Unwatched
            });
        }
        let (inotify, threads) = (self.directories.inotify(), &self.threads);
        let mut differs = self.configuration.read(&inotify, threads).await;
        if let Some(ca_file) = &mut self.ca_file {
            differs |= ca_file.read(&inotify, threads).await;
        }
        self.end_unused_watches();
        differs
    }

    /// Removes the watches of directories that lead to no file any more. The configuration and the
    /// CA file may share one.
    fn end_unused_watches(&mut self) {
        let mut now = self.configuration.watches.clone();
        now.extend(self.ca_file.iter().flat_map(|files| &files.watches));
        let unused = self.watches.iter().filter(|watch| !now.contains(watch));
        if let Some(inotify) = self.directories.inotify() {
            for watch in unused {
                // The kernel may have removed it with its directory.
                let _ = inotify.rm_watch(*watch);
            }
        }
        self.watches = now;
    }
}

impl WatchedFiles<String> {
    fn configuration(path: PathBuf) -> Self {
        Self {
            path,
            paths: ConfigFiles::watched_paths,
            read: ConfigFiles::fingerprint,
            content: None,
            watches: Vec::new(),
        }
    }
}

impl WatchedFiles<Vec<u8>> {
    fn ca_file(path: PathBuf) -> Self {
        Self {
            path,
            paths: |path| vec![path.to_owned()],
            // A file that cannot be read is as one without content.
            read: |path| fs::read(path).unwrap_or_default(),
            content: None,
            watches: Vec::new(),
        }
    }
}

impl<T: PartialEq + Send + 'static> WatchedFiles<T> {
    /// Watches the directories through which the files are found now, then reads the content: no
    /// change is lost in between. Returns whether it differs. If the future is dropped, the content
    /// stays that of before.
    async fn read(&mut self, inotify: &Option<Arc<Inotify>>, threads: &FileThreads) -> bool {
        let (path, inotify) = (self.path.clone(), inotify.clone());
        let (paths, content) = (self.paths, self.read);
        let read = move || {
            let watches = inotify.map(|inotify| watch_directories(&inotify, &paths(&path)));
            (watches.unwrap_or_default(), content(&path))
        };
        let Ok((watches, content)) = threads.run(&self.path, read).await else {
            return false;
        };
        self.watches = watches;
        let before = self.content.replace(content);
        before.is_some() && before != self.content
    }
}

fn watch_directories(inotify: &Inotify, files: &[PathBuf]) -> Vec<WatchDescriptor> {
    files
        .iter()
        .flat_map(|file| directories_to(file))
        .filter_map(|directory| inotify.add_watch(&directory, EVENTS).ok())
        .collect()
}

/// The events after which a file may have another content. A file that is open for writing is not
/// complete yet.
const EVENTS: AddWatchFlags = AddWatchFlags::IN_CLOSE_WRITE
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_ONLYDIR);

/// Returns the directories in which another entry can lead to another file.
fn directories_to(path: &Path) -> Vec<PathBuf> {
    let steps = path_steps(path).unwrap_or_default();
    let last = steps.len().saturating_sub(1);
    steps
        .into_iter()
        .enumerate()
        .filter(|(i, step)| *i == last || step.entry.as_ref().is_ok_and(|entry| entry.is_symlink()))
        .map(|(_, step)| step.directory)
        .collect()
}

impl Directories {
    fn create() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let descriptor = inotify.as_fd().try_clone_to_owned()?;
        Ok(Self::Watched {
            events: watch_descriptor(descriptor, Interest::READABLE)?,
            inotify: Arc::new(inotify),
        })
    }

    fn inotify(&self) -> Option<Arc<Inotify>> {
        match self {
            Self::Watched { inotify, .. } => Some(inotify.clone()),
            Self::New | Self::Unwatched => None,
        }
    }

    /// Waits for an event and the rest of its series, or for the interval.
    async fn event(&self) {
        let Self::Watched { inotify, events } = self else {
            return sleep(COMPARE_INTERVAL).await;
        };
        if timeout(COMPARE_INTERVAL, next(inotify, events))
            .await
            .is_err()
        {
            return;
        }
        let end = Instant::now() + MAX_SETTLE_TIME;
        while Instant::now() < end && timeout(SETTLE_TIME, next(inotify, events)).await.is_ok() {}
    }
}

/// Waits for events, and takes those that are there.
async fn next(inotify: &Inotify, events: &AsyncFd<OwnedFd>) {
    loop {
        let Ok(mut ready) = events.readable().await else {
            // The runtime ends.
            return std::future::pending().await;
        };
        if let Ok(Ok(_)) = ready.try_io(|_| Ok(inotify.read_events()?)) {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
