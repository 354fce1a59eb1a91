//! The AppArmor profile of this process. Containers have one by default where the node has
//! AppArmor, and it hides processes outside of the profile.

use std::fs;
use std::path::Path;

/// The callers that are rejected because of the profile.
pub const CONFINED: &str = "processes outside of this profile cannot be inspected, so their requests are rejected \
     (no_holder, unseen_program)";
/// The fix for a profile that hides processes.
pub const CONFINED_FIX: &str = "in Kubernetes set appArmorProfile: { type: Unconfined } in the container's securityContext, in Docker use \
     --security-opt apparmor=unconfined";

/// Returns the name of the profile, if the kernel enforces one on this process. `proc` is the mount
/// point of `/proc`.
pub fn enforced_profile(proc: &Path) -> Option<String> {
    let shown = fs::read_to_string(proc.join("self/attr/apparmor/current")).ok()?;
    let (profile, mode) = shown.trim_end().rsplit_once(' ')?;
    (mode == "(enforce)").then(|| profile.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profile_counts_only_if_it_is_enforced() {
        let proc = tempfile::tempdir().unwrap();
        assert_eq!(enforced_profile(proc.path()), None);
        let directory = proc.path().join("self/attr/apparmor");
        fs::create_dir_all(&directory).unwrap();
        for (shown, expected) in [
            ("unconfined\n", None),
            ("snap.awsvid (complain)\n", None),
            (
                "cri-containerd.apparmor.d (enforce)\n",
                Some("cri-containerd.apparmor.d"),
            ),
            ("of two words (enforce)\n", Some("of two words")),
        ] {
            fs::write(directory.join("current"), shown).unwrap();
            assert_eq!(
                enforced_profile(proc.path()).as_deref(),
                expected,
                "{shown}"
            );
        }
    }
}
