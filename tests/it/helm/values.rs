//! The chart's values: one list in `values.yaml`, the schema and the README, closed and strict.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::rendered::{Renderer, VERSION, chart, comparable, key};
use crate::harness::counterparts::process::run;
use crate::harness::daemon::PROGRAM;
use crate::harness::documents::block;

const TIMEOUT: Duration = Duration::from_secs(60);
const README: &str = include_str!("../../../deploy/helm/awsvid/README.md");
const SCHEMA: &str = include_str!("../../../deploy/helm/awsvid/values.schema.json");
const CHART: &str = include_str!("../../../deploy/helm/awsvid/Chart.yaml");

/// A value's default and its meaning.
type Entries = BTreeMap<String, (Value, String)>;

/// Collects the schema's values, and asserts that it is closed.
fn schema_entries(path: &str, schema: &Map<String, Value>, found: &mut Entries) {
    let properties = schema["properties"].as_object().unwrap();
    assert_eq!(
        schema["additionalProperties"], false,
        "{path} is open to misspelled names"
    );
    for (name, property) in properties {
        let path = format!("{path}{name}");
        let property = property.as_object().unwrap();
        if let Some(default) = property.get("default") {
            let meaning = property["description"].as_str().unwrap().to_owned();
            found.insert(path, (default.clone(), meaning));
        } else if path != "global" {
            schema_entries(&format!("{path}."), property, found);
        }
    }
}

fn schema() -> Entries {
    let schema: Value = serde_json::from_str(SCHEMA).unwrap();
    let mut found = Entries::new();
    schema_entries("", schema.as_object().unwrap(), &mut found);
    assert!(found.len() > 40, "{}", found.len());
    found
}

/// Returns `values.yaml` as JSON, by a chart that prints its values.
fn values(renderer: &Renderer) -> Value {
    let probe = renderer.folder().join("probe");
    fs::create_dir_all(probe.join("templates")).unwrap();
    let write = |name: &str, text: &str| fs::write(probe.join(name), text).unwrap();
    write(
        "Chart.yaml",
        "apiVersion: v2\nname: probe\nversion: 0.0.0\n",
    );
    let template = "kind: Values\napiVersion: v1\nmetadata: { name: values }\n\
                    text: {{ toRawJson .Values | quote }}\n";
    write("templates/values.yaml", template);
    fs::copy(chart().join("values.yaml"), probe.join("values.yaml")).unwrap();
    let arguments = ["template", "probe", probe.to_str().unwrap()];
    let rendered = renderer.helm(&arguments).success("helm template");
    let objects = renderer.objects(&rendered);
    let object = objects.values().next().unwrap();
    serde_json::from_str(object["text"].as_str().unwrap()).unwrap()
}

/// Returns the default at a path such as `image.tag`.
fn at<'a>(values: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(values, |value, name| &value[name])
}

/// Counts the values that are not tables of others.
fn leaves(path: &str, value: &Value, known: &Entries) -> Vec<String> {
    if known.contains_key(path) {
        return vec![path.to_owned()];
    }
    let Some(fields) = value.as_object() else {
        return vec![format!("{path}, which the schema lacks")];
    };
    let prefix = if path.is_empty() {
        String::new()
    } else {
        format!("{path}.")
    };
    fields
        .iter()
        .flat_map(|(name, value)| leaves(&format!("{prefix}{name}"), value, known))
        .collect()
}

#[test]
fn schema_has_the_values_and_their_defaults() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let (schema, values) = (schema(), values(&renderer));
    let mut found = leaves("", &values, &schema);
    found.sort();
    assert_eq!(found, schema.keys().cloned().collect::<Vec<_>>());
    for (path, (default, _)) in &schema {
        assert_eq!(at(&values, path), default, "{path}");
    }
}

#[test]
fn readme_has_the_values_and_their_defaults() {
    let mut rows = BTreeMap::new();
    for line in README.lines() {
        let cells: Vec<&str> = line.trim_matches(['|', ' ']).split(" | ").collect();
        let [name, default, meaning] = cells[..] else {
            continue;
        };
        if let Some(name) = name
            .strip_prefix('`')
            .and_then(|name| name.strip_suffix('`'))
        {
            let earlier = rows.insert(name.to_owned(), (default, meaning));
            assert!(earlier.is_none(), "{name} twice");
        }
    }
    let schema = schema();
    assert_eq!(
        rows.keys().collect::<Vec<_>>(),
        schema.keys().collect::<Vec<_>>()
    );
    for (name, (default, meaning)) in &schema {
        let (shown, explained) = rows[name];
        assert_eq!(explained, meaning, "{name}");
        if name == "config" {
            continue; // A section of its own has it.
        }
        let shown: Value = serde_json::from_str(shown.trim_matches('`')).unwrap();
        assert_eq!(&shown, default, "{name}");
    }
}

/// The chart's schema rejects a key that it does not know, so a wrong key of an example shows here.
#[test]
fn values_of_the_readme_are_rendered() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let roles = block(
        "deploy/helm/awsvid/README.md",
        "Configuration",
        "config:\n  sts:\n    region: eu-central-1\n  role:",
    );
    let files_of_teams = block(
        "deploy/helm/awsvid/README.md",
        "Configuration",
        "config:\n  include:",
    );
    let files = ["roles.yaml", "teams.yaml"].map(|name| renderer.folder().join(name));
    let render = |values: &[&str; 2]| {
        let mut options = VERSION.to_vec();
        for (file, values) in files.iter().zip(values) {
            fs::write(file, values).unwrap();
            options.extend(["--values", file.to_str().unwrap()]);
        }
        let domain = "spire.trustDomain=prod.example.com";
        renderer.render(&["template"], &[domain], &options)
    };
    let rendered = render(&[&roles, &files_of_teams]).success("helm template");
    let objects = comparable(renderer.objects(&rendered));
    let written = &objects[&key("ConfigMap", "awsvid")]["data"]["awsvid.toml"];
    assert_eq!(written["include"], "/etc/awsvid-roles/*.toml");
    assert_eq!(
        written["role"][0]["role_arn"],
        "arn:aws:iam::111122223333:role/billing"
    );
    let pod = &objects[&key("DaemonSet", "awsvid")]["spec"]["template"]["spec"];
    let volumes = pod["volumes"].as_array().unwrap();
    assert!(volumes.iter().any(|volume| volume["name"] == "roles"));

    let misspelled = files_of_teams.replace("extraVolumes:", "extraVolume:");
    let output = render(&[&roles, &misspelled]);
    assert!(
        !output.status.success() && output.stderr.contains("schema"),
        "{output:?}"
    );
}

/// The tables within tables of the example are those of a file that awsvid takes as it is.
#[test]
fn chain_and_roles_anywhere_of_the_readme_are_a_valid_configuration() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let values = block(
        "deploy/helm/awsvid/README.md",
        "Configuration",
        "config:\n  sts:\n    region: eu-central-1\n  roles_anywhere:",
    );
    let file = renderer.folder().join("chain.yaml");
    fs::write(&file, values).unwrap();
    let options = [&VERSION[..], &["--values", file.to_str().unwrap()]].concat();
    let objects = renderer.chart(&["spire.trustDomain=prod.example.com"], &options);
    let text = &objects[&key("ConfigMap", "awsvid")]["data"]["awsvid.toml"];
    let written = renderer.folder().join("awsvid.toml");
    fs::write(&written, text.as_str().unwrap()).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["config", "show", "--config"]).arg(&written);
    let shown = run(command, b"", TIMEOUT).success("awsvid config show");
    let shown: toml::Table = toml::from_str(&shown).unwrap();
    let role = &shown["role"][0];
    assert_eq!(role["exchange"].as_str(), Some("roles-anywhere"));
    let tags = serde_json::to_value(&role["chain"][0]["tags"]).unwrap();
    let expected = json!({ "kubernetes-namespace": "{path[1]}", "spiffe-id": "{spiffe_id}" });
    assert_eq!(tags, expected);
    assert!(shown.contains_key("roles_anywhere"), "{shown}");
}

#[test]
fn versions_agree() {
    let version = env!("CARGO_PKG_VERSION");
    assert!(CHART.contains(&format!("\nversion: {version}\n")));
    assert!(CHART.contains(&format!("\nappVersion: \"{version}\"\n")));
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let arguments = ["lint", "--strict", "--set", "strict=false"];
    let chart = chart();
    renderer
        .helm(&[&arguments[..], &[chart.to_str().unwrap()]].concat())
        .success("helm lint");
    // A cluster that is too old.
    let old = renderer.render(
        &["template"],
        &["strict=false"],
        &["--kube-version", "1.24.0"],
    );
    assert!(
        !old.status.success() && old.stderr.contains("kubeVersion"),
        "{old:?}"
    );
}

#[test]
fn unknown_and_wrong_values_are_rejected() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    for wrong in [
        "nosuch=1",
        "image.nosuch=1",
        "image.digest=sha256:short",
        "spire.agentServiceAccount.nosuch=1",
        "source=spire",
        "spire.brokerSocket=run/relative.sock",
        "environment.mode=maybe",
        "environment.extraVariables.a-b=1",
        "config.identity.broker_socket=unix:///elsewhere",
        "config.pods.enabled=false",
        "imds.mode=always",
        "config.imds.region=false",
        "config.imds.mode=endpoint",
        "namespace.podSecurity=baseline",
    ] {
        let output = renderer.render(&["template"], &["strict=false", wrong], &VERSION);
        assert!(
            !output.status.success() && output.stderr.contains("schema"),
            "{wrong}: {output:?}"
        );
    }
}

#[test]
fn placeholders_are_rejected() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let role = "config.role[0].name=a,config.role[0].spiffe_id=spiffe://prod.example.com/a";
    let arn = |account: &str| format!("config.role[0].role_arn=arn:aws:iam::{account}:role/a");
    let domain = "spire.trustDomain=prod.example.com";
    let failed = |values: &[&str], message: &str| {
        let output = renderer.render(&["template"], values, &VERSION);
        assert!(
            !output.status.success() && output.stderr.contains(message),
            "{values:?}: {output:?}"
        );
    };
    failed(&[], "spire.trustDomain is the placeholder example.org");
    failed(&[domain], "config has the placeholder example.org");
    let placeholder = arn("123456789012");
    failed(
        &[domain, role, &placeholder],
        "config has the placeholder 123456789012",
    );
    let own = arn("111122223333");
    let chart = renderer.chart(&[domain, role, &own], &VERSION);
    assert!(!chart.is_empty());
    let longer = "spire.trustDomain=myexample.org";
    let role_of_longer = role.replace("prod.example.com", "myexample.org");
    let longer = [longer, &role_of_longer, &own];
    assert!(!renderer.chart(&longer, &VERSION).is_empty());
    failed(
        &["spire.trustDomain=prod.example.org"],
        "spire.trustDomain is the placeholder example.org",
    );
    let own_map = ["existingConfigMap=mine", domain];
    assert!(!renderer.chart(&own_map, &VERSION).is_empty());
}
