//! The directories and entries through which the kernel finds a file.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Component, Path, PathBuf};

/// The kernel's limit of symbolic links on a path (`path_resolution(7)`).
const MAX_LINKS: usize = 40;

/// An entry of a directory on the way to a file.
#[derive(Debug)]
pub(crate) struct PathStep {
    pub(crate) directory: PathBuf,
    /// Metadata of the entry itself, which may be a symbolic link. An error ends the way.
    pub(crate) entry: io::Result<Metadata>,
}

/// Returns the steps to a file from the root directory on. It follows symbolic links as the kernel
/// does. Blocks while the file system does not answer.
pub(crate) fn path_steps(path: &Path) -> io::Result<Vec<PathStep>> {
    let mut at = PathBuf::from("/");
    let mut rest = parts(&std::path::absolute(path)?);
    let (mut links, mut steps) = (0, Vec::new());
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            at.pop();
            continue;
        }
        let path = at.join(&name);
        let directory = at.clone();
        match follow(&path, &mut at, &mut rest, &mut links) {
            Ok(entry) => steps.push(PathStep {
                directory,
                entry: Ok(entry),
            }),
            Err(error) => {
                steps.push(PathStep {
                    directory,
                    entry: Err(error),
                });
                break;
            }
        }
    }
    Ok(steps)
}

/// Moves `at` and `rest` past the entry at `path`, and returns its metadata.
fn follow(
    path: &Path,
    at: &mut PathBuf,
    rest: &mut VecDeque<OsString>,
    links: &mut usize,
) -> io::Result<Metadata> {
    let found = fs::symlink_metadata(path)?;
    if found.is_symlink() {
        *links += 1;
        if *links > MAX_LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let target = fs::read_link(path)?;
        if target.is_absolute() {
            *at = PathBuf::from("/");
        }
        for part in parts(&target).into_iter().rev() {
            rest.push_front(part);
        }
    } else if found.is_dir() {
        *at = path.to_owned();
    }
    Ok(found)
}

/// Returns the parts of a path without the leading `/`.
fn parts(path: &Path) -> VecDeque<OsString> {
    let part = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn parts_of_a_relative_path_are_kept() {
        // As on a command line.
        assert_eq!(parts(Path::new("./a/../b")), ["a", "..", "b"]);
    }

    #[test]
    fn steps_follow_links_and_end_at_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        fs::create_dir(root.join("version")).unwrap();
        symlink("version", root.join("data")).unwrap();
        symlink("data/file", root.join("file")).unwrap();
        let last = |path: &str| {
            let steps = path_steps(&root.join(path)).unwrap();
            let below = steps.into_iter().filter_map(|step| {
                let directory = step.directory.strip_prefix(&root).ok()?.to_owned();
                Some((directory, step.entry.is_ok()))
            });
            below.collect::<Vec<_>>()
        };
        let step = |directory: &str, is_found| (PathBuf::from(directory), is_found);
        let found = [step("", true), step("", true), step("", true)];
        assert_eq!(
            last("file"),
            [&found[..], &[step("version", false)]].concat()
        );
        assert_eq!(last("none/file"), [step("", false)]);
        symlink("loop", root.join("loop")).unwrap();
        assert_eq!(last("loop").last(), Some(&step("", false)));
    }
}
