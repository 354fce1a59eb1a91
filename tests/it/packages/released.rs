//! The programs that `deploy/release` builds. Only the slow form does that: it takes four builds
//! with all optimizations.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::elf::Elf;
use super::{output, text, unpack};
use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{folder, skip};
use crate::harness::release::Release;
use crate::harness::slow_only;

/// Builds the release of a copy of the source in another folder, with another folder of cargo's.
#[test]
fn release_is_reproducible() {
    if !slow_only() {
        return;
    }
    let checkout = env!("CARGO_MANIFEST_DIR");
    if !output("git", &["-C", checkout, "status", "--porcelain"]).is_empty() {
        skip("the checkout has changes without a commit, and a copy would lack them");
        return;
    }
    let folder = folder();
    let Some(first) = Release::built(&folder.path().join("first")) else {
        return;
    };
    first.run(&[
        "static", "files", "archive", "packages", "image", "sbom", "sums",
    ]);
    let source = folder.path().join("a/copy");
    fs::create_dir_all(&source).unwrap();
    let archive = folder.path().join("source.tar");
    output(
        "git",
        &[
            "-C",
            checkout,
            "archive",
            "--output",
            text(&archive),
            "HEAD",
        ],
    );
    unpack(&archive, &source);
    let out = source.join("out");
    fs::create_dir(&out).unwrap();
    let mut build = Command::new(source.join("deploy/release"));
    build
        .env("OUT", &out)
        .env("CARGO_TARGET_DIR", source.join("target"))
        .env("SOURCE_DATE_EPOCH", "1700000000");
    run(build, b"", Duration::from_secs(7200)).success("deploy/release elsewhere");
    let sums = |path: PathBuf| fs::read_to_string(path.join("SHA256SUMS")).unwrap();
    assert_eq!(sums(folder.path().join("first")), sums(out));
}

/// Checks what only the programs of a release have.
#[test]
fn released_programs_run_on_old_systems() {
    if !slow_only() {
        return;
    }
    let folder = folder();
    let Some(release) = Release::built(folder.path()) else {
        return;
    };
    release.run(&["static"]);
    let (linked, fixed) = (release.path("awsvid"), release.path("awsvid-static"));
    let commit = output(
        "git",
        &[
            "-C",
            env!("CARGO_MANIFEST_DIR"),
            "rev-parse",
            "--short=12",
            "HEAD",
        ],
    );
    for program in [&linked, &fixed] {
        Elf::read(program).assert_hardened();
        let content = fs::read(program).unwrap();
        let printable = String::from_utf8_lossy(&content);
        let path = ["/root/", "/home/", env!("CARGO_MANIFEST_DIR")]
            .into_iter()
            .find(|path| printable.contains(path));
        assert_eq!(path, None, "a path of this machine");
        let version = output(text(program), &["--version"]);
        assert!(version.contains(commit.trim()), "{version}");
        assert!(!version.contains(" dev"), "{version}");
        let help = output(text(program), &["--help"]);
        assert!(
            !help.contains("awsvid dev") && !help.contains("  dev"),
            "{help}"
        );
    }
    let elf = Elf::read(&linked);
    assert!(
        elf.newest_glibc() <= Some((2, 28)),
        "{:?}",
        elf.newest_glibc()
    );
    for library in elf.needed() {
        let is_libc = [
            "libc.so.6",
            "libm.so.6",
            "libdl.so.2",
            "libpthread.so.0",
            "librt.so.1",
        ]
        .contains(&&*library)
            || library.starts_with("ld-linux");
        assert!(is_libc, "{library} is not part of libc6");
    }
    assert_eq!(Elf::read(&fixed).needed(), Vec::<String>::new());
}
