//! The revision of the source, as git knows it.

use std::path::Path;
use std::process::Command;

/// The files and folders that the program is built from.
pub(crate) const SOURCES: [&str; 4] = ["src", "proto", "Cargo.toml", "Cargo.lock"];

/// Returns the commit of the working copy with the root `folder`, with `+changes` if the sources
/// differ from it. Returns `None` without a working copy or without git: in a tarball, even if it
/// was unpacked inside another repository.
pub(crate) fn revision(folder: &Path) -> Option<String> {
    // Empty at the root of a working copy, and only there.
    if !git(folder, &["rev-parse", "--show-prefix"])?.is_empty() {
        return None;
    }
    let commit = git(folder, &["rev-parse", "--short=12", "HEAD"])?;
    let mut status = vec!["status", "--porcelain", "--untracked-files=no", "--"];
    status.extend(SOURCES);
    let is_changed = !git(folder, &status)?.is_empty();
    Some(if is_changed {
        commit + "+changes"
    } else {
        commit
    })
}

/// Returns files, relative to `folder`. One of them changes when a commit is checked out or made.
pub(crate) fn moves(folder: &Path) -> Vec<String> {
    let paths = ["HEAD", "logs/HEAD"].map(|name| git(folder, &["rev-parse", "--git-path", name]));
    paths
        .into_iter()
        .flatten()
        .filter(|path| folder.join(path).exists())
        .collect()
}

fn git(folder: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    // The variables of a git hook would lead to the repository of the hook. Reading needs no lock.
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"] {
        command.env_remove(variable);
    }
    let output = command
        .env("GIT_OPTIONAL_LOCKS", "0")
        .current_dir(folder)
        .args(arguments)
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
