use std::os::unix::fs::{PermissionsExt, chown};

use super::*;

const C: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const U: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";

/// Creates a tree with these directories. Root owns them if root runs the test.
fn pods(directories: &[&str]) -> (tempfile::TempDir, PodLookup) {
    let folder = tempfile::tempdir().unwrap();
    for directory in directories {
        fs::create_dir_all(folder.path().join(directory)).unwrap();
    }
    let tree = CgroupTree::at(
        folder.path().to_owned(),
        crate::cgroup::PodRoots::defaults(),
    );
    (folder, PodLookup::new(Arc::new(tree)))
}

fn path(text: &str) -> CgroupPath {
    CgroupPath::parse(text).unwrap()
}

#[test]
fn pod_exists_as_long_as_its_directory() {
    if !crate::skip::root() {
        return;
    }
    let pod = format!("kubepods/burstable/pod{U}");
    let (folder, pods) = pods(&[&format!("{pod}/{C}/init"), "system.slice/a.service"]);
    assert_eq!(pods.discover_roots(), [path("/kubepods")]);
    assert!(pods.of(&path("/system.slice/a.service")).unwrap().is_none());
    let resolved = pods
        .of(&path(&format!("/{pod}/{C}/init")))
        .unwrap()
        .unwrap();
    assert_eq!(
        (resolved.pod.uid.as_str(), resolved.pod.container.as_deref()),
        (U, Some(C))
    );
    let ages = resolved.verify_exists().unwrap();
    assert!(
        ages.pod < Duration::from_secs(60) && ages.container < Duration::from_secs(60),
        "{ages:?}"
    );
    fs::remove_dir_all(folder.path().join(&pod).join(C)).unwrap();
    assert!(
        resolved.verify_exists().is_ok(),
        "the pod outlives its containers"
    );
    // A new directory at the same path is another pod.
    let directory = folder.path().join(&pod);
    let _kept = fs::File::open(&directory).unwrap();
    fs::remove_dir(&directory).unwrap();
    assert_eq!(resolved.verify_exists(), Err(AttestError::CallerGone));
    fs::create_dir(&directory).unwrap();
    assert_eq!(resolved.verify_exists(), Err(AttestError::CallerGone));
    assert!(matches!(
        pods.of(&path(&format!("/{pod}/{C}"))),
        Ok(Some(_))
    ));
    fs::remove_dir(&directory).unwrap();
    let gone = pods.of(&path(&format!("/{pod}/{C}")));
    assert!(
        matches!(gone, Err(AttestError::UnreadableCgroup)),
        "{gone:?}"
    );
}

#[test]
fn lookup_requires_root_to_own_every_directory() {
    if !crate::skip::root() {
        return;
    }
    let pod = format!("kubepods/burstable/pod{U}");
    let container = path(&format!("/{pod}/{C}"));
    for part in ["kubepods", "kubepods/burstable", &pod] {
        for change in [
            |part: &std::path::Path| chown(part, Some(1002), None),
            |part: &std::path::Path| fs::set_permissions(part, fs::Permissions::from_mode(0o777)),
        ] {
            let (folder, pods) = pods(&[&format!("{pod}/{C}")]);
            assert!(pods.of(&container).unwrap().is_some());
            change(&folder.path().join(part)).unwrap();
            let rejected = pods.of(&container);
            assert!(
                matches!(rejected, Err(AttestError::DelegatedCgroup)),
                "{part}: {rejected:?}"
            );
        }
    }
    // Root named the container's directory, and the container may do anything below it.
    let (folder, pods) = pods(&[&format!("{pod}/{C}/x")]);
    chown(folder.path().join(&pod).join(C), Some(1002), None).unwrap();
    assert_eq!(
        pods.of(&path(&format!("/{pod}/{C}/x")))
            .unwrap()
            .unwrap()
            .pod
            .container
            .as_deref(),
        Some(C)
    );
}

#[test]
fn lookup_rejects_pod_names_at_other_paths() {
    if !crate::skip::root() {
        return;
    }
    let (user, other) = (
        format!("user.slice/kubepods/pod{U}"),
        format!("other/kubepods/pod{U}"),
    );
    let (folder, pods) = pods(&[&user, &other]);
    chown(folder.path().join("user.slice"), Some(1002), None).unwrap();
    let rejected = pods.of(&path(&format!("/{user}")));
    assert!(
        matches!(rejected, Err(AttestError::DelegatedCgroup)),
        "{rejected:?}"
    );
    let rejected = pods.of(&path(&format!("/{other}"))).unwrap_err();
    assert_eq!(rejected, AttestError::MisplacedPod);
}
