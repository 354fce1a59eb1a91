//! The workflows in `.github/workflows`, which only run elsewhere: actionlint reads them, and each
//! follows the rules below.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::counterparts::process::run;
use crate::harness::counterparts::tool;

fn workflows() -> Vec<(PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(".github/workflows");
    let paths = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path, text)
    };
    let found: Vec<_> = paths.map(read).collect();
    assert!(found.len() >= 2, "{found:?}");
    found
}

/// A tag can be moved to other code; a commit can't.
fn is_pinned(action: &str) -> bool {
    let Some((name, comment)) = action.split_once(" # v") else {
        return false;
    };
    let commit = name.split_once('@').map_or("", |(_, commit)| commit);
    commit.len() == 40
        && commit.bytes().all(|byte| byte.is_ascii_hexdigit())
        && comment.starts_with(|c: char| c.is_ascii_digit())
}

#[test]
fn actions_are_pinned_by_commit() {
    let mut uses = 0;
    for (path, text) in workflows() {
        for line in text.lines() {
            let Some((_, action)) = line.split_once("uses: ") else {
                continue;
            };
            uses += 1;
            assert!(is_pinned(action), "{}: {action}", path.display());
        }
    }
    assert!(uses > 5);
    let commit = "de0fac2e4500dabe0009e67214ff5f5447ce83dd";
    assert!(!is_pinned("actions/checkout@v6 # v6"));
    assert!(!is_pinned(&format!("actions/checkout@{commit}")));
    assert!(!is_pinned(&format!(
        "actions/checkout@{} # v6",
        &commit[1..]
    )));
}

/// A step has no right that its job does not list.
#[test]
fn workflows_grant_nothing_by_default() {
    for (path, text) in workflows() {
        let top = text.lines().find(|line| line.starts_with("permissions:"));
        assert_eq!(top, Some("permissions: {}"), "{}", path.display());
        let jobs = text.matches("runs-on:").count();
        assert_eq!(
            text.matches("    permissions:\n").count(),
            jobs,
            "{}",
            path.display()
        );
        let credentials = text.matches("persist-credentials: false").count();
        let checkouts = text.matches("uses: actions/checkout@").count();
        assert_eq!(credentials, checkouts, "{}", path.display());
        assert!(!text.contains("write-all"), "{}", path.display());
    }
}

#[test]
fn actionlint_accepts_workflows() {
    let Some(actionlint) = tool("actionlint") else {
        return;
    };
    let mut command = Command::new(actionlint);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(["-no-color", "-shellcheck=", "-pyflakes="]);
    let output = run(command, b"", Duration::from_secs(60));
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{output:?}"
    );
}
