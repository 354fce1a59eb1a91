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
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use crate::config::{ConfigFiles, path_steps};
use crate::pod_listeners::watch_descriptor;

/// Time without an event after which the files count as complete. A writer may need several steps.
const SETTLE_TIME: Duration = Duration::from_millis(200);
/// Maximum time that further events delay the comparison.
const MAX_SETTLE_TIME: Duration = Duration::from_secs(5);
/// Interval at which the content is compared without an event. A network file system reports no
/// change of another machine.
const COMPARE_INTERVAL: Duration = Duration::from_secs(60);

/// Watch on the configuration's files, and on the CA file that it names.
#[derive(Debug)]
pub(super) struct ConfigWatch {
    path: PathBuf,
    ca_file: Option<PathBuf>,
    /// The content that was reported last.
    content: Content,
    directories: Directories,
}

/// The content of the files, for a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Content {
    configuration: String,
    ca_file: Option<Vec<u8>>,
}

/// Events of directories. Without inotify there are none.
#[derive(Debug, Default)]
enum Directories {
    #[default]
    New,
    Watched {
        inotify: Arc<Inotify>,
        events: AsyncFd<OwnedFd>,
        watches: Vec<WatchDescriptor>,
    },
    Unwatched,
}

impl ConfigWatch {
    /// Returns a watch for a change of the content from now on.
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            ca_file: None,
            content: Content::read(path, None),
            directories: Directories::default(),
        }
    }

    /// Also watches the CA file of the configuration that is in effect now.
    pub(super) fn follow_ca_file(&mut self, ca_file: Option<PathBuf>) {
        if self.ca_file != ca_file {
            self.content.ca_file = ca_file.as_deref().map(read);
            self.ca_file = ca_file;
        }
    }

    /// Records the content that is loaded now for another reason.
    pub(super) async fn skip_current(&mut self) {
        let (path, ca_file) = (self.path.clone(), self.ca_file.clone());
        let read = spawn_blocking(move || Content::read(&path, ca_file.as_deref()));
        if let Ok(content) = read.await {
            self.content = content;
        }
    }

    /// Waits until the content differs from the last one. It may be called again after it was
    /// cancelled.
    pub(super) async fn changed(&mut self) {
        loop {
            // Before the comparison, so that no change is lost in between.
            self.renew_watches().await;
            let before = self.content.clone();
            self.skip_current().await;
            if self.content != before {
                return;
            }
            self.directories.event().await;
        }
    }

    /// Moves the watches to the directories through which the files are found now.
    async fn renew_watches(&mut self) {
        if let Directories::New = self.directories {
            self.directories = Directories::create().unwrap_or_else(|error| {
                tracing::warn!(%error, "the configuration is read every minute: its files cannot be watched");
                Directories::Unwatched
            });
        }
        let Directories::Watched {
            inotify, watches, ..
        } = &mut self.directories
        else {
            return;
        };
        let (path, ca_file, inotify) = (self.path.clone(), self.ca_file.clone(), inotify.clone());
        let old = std::mem::take(watches);
        let renewed = spawn_blocking(move || {
            let files = ConfigFiles::watched_paths(&path).into_iter().chain(ca_file);
            let now: Vec<_> = files
                .flat_map(|file| directories_to(&file))
                .filter_map(|directory| inotify.add_watch(&directory, EVENTS).ok())
                .collect();
            for gone in old.into_iter().filter(|old| !now.contains(old)) {
                // The kernel may have removed it with its directory.
                let _ = inotify.rm_watch(gone);
            }
            now
        });
        *watches = renewed.await.unwrap_or_default();
    }
}

impl Content {
    fn read(path: &Path, ca_file: Option<&Path>) -> Self {
        Self {
            configuration: ConfigFiles::fingerprint(path),
            ca_file: ca_file.map(read),
        }
    }
}

/// Returns the content of the file, or nothing if it cannot be read.
fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_default()
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
            watches: Vec::new(),
        })
    }

    /// Waits for an event and the rest of its series, or for the interval.
    async fn event(&self) {
        let Self::Watched {
            inotify, events, ..
        } = self
        else {
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
