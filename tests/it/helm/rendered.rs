//! Renders the chart by Helm and the Kustomize tree by kubectl, as maps of objects.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::{folder, tool};

const TIMEOUT: Duration = Duration::from_secs(60);
/// The values with which the chart renders the defaults: the placeholders are part of them, and the
/// Kustomize tree creates the namespace.
pub(super) const DEFAULTS: [&str; 2] = ["strict=false", "namespace.create=true"];
/// The version of Kubernetes that the tests run.
pub(super) const VERSION: [&str; 2] = ["--kube-version", "1.36.3"];

/// The kind, the namespace (empty for the cluster's scope) and the name of an object.
pub(super) type Key = (String, String, String);
pub(super) type Objects = BTreeMap<Key, Value>;

/// The two programs, and a folder for files of a test.
pub(super) struct Renderer {
    helm: PathBuf,
    kubectl: PathBuf,
    folder: TempDir,
}

/// Returns the folder of the chart.
pub(super) fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/helm/awsvid")
}

/// Returns the folder of the Kustomize tree.
pub(super) fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes")
}

impl Renderer {
    /// Returns `None` after a printed skip if a program is missing.
    pub(super) fn new() -> Option<Self> {
        Some(Self {
            helm: tool("helm")?,
            kubectl: tool("kubectl")?,
            folder: folder(),
        })
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn run(&self, program: &Path, arguments: &[&str], input: &str) -> Output {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("HOME", self.folder.path())
            .args(arguments);
        run(command, input.as_bytes(), TIMEOUT)
    }

    pub(super) fn helm(&self, arguments: &[&str]) -> Output {
        self.run(&self.helm, arguments, "")
    }

    /// Runs `helm template`, or another command of that form, with these values and options.
    pub(super) fn render(&self, command: &[&str], values: &[&str], options: &[&str]) -> Output {
        let chart = chart();
        let mut arguments = command.to_vec();
        arguments.extend(["awsvid", chart.to_str().unwrap(), "--namespace", "awsvid"]);
        for value in values {
            arguments.extend(["--set", *value]);
        }
        arguments.extend(options);
        self.helm(&arguments)
    }

    /// Returns the objects of the chart with these values.
    pub(super) fn chart(&self, values: &[&str], options: &[&str]) -> Objects {
        let output = self.render(&["template"], values, options);
        self.objects(&output.success("helm template"))
    }

    /// Returns the objects of a folder with a kustomization.
    pub(super) fn kustomization(&self, directory: &Path) -> Objects {
        let arguments = ["kustomize", directory.to_str().unwrap()];
        let output = self.run(&self.kubectl, &arguments, "");
        self.objects(&output.success("kubectl kustomize"))
    }

    /// Writes a kustomization of these folders of the tree, with the tree's `awsvid.toml` changed
    /// by `change`, and returns its objects.
    pub(super) fn overlay(
        &self,
        source: &str,
        components: &[&str],
        change: impl Fn(String) -> String,
    ) -> Objects {
        let directory = self.folder.path().join("overlay");
        fs::create_dir_all(&directory).unwrap();
        // Kustomize takes no absolute path.
        let up = "../".repeat(directory.components().count() - 1);
        let base = format!("{up}{}", tree().strip_prefix("/").unwrap().display());
        let components: Vec<String> = components
            .iter()
            .map(|name| format!("{base}/components/{name}"))
            .collect();
        let kustomization = json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
            "resources": [format!("{base}/{source}")],
            "components": components,
            "configMapGenerator": [
                { "name": "awsvid", "namespace": "awsvid", "behavior": "merge", "files": ["awsvid.toml"] }
            ],
        });
        let text = fs::read_to_string(tree().join(source).join("awsvid.toml")).unwrap();
        fs::write(directory.join("awsvid.toml"), change(text)).unwrap();
        fs::write(
            directory.join("kustomization.yaml"),
            kustomization.to_string(),
        )
        .unwrap();
        self.kustomization(&directory)
    }

    /// Parses objects in YAML. kubectl converts each to JSON, and adds empty annotations.
    pub(super) fn objects(&self, yaml: &str) -> Objects {
        let convert = [
            "annotate",
            "--local",
            "--output",
            "json",
            "--filename",
            "-",
            "none-",
        ];
        let converted = self.run(&self.kubectl, &convert, yaml).success("kubectl");
        let mut found = Objects::new();
        for object in serde_json::Deserializer::from_str(&converted).into_iter::<Value>() {
            let object = object.unwrap();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let metadata = &object["metadata"];
            let key = (
                text(&object["kind"]),
                text(&metadata["namespace"]),
                text(&metadata["name"]),
            );
            let earlier = found.insert(key.clone(), object);
            assert!(earlier.is_none(), "twice: {key:?}");
        }
        found
    }
}

/// Replaces the text of `awsvid.toml` by its content, so that comments and order do not count.
fn parse_configuration(config_map: &mut Value) {
    let text = &mut config_map["data"]["awsvid.toml"];
    let parsed: toml::Table = toml::from_str(text.as_str().unwrap())
        .unwrap_or_else(|error| panic!("awsvid.toml: {error}\n{text}"));
    *text = serde_json::to_value(parsed).unwrap();
}

/// Parses the objects' configuration, so that its comments and order do not count.
pub(super) fn comparable(mut objects: Objects) -> Objects {
    parse_configuration(objects.get_mut(&key("ConfigMap", "awsvid")).unwrap());
    objects
}

/// Returns the key of an object in awsvid's namespace.
pub(super) fn key(kind: &str, name: &str) -> Key {
    (kind.to_owned(), "awsvid".to_owned(), name.to_owned())
}

/// Returns the key of an object of the cluster's scope.
pub(super) fn cluster_key(kind: &str, name: &str) -> Key {
    (kind.to_owned(), String::new(), name.to_owned())
}

/// Sorts lists of objects with names, because Kubernetes ignores the order.
fn sort_named(value: &mut Value) {
    match value {
        Value::Array(items) => {
            items.iter_mut().for_each(sort_named);
            if !items.is_empty() && items.iter().all(|item| item["name"].is_string()) {
                items.sort_by_key(|item| item["name"].as_str().unwrap().to_owned());
            }
        }
        Value::Object(fields) => fields.values_mut().for_each(sort_named),
        _ => {}
    }
}

/// Asserts that both have the same objects, and shows each difference.
pub(super) fn assert_equal(mut chart: Objects, mut tree: Objects) {
    let mut differences = String::new();
    chart.values_mut().for_each(sort_named);
    tree.values_mut().for_each(sort_named);
    let keys: BTreeSet<&Key> = chart.keys().chain(tree.keys()).collect();
    for key in keys {
        if let (Some(ours), Some(theirs)) = (chart.get(key), tree.get(key)) {
            compare(&format!("{key:?}"), ours, theirs, &mut differences);
        } else if chart.contains_key(key) {
            writeln!(differences, "{key:?}: only in the chart").unwrap();
        } else {
            writeln!(differences, "{key:?}: only in the Kustomize tree").unwrap();
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

fn compare(path: &str, chart: &Value, tree: &Value, differences: &mut String) {
    match (chart, tree) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let only_theirs = theirs.keys().filter(|name| !ours.contains_key(*name));
            for name in ours.keys().chain(only_theirs) {
                let path = format!("{path}.{name}");
                compare(&path, &chart[name], &tree[name], differences);
            }
        }
        (Value::Array(ours), Value::Array(theirs)) if ours.len() == theirs.len() => {
            for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                compare(&format!("{path}[{index}]"), ours, theirs, differences);
            }
        }
        _ if chart == tree => {}
        _ => writeln!(differences, "{path}: chart {chart}, tree {tree}").unwrap(),
    }
}
