//! Forged and replaced executables, where a rule names one.

use std::path::{Path, PathBuf};

use super::{ALICE, AttackStage, BOB, LISTENERS};
use crate::harness::actor;
use crate::harness::counterparts::{folder, root};
use crate::harness::outcome::{Outcome, credentials_of, rejected};

impl AttackStage {
    /// Plays scenes about the program that a caller runs over each listener, and compares their
    /// outcomes.
    fn check_programs(&self, program: &Path, scenes: &[(&str, Outcome)]) {
        let mut wrong = Vec::new();
        for listener in LISTENERS {
            for (scene, right) in scenes {
                let address = self.daemon.listener(listener);
                let (daemon, cgroup) = (self.daemon.pid(), self.cgroup.path());
                let answer =
                    actor::play_program(scene, listener, &address, daemon, cgroup, program);
                let outcome = Outcome::of(&answer, scene, &self.daemon);
                if outcome != *right {
                    wrong.push(format!(
                        "{scene} over {listener}: {outcome:?}, not {right:?}"
                    ));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

/// Returns a folder with the actor by two names, and the path of the one that rules name.
fn two_programs() -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    let program = folder.path().join("program");
    for name in ["program", "forged"] {
        std::fs::copy(actor::program(), folder.path().join(name)).unwrap();
    }
    (folder, program)
}

/// T11: in a mount namespace of its own any process can show any path.
#[test]
fn exe_rule_matches_file_not_path() {
    if !root() {
        return;
    }
    let (folder, program) = two_programs();
    let stage = AttackStage::start_with(folder, |_| format!("exe = {program:?}"));
    stage.check_programs(
        &program,
        &[
            ("program", credentials_of(ALICE)),
            ("other-program", rejected("no_identity")),
            ("forged-path", rejected("no_identity")),
            ("forged-path-in-user-namespace", rejected("no_identity")),
            ("replaced", rejected("identity_changed")),
        ],
    );
}

/// T37: a program of Alice passes as the program that the rule names. So `exe` does not separate
/// programs of one user. Bob's program remains Bob's, and a change during the request is noticed.
#[test]
fn forged_executable_passes_only_as_program_of_same_user() {
    if !root() {
        return;
    }
    let (folder, program) = two_programs();
    let stage = AttackStage::start_with(folder, |uid| match uid {
        61001 => format!("exe = {program:?}"),
        _ => String::new(),
    });
    stage.check_programs(
        &program,
        &[
            ("other-program", rejected("no_identity")),
            ("forged-file", credentials_of(ALICE)),
            ("forged-file-by-bob", credentials_of(BOB)),
            ("forged-file-late", rejected("identity_changed")),
        ],
    );
}
