use std::path::Path;

use super::*;
use crate::caller::constant_proof::constant_caller;
use crate::caller::{Caller, Groups, ListenerKind, Process, Program};

/// Returns a caller of which only the socket is known.
fn by_socket(uid: u32, cgroup: Option<&str>) -> Caller {
    constant_caller(ListenerKind::Tcp, uid, cgroup, None)
}

fn groups(groups: &[u32]) -> Option<Groups> {
    Some(Groups::new(groups.to_vec(), GroupDetail::List).unwrap())
}

fn process() -> Process {
    Process {
        pid: 4711,
        gid: 100,
        groups: groups(&[27, 1002]),
        in_container: false,
        program: None,
        started: None,
    }
}

fn running_program(exe: Option<Executable>) -> Process {
    Process {
        program: Some(Program { exe }),
        ..process()
    }
}

fn with_process(caller: Caller, process: Process) -> Caller {
    Caller {
        process: Some(process),
        ..caller
    }
}

fn rule() -> WorkloadRule {
    WorkloadRule {
        spiffe_id: SpiffeId::parse("spiffe://example.org/billing").unwrap(),
        uid: None,
        gid: None,
        supplementary_group: None,
        exe: None,
        systemd_unit: None,
        cgroup: None,
    }
}

fn glob(text: &str) -> Option<glob::Pattern> {
    Some(glob::Pattern::new(text).unwrap())
}

/// Decides with the files of rules read where they are needed.
fn decide_with_files<'a>(rules: &'a [WorkloadRule], caller: &Caller) -> Decision<'a> {
    let since = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    loop {
        match decide(rules, caller.facts(), since) {
            Decision::NeedsFile(file) => assert!(runtime.block_on(file.refresh_stat())),
            decision => return decision,
        }
    }
}

#[track_caller]
fn decides(rule: &WorkloadRule, caller: &Caller, expected: &str) {
    let decision = match decide_with_files(std::slice::from_ref(rule), caller) {
        Decision::Matched(matched) if std::ptr::eq(matched, rule) => "matched",
        Decision::Matched(_) => "another rule",
        Decision::NoMatch => "no match",
        Decision::NeedsProcess => "needs the process",
        Decision::NeedsFile(_) => "needs the file",
    };
    assert_eq!(decision, expected, "{rule:?}\n{caller:?}");
}

const HOST: Option<&str> = Some("/system.slice/billing.service");
const CONTAINER: Option<&str> = Some(
    "/system.slice/docker-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef.scope",
);

#[test]
fn socket_decides_for_rules_with_a_location() {
    let unit = |name: &str| WorkloadRule {
        systemd_unit: Some(name.to_owned()),
        ..rule()
    };
    let uid = WorkloadRule {
        uid: Some(1001),
        ..rule()
    };
    let cgroup = |pattern: &str| WorkloadRule {
        cgroup: glob(pattern),
        ..rule()
    };
    let table = [
        // A container without a cgroup of its own also has a uid of the host (T31).
        (uid.clone(), 1001, HOST, "needs the process"),
        (uid.clone(), 1002, HOST, "no match"),
        (uid.clone(), 0, HOST, "no match"),
        // Other processes hold root's sockets too, such as the workers of a web server (T24).
        (unit("billing.service"), 0, HOST, "needs the process"),
        (cgroup("/system.slice/*"), 0, HOST, "needs the process"),
        (cgroup("/system.slice/*"), 0, None, "no match"),
        (uid.clone(), 1001, CONTAINER, "no match"),
        (unit("billing.service"), 5, HOST, "matched"),
        (
            unit("billing.service"),
            5,
            Some("/system.slice/billing.service/worker"),
            "matched",
        ),
        (
            unit("billing.service"),
            5,
            Some("/system.slice/other.service"),
            "no match",
        ),
        // The unit is delegated to its user, which may choose names below it (T2).
        (
            unit("billing.service"),
            5,
            Some("/user.slice/user@5.service/billing.service"),
            "no match",
        ),
        (unit("billing.service"), 5, Some("/"), "no match"),
        (unit("billing.service"), 5, None, "no match"),
        (cgroup("/system.slice/billing.service"), 5, HOST, "matched"),
        (cgroup("/system.slice/*"), 5, HOST, "matched"),
        (
            cgroup("/system.slice/*"),
            5,
            Some("/system.slice/billing.service/worker"),
            "no match",
        ),
        (
            cgroup("/system.slice/**"),
            5,
            Some("/system.slice/billing.service/worker"),
            "matched",
        ),
        (
            cgroup("/system.slice/**"),
            5,
            Some("/system.slice2/billing.service"),
            "no match",
        ),
        (cgroup("/system.slice/Billing.service"), 5, HOST, "no match"),
        (cgroup("/system.slice/*"), 5, None, "no match"),
        // Only a rule with the cgroup can match a container (T6).
        (cgroup("/system.slice/docker-*"), 5, CONTAINER, "matched"),
        (
            WorkloadRule {
                uid: Some(1001),
                ..cgroup("/system.slice/docker-*")
            },
            1001,
            CONTAINER,
            "matched",
        ),
        (
            WorkloadRule {
                uid: Some(1001),
                ..cgroup("/system.slice/docker-*")
            },
            5,
            CONTAINER,
            "no match",
        ),
        (
            WorkloadRule {
                uid: Some(1001),
                ..unit("billing.service")
            },
            1001,
            HOST,
            "matched",
        ),
        (
            WorkloadRule {
                uid: Some(1001),
                ..unit("billing.service")
            },
            1002,
            HOST,
            "no match",
        ),
        (
            WorkloadRule {
                uid: Some(1001),
                ..unit("other.service")
            },
            1001,
            HOST,
            "no match",
        ),
    ];
    for (rule, uid, path, expected) in table {
        decides(&rule, &by_socket(uid, path), expected);
    }
}

#[test]
fn rule_needs_the_process_if_no_cgroup_shows_a_container() {
    let uid = WorkloadRule {
        uid: Some(1001),
        ..rule()
    };
    for path in [None, Some("/")] {
        decides(&uid, &by_socket(1001, path), "needs the process");
        decides(&uid, &by_socket(1002, path), "no match");
        decides(
            &uid,
            &with_process(by_socket(1001, path), process()),
            "matched",
        );
        let in_container = Process {
            in_container: true,
            ..process()
        };
        decides(
            &uid,
            &with_process(by_socket(1001, path), in_container),
            "no match",
        );
    }
    // A process in namespaces of its own is in a container, whatever its cgroup's name.
    let in_container = Process {
        in_container: true,
        ..process()
    };
    decides(
        &uid,
        &with_process(by_socket(1001, HOST), in_container.clone()),
        "no match",
    );
    let named = WorkloadRule {
        cgroup: glob("/system.slice/*"),
        ..uid
    };
    decides(
        &named,
        &with_process(by_socket(1001, HOST), in_container),
        "matched",
    );
}

#[test]
fn group_rules_need_the_process() {
    let table = [
        (
            WorkloadRule {
                gid: Some(100),
                ..rule()
            },
            "matched",
        ),
        (
            WorkloadRule {
                gid: Some(1002),
                ..rule()
            },
            "no match",
        ),
        (
            WorkloadRule {
                supplementary_group: Some(1002),
                ..rule()
            },
            "matched",
        ),
        (
            WorkloadRule {
                supplementary_group: Some(100),
                ..rule()
            },
            "no match",
        ),
        (
            WorkloadRule {
                gid: Some(100),
                supplementary_group: Some(27),
                ..rule()
            },
            "matched",
        ),
        (
            WorkloadRule {
                gid: Some(100),
                supplementary_group: Some(28),
                ..rule()
            },
            "no match",
        ),
    ];
    for (rule, expected) in table {
        decides(&rule, &by_socket(7, HOST), "needs the process");
        decides(
            &rule,
            &with_process(by_socket(7, HOST), process()),
            expected,
        );
        decides(&rule, &by_socket(7, CONTAINER), "no match");
        // Groups that were read for an agent are known by their digest only.
        let digest = Groups::new(vec![27, 1002], GroupDetail::Digest).unwrap();
        let unlisted = Process {
            groups: Some(digest),
            ..process()
        };
        let expected = if rule.supplementary_group.is_some() {
            "needs the process"
        } else {
            expected
        };
        decides(&rule, &with_process(by_socket(7, HOST), unlisted), expected);
        // If the socket excludes the caller, no search is necessary.
        decides(
            &WorkloadRule {
                uid: Some(8),
                ..rule
            },
            &by_socket(7, HOST),
            "no match",
        );
    }
}

#[test]
fn overflow_id_matches_no_rule() {
    for rule in [
        WorkloadRule {
            uid: Some(OVERFLOW_ID),
            ..rule()
        },
        WorkloadRule {
            systemd_unit: Some("billing.service".into()),
            ..rule()
        },
    ] {
        decides(&rule, &by_socket(OVERFLOW_ID, HOST), "no match");
        decides(
            &rule,
            &with_process(by_socket(OVERFLOW_ID, HOST), process()),
            "no match",
        );
    }
    let unmapped = Process {
        gid: OVERFLOW_ID,
        groups: groups(&[OVERFLOW_ID]),
        ..process()
    };
    for rule in [
        WorkloadRule {
            gid: Some(OVERFLOW_ID),
            ..rule()
        },
        WorkloadRule {
            supplementary_group: Some(OVERFLOW_ID),
            ..rule()
        },
    ] {
        decides(
            &rule,
            &with_process(by_socket(7, HOST), unmapped.clone()),
            "no match",
        );
    }
}

fn executable(file: &std::fs::Metadata, shown: &Path) -> Executable {
    Executable {
        device: file.dev(),
        inode: file.ino(),
        changed: (file.ctime(), file.ctime_nsec()),
        path: shown.into(),
    }
}

#[test]
fn exe_matches_the_current_file() {
    let directory = tempfile::tempdir().unwrap();
    let [program, copy, link] = ["program", "copy", "link"].map(|name| directory.path().join(name));
    std::fs::write(&program, "v1").unwrap();
    std::fs::write(&copy, "v1").unwrap();
    std::os::unix::fs::symlink(&program, &link).unwrap();
    // `shown` is the target of /proc/<pid>/exe, which the caller can forge (T11).
    let running = |file: &Path, shown: &Path| {
        let exe = executable(&std::fs::metadata(file).unwrap(), shown);
        with_process(by_socket(7, HOST), running_program(Some(exe)))
    };
    let only = |path: &Path| WorkloadRule {
        exe: Some(ExeMatcher::new(path.to_owned())),
        ..rule()
    };

    decides(&only(&program), &by_socket(7, HOST), "needs the process");
    decides(&only(&program), &running(&program, &program), "matched");
    decides(
        &only(&program),
        &running(&program, Path::new("/elsewhere")),
        "matched",
    );
    decides(&only(&link), &running(&program, &program), "matched");
    decides(&only(&program), &running(&copy, &program), "no match");
    // The program was not read, or could not be read for lack of permission.
    decides(
        &only(&program),
        &with_process(by_socket(7, HOST), process()),
        "needs the process",
    );
    decides(
        &WorkloadRule {
            gid: Some(1),
            ..only(&program)
        },
        &with_process(by_socket(7, HOST), process()),
        "no match",
    );
    decides(
        &only(&program),
        &with_process(by_socket(7, HOST), running_program(None)),
        "no match",
    );
    decides(
        &only(&directory.path().join("missing")),
        &running(&program, &program),
        "no match",
    );
    let same_inode_elsewhere = {
        let mut caller = running(&program, &program);
        let exe = caller
            .process
            .as_mut()
            .and_then(|process| process.program.as_mut()?.exe.as_mut());
        exe.unwrap().device += 1;
        caller
    };
    decides(&only(&program), &same_inode_elsewhere, "no match");
    decides(
        &WorkloadRule {
            uid: Some(8),
            ..only(&program)
        },
        &running(&program, &program),
        "no match",
    );
    decides(
        &WorkloadRule {
            uid: Some(7),
            ..only(&program)
        },
        &running(&program, &program),
        "matched",
    );

    // An upgrade replaces the file. A process that executes the old file no longer matches, and one
    // that executes the new file does.
    let old = running(&program, &program);
    std::fs::rename(&copy, &program).unwrap();
    decides(&only(&program), &old, "no match");
    decides(&only(&program), &running(&program, &program), "matched");
}

/// Covers a stat of a moment ago. The executable of a running process is read by its open file, as
/// `/proc/<pid>/exe` shows it.
#[test]
fn exe_does_not_match_a_file_that_was_moved() {
    let directory = tempfile::tempdir().unwrap();
    let [program, other] = ["program", "other"].map(|name| directory.path().join(name));
    let rule = WorkloadRule {
        exe: Some(ExeMatcher::new(program.clone())),
        ..rule()
    };
    let decides_of = |running: &std::fs::File, expected: &str| {
        let exe = executable(&running.metadata().unwrap(), &program);
        decides(
            &rule,
            &with_process(by_socket(7, HOST), running_program(Some(exe))),
            expected,
        );
    };
    type ReplaceFile<'t> = &'t dyn Fn(&Path, &Path);
    let takes: [ReplaceFile<'_>; 3] = [
        &|program, _| std::fs::remove_file(program).unwrap(),
        &|program, other| std::fs::rename(program, other).unwrap(),
        &|program, other| {
            std::fs::write(other, "v2").unwrap();
            std::fs::rename(other, program).unwrap();
        },
    ];
    for take in takes {
        std::fs::write(&program, "v1").unwrap();
        let running = std::fs::File::open(&program).unwrap();
        decides_of(&running, "matched");
        // The file was found there a moment ago, and is not read again.
        let cached = || {
            rule.exe
                .as_ref()
                .unwrap()
                .cached
                .lock()
                .unwrap()
                .as_ref()
                .unwrap()
                .at
        };
        let first = cached();
        decides_of(&running, "matched");
        assert_eq!(cached(), first);
        take(&program, &other);
        decides_of(&running, "no match");
    }
    // This replaces a directory on the path, which the cache does not detect at once.
    let [old, new] = ["old", "new"].map(|name| directory.path().join(name));
    std::fs::create_dir(&old).unwrap();
    std::fs::write(old.join("program"), "v1").unwrap();
    let running = std::fs::File::open(old.join("program")).unwrap();
    let file = ExeMatcher::new(old.join("program"));
    let runs = || {
        file.is(
            &executable(&running.metadata().unwrap(), Path::new("")),
            Instant::now(),
        )
    };
    assert_eq!(runs(), None);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    assert!(runtime.block_on(file.refresh_stat()));
    assert_eq!(runs(), Some(true));
    std::fs::rename(&old, &new).unwrap();
    file.cached.lock().unwrap().as_mut().unwrap().at -= STAT_TTL;
    assert_eq!(runs(), None);
}

/// A later rule would return another workload's identity, if that program is running.
#[test]
fn unreadable_exe_is_undecided() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    std::os::unix::fs::symlink(&path, &path).unwrap();
    let file = ExeMatcher::new(path.clone());
    let found = std::fs::metadata(directory.path()).unwrap();
    let since = Instant::now();
    let runs = || file.is(&executable(&found, Path::new("")), since);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    assert!(!runtime.block_on(file.refresh_stat()));
    assert_eq!(runs(), None);
    std::fs::remove_file(&path).unwrap();
    assert!(runtime.block_on(file.refresh_stat()));
    assert_eq!(runs(), Some(false));
}

#[test]
fn first_matching_rule_wins() {
    let named = |name: &str, rule: WorkloadRule| WorkloadRule {
        spiffe_id: SpiffeId::parse(&format!("spiffe://example.org/{name}")).unwrap(),
        ..rule
    };
    let rules = [
        named(
            "other",
            WorkloadRule {
                uid: Some(1),
                ..rule()
            },
        ),
        named(
            "by-group",
            WorkloadRule {
                uid: Some(2),
                gid: Some(100),
                ..rule()
            },
        ),
        named(
            "by-uid",
            WorkloadRule {
                uid: Some(2),
                ..rule()
            },
        ),
        named(
            "second",
            WorkloadRule {
                uid: Some(1),
                ..rule()
            },
        ),
    ];
    let chosen = |caller: &Caller| match decide_with_files(&rules, caller) {
        Decision::Matched(rule) => rule
            .spiffe_id
            .to_string()
            .replace("spiffe://example.org/", ""),
        other => format!("{other:?}"),
    };
    assert_eq!(
        chosen(&with_process(by_socket(1, HOST), process())),
        "other"
    );
    assert_eq!(chosen(&by_socket(3, HOST)), "NoMatch");
    // The first rule has no location, so a process has to hold the socket and match.
    assert_eq!(chosen(&by_socket(1, HOST)), "NeedsProcess");
    // The second rule comes first, so the third must not match before the second is decided.
    assert_eq!(chosen(&by_socket(2, HOST)), "NeedsProcess");
    assert_eq!(
        chosen(&with_process(by_socket(2, HOST), process())),
        "by-group"
    );
    assert_eq!(
        chosen(&with_process(
            by_socket(2, HOST),
            Process {
                gid: 5,
                ..process()
            }
        )),
        "by-uid"
    );
    assert_eq!(
        decide_with_files(&[], &by_socket(1, HOST)),
        Decision::NoMatch
    );
}
