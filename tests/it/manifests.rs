//! Checks of the Kubernetes files that need no cluster.

use std::fs;
use std::path::{Path, PathBuf};

/// A name without a registry is docker.io's, where another owner may have it (T38). The chart's
/// templates have names only after Helm renders them: helm/names.rs checks those.
#[test]
fn images_name_registry_and_version() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let mut found = Vec::new();
    let is_template = |file: &PathBuf| file.starts_with(deploy.join("helm"));
    for file in files(&deploy).into_iter().filter(|file| !is_template(file)) {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        let names = text.lines().flat_map(images).map(str::to_owned);
        found.extend(names.map(|image| (file.strip_prefix(&deploy).unwrap().to_owned(), image)));
    }
    assert!(found.len() >= 4, "images in deploy: {found:?}");
    let vague: Vec<_> = found.iter().filter(|(_, image)| !is_whole(image)).collect();
    assert!(
        vague.is_empty(),
        "without a registry, a tag or a digest: {vague:?}"
    );
}

#[test]
fn whole_name_has_registry_and_version() {
    let digest = "registry.example:5000/a@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    for image in [
        "ghcr.io/awsvid/awsvid:0.1.0",
        "docker.io/library/busybox:1.37.0-musl",
        "localhost/a:1",
        digest,
    ] {
        assert!(is_whole(image), "{image}");
    }
    for image in [
        "kubectl",
        "awsvid:0.1.0",
        "library/busybox:1",
        "ghcr.io/a/b",
        "ghcr.io/a:latest",
        "ghcr.io:443/a",
        "",
    ] {
        assert!(!is_whole(image), "{image}");
    }
    let line = "  - image: \"a:1\" # { image: b, newImage: c }";
    assert_eq!(images(line).collect::<Vec<_>>(), ["a:1", "b"]);
}

/// Returns the values of `image:` in a line of YAML, in block style or in braces.
fn images(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("image:").filter_map(|(start, key)| {
        let is_key = line[..start]
            .chars()
            .next_back()
            .is_none_or(|before| " {,".contains(before));
        let value = line[start + key.len()..].trim_start();
        is_key.then(|| {
            value
                .split([' ', ',', '}'])
                .next()
                .unwrap_or_default()
                .trim_matches(['"', '\''])
        })
    })
}

/// Returns whether a container runtime adds nothing to this image's name.
pub(crate) fn is_whole(image: &str) -> bool {
    let Some((registry, path)) = image.split_once('/') else {
        return false;
    };
    let version = path
        .split_once("@sha256:")
        .or_else(|| path.rsplit_once(':'));
    (registry.contains(['.', ':']) || registry == "localhost")
        && version
            .is_some_and(|(name, version)| !name.is_empty() && !["", "latest"].contains(&version))
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| {
            if path.is_dir() {
                files(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}
