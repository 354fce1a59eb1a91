//! The archive of a release, its checksums and SBOMs, and the address of the repository.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{TIMEOUT, linked_crates, output, text};
use crate::harness::counterparts::process::run;
use crate::harness::release::Release;

/// The archive's files, apart from manual pages.
const ARCHIVED: [&str; 15] = [
    "CHANGELOG.md.gz",
    "LICENCES.txt",
    "LICENSE",
    "README.md",
    "_awsvid",
    "awsvid",
    "awsvid.bash",
    "awsvid.fish",
    "awsvid.logrotate",
    "awsvid.service",
    "awsvid.socket",
    "awsvid.tmpfiles.conf",
    "awsvid.toml",
    "spiffe-broker.toml",
    "spire-delegated.toml",
];

/// Asserts that a release with packages has all other files that are published.
pub(super) fn assert_complete(release: &Release) {
    release.run(&["archive", "sbom", "sums"]);
    assert_bills_are_complete(release);
    assert_archived(&release.ending(".tar.gz"));

    let sums = release.path("SHA256SUMS");
    let mut check = Command::new("sha256sum");
    check.args(["--check", "--strict"]).arg(&sums);
    check.current_dir(sums.parent().unwrap());
    let checked = run(check, b"", TIMEOUT).success("sha256sum");
    let checked: BTreeSet<&str> = checked
        .lines()
        .filter_map(|line| line.strip_suffix(": OK"))
        .collect();
    let published =
        [".deb", ".rpm", ".tar.gz", "64.cdx.json", ".oci.cdx.json"].map(|end| release.ending(end));
    let published: BTreeSet<&str> = published
        .iter()
        .filter_map(|path| path.file_name()?.to_str())
        .collect();
    assert_eq!(checked, published);
}

fn assert_archived(archive: &Path) {
    let listed = output(
        "tar",
        &[
            "--list",
            "--verbose",
            "--numeric-owner",
            "--file",
            text(archive),
        ],
    );
    let name = archive.file_name().unwrap().to_str().unwrap();
    let top = format!("{}/", name.strip_suffix(".tar.gz").unwrap());
    let files: BTreeSet<&str> = listed
        .lines()
        .filter(|line| !line.starts_with('d'))
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert_eq!(words[1], "0/0", "{line}");
            words[5].strip_prefix(&top).expect(line)
        })
        .filter(|path| !path.starts_with("man"))
        .collect();
    assert_eq!(files, ARCHIVED.into());
    assert!(listed.contains("man1/awsvid-serve.1.gz"), "{listed}");
}

/// Asserts that a bill of materials has each crate that the program links. That of the image also
/// has its certificates.
fn assert_bills_are_complete(release: &Release) {
    for (end, more) in [
        ("64.cdx.json", None),
        (".oci.cdx.json", Some("ca-certificates.crt")),
    ] {
        let bill = fs::read(release.ending(end)).unwrap();
        let bill: Value = serde_json::from_slice(&bill).unwrap();
        assert_eq!(bill["bomFormat"], "CycloneDX");
        let edges = bill["dependencies"].as_array().unwrap();
        let tokio = |reference: &Value| {
            let text = reference.as_str().unwrap();
            text.starts_with("pkg:cargo/tokio@")
        };
        let is_known = |edge: &Value| edge["dependsOn"].as_array().unwrap().iter().any(tokio);
        assert!(edges.iter().any(is_known), "{end}: {edges:?}");
        let components = bill["components"].as_array().unwrap();
        let names: BTreeSet<String> = components
            .iter()
            .map(|component| {
                let field = |name: &str| component[name].as_str().unwrap_or_default();
                format!("{} {}", field("name"), field("version"))
            })
            .collect();
        let crates = linked_crates();
        let missing: Vec<_> = crates
            .iter()
            .filter(|name| !names.contains(*name))
            .collect();
        assert!(missing.is_empty(), "{end}: {missing:?}");
        let has = |name: &str| components.iter().any(|component| component["name"] == name);
        assert!(more.is_none_or(has), "{end}: {more:?}");
    }
}

/// Cargo.toml has it. The documents and the manifests name the same.
#[test]
fn repository_is_that_of_the_manifest_everywhere() {
    let repository = env!("CARGO_PKG_REPOSITORY");
    let owner = repository.strip_prefix("https://github.com/").unwrap();
    let owner = owner.strip_suffix("/awsvid").unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = 0;
    let mut waiting = vec![
        root.join("README.md"),
        root.join("deploy"),
        root.join("src"),
    ];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            let entries = fs::read_dir(&path).unwrap();
            waiting.extend(entries.map(|entry| entry.unwrap().path()));
            continue;
        }
        let content = fs::read_to_string(&path).unwrap_or_default();
        for host in ["github.com/", "ghcr.io/"] {
            for (_, rest) in content
                .match_indices(host)
                .map(|(at, _)| content.split_at(at + host.len()))
            {
                let Some((before, _)) = rest.split_once("/awsvid") else {
                    continue;
                };
                if before
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
                {
                    found += 1;
                    assert_eq!(before, owner, "{}", path.display());
                }
            }
        }
    }
    assert!(found > 5, "{found}");
}
