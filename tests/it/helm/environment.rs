//! The chart chooses by the cluster's APIs how pods get their variables, and its notes describe it.

use super::rendered::{Objects, Renderer, chart, cluster_key, tree};
use crate::harness::documents;

const POLICY_V1: &str = "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy";
const POLICY_V1BETA1: &str = "admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy";
const KYVERNO: &str = "kyverno.io/v1/ClusterPolicy";

/// The version of a cluster, an API that it has, the chosen kind, a line of the notes.
const CLUSTERS: [(&str, &str, Option<&str>, &str); 7] = [
    (
        "1.36.0",
        "",
        Some(POLICY_V1),
        "Injected by the API server (MutatingAdmissionPolicy awsvid-environment, v1)",
    ),
    (
        "1.35.2",
        POLICY_V1,
        Some(POLICY_V1),
        "Injected by the API server",
    ),
    (
        "1.34.0",
        POLICY_V1BETA1,
        Some(POLICY_V1BETA1),
        "Injected by the API server (MutatingAdmissionPolicy awsvid-environment, v1beta1)",
    ),
    ("1.30.0", KYVERNO, Some(KYVERNO), "Injected by Kyverno"),
    (
        "1.36.0",
        KYVERNO,
        Some(POLICY_V1),
        "Injected by the API server",
    ),
    ("1.35.9", "", None, "NOTHING IS INJECTED"),
    ("1.25.0", "", None, "NOTHING IS INJECTED"),
];

fn options<'a>(version: &'a str, api: &'a str) -> Vec<&'a str> {
    let mut options = vec!["--kube-version", version];
    if !api.is_empty() {
        options.extend(["--api-versions", api]);
    }
    options
}

#[test]
fn environment_follows_the_apis_of_the_cluster() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    for (version, api, chosen, _) in CLUSTERS {
        let objects = renderer.chart(&["strict=false"], &options(version, api));
        let found: Vec<String> = objects
            .iter()
            .filter(|(key, _)| key.2 == "awsvid-environment" && !key.0.ends_with("Binding"))
            .map(|(key, object)| format!("{}/{}", object["apiVersion"].as_str().unwrap(), key.0))
            .collect();
        assert_eq!(found, Vec::from_iter(chosen), "{version} {api}");
    }
    let none = ["strict=false", "environment.mode=none"];
    let objects = renderer.chart(&none, &options("1.36.0", ""));
    assert!(!objects.keys().any(|key| key.2 == "awsvid-environment"));
}

/// Returns the notes that `helm install` prints on such a cluster.
fn notes(renderer: &Renderer, values: &[&str], version: &str, api: &str) -> String {
    // `helm install` has no `--kube-version`, and `helm template` does not print the notes. So a
    // copy of the chart renders them into an object.
    let copy = renderer.folder().join("notes");
    if !copy.exists() {
        copy_folder(&chart(), &copy);
        let notes = copy.join("templates/NOTES.txt");
        let text = std::fs::read_to_string(&notes).unwrap();
        let define = format!("{{{{ define \"notes\" }}}}{text}{{{{ end }}}}");
        std::fs::remove_file(notes).unwrap();
        std::fs::write(copy.join("templates/_notes.tpl"), define).unwrap();
        let object = "apiVersion: v1\nkind: Secret\nmetadata: { name: notes, namespace: awsvid }\n\
                      stringData:\n  notes: |\n    {{- include \"notes\" . | nindent 4 }}\n";
        std::fs::write(copy.join("templates/notes.yaml"), object).unwrap();
    }
    let copy = copy.to_str().unwrap();
    let mut arguments = vec!["template", "awsvid", copy, "--namespace", "awsvid"];
    arguments.extend(options(version, api));
    for value in values {
        arguments.extend(["--set", *value]);
    }
    let rendered = renderer.helm(&arguments).success("helm template");
    let objects = renderer.objects(&rendered);
    let key = ("Secret".to_owned(), "awsvid".to_owned(), "notes".to_owned());
    let text = &objects[&key]["stringData"]["notes"];
    text.as_str().unwrap().to_owned()
}

fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn notes_list_what_is_injected_and_what_is_not() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    for (version, api, chosen, line) in CLUSTERS {
        let notes = notes(&renderer, &["strict=false"], version, api);
        assert!(notes.contains(line), "{version} {api}: {notes}");
        assert_eq!(notes.contains("Not injected:"), chosen.is_some(), "{notes}");
        // The API alone is not enough.
        let is_beta = chosen == Some(POLICY_V1BETA1);
        assert_eq!(notes.contains("feature gate"), is_beta, "{notes}");
    }
}

#[test]
fn notes_print_the_values_for_the_chart_of_spire() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let values: String = example("spire-values.yaml")
        .lines()
        .map(|line| format!("    {line}\n"))
        .collect();
    let broker = notes(&renderer, &["strict=false"], "1.36.0", "");
    assert!(broker.contains(&values), "{broker}");
    let delegated = ["strict=false", "source=spire-delegated"];
    let delegated = notes(&renderer, &delegated, "1.36.0", "");
    assert!(
        delegated.contains("authorizedDelegates: [/ns/awsvid/sa/awsvid]"),
        "{delegated}"
    );
}

/// Returns the lines of an example without its comments.
fn example(name: &str) -> String {
    let text = std::fs::read_to_string(chart().join("examples").join(name)).unwrap();
    text.lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn page_has_the_values_of_the_examples() {
    let spire = documents::block(
        "kubernetes-with-spire.md",
        "1. Let SPIRE serve awsvid",
        "spire-agent:",
    );
    assert_eq!(spire, example("spire-values.yaml"));
    let awsvid = documents::block("kubernetes-with-spire.md", "2. Install awsvid", "spire:");
    let placeholders = awsvid
        .replace("prod.example.com", "example.org")
        .replace("111122223333", "123456789012");
    assert_eq!(placeholders, example("awsvid-values.yaml"));
}

#[test]
fn extra_variables_reach_every_kind_of_container() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let region = "environment.extraVariables.AWS_REGION=eu-central-1";
    // Kyverno has a rule for each kind of container, the others have one variable for both.
    for (mode, count) in [("policy-v1", 1), ("policy-v1beta1", 1), ("kyverno", 2)] {
        let mode = format!("environment.mode={mode}");
        let objects = renderer.chart(&["strict=false", region, &mode], &options("1.36.0", ""));
        let policy = objects
            .iter()
            .find(|(key, _)| key.2 == "awsvid-environment" && !key.0.ends_with("Binding"))
            .expect("the policy");
        let text = policy.1.to_string();
        assert_eq!(
            text.matches("eu-central-1").count(),
            count,
            "{mode}: {text}"
        );
    }
    let values = ["strict=false", region, "environment.mode=none"];
    let notes = notes(&renderer, &values, "1.36.0", "");
    assert_mentions(&notes, &["AWS_REGION=eu-central-1"], &[]);
}

/// The documented patch makes the policy that the chart makes with the same variables.
#[test]
fn documented_patch_adds_extra_variables_to_the_component() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let patch = documents::block("install-kubernetes.md", "The variables", "patches:");
    let values = documents::block("install-kubernetes.md", "The variables", "environment:");
    let write = |name: &str, text: &str| {
        let path = renderer.folder().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let values = write("extra.yaml", &values);
    let options = [
        &options("1.36.0", "")[..],
        &["--values", values.to_str().unwrap()],
    ]
    .concat();
    let chart = renderer.chart(&["strict=false"], &options);
    renderer.overlay("spiffe-broker", &["environment"], |text| text);
    let overlay = renderer.folder().join("overlay");
    let outer = renderer.folder().join("patched");
    std::fs::create_dir(&outer).unwrap();
    let resources = format!("resources: [../{}]", overlay.file_name().unwrap().display());
    std::fs::write(
        outer.join("kustomization.yaml"),
        format!("{resources}\n{patch}"),
    )
    .unwrap();
    let tree = renderer.kustomization(&outer);
    let key = cluster_key("MutatingAdmissionPolicy", "awsvid-environment");
    let variables = |objects: &Objects| {
        let text = objects[&key]["spec"]["variables"][2]["expression"].to_string();
        // CEL has two forms of a string.
        text.replace("\\\"", "'")
    };
    assert_eq!(variables(&chart), variables(&tree));
    assert!(variables(&tree).contains("NO_PROXY"), "{patch}");
}

#[test]
fn variables_follow_the_mode_of_instance_metadata() {
    const DISABLED: &str = "AWS_EC2_METADATA_DISABLED";
    const ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
    const V1_DISABLED: &str = "AWS_EC2_METADATA_V1_DISABLED";
    let Some(renderer) = Renderer::new() else {
        return;
    };
    for (mode, expected, unexpected) in [
        ("off", &[DISABLED][..], &[ENDPOINT, V1_DISABLED][..]),
        ("endpoint", &[ENDPOINT, V1_DISABLED], &[DISABLED]),
        ("address", &[ENDPOINT, V1_DISABLED], &[DISABLED]),
    ] {
        let mode = format!("imds.mode={mode}");
        for environment in ["policy-v1", "policy-v1beta1", "kyverno"] {
            let environment = format!("environment.mode={environment}");
            let values = ["strict=false", &mode, &environment];
            let objects = renderer.chart(&values, &options("1.36.0", ""));
            let (_, policy) = objects
                .iter()
                .find(|(key, _)| key.2 == "awsvid-environment" && !key.0.ends_with("Binding"))
                .expect("the policy");
            assert_mentions(&policy.to_string(), expected, unexpected);
        }
        let notes = notes(&renderer, &["strict=false", &mode], "1.25.0", "");
        assert_mentions(&notes, expected, unexpected);
    }
}

#[test]
fn notes_describe_how_pods_opt_in_to_the_address() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let values = [
        "strict=false",
        "imds.mode=address",
        "imds.namespaceLabel=a.example/b",
    ];
    for (version, expected, unexpected) in [
        ("1.36.0", "the label a.example/b=true", "NO POD GETS IT"),
        ("1.25.0", "NO POD GETS IT", "the label a.example/b=true"),
    ] {
        let notes = notes(&renderer, &values, version, "");
        assert_mentions(&notes, &["169.254.169.254", expected], &[unexpected]);
    }
    let notes = notes(&renderer, &["strict=false"], "1.36.0", "");
    assert_mentions(&notes, &[], &["169.254.169.254"]);
}

/// A pod's own sysctl opts it in as the policy's does.
#[test]
fn pages_have_the_sysctl_and_the_capability_of_the_component() {
    let component = |name: &str| {
        let path = tree().join("components/imds-address").join(name);
        std::fs::read_to_string(path).unwrap()
    };
    let policy = component("policy.yaml");
    for block in [
        documents::block(
            "install-kubernetes.md",
            "The address 169.254.169.254",
            "spec:",
        ),
        documents::block("imds.md", "Serve 169.254.169.254 in pods", "spec:"),
    ] {
        let (_, rest) = block.split_once("{ name: ").expect("a sysctl");
        let (name, rest) = rest.split_once(", value: \"").expect("its value");
        let (value, _) = rest.split_once('"').expect("a string");
        assert!(
            policy.contains(&format!("name: '{name}', value: '{value}'")),
            "{block}"
        );
    }
    let block = documents::block(
        "imds.md",
        "Serve 169.254.169.254 in pods",
        "securityContext:",
    );
    assert!(block.contains("add: [NET_ADMIN]"), "{block}");
    assert!(component("kustomization.yaml").contains("capabilities/add/-, value: NET_ADMIN"));
}

#[test]
fn component_for_older_clusters_has_the_same_variables() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let components = ["environment-patch", "environment-imds"];
    let tree = renderer.overlay("spiffe-broker", &components, |text| text);
    let (_, values) = tree
        .iter()
        .find(|(key, _)| key.0 == "ConfigMap" && key.2 == "awsvid-environment")
        .expect("the variables");
    let data = &values["data"];
    assert_eq!(
        data["EC2_METADATA_SERVICE_ENDPOINT"],
        "http://127.0.0.1:974/"
    );
    assert_eq!(data["EC2_METADATA_V1_DISABLED"], "true");
    assert!(data["EC2_METADATA_DISABLED"].is_null(), "{data}");
}

fn assert_mentions(text: &str, expected: &[&str], unexpected: &[&str]) {
    for name in expected {
        assert!(text.contains(name), "no {name}: {text}");
    }
    for name in unexpected {
        assert!(!text.contains(name), "{name}: {text}");
    }
}
