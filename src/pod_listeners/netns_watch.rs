//! Waits until there may be other network namespaces than before.
//!
//! Files come and go by inotify, in a directory that itself may come later or be replaced. What is mounted on them, which
//! for inotify is no event, is told by `/proc/self/mountinfo` (proc(5): it polls as exceptional after a change).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::pod_listeners::sys;

/// What may be different.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Which files there are.
    Files,
    /// What is mounted somewhere.
    Mounts,
}

/// Watches one directory.
#[derive(Debug)]
pub(super) struct NetnsWatch {
    directory: PathBuf,
    inotify: Inotify,
    /// The same descriptor, for the runtime.
    events: AsyncFd<OwnedFd>,
    mounts: AsyncFd<OwnedFd>,
    /// On the directory, if it is there.
    inside: Option<WatchDescriptor>,
    /// On the nearest directory above it that is there.
    above: Option<(WatchDescriptor, PathBuf)>,
}

impl NetnsWatch {
    /// To be called within the runtime.
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let mut watch = Self {
            directory: directory.to_owned(),
            events: sys::watch(inotify.as_fd().try_clone_to_owned()?, Interest::READABLE)?,
            inotify,
            mounts: sys::watch(
                File::open("/proc/self/mountinfo")?.into(),
                Interest::PRIORITY,
            )?,
            inside: None,
            above: None,
        };
        watch.renew()?;
        Ok(watch)
    }

    /// Follows the directory to where it is now. To be called before its files are looked at, so that no change is lost
    /// between the two.
    pub(super) fn renew(&mut self) -> io::Result<()> {
        let files = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let directories =
            AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ONLYDIR;
        // From the outside in: a directory that is made meanwhile is seen by one of the two.
        let mut above = None;
        for directory in self.directory.ancestors().skip(1) {
            if let Some(watched) = self.add(directory, directories)? {
                above = Some((watched, directory.to_owned()));
                break;
            }
        }
        let inside = self.add(&self.directory, files)?;
        let now = [inside, above.as_ref().map(|(watched, _)| *watched)];
        let before = [self.inside, self.above.take().map(|(watched, _)| watched)];
        for old in before
            .into_iter()
            .flatten()
            .filter(|old| !now.contains(&Some(*old)))
        {
            // The kernel may have removed it with its directory.
            let _ = self.inotify.rm_watch(old);
        }
        (self.inside, self.above) = (inside, above);
        Ok(())
    }

    /// Whether the directory is there.
    pub(super) fn has_directory(&self) -> bool {
        self.inside.is_some()
    }

    fn add(&self, directory: &Path, what: AddWatchFlags) -> io::Result<Option<WatchDescriptor>> {
        match self.inotify.add_watch(directory, what) {
            Ok(watched) => Ok(Some(watched)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a change.
    pub(super) async fn changed(&self) -> io::Result<Change> {
        tokio::select! {
            biased;
            files = self.files() => files.map(|()| Change::Files),
            mounts = self.mounts.ready(Interest::PRIORITY) => {
                mounts?.clear_ready();
                Ok(Change::Mounts)
            }
        }
    }

    /// Waits for a change of which files there are.
    pub(super) async fn files(&self) -> io::Result<()> {
        loop {
            let mut ready = self.events.readable().await?;
            match ready.try_io(|_| Ok(self.inotify.read_events()?)) {
                Ok(Ok(events)) if events.iter().any(|event| self.concerns(event)) => return Ok(()),
                Ok(Ok(_)) | Err(_) => {}
                Ok(Err(error)) => return Err(error),
            }
        }
    }

    fn concerns(&self, event: &InotifyEvent) -> bool {
        let Some((above, path)) = &self.above else {
            return true;
        };
        if event.wd != *above || event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return true;
        }
        // Much happens in `/run` that is nobody's concern here.
        let below = self.directory.strip_prefix(path).ok();
        event.name.as_deref() == below.and_then(|below| below.iter().next())
    }
}
