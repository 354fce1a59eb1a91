use std::os::unix::fs::{PermissionsExt, chown};

use super::*;

const C: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const OTHER: &str = "1123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const U: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";

fn mount_of(names: Vec<String>, mount: PathBuf) -> CgroupMount {
    CgroupMount {
        names,
        mount,
        base: String::new(),
        above: 0,
        own_root: None,
        own: None,
    }
}

/// Creates two hierarchies, v2 and v1's memory, with these directories in both.
fn machine(directories: &[&str]) -> (tempfile::TempDir, CgroupMounts) {
    let folder = tempfile::tempdir().unwrap();
    let [v2, memory] = ["v2", "memory"].map(|name| folder.path().join(name));
    for directory in directories {
        fs::create_dir_all(v2.join(directory)).unwrap();
        fs::create_dir_all(memory.join(directory)).unwrap();
    }
    let hierarchies = CgroupMounts(vec![
        mount_of(Vec::new(), v2),
        mount_of(vec!["rw".to_owned(), "memory".to_owned()], memory),
    ]);
    (folder, hierarchies)
}

#[test]
fn find_returns_the_mounts_of_all_hierarchies() {
    let mountinfo = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                     32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                     40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd\n\
                     41 31 0:38 /sub /elsewhere rw,relatime - cgroup2 cgroup2 rw\n\
                     42 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
    let found = CgroupMounts::find(mountinfo);
    let mount = |names| {
        found
            .get(names)
            .map(|found| found.mount.to_str().unwrap().to_owned())
    };
    assert_eq!(
        mount("cpu,cpuacct").as_deref(),
        Some("/sys/fs/cgroup/cpu,cpuacct")
    );
    assert_eq!(
        mount("name=systemd").as_deref(),
        Some("/sys/fs/cgroup/systemd")
    );
    assert_eq!(mount("").as_deref(), Some("/sys/fs/cgroup/unified"));
    assert_eq!(mount("memory"), None);
}

#[test]
fn check_accepts_cgroups_that_only_root_could_name() {
    if !crate::skip::root() {
        return;
    }
    let pod = format!("kubepods/besteffort/pod{U}/{C}");
    let (_folder, machine) = machine(&["system.slice/billing.service", &pod]);
    for text in [
        "0::/\n".to_owned(),
        "0::/system.slice/billing.service\n".to_owned(),
        format!("4:memory:/{pod}\n0::/\n"),
        format!("4:memory:/{pod}\n0::/{pod}\n"),
    ] {
        assert_eq!(machine.check(&text), Ok(()), "{text}");
    }
}

#[test]
fn check_rejects_nested_or_different_containers() {
    if !crate::skip::root() {
        return;
    }
    let (outer, inner) = (
        format!("docker/{C}"),
        format!("docker/{C}/kubepods/pod{U}/{OTHER}"),
    );
    let other = format!("docker/{OTHER}");
    let (_folder, machine) = machine(&[&inner, &other]);
    for text in [
        format!("0::/{inner}\n"),
        format!("4:memory:/{outer}\n0::/{other}\n"),
    ] {
        assert_eq!(
            machine.check(&text),
            Err(AttestError::NestedContainer),
            "{text}"
        );
    }
}

#[test]
fn check_rejects_cgroups_that_a_user_could_name() {
    if !crate::skip::root() {
        return;
    }
    let delegated = "user.slice/user@1002.service";
    let (folder, machine) = machine(&[&format!("{delegated}/app")]);
    chown(folder.path().join("v2").join(delegated), Some(1002), None).unwrap();
    assert_eq!(
        machine.check(&format!("0::/{delegated}/app\n")),
        Err(AttestError::DelegatedCgroup)
    );
    assert_eq!(
        machine.check(&format!("0::/{delegated}\n")),
        Err(AttestError::DelegatedCgroup)
    );
    assert_eq!(machine.check("0::/user.slice\n"), Ok(()));
    // In v1's hierarchy root owns it.
    assert_eq!(
        machine.check(&format!("4:memory:/{delegated}/app\n")),
        Ok(())
    );
    fs::set_permissions(
        folder.path().join("memory/user.slice"),
        fs::Permissions::from_mode(0o775),
    )
    .unwrap();
    assert_eq!(
        machine.check(&format!("4:memory:/{delegated}/app\n")),
        Err(AttestError::DelegatedCgroup)
    );
}

#[test]
fn check_rejects_unreadable_cgroups() {
    let (_folder, machine) = machine(&["there"]);
    for text in [
        "0::/gone\n",
        "0::/../elsewhere\n",
        "0::/there (deleted)\n",
        "5:pids:/there\n",
    ] {
        assert_eq!(
            machine.check(text),
            Err(AttestError::UnreadableCgroup),
            "{text}"
        );
    }
}

/// Returns how the v2 hierarchy is visible: its mount, the mounted directory, and the levels above
/// the namespace.
fn unified(mountinfo: &str) -> Option<(String, String, usize)> {
    let found = CgroupMounts::find(mountinfo);
    let found = found.get("")?;
    Some((
        found.mount.to_str().unwrap().to_owned(),
        found.base.clone(),
        found.above,
    ))
}

#[test]
fn find_prefers_the_hosts_tree_in_a_container() {
    let own = format!(
        "/kubepods.slice/kubepods-pod{}.slice/cri-containerd-{C}.scope",
        U.replace('-', "_")
    );
    let mount =
        |root: &str, at: &str| format!("41 31 0:38 {root} {at} ro,nosuid - cgroup2 cgroup2 rw\n");
    let table = [
        // The daemon runs on the host.
        (
            mount("/", "/sys/fs/cgroup"),
            Some(("/sys/fs/cgroup", "", 0)),
        ),
        // The container is in the host's cgroup namespace, as with cgroup v1. Its own part and the
        // whole tree are mounted, in either order.
        (
            mount(&own, "/sys/fs/cgroup") + &mount("/", "/host/cgroup"),
            Some(("/host/cgroup", "", 0)),
        ),
        (
            mount("/", "/host/cgroup") + &mount(&own, "/sys/fs/cgroup"),
            Some(("/host/cgroup", "", 0)),
        ),
        (mount(&own, "/sys/fs/cgroup"), None),
        // The kubelet's part of the tree is mounted instead of the whole.
        (
            mount(&own, "/sys/fs/cgroup") + &mount("/kubepods.slice", "/host/pods"),
            Some(("/host/pods", "/kubepods.slice", 0)),
        ),
        (
            mount("/kubepods", "/host/pods") + &mount("/", "/host/cgroup"),
            Some(("/host/cgroup", "", 0)),
        ),
        // The container is in a namespace of its own, so its own part is the root.
        (
            mount("/", "/sys/fs/cgroup") + &mount("/../../..", "/host/cgroup"),
            Some(("/host/cgroup", "", 3)),
        ),
        (
            mount("/../../..", "/host/cgroup") + &mount("/", "/sys/fs/cgroup"),
            Some(("/host/cgroup", "", 3)),
        ),
        (
            mount("/../../..", "/sys/fs/cgroup"),
            Some(("/sys/fs/cgroup", "", 3)),
        ),
        // A directory outside the namespace has no known position.
        (
            mount("/", "/sys/fs/cgroup") + &mount("/../other", "/x"),
            Some(("/sys/fs/cgroup", "", 0)),
        ),
    ];
    for (mountinfo, expected) in table {
        let expected =
            expected.map(|(mount, base, above)| (mount.to_owned(), base.to_owned(), above));
        assert_eq!(unified(&mountinfo), expected, "{mountinfo}");
    }
}

#[test]
fn path_is_relative_to_the_daemons_cgroup_namespace() {
    let own = "/kubepods/burstable/own/container";
    let mounts = |above, own: Option<&str>| {
        let own = own.map(str::to_owned);
        CgroupMounts(vec![CgroupMount {
            above,
            own,
            ..mount_of(Vec::new(), PathBuf::from("/host"))
        }])
    };
    let table = [
        (0, None, "/a/b", Some("/a/b")),
        (0, None, "/../a", None),
        (4, Some(own), "/", Some(own)),
        (
            4,
            Some(own),
            "/init",
            Some("/kubepods/burstable/own/container/init"),
        ),
        (
            4,
            Some(own),
            "/../other",
            Some("/kubepods/burstable/own/other"),
        ),
        (
            4,
            Some(own),
            "/../../pod/container",
            Some("/kubepods/burstable/pod/container"),
        ),
        (
            4,
            Some(own),
            "/../../../../system.slice/x.service",
            Some("/system.slice/x.service"),
        ),
        (4, Some(own), "/../../../..", Some("/")),
        // These are above the mounted directory.
        (4, Some(own), "/../../../../../x", None),
        (4, Some(own), "/a/../b", None),
        (
            4,
            Some(own),
            "/..x",
            Some("/kubepods/burstable/own/container/..x"),
        ),
        // If the own position is not known, only paths without a part in common are.
        (
            4,
            None,
            "/../../../../system.slice/x.service",
            Some("/system.slice/x.service"),
        ),
        (4, None, "/../../pod/container", None),
    ];
    for (above, own, shown, path) in table {
        let found = mounts(above, own).path("", shown);
        assert_eq!(
            found.as_ref().map(CgroupPath::as_str),
            path,
            "{shown} from {above} below {own:?}"
        );
    }
}

#[test]
fn own_path_is_found_by_inode() {
    let folder = tempfile::tempdir().unwrap();
    for directory in ["a/b/c", "a/d/c", "e/b/c"] {
        fs::create_dir_all(folder.path().join(directory)).unwrap();
    }
    let own = folder.path().join("a/d/c");
    assert_eq!(own_path(folder.path(), &own, 3).as_deref(), Some("/a/d/c"));
    assert_eq!(own_path(folder.path(), &own, 2), None);
    let mount = |root: &str, at: &Path| {
        format!(
            "41 31 0:38 {root} {} ro - cgroup2 cgroup2 rw\n",
            at.display()
        )
    };
    let found = CgroupMounts::find(&(mount("/", &own) + &mount("/../../..", folder.path())));
    assert_eq!(found.path("", "/../x").unwrap().as_str(), "/a/d/x");
}

/// A later test does not search for it again: here it would find nothing.
#[test]
fn own_path_is_kept_while_its_mount_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("a/own");
    fs::create_dir_all(&own).unwrap();
    let mounts = |root: &str| {
        format!(
            "41 31 0:38 / {} ro - cgroup2 cgroup2 rw\n42 31 0:38 {root} {} ro - cgroup2 cgroup2 rw\n",
            own.display(),
            folder.path().display()
        )
    };
    let found = CgroupMounts::find(&mounts("/../.."));
    assert_eq!(found.path("", "/").unwrap().as_str(), "/a/own");
    fs::remove_dir_all(folder.path().join("a")).unwrap();
    let again = found.find_again(&format!(
        "1 2 0:3 / /x rw - ext4 x rw\n{}",
        mounts("/../..")
    ));
    assert_eq!(again, found);
    let other = found.find_again(&mounts("/.."));
    assert_eq!(other.path("", "/").as_ref().map(CgroupPath::as_str), None);
}
