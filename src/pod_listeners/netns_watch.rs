//! Waits until the set of network namespaces may have changed.
//!
//! inotify reports files, in a directory that may appear later or be replaced. It does not report
//! mounts on them. Those come from `/proc/self/mountinfo`, which polls as exceptional after a
//! change (proc(5)).

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::pod_listeners::sys;

/// Kind of change that was reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// The files in the directory.
    Files,
    /// The mounts of the host.
    Mounts,
}

/// Waits for changes of one directory of namespaces.
#[derive(Debug)]
pub(super) struct NetnsWatch {
    inotify: Arc<Inotify>,
    /// The inotify descriptor, registered with the runtime.
    events: AsyncFd<OwnedFd>,
    mounts: AsyncFd<OwnedFd>,
    /// The events that concern the directory.
    pub(super) filter: EventFilter,
}

/// The directories that are watched. Each of its calls may wait for their file system.
#[derive(Debug)]
pub(super) struct WatchedDirectories {
    directory: PathBuf,
    inotify: Arc<Inotify>,
    /// Watch on the directory, if it exists.
    inside: Option<WatchDescriptor>,
    /// Watch on the nearest existing directory above it.
    above: Option<(WatchDescriptor, PathBuf)>,
}

/// Decides which events of inotify concern the directory.
#[derive(Debug, Default)]
pub(super) struct EventFilter {
    has_directory: bool,
    /// The watch above the directory, and the only name there that matters.
    above: Option<(WatchDescriptor, OsString)>,
}

impl NetnsWatch {
    /// Creates the watch, which reports nothing until [`WatchedDirectories::renew`] is called. Has
    /// to be called within the runtime.
    pub(super) fn new(directory: &Path) -> io::Result<(Self, WatchedDirectories)> {
        let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
        let inotify = Arc::new(Inotify::init(flags)?);
        let mounts = File::open("/proc/self/mountinfo")?.into();
        let watch = Self {
            events: sys::watch(inotify.as_fd().try_clone_to_owned()?, Interest::READABLE)?,
            mounts: sys::watch(mounts, Interest::PRIORITY)?,
            inotify: inotify.clone(),
            filter: EventFilter::default(),
        };
        let directories = WatchedDirectories {
            directory: directory.to_owned(),
            inotify,
            inside: None,
            above: None,
        };
        Ok((watch, directories))
    }

    /// Waits for a change of files or mounts.
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

    /// Waits for a change of the set of files.
    pub(super) async fn files(&self) -> io::Result<()> {
        loop {
            let mut ready = self.events.readable().await?;
            match ready.try_io(|_| Ok(self.inotify.read_events()?)) {
                Ok(Ok(events)) if events.iter().any(|event| self.filter.concerns(event)) => {
                    return Ok(());
                }
                Ok(Ok(_)) | Err(_) => {}
                Ok(Err(error)) => return Err(error),
            }
        }
    }
}

impl WatchedDirectories {
    /// Moves the watches to where the directory is now, and returns the filter for their events.
    pub(super) fn renew(&mut self) -> io::Result<EventFilter> {
        let files = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let directories =
            AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ONLYDIR;
        // From the outside in: one of two watches reports a directory that is created meanwhile.
        let mut above = None;
        for directory in self.directory.ancestors().skip(1) {
            if let Some(watched) = self.add(directory, directories)? {
                above = Some((watched, directory.to_owned()));
                break;
            }
        }
        let inside = self.add(&self.directory, files)?;
        let now = [inside, above.as_ref().map(|(watched, _)| *watched)];
        let old_watches = [self.inside, self.above.take().map(|(watched, _)| watched)];
        for old in old_watches
            .into_iter()
            .flatten()
            .filter(|old| !now.contains(&Some(*old)))
        {
            // The kernel may have removed it with its directory.
            let _ = self.inotify.rm_watch(old);
        }
        (self.inside, self.above) = (inside, above);
        Ok(self.filter())
    }

    fn filter(&self) -> EventFilter {
        let above = self.above.as_ref().and_then(|(watched, path)| {
            let below = self.directory.strip_prefix(path).ok()?;
            Some((*watched, below.iter().next()?.to_owned()))
        });
        EventFilter {
            has_directory: self.inside.is_some(),
            above,
        }
    }

    fn add(&self, directory: &Path, what: AddWatchFlags) -> io::Result<Option<WatchDescriptor>> {
        match self.inotify.add_watch(directory, what) {
            Ok(watched) => Ok(Some(watched)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl EventFilter {
    /// Returns whether the directory exists.
    pub(super) fn has_directory(&self) -> bool {
        self.has_directory
    }

    fn concerns(&self, event: &InotifyEvent) -> bool {
        match &self.above {
            // Most events in `/run` concern other directories.
            Some((above, name))
                if event.wd == *above && !event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) =>
            {
                event.name.as_ref() == Some(name)
            }
            _ => true,
        }
    }
}

/// Returns whether a mount that the host makes at or below this directory appears here too, by the
/// content of `/proc/self/mountinfo` (proc(5)). True if that does not show the directory's mount.
pub(super) fn receives_mounts(mountinfo: &str, directory: &Path) -> bool {
    let mut best: Option<(usize, bool)> = None;
    for line in mountinfo.lines() {
        let mut fields = line.split(' ');
        let Some(point) = fields.nth(4).map(Path::new) else {
            continue;
        };
        if !directory.starts_with(point) {
            continue;
        }
        let mut optional = fields.skip(1).take_while(|field| *field != "-");
        let receives =
            optional.any(|field| field.starts_with("shared:") || field.starts_with("master:"));
        let depth = point.components().count();
        // A later mount at the same point covers the earlier one.
        if best.is_none_or(|(deepest, _)| depth >= deepest) {
            best = Some((depth, receives));
        }
    }
    best.is_none_or(|(_, receives)| receives)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_receives_what_the_host_mounts_if_it_propagates() {
        const ROOT: &str = "21 20 0:19 / / rw,relatime - overlay overlay rw\n";
        let mount = |point: &str, optional: &str| {
            format!("22 21 0:20 / {point} ro,relatime {optional}- tmpfs tmpfs rw\n")
        };
        let directory = Path::new("/run/netns");
        let table = [
            (String::new(), true),
            (ROOT.to_owned(), false),
            (mount("/run/netns", "master:7 "), true),
            (mount("/run/netns", "shared:3 master:7 "), true),
            (mount("/run/netns", ""), false),
            // The deepest mount counts, and the latest one at the same point.
            (mount("/run", "master:7 "), true),
            (mount("/run/netns", "") + &mount("/run", "master:7 "), false),
            (
                mount("/run/netns", "master:7 ") + &mount("/run/netns", ""),
                false,
            ),
            (mount("/run/netns-other", ""), false),
        ];
        for (mounts, expected) in table {
            let text = ROOT.to_owned() + &mounts;
            let text = if mounts.is_empty() { "" } else { &text };
            assert_eq!(receives_mounts(text, directory), expected, "{text}");
        }
    }
}
