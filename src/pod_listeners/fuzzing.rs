//! The fuzz targets for messages of a handover, and for `/proc/self/mountinfo`, with arbitrary
//! text.

use std::path::Path;

pub(crate) use super::handover_protocol::fuzzing::handover;
use super::netns_watch::receives_mounts;

/// Checks that the last mount of the directory decides, whatever is before it.
pub(crate) fn mountinfo(text: &str) -> bool {
    let directory = Path::new("/run/netns");
    for (optional, receives) in [("", false), ("master:7 ", true), ("shared:3 ", true)] {
        let text =
            format!("{text}\n22 21 0:20 / /run/netns rw,relatime {optional}- tmpfs tmpfs rw\n");
        assert_eq!(receives_mounts(&text, directory), receives, "{text}");
    }
    !receives_mounts(text, directory)
}
