//! The chart's objects: the same as those of the Kustomize tree, whatever is enabled.

use serde_json::json;

use super::rendered::{
    DEFAULTS, Renderer, VERSION, assert_equal, cluster_key, comparable, key, tree,
};

#[test]
fn chart_equals_the_tree_by_default() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let chart = renderer.chart(&DEFAULTS, &VERSION);
    let tree = renderer.kustomization(&tree());
    assert_equal(comparable(chart), comparable(tree));
}

/// The components that the chart has too, and the values that enable them.
const COMPONENTS: [(&str, &str); 5] = [
    ("dashboard", "dashboards.enabled=true"),
    ("network-policy", "networkPolicy.enabled=true"),
    ("pod-monitor", "metrics.podMonitor.enabled=true"),
    ("prometheus-rule", "metrics.prometheusRule.enabled=true"),
    ("startup-taint", "startupTaint.enabled=true"),
];

#[test]
fn chart_equals_the_tree_for_each_source_and_component() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let listen = |text: String| {
        text.replace("tcp = []", "tcp = [\"127.0.0.1:974\", \"[::1]:974\"]")
            .replace("unix = \"\"", "unix = \"/run/awsvid-socket/awsvid.sock\"")
    };
    for source in ["spiffe-broker", "spire-delegated"] {
        let source_value = format!("source={source}");
        let mut values = DEFAULTS.to_vec();
        values.extend([source_value.as_str(), "environment.mode=none"]);
        let none = renderer.chart(&values, &VERSION);
        let tree = renderer.kustomization(&tree().join(source));
        assert_equal(comparable(none), comparable(tree));

        values.pop();
        values.extend(COMPONENTS.map(|(_, value)| value));
        let mut components: Vec<&str> = COMPONENTS.map(|(name, _)| name).to_vec();
        components.push("environment");
        let chart = renderer.chart(&values, &VERSION);
        let tree = renderer.overlay(source, &components, |text| text);
        assert_equal(comparable(chart), comparable(tree));

        values.push("host.enabled=true");
        // Before `startup-taint`, which changes it.
        components.insert(0, "host");
        let chart = renderer.chart(&values, &VERSION);
        let tree = renderer.overlay(source, &components, listen);
        assert_equal(comparable(chart), comparable(tree));
    }
}

#[test]
fn chart_equals_the_tree_with_instance_metadata() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let components = ["environment", "environment-imds", "imds-address"];
    for (mode, components) in [("endpoint", &components[..2]), ("address", &components)] {
        let mode_value = format!("imds.mode={mode}");
        let mut values = DEFAULTS.to_vec();
        values.push(&mode_value);
        let chart = renderer.chart(&values, &VERSION);
        // As the component describes it; `region` is on by default.
        let table = format!(
            "\n[imds]\nmode = \"{mode}\"\nregion = true\n\
             key_file = \"/run/awsvid-handover/own/imds-key\"\n"
        );
        let tree = renderer.overlay("spiffe-broker", components, |text| text + &table);
        assert_equal(comparable(chart), comparable(tree));
    }
}

#[test]
fn chart_equals_the_tree_with_policies_of_v1beta1() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let api = "admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy";
    let older = ["--kube-version", "1.34.4", "--api-versions", api];
    let values = [&DEFAULTS[..], &["imds.mode=address"]].concat();
    let chart = renderer.chart(&values, &older);
    let components = [
        "environment",
        "environment-imds",
        "imds-address",
        "policies-v1beta1",
    ];
    let table = "\n[imds]\nmode = \"address\"\nregion = true\n\
                 key_file = \"/run/awsvid-handover/own/imds-key\"\n";
    let tree = renderer.overlay("spiffe-broker", &components, |text| text + table);
    assert!(tree.values().any(|object| {
        object["kind"] == "MutatingAdmissionPolicy"
            && object["apiVersion"] == "admissionregistration.k8s.io/v1beta1"
    }));
    assert_equal(comparable(chart), comparable(tree));
}

/// With `hostNetwork` awsvid cannot notice a directory without namespaces. But a node's first pod
/// must not wait for another one that waits for it.
#[test]
fn host_network_creates_no_directory_of_namespaces() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    for (values, components, expected) in [
        (&[][..], &[][..], "DirectoryOrCreate"),
        (&["host.enabled=true"], &["host"], "Directory"),
        (
            &["host.enabled=true", "startupTaint.enabled=true"],
            &["host", "startup-taint"],
            "DirectoryOrCreate",
        ),
    ] {
        let values = [&DEFAULTS[..], values].concat();
        let tree = renderer.overlay("spiffe-broker", components, |text| text);
        for objects in [renderer.chart(&values, &VERSION), tree] {
            let pod = &objects[&key("DaemonSet", "awsvid")]["spec"]["template"]["spec"];
            let volumes = pod["volumes"].as_array().unwrap();
            let netns = volumes.iter().find(|volume| volume["name"] == "netns");
            assert_eq!(netns.unwrap()["hostPath"]["type"], expected, "{values:?}");
        }
    }
}

/// OpenShift rejects a pod with a seccomp profile that its constraints lack. It gives a pod without
/// constraints of its own a user of the namespace's range.
#[test]
fn openshift_allows_profile_and_users() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    for (profile, expected, of_pod) in [
        (
            "seccomp.localhostProfile=",
            "runtime/default",
            "RuntimeDefault",
        ),
        (
            "seccomp.localhostProfile=a.json",
            "localhost/a.json",
            "Localhost",
        ),
    ] {
        let enabled = ["openshift.enabled=true", "startupTaint.enabled=true"];
        let values = [&["strict=false", profile], &enabled[..]].concat();
        let chart = renderer.chart(&values, &VERSION);
        let constraints = cluster_key("SecurityContextConstraints", "awsvid-node");
        assert_eq!(chart[&constraints]["seccompProfiles"], json!([expected]));
        let pod = |kind: &str, name: &str| {
            chart[&key(kind, name)]["spec"]["template"]["spec"]["securityContext"].clone()
        };
        assert_eq!(pod("DaemonSet", "awsvid")["seccompProfile"]["type"], of_pod);
        let taint = pod("Deployment", "startup-taint");
        assert_eq!(taint["runAsNonRoot"], true);
        assert!(taint.get("runAsUser").is_none() && taint.get("runAsGroup").is_none());
    }
}

/// OpenShift rejects a pod with a capability that its constraints lack.
#[test]
fn openshift_allows_each_capability() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    for source in ["spiffe-broker", "spire-delegated"] {
        for mode in ["off", "endpoint", "address"] {
            let (source, mode) = (format!("source={source}"), format!("imds.mode={mode}"));
            let values = ["strict=false", "openshift.enabled=true", &source, &mode];
            let chart = renderer.chart(&values, &VERSION);
            let pod = &chart[&key("DaemonSet", "awsvid")]["spec"]["template"]["spec"];
            let constraints = cluster_key("SecurityContextConstraints", "awsvid-node");
            let mut sets = [
                &pod["containers"][0]["securityContext"]["capabilities"]["add"],
                &chart[&constraints]["allowedCapabilities"],
            ]
            .map(|list| serde_json::from_value::<Vec<String>>(list.clone()).unwrap());
            sets.iter_mut().for_each(|set| set.sort());
            assert_eq!(sets[0], sets[1], "{source} {mode}");
        }
    }
}

/// The paths and names of SPIRE's own chart 0.30.
#[test]
fn chart_fits_the_chart_of_spire() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let example = super::rendered::chart().join("examples/awsvid-values.yaml");
    let options = [&VERSION[..], &["--values", example.to_str().unwrap()]].concat();
    let chart = renderer.chart(&["strict=false"], &options);
    let pod = &chart[&key("DaemonSet", "awsvid")]["spec"]["template"]["spec"];
    let broker = "/run/spire/agent/sockets/csi.spiffe.io/broker";
    let volumes = pod["volumes"].as_array().unwrap();
    let mounts = pod["containers"][0]["volumeMounts"].as_array().unwrap();
    assert!(
        volumes
            .iter()
            .any(|volume| volume["hostPath"]["path"] == broker)
            && mounts.iter().any(|mount| mount["mountPath"] == broker),
        "{pod}"
    );
    let config = &chart[&key("ConfigMap", "awsvid")]["data"]["awsvid.toml"];
    let line = format!("broker_socket = \"unix://{broker}/broker.sock\"");
    assert!(config.as_str().unwrap().contains(&line), "{config}");
    let review = cluster_key("ClusterRoleBinding", "awsvid-spire-agent-review");
    assert_eq!(
        chart[&review]["subjects"],
        json!([{ "kind": "ServiceAccount", "name": "spire-agent", "namespace": "spire-system" }])
    );
}

#[test]
fn configuration_keeps_types_and_nested_tables() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let config = json!({
        "sts": { "region": "eu-central-1", "max_concurrent": 16 },
        "listen": { "admin": "127.0.0.1:9750", "max_connections": 1_000_000 },
        "audit": { "required": true, "file": "quote \" backslash \\ line\nend é 🦀" },
        "role": [
            { "name": "a", "policy_arns": ["x", "y"], "chain": [{ "role_arn": "z", "tags": { "a b": "c" } }] },
            { "name": "b" },
        ],
        "odd": { "1.5": 1.5, "mixed": [[1, 2], []], "inline": [[{ "k": -3 }]] },
    });
    let set = format!("config={config}");
    let options = [&VERSION[..], &["--set-json", &set]].concat();
    let chart = comparable(renderer.chart(&DEFAULTS, &options));
    let written = &chart[&key("ConfigMap", "awsvid")]["data"]["awsvid.toml"];
    for table in ["audit", "role", "odd", "sts"] {
        assert_eq!(written[table], config[table], "{table}");
    }
    assert_eq!(written["listen"]["admin"], "127.0.0.1:9750");
    assert_eq!(written["listen"]["max_connections"], 1_000_000);
    assert_eq!(written["listen"]["status"], "/run/awsvid/status.sock");
    let annotations =
        &chart[&key("DaemonSet", "awsvid")]["spec"]["template"]["metadata"]["annotations"];
    assert_eq!(annotations["prometheus.io/port"], "9750");
}

/// `helm upgrade --reuse-values` keeps a null of an earlier installation.
#[test]
fn null_in_configuration_removes_the_key() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let config = json!({
        "sts": { "region": null, "endpoint": "https://sts.internal", "timeout": null },
        "cache": null,
    });
    let set = format!("config={config}");
    let options = [&VERSION[..], &["--set-json", &set]].concat();
    let chart = comparable(renderer.chart(&DEFAULTS, &options));
    let written = &chart[&key("ConfigMap", "awsvid")]["data"]["awsvid.toml"];
    assert_eq!(
        written["sts"],
        json!({ "endpoint": "https://sts.internal" })
    );
    assert!(written.get("cache").is_none(), "{written}");
}

#[test]
fn configuration_change_replaces_pods_if_enabled() {
    let Some(renderer) = Renderer::new() else {
        return;
    };
    let sum = |value: &str| {
        let values = ["strict=false", "restartOnConfigChange=true", value];
        let chart = renderer.chart(&values, &VERSION);
        chart[&key("DaemonSet", "awsvid")]["spec"]["template"]["metadata"]["annotations"]
            ["checksum/config"]
            .clone()
    };
    let default = sum("strict=false");
    assert!(default.is_string());
    assert_eq!(sum("host.enabled=false"), default);
    for changed in ["config.sts.region=us-east-1", "configFiles.a=b"] {
        assert!(sum(changed).is_string());
        assert_ne!(sum(changed), default, "{changed}");
    }
    for without in ["restartOnConfigChange=false", "existingConfigMap=mine"] {
        assert!(sum(without).is_null(), "{without}");
    }
    let own = renderer.chart(&["strict=false", "existingConfigMap=mine"], &VERSION);
    assert!(!own.keys().any(|key| key.0 == "ConfigMap"));
}
