//! The fuzz targets for the files of `/proc` that concern the daemon itself, with arbitrary text.

use caps::Capability;

use super::{DaemonFeatures, HidingProc, ProcessStatus};

/// A mount of `/proc` after all others.
const PROC_MOUNT: &str = "46 22 0:22 / /proc rw - proc proc rw";

/// Checks `/proc/self/mountinfo`: the last mount of `/proc` decides, whatever is before it.
pub(crate) fn mountinfo(text: &str) -> bool {
    let features = DaemonFeatures {
        inspects_processes: true,
        listens_on_host: true,
        names_processes: true,
        enters_namespaces: true,
        sets_addresses: true,
        listens_low: true,
    };
    let found = HidingProc::find(features, text, text);
    for text in found.iter().flat_map(|found| [found.effect(), found.fix()]) {
        assert!(!text.contains('\n'), "{text:?}");
    }
    let shown = format!("{text}\n{PROC_MOUNT}\n");
    assert_eq!(HidingProc::find(features, &shown, ""), None);
    let hidden = format!("{text}\n{PROC_MOUNT},hidepid=4\n");
    assert!(HidingProc::find(features, &hidden, "").is_some());
    found.is_some()
}

/// Checks `/proc/self/status`: the first line of a name decides, and each field is a word.
pub(crate) fn status(text: &str) -> bool {
    let status = ProcessStatus(text);
    let has_all = format!("CapEff:\tffffffffffffffff\n{text}");
    let has_none = format!("CapEff:\t0\n{text}");
    let capability = Capability::CAP_SYS_PTRACE;
    assert!(ProcessStatus(&has_all).has_capability(capability));
    assert!(!ProcessStatus(&has_none).has_capability(capability));
    for field in status.fields("Groups") {
        assert!(!field.contains(char::is_whitespace) && text.contains(field));
    }
    status.has_capability(capability)
}
