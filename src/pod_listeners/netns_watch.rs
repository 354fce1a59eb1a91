//! Waits until the set of network namespaces may have changed.
//!
//! inotify reports files, in a directory that may appear later or be replaced. It does not report
//! mounts on them. Those come from `/proc/self/mountinfo`, which polls as exceptional after a
//! change (proc(5)).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

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

/// Watch on one directory of namespaces.
#[derive(Debug)]
pub(super) struct NetnsWatch {
    directory: PathBuf,
    inotify: Inotify,
    /// The inotify descriptor, registered with the runtime.
    events: AsyncFd<OwnedFd>,
    mounts: AsyncFd<OwnedFd>,
    /// Watch on the directory, if it exists.
    inside: Option<WatchDescriptor>,
    /// Watch on the nearest existing directory above it.
    above: Option<(WatchDescriptor, PathBuf)>,
}

impl NetnsWatch {
    /// Creates the watch. Has to be called within the runtime.
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

    /// Moves the watches to where the directory is now. Has to be called before a scan, so that no
    /// change is lost in between.
    pub(super) fn renew(&mut self) -> io::Result<()> {
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
        Ok(())
    }

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
        // Most events in `/run` concern other directories.
        let below = self.directory.strip_prefix(path).ok();
        event.name.as_deref() == below.and_then(|below| below.iter().next())
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
