//! The programs, packages and image of a release, as `deploy/release` makes them. The ordinary form
//! packs the program of the tests; the slow form builds the programs as the workflow does.
//! `systemd/packages.rs` installs the packages, and `kubernetes.rs` runs the image.

mod archive;
mod elf;
mod released;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::run;
use crate::harness::daemon::PROGRAM;
use crate::harness::is_slow;
use crate::harness::release::Release;
use elf::Elf;

const TIMEOUT: Duration = Duration::from_secs(120);
/// The files that both packages install. Manual pages and completions for zsh are added to it.
const INSTALLED: [(&str, &str); 12] = [
    ("-rwxr-xr-x", "/usr/bin/awsvid"),
    ("-rw-r--r--", "/etc/awsvid/awsvid.toml"),
    ("-rw-r--r--", "/etc/logrotate.d/awsvid"),
    ("-rw-r--r--", "/usr/lib/systemd/system/awsvid.service"),
    ("-rw-r--r--", "/usr/lib/systemd/system/awsvid.socket"),
    ("-rw-r--r--", "/usr/lib/tmpfiles.d/awsvid.conf"),
    (
        "-rw-r--r--",
        "/usr/share/bash-completion/completions/awsvid",
    ),
    (
        "-rw-r--r--",
        "/usr/share/fish/vendor_completions.d/awsvid.fish",
    ),
    ("-rw-r--r--", "/usr/share/doc/awsvid/changelog.gz"),
    ("-rw-r--r--", "/usr/share/doc/awsvid/copyright"),
    ("-rw-r--r--", "/usr/share/doc/awsvid/spiffe-broker.toml"),
    ("-rw-r--r--", "/usr/share/doc/awsvid/spire-delegated.toml"),
];
const CONFIGURATION: [&str; 2] = ["/etc/awsvid/awsvid.toml", "/etc/logrotate.d/awsvid"];

fn output(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C.UTF-8");
    run(command, b"", TIMEOUT).success(&format!("{program} {}", arguments.join(" ")))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Returns a release with the program of the tests, or in the slow form one that is built as the
/// workflow does.
fn release_in(out: &Path) -> Option<Release> {
    match is_slow() {
        true => Release::built(out),
        false => Release::of_tests(out, Path::new(PROGRAM)),
    }
}

/// Asserts that the program in the package has the protections of the compiler and the linker.
fn assert_hardened(package: &Path, unpack: &str) {
    let folder = folder();
    let mut command = Command::new("sh");
    command.current_dir(folder.path());
    command.args(["-euc", unpack, "sh", text(package)]);
    run(command, b"", TIMEOUT).success(unpack);
    Elf::read(&folder.path().join("usr/bin/awsvid")).assert_hardened();
}

#[test]
fn elf_names_each_missing_protection() {
    let elf = Elf::read(Path::new(PROGRAM));
    for (from, to, missing) in [
        (
            "Type:                              DYN",
            "Type:                              EXEC",
            "position-independent",
        ),
        ("GNU_RELRO", "GNU_EH_FRAME", "RELRO"),
        ("NOW", "LAZY", "immediate binding"),
        ("(NEEDED)", "(RUNPATH)", "RPATH"),
        (
            "  GNU_STACK      0x000000 0x0000000000000000 0x0000000000000000 0x000000 0x000000 RW ",
            "  GNU_STACK      0x000000 0x0000000000000000 0x0000000000000000 0x000000 0x000000 RWE",
            "executable stack",
        ),
    ] {
        let changed = elf.replaced(from, to);
        let found = changed.weaknesses();
        assert!(
            found.iter().any(|weakness| weakness.contains(missing)),
            "{missing}: {found:?}"
        );
    }
}

#[test]
fn packages_have_what_a_node_needs() {
    let folder = folder();
    let Some(release) = release_in(&folder.path().join("one")) else {
        return;
    };
    release.run(&["files", "packages"]);
    archive::assert_complete(&release);
    let [deb, rpm] = [".deb", ".rpm"].map(|end| release.ending(end));
    assert_deb(&deb);
    assert_rpm(&rpm);
    assert_hardened(&deb, "dpkg-deb --extract \"$1\" .");
    assert_hardened(
        &rpm,
        "rpm2cpio \"$1\" | cpio --quiet --extract --make-directories --no-absolute-filenames",
    );

    // The same in another folder, from files with other times.
    let Some(other) = release_in(&folder.path().join("other")) else {
        return;
    };
    other.run(&["files", "packages"]);
    for end in [".deb", ".rpm"] {
        let read = |release: &Release| fs::read(release.ending(end)).unwrap();
        assert!(read(&release) == read(&other), "{end}: other bytes");
    }
}

fn assert_deb(deb: &Path) {
    let control = |field: &str| output("dpkg-deb", &["--field", text(deb), field]);
    assert_eq!(control("Package").trim(), "awsvid");
    assert!(control("Depends").contains("libc6 (>= 2.28)"));
    assert!(control("Depends").contains("ca-certificates"));
    let listed = output("dpkg-deb", &["--contents", text(deb)]);
    let files = listed
        .lines()
        .filter(|line| line.starts_with('-'))
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert_eq!(words[1], "root/root", "{line}");
            (
                words[0].to_owned(),
                words[5].trim_start_matches('.').to_owned(),
            )
        });
    assert_eq!(
        files.collect::<BTreeSet<_>>(),
        expected("/usr/share/zsh/vendor-completions/_awsvid")
    );
    let marked = output("dpkg-deb", &["--info", text(deb), "conffiles"]);
    assert_eq!(
        marked.lines().collect::<BTreeSet<_>>(),
        CONFIGURATION.into()
    );
}

fn assert_rpm(rpm: &Path) {
    let query = |arguments: &[&str]| {
        output(
            "rpm",
            &[&["--query", "--package", text(rpm)], arguments].concat(),
        )
    };
    let format = "[%{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILENAMES}\n]";
    let listed = query(&["--queryformat", format]);
    let files = listed
        .lines()
        .filter(|line| line.starts_with('-'))
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            assert_eq!(words[1], "root:root", "{line}");
            (words[0].to_owned(), words[2].to_owned())
        });
    assert_eq!(
        files.collect::<BTreeSet<_>>(),
        expected("/usr/share/zsh/site-functions/_awsvid")
    );
    let marked = query(&["--configfiles"]);
    assert_eq!(
        marked.lines().collect::<BTreeSet<_>>(),
        CONFIGURATION.into()
    );
    assert!(query(&["--requires"]).contains("glibc >= 2.28"));
}

/// Returns modes and paths of all files, with the completions for zsh at this path.
fn expected(zsh: &str) -> BTreeSet<(String, String)> {
    let mut commands = vec![String::new()];
    let help = output(PROGRAM, &["--help"]);
    let listed = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| !line.starts_with("   "));
    let names = listed.filter_map(|line| line.split_whitespace().next());
    // Only the program of the tests has `dev`.
    let missing = |name: &str| name == "help" || (name == "dev" && is_slow());
    commands.extend(
        names
            .filter(|name| !missing(name))
            .map(|name| format!("-{name}")),
    );
    commands.extend(["-config-validate", "-config-show"].map(str::to_owned));
    let pages = commands
        .into_iter()
        .map(|command| format!("/usr/share/man/man1/awsvid{command}.1.gz"));
    let pages = pages.chain([
        "/usr/share/man/man5/awsvid.toml.5.gz".to_owned(),
        zsh.to_owned(),
    ]);
    let pages = pages.map(|path| ("-rw-r--r--".to_owned(), path));
    let fixed = INSTALLED.map(|(mode, path)| (mode.to_owned(), path.to_owned()));
    fixed.into_iter().chain(pages).collect()
}

/// The licences of crates demand that their texts are distributed with the program.
#[test]
fn licences_name_every_linked_crate() {
    let folder = folder();
    let Some(release) = Release::of_tests(folder.path(), Path::new(PROGRAM)) else {
        return;
    };
    release.run(&["files"]);
    let licences = fs::read_to_string(release.path("files/LICENCES.txt")).unwrap();
    assert!(licences.contains("Apache License"), "awsvid's own");
    let crates = linked_crates();
    let missing: Vec<_> = crates
        .iter()
        .filter(|name| !licences.contains(&format!("{name} (")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// Returns name and version of each crate that the program links.
fn linked_crates() -> BTreeSet<String> {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([
        "tree",
        "--locked",
        "--offline",
        "--no-default-features",
        "--target",
        &triple,
        "--edges",
        "normal",
        "--prefix",
        "none",
        "--format",
        "{p}",
    ]);
    let tree = run(cargo, b"", TIMEOUT).success("cargo tree");
    let crates: BTreeSet<String> = tree
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (name, version) = (words.next()?, words.next()?.trim_start_matches('v'));
            (name != "awsvid").then(|| format!("{name} {version}"))
        })
        .collect();
    assert!(crates.len() > 50, "{crates:?}");
    crates
}

#[test]
fn image_has_program_and_certificates_alone() {
    let folder = folder();
    let Some(release) = release_in(folder.path()) else {
        return;
    };
    if is_slow() {
        release.run(&["static"]);
    }
    release.run(&["files", "image"]);
    let first = fs::read(release.ending(".oci.tar")).unwrap();
    release.run(&["image"]);
    let is_same = first == fs::read(release.ending(".oci.tar")).unwrap();
    assert!(is_same, "two archives of one image differ");
    let layout = folder.path().join("layout");
    fs::create_dir(&layout).unwrap();
    unpack(&release.ending(".oci.tar"), &layout);
    let read = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().unwrap().replace(':', "/");
        layout.join("blobs").join(digest)
    };
    let json =
        |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let index = json(layout.join("index.json"));
    let manifest = json(read(&index["manifests"][0]));
    let configuration = json(read(&manifest["config"]));
    let config = &configuration["config"];
    assert_eq!(config["Entrypoint"], serde_json::json!(["/usr/bin/awsvid"]));
    let labels = &config["Labels"];
    assert_eq!(
        labels["org.opencontainers.image.version"],
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(
        labels["org.opencontainers.image.revision"]
            .as_str()
            .map(str::len),
        Some(40),
        "{labels}"
    );
    let root = folder.path().join("root");
    fs::create_dir(&root).unwrap();
    for layer in manifest["layers"].as_array().unwrap() {
        unpack(&read(layer), &root);
    }
    let found = output("find", &[text(&root), "-type", "f", "-printf", "%m /%P\n"]);
    let libraries = |line: &&str| is_slow() || !line.contains("/lib");
    let found: BTreeSet<&str> = found.lines().filter(libraries).collect();
    let expected = [
        "644 /etc/ssl/certs/ca-certificates.crt",
        "644 /usr/share/doc/awsvid/LICENCES.txt",
        "755 /usr/bin/awsvid",
    ];
    assert_eq!(found, expected.into());
    if is_slow() {
        // It runs without the files of any distribution, and finds users in this file.
        let users = "root:x:0:0::/:/bin/sh\nbilling:x:1001:1001::/:/bin/sh\n";
        fs::write(root.join("etc/passwd"), users).unwrap();
        fs::copy("deploy/awsvid.toml", root.join("etc/awsvid.toml")).unwrap();
        let inside = output(
            "chroot",
            &[
                text(&root),
                "/usr/bin/awsvid",
                "config",
                "validate",
                "/etc/awsvid.toml",
            ],
        );
        assert!(!inside.contains("unknown"), "{inside}");
    }
}

fn unpack(archive: &Path, into: &Path) {
    output(
        "tar",
        &[
            "--extract",
            "--file",
            text(archive),
            "--directory",
            text(into),
        ],
    );
}
