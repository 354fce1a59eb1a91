use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::PathBuf;

use super::*;

/// Returns the problems of the file at this path, without their fixes.
fn found(path: &Path) -> Vec<String> {
    exposures(path, &fs::metadata(path).unwrap(), "configuration")
        .into_iter()
        .map(|problem| problem.what)
        .collect()
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A folder of this process's own, and a file in it.
fn file() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("awsvid.toml");
    fs::write(&path, "").unwrap();
    set_mode(&path, 0o644);
    (folder, path)
}

#[test]
fn own_file_is_safe_below_a_sticky_directory() {
    let (_folder, path) = file();
    assert_eq!(found(&path), [] as [&str; 0]);
    set_mode(&path, 0o400);
    assert_eq!(found(&path), [] as [&str; 0]);
}

#[test]
fn modes_of_file_and_directory_count() {
    let (folder, path) = file();
    set_mode(&path, 0o646);
    assert_eq!(
        found(&path),
        ["every user of this node can write the configuration"]
    );
    set_mode(&path, 0o664);
    let own_group = fs::metadata(&path).unwrap().gid() == getegid().as_raw();
    assert_eq!(found(&path).is_empty(), own_group);
    set_mode(&path, 0o644);
    set_mode(folder.path(), 0o777);
    let expected = format!(
        "every user of this node can write to {}",
        folder.path().display()
    );
    assert!(
        found(&path)[..]
            .iter()
            .all(|what| what.starts_with(&expected))
            && found(&path).len() == 1
    );
    // As in /tmp: only its owner can replace it.
    set_mode(folder.path(), 0o1777);
    assert_eq!(found(&path), [] as [&str; 0]);
}

#[test]
fn symbolic_link_counts_with_its_directory_and_target() {
    let (folder, path) = file();
    let other = tempfile::tempdir().unwrap();
    // As a ConfigMap is mounted: awsvid.toml -> ..data/awsvid.toml, ..data -> ..2026
    fs::create_dir(other.path().join("..2026")).unwrap();
    fs::rename(&path, other.path().join("..2026/awsvid.toml")).unwrap();
    symlink("..2026", other.path().join("..data")).unwrap();
    symlink("..data/awsvid.toml", other.path().join("awsvid.toml")).unwrap();
    symlink(other.path().join("awsvid.toml"), &path).unwrap();
    assert_eq!(found(&path), [] as [&str; 0]);
    for exposed in [folder.path(), other.path(), &other.path().join("..2026")] {
        set_mode(exposed, 0o777);
        let expected = format!("every user of this node can write to {}", exposed.display());
        let found = found(&path);
        assert!(
            found.len() == 1 && found[0].starts_with(&expected),
            "{found:?}"
        );
        set_mode(exposed, 0o755);
    }
    // A circle cannot be opened; here the file was opened before there was one.
    let opened = fs::metadata(&path).unwrap();
    fs::remove_file(other.path().join("..data")).unwrap();
    symlink("..data", other.path().join("..data")).unwrap();
    let problems = exposures(&path, &opened, "configuration");
    assert!(
        problems.len() == 1 && problems[0].what.contains("cannot be checked"),
        "{problems:?}"
    );
}

#[test]
fn owners_of_file_and_directory_count() {
    if !crate::skip::root() {
        return;
    }
    let (folder, path) = file();
    chown(&path, Some(51_001), Some(51_001)).unwrap();
    assert_eq!(
        found(&path),
        ["uid 51001 owns the configuration and could change it"]
    );
    set_mode(&path, 0o664);
    assert_eq!(found(&path)[1..], ["gid 51001 can write the configuration"]);
    set_mode(&path, 0o644);
    chown(&path, Some(0), Some(0)).unwrap();
    chown(folder.path(), Some(51_001), None).unwrap();
    let owned = format!(
        "uid 51001 owns {} and could put another configuration there",
        folder.path().display()
    );
    assert_eq!(found(&path), [owned]);
    // A file of another user's in a sticky directory of root's.
    chown(folder.path(), Some(0), None).unwrap();
    set_mode(folder.path(), 0o1777);
    chown(&path, Some(51_001), Some(51_001)).unwrap();
    assert_eq!(
        found(&path),
        ["uid 51001 owns the configuration and could change it"]
    );
    chown(&path, Some(0), Some(0)).unwrap();
    let link = folder.path().join("link");
    symlink(&path, &link).unwrap();
    assert_eq!(found(&link), [] as [&str; 0]);
    std::os::unix::fs::lchown(&link, Some(51_001), None).unwrap();
    let owned = format!(
        "uid 51001 owns a symbolic link in {} and could lead it elsewhere",
        folder.path().display()
    );
    assert_eq!(found(&link), [owned]);
}

#[test]
fn socket_is_exposed_below_a_directory_that_others_can_write() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let whats = |path: &Path| -> Vec<String> {
        let problems = socket_exposures(path).into_iter();
        problems.map(|problem| problem.what).collect()
    };
    let missing = folder.path().join("missing/agent.sock");
    assert_eq!((whats(&path), whats(&missing)), (vec![], vec![]));
    let writable = format!(
        "every user of this node can write to {} and put another socket there",
        folder.path().display()
    );
    // Others can bind a socket that is absent, in a sticky directory too.
    for mode in [0o777, 0o1777] {
        set_mode(folder.path(), mode);
        for path in [&path, &missing] {
            assert_eq!(whats(path), [writable.as_str()], "{mode:o} {path:?}");
        }
    }
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert_eq!(whats(&path), [writable.as_str()]);
    assert_eq!(
        socket_exposures(&path)[0].fix,
        "move it to a directory of root's"
    );
    // A directory of root's that exists cannot be replaced there.
    fs::create_dir(folder.path().join("missing")).unwrap();
    assert_eq!(whats(&missing), [] as [&str; 0]);
    set_mode(folder.path(), 0o755);
    assert_eq!(whats(&path), [] as [&str; 0]);
    if crate::skip::root() {
        // The agent's own user: not a fault of the socket, and others cannot replace it.
        chown(&path, Some(51_001), None).unwrap();
        assert_eq!(whats(&path), [] as [&str; 0]);
        chown(folder.path(), Some(51_001), None).unwrap();
        let owned = format!(
            "uid 51001 owns {} and could put another socket there",
            folder.path().display()
        );
        assert_eq!(whats(&path), [owned]);
        let fix = &socket_exposures(&path)[0].fix;
        assert!(
            fix.ends_with("unless only the agent runs as this user"),
            "{fix}"
        );
    }
}
