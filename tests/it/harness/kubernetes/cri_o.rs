//! CRI-O as a node's container runtime. Its images come from archives too, through the storage that
//! it shares with other programs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::super::counterparts::process::run;
use super::configuration::PAUSE;
use super::{Node, TIMEOUT};

/// Those of `tests/counterparts`. Debian's `conmon` and `skopeo` are needed too.
pub(super) const PROGRAMS: [&str; 4] = ["crio", "pinns", "conmon", "skopeo"];
pub(super) const SOCKET: &str = "/run/crio/crio.sock";
/// The path of an archive on the node while it is imported.
const ARCHIVE: &str = "/var/tmp/image.tar";

/// CRI-O's own paths are below its root directories.
const CONFIGURATION: &str = r#"
[crio]
storage_driver = "overlay"
[crio.runtime]
cgroup_manager = "cgroupfs"
conmon_cgroup = "pod"
default_runtime = "runc"
pinns_path = "BIN/pinns"
hooks_dir = []
[crio.runtime.runtimes.runc]
runtime_path = "/etc/crio/runc"
monitor_path = "BIN/conmon"
monitor_cgroup = "pod"
[crio.image]
pause_image = "PAUSE"
[crio.network]
plugin_dirs = ["BIN"]
"#;

/// Without CAP_SYS_RESOURCE, which a computer may deny its tests, no process can lower its OOM
/// score, and no privileged container can have it: it gets another one twice. A computer with
/// cgroup v1 may not mount the controller of huge pages. CRI-O has no setting for these.
const RUNC: &str = r#"#!/bin/sh
last=
for word; do
    [ "$last" != --bundle ] ||
        sed --in-place --null-data --regexp-extended "$word/config.json" \
            --expression='s/"CAP_SYS_RESOURCE"/"CAP_CHOWN"/g' \
            --expression='s/("oomScoreAdj": *)-[0-9]+/\10/' \
            --expression='s/("hugepageLimits": *)\[[^]]*\]/\1[]/'
    last=$word
done
exec BIN/runc "$@"
"#;

/// Writes its configuration below `files`, with the programs in `bin`.
pub(super) fn write(files: &Path, bin: &Path) {
    let (crio, containers) = (files.join("etc/crio"), files.join("etc/containers"));
    for directory in [&crio, &containers, &files.join("var/tmp")] {
        fs::create_dir_all(directory).expect("a directory");
    }
    let here = |text: &str| {
        let text = text.replace("BIN", &bin.display().to_string());
        text.replace("PAUSE", PAUSE)
    };
    let runc = crio.join("runc");
    fs::write(&runc, here(RUNC)).expect("a file");
    fs::set_permissions(&runc, fs::Permissions::from_mode(0o755)).expect("a mode");
    fs::write(crio.join("crio.conf"), here(CONFIGURATION)).expect("a file");
    let policy = r#"{ "default": [{ "type": "insecureAcceptAnything" }] }"#;
    fs::write(containers.join("policy.json"), policy).expect("a file");
}

/// Imports an OCI archive under the name that is in it.
pub(super) fn import(node: &Node, archive: &Path) {
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--to-stdout");
    tar.arg("--file")
        .arg(archive)
        .args(["--no-anchored", "index.json"]);
    let index = run(tar, b"", TIMEOUT).success("the image's index");
    let index: Value = serde_json::from_str(&index).expect("JSON");
    let annotations = &index["manifests"][0]["annotations"];
    // One of them has the whole name.
    let names = [
        "io.containerd.image.name",
        "org.opencontainers.image.ref.name",
    ];
    let name = names.iter().find_map(|name| annotations[name].as_str());
    let storage = format!("containers-storage:{}", name.expect("the image's name"));
    fs::copy(archive, node.path(ARCHIVE)).expect("a copy of the archive");
    let from = format!("oci-archive:{ARCHIVE}");
    let copied = node.run(&["skopeo", "--insecure-policy", "copy", &from, &storage]);
    copied.success("skopeo");
}
