//! Container images made of files of this computer, as archives that a container runtime imports:
//! no registry, no Docker.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::counterparts::process::run;

/// Bounds the writing of a layer of some hundred megabytes on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The parts of an image.
pub(crate) struct Image<'a> {
    /// Its whole name, such as `docker.io/library/busybox:test`.
    pub(crate) name: &'a str,
    /// Root directories, one layer each.
    pub(crate) layers: &'a [&'a Path],
    /// The command of a container by default.
    pub(crate) entrypoint: &'a [&'a str],
}

impl Image<'_> {
    /// Writes the archive into a directory of its own, and returns its path.
    pub(super) fn archive(&self, directory: &Path) -> PathBuf {
        let layout = directory.join("layout");
        fs::create_dir_all(layout.join("blobs/sha256")).expect("a directory for an image");
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|root| layer(&layout, root))
            .collect();
        let configuration = json!({
            "architecture": architecture(), "os": "linux",
            "config": { "Entrypoint": self.entrypoint, "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] },
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer["digest"]).collect::<Vec<_>>() },
        });
        let configuration = blob(
            &layout,
            "application/vnd.oci.image.config.v1+json",
            &configuration,
        );
        let manifest = json!({ "schemaVersion": 2, "config": configuration, "layers": layers });
        let mut manifest = blob(
            &layout,
            "application/vnd.oci.image.manifest.v1+json",
            &manifest,
        );
        manifest["annotations"] = json!({ "io.containerd.image.name": self.name });
        let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
        fs::write(layout.join("index.json"), index.to_string()).expect("a file");
        fs::write(
            layout.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .expect("a file");
        let archive = directory.join("image.tar");
        tar(&archive, &layout);
        fs::remove_dir_all(&layout).expect("remove an image's directory");
        archive
    }
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

fn layer(layout: &Path, root: &Path) -> Value {
    let file = layout.join("layer");
    tar(&file, root);
    stored(layout, "application/vnd.oci.image.layer.v1.tar", &file)
}

fn blob(layout: &Path, media_type: &str, content: &Value) -> Value {
    let file = layout.join("blob");
    fs::write(&file, content.to_string()).expect("a file");
    stored(layout, media_type, &file)
}

/// Moves a file to the path of its digest, and returns the descriptor.
fn stored(layout: &Path, media_type: &str, file: &Path) -> Value {
    let mut command = Command::new("sha256sum");
    command.arg(file);
    let printed = run(command, b"", TIMEOUT).success("sha256sum");
    let digest = printed
        .split(' ')
        .next()
        .expect("a digest")
        .trim_start_matches('\\');
    let size = fs::metadata(file).expect("a file").len();
    fs::rename(file, layout.join("blobs/sha256").join(digest)).expect("move a file");
    json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size })
}

fn tar(archive: &Path, directory: &Path) {
    let mut command = Command::new("tar");
    command
        .arg("--create")
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(directory);
    command.args(["--owner=0", "--group=0", "--numeric-owner", "."]);
    run(command, b"", TIMEOUT).success("tar");
}

/// Lays out a root directory with a program of this computer at `path`, and the shared libraries
/// that it is linked with.
pub(crate) fn root_of(directory: &Path, program: &Path, path: &str) -> PathBuf {
    let root = directory.join("root");
    let mut files = vec![(program.to_owned(), PathBuf::from(path))];
    let mut command = Command::new("ldd");
    command.arg(program);
    let linked = run(command, b"", TIMEOUT);
    // A program that is linked with nothing makes ldd fail.
    for library in linked
        .stdout
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        files.push((
            fs::canonicalize(library).expect("a library"),
            library.into(),
        ));
    }
    for (from, to) in files {
        let to = root.join(to.strip_prefix("/").expect("an absolute path"));
        fs::create_dir_all(to.parent().expect("a directory")).expect("a directory");
        fs::copy(from, &to).expect("copy a file");
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).expect("a mode");
    }
    root
}
