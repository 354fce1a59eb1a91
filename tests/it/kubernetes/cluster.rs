//! A node with all that awsvid needs, and awsvid as the manifests install it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::counterparts::minio::{self, Minio};
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::spire::{RemoteAgent, Spire, SpireSetting};
use crate::harness::daemon::PROGRAM;
use crate::harness::documents::block;
use crate::harness::forward::Forward;
use crate::harness::is_slow;
use crate::harness::kubernetes::{ADDRESS, Image, NAME, Node, root_of};
use crate::harness::release::Release;
use crate::harness::tls::TlsFront;

/// The image of pods that use the AWS CLI.
pub(super) const AWS: &str = "docker.io/library/aws:test";
const AWSVID: &str = "spiffe://example.org/ns/awsvid/sa/awsvid";
/// The name of the seccomp profile in the kubelet's directory.
const SECCOMP_PROFILE: &str = "awsvid.json";
/// The ports of MinIO and the SPIRE server on the node.
pub(super) const MINIO_PORT: u16 = 9000;
pub(super) const STS_PORT: u16 = 9443;
const SPIRE_PORT: u16 = 8081;

/// The node, SPIRE's server, MinIO with a bucket for each of two service accounts, and awsvid.
pub(super) struct Cluster {
    pub(super) node: Node,
    pub(super) spire: Spire,
    pub(super) minio: Minio,
    folder: PathBuf,
    sts: TlsFront,
    _forwards: [Forward; 3],
}

/// A service account. Its pods may read the object `test.txt` in the bucket of its namespace's
/// name.
#[derive(Clone, Copy, Debug)]
pub(super) struct ServiceAccount {
    pub(super) namespace: &'static str,
    pub(super) name: &'static str,
}

pub(super) const READER: ServiceAccount = ServiceAccount {
    namespace: "shop",
    name: "reader",
};
pub(super) const OTHER: ServiceAccount = ServiceAccount {
    namespace: "office",
    name: "other",
};

impl ServiceAccount {
    pub(super) fn id(self) -> String {
        format!(
            "spiffe://example.org/ns/{}/sa/{}",
            self.namespace, self.name
        )
    }
}

/// Returns the directory of the shipped manifests.
pub(super) fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes")
}

/// Writes a directory in `folder` for `kubectl apply -k`, as an operator would have it: with a
/// configuration of its own, if there are resources.
pub(super) fn overlay(
    folder: &Path,
    name: &str,
    resources: &[&str],
    components: &[&str],
) -> PathBuf {
    let directory = folder.join("overlays").join(name);
    fs::create_dir_all(&directory).unwrap();
    // Kustomize accepts no absolute path.
    let up = "../".repeat(directory.components().count() - 1);
    let base = format!("{up}{}", manifests().strip_prefix("/").unwrap().display());
    let mut kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": resources.iter().map(|name| format!("{base}/{name}")).collect::<Vec<_>>(),
        "components": components.iter().map(|name| format!("{base}/components/{name}")).collect::<Vec<_>>(),
    });
    if !resources.is_empty() {
        kustomization["configMapGenerator"] = json!([
            { "name": "awsvid", "namespace": "awsvid", "behavior": "merge", "files": ["awsvid.toml", "ca.crt"] }
        ]);
    }
    fs::write(
        directory.join("kustomization.yaml"),
        kustomization.to_string(),
    )
    .unwrap();
    directory
}

/// Builds the image of a release, and returns its archive.
fn image(release: &Release) -> PathBuf {
    release.run(&["files", "image"]);
    release.ending(".oci.tar")
}

impl Cluster {
    /// Starts everything except awsvid and the agent.
    pub(super) fn start(folder: &Path) -> Option<Self> {
        // The image that a release has. Its program is the tests' own, but in the slow form, which
        // measures.
        let out = folder.join("release");
        let awsvid = match is_slow() {
            true => Release::built(&out)?,
            false => Release::of_tests(&out, Path::new(PROGRAM))?,
        };
        Self::start_on(Node::start(folder)?, folder, &image(&awsvid))
    }

    /// Starts everything on a node whose container runtime is CRI-O.
    pub(super) fn start_with_cri_o(folder: &Path) -> Option<Self> {
        let awsvid = Release::of_tests(&folder.join("release"), Path::new(PROGRAM))?;
        Self::start_on(Node::start_with_cri_o(folder)?, folder, &image(&awsvid))
    }

    /// Starts all the rest on this node, with the image of awsvid in this archive.
    pub(super) fn start_on(node: Node, folder: &Path, awsvid: &Path) -> Option<Self> {
        let uid = node.get(&["node", NAME])["metadata"]["uid"]
            .as_str()
            .expect("a UID")
            .to_owned();
        let (kubeconfig, api) = node.kubeconfig_outside();
        let setting = SpireSetting {
            remote_agent: Some(RemoteAgent {
                id: format!("spiffe://example.org/spire/agent/k8s_psat/example/{uid}"),
                node_attestor: format!(
                    "NodeAttestor \"k8s_psat\" {{ plugin_data {{ clusters = {{ \"example\" = {{ \
                     service_account_allow_list = [\"awsvid-spire:spire-agent\", \"spire-system:spire-agent\"], kube_config_file = {kubeconfig:?} }} }} }} }}"
                ),
            }),
            ..SpireSetting::default()
        };
        let spire = Spire::start_with(folder, setting)?;
        let mut policy = minio::readable_by(&READER.id(), READER.namespace);
        let more = minio::readable_by(&OTHER.id(), OTHER.namespace);
        policy["Statement"]
            .as_array_mut()
            .unwrap()
            .push(more["Statement"][0].clone());
        let minio = Minio::start(folder, &spire.issuer_url(), &policy)?;
        let minio_address: SocketAddr = minio
            .endpoint()
            .trim_start_matches("http://")
            .parse()
            .unwrap();
        let forwards = [
            api,
            node.offer(SPIRE_PORT, spire.server_address()),
            node.offer(MINIO_PORT, minio_address),
        ];
        let sts = node.offer_with_tls(STS_PORT, minio_address);
        let cluster = Self {
            node,
            spire,
            minio,
            folder: folder.to_owned(),
            sts,
            _forwards: forwards,
        };
        cluster.node.import_archive(awsvid);
        cluster.import_programs();
        cluster.prepare();
        Some(cluster)
    }

    /// Imports the images of the agent and of pods with the AWS CLI.
    fn import_programs(&self) {
        let directory = |name: &str| self.folder.join("images").join(name);
        let program = |name: &str, image: &str, program: &Path, path: &str| {
            let root = root_of(&directory(name), program, path);
            self.node.import(&Image {
                name: image,
                layers: &[&root],
                entrypoint: &[path],
            });
        };
        let agent = self.node.bin().join("spire-agent");
        program(
            "agent",
            "ghcr.io/spiffe/spire-agent:1.15.3",
            &agent,
            "/opt/spire/bin/spire-agent",
        );
        let files = self.node.bin().join("pod-files");
        let (busybox, aws) = (files.join("busybox"), files.join("awscli"));
        self.node.import(&Image {
            name: AWS,
            layers: &[&busybox, &aws],
            entrypoint: &["/usr/bin/aws"],
        });
    }

    /// Sets up what exists before awsvid: the server's bundle, workloads' namespaces, their entries
    /// and objects.
    fn prepare(&self) {
        self.spire
            .register(AWSVID, &["k8s:ns:awsvid", "k8s:sa:awsvid"]);
        let (name, bundle) = ("spire-bundle", self.spire.bundle());
        let mut items = vec![
            json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "awsvid-spire" } }),
            json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name, "namespace": "awsvid-spire" },
                "data": { "bundle.crt": bundle } }),
        ];
        for account @ ServiceAccount { namespace, name } in [READER, OTHER] {
            let labels = json!({ "awsvid.io/environment": "true" });
            items.push(json!({ "apiVersion": "v1", "kind": "Namespace",
                "metadata": { "name": namespace, "labels": labels } }));
            items.push(json!({ "apiVersion": "v1", "kind": "ServiceAccount",
                "metadata": { "name": name, "namespace": namespace } }));
            let selectors = [format!("k8s:ns:{namespace}"), format!("k8s:sa:{name}")];
            self.spire
                .register(&account.id(), &selectors.each_ref().map(String::as_str));
            self.minio.make_bucket(namespace);
            self.minio.put(
                namespace,
                "test.txt",
                format!("hello from the {namespace}\n").as_bytes(),
            );
        }
        self.node
            .apply(&json!({ "apiVersion": "v1", "kind": "List", "items": items }));
    }

    /// Installs the manifests of this directory, with MinIO instead of AWS.
    pub(super) fn install(&self, source: &str) {
        self.install_with(source, &["environment"]);
    }

    /// Installs them with these components.
    pub(super) fn install_with(&self, source: &str, components: &[&str]) {
        self.apply(&self.overlay(source, components, |text| text));
    }

    /// Installs them with awsvid for pods on the node's network, as the README describes.
    pub(super) fn install_for_host(&self, source: &str) {
        let listen = |text: String| {
            let text = text.replace("tcp = []", "tcp = [\"127.0.0.1:974\", \"[::1]:974\"]");
            text.replace("unix = \"\"", "unix = \"/run/awsvid-socket/awsvid.sock\"")
        };
        let directory = self.overlay(source, &["environment", "host"], listen);
        if source == "spire-delegated" {
            let agent =
                fs::read_to_string(manifests().join("examples").join(source).join("agent.conf"))
                    .unwrap();
            let unix = "plugins {\n  WorkloadAttestor \"unix\" {\n    plugin_data {}\n  }";
            fs::write(
                directory.join("agent.conf"),
                agent.replacen("plugins {", unix, 1),
            )
            .unwrap();
            let file = directory.join("kustomization.yaml");
            let mut kustomization: Value =
                serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
            kustomization["configMapGenerator"].as_array_mut().unwrap().push(
                json!({ "name": "spire-agent", "namespace": "awsvid-spire", "behavior": "merge", "files": ["agent.conf"] }),
            );
            fs::write(file, kustomization.to_string()).unwrap();
        }
        self.apply(&directory);
    }

    /// Installs them with the instance metadata service at its address, as its page describes.
    pub(super) fn install_with_metadata_address(&self, source: &str) {
        let table =
            "[imds]\nmode = \"address\"\nkey_file = \"/run/awsvid-handover/own/imds-key\"\n\n";
        let components = ["environment", "environment-imds", "imds-address"];
        let directory = self.overlay(source, &components, |text| format!("{table}{text}"));
        self.apply(&directory);
    }

    /// Returns the certificate of MinIO's port with TLS.
    pub(super) fn certificate(&self) -> String {
        self.sts.certificate().to_owned()
    }

    /// Writes an overlay of the manifests, with another `[listen]`.
    fn overlay(
        &self,
        source: &str,
        components: &[&str],
        listen: impl Fn(String) -> String,
    ) -> PathBuf {
        self.overlay_of(&format!("examples/{source}"), source, components, listen)
    }

    /// The same of another folder than an example's, whose configuration is that of `source`.
    pub(super) fn overlay_of(
        &self,
        resource: &str,
        source: &str,
        components: &[&str],
        listen: impl Fn(String) -> String,
    ) -> PathBuf {
        let text = fs::read_to_string(manifests().join(source).join("awsvid.toml")).unwrap();
        let (start, _) = text.split_once("[sts]").expect("the example's [sts]");
        let start = listen(start.to_owned());
        let text = format!(
            "{start}audience = {:?}\n[sts]\nendpoint = {:?}\nca_file = \"/etc/awsvid/ca.crt\"\n[log]\nlevel = \"awsvid=debug,info\"\n\
             [[role]]\nname = \"all\"\nspiffe_id = \"spiffe://example.org/ns/*/sa/*\"\nrole_arn = {:?}\n",
            minio::AUDIENCE,
            self.sts.url(),
            self.minio.role_arn(),
        );
        let directory = overlay(
            &self.folder,
            &[
                resource.replace('/', "-").as_str(),
                components.join("-").as_str(),
            ]
            .join("-"),
            &[resource],
            components,
        );
        fs::write(directory.join("awsvid.toml"), text).unwrap();
        fs::write(directory.join("ca.crt"), self.sts.certificate()).unwrap();
        directory
    }

    /// Copies awsvid's seccomp profile to where the kubelet expects it, by the name that the guide
    /// has.
    pub(super) fn install_seccomp_profile(&self) {
        let patch = block(
            "install-kubernetes.md",
            "A narrower seccomp profile",
            "securityContext:",
        );
        let name = format!("localhostProfile: {SECCOMP_PROFILE} }}");
        assert!(patch.contains(&name), "{patch}");
        let directory = self.node.path("/var/lib/kubelet/seccomp");
        fs::create_dir_all(&directory).unwrap();
        let profile = manifests().join("seccomp.json");
        fs::copy(profile, directory.join(SECCOMP_PROFILE)).unwrap();
    }

    /// Returns values of the Helm chart with MinIO as the STS, as `overlay` does it in TOML, and
    /// the seccomp profile.
    pub(super) fn chart_values(&self) -> Value {
        json!({
            "strict": false,
            "seccomp": { "localhostProfile": SECCOMP_PROFILE },
            "config": {
                "identity": { "audience": minio::AUDIENCE },
                // A null removes the chart's example.
                "sts": { "region": null, "endpoint": self.sts.url(), "ca_file": "/etc/awsvid/ca.crt" },
                "log": { "level": "awsvid=debug,info" },
                "role": [{
                    "name": "all", "spiffe_id": "spiffe://example.org/ns/*/sa/*",
                    "role_arn": self.minio.role_arn(),
                }],
            },
            "configFiles": { "ca.crt": self.sts.certificate() },
        })
    }

    fn apply(&self, directory: &Path) {
        self.node
            .kubectl(&["apply", "--kustomize", directory.to_str().unwrap()])
            .success("kubectl apply -k");
        self.node
            .rolled_out("awsvid-spire", "daemonset/spire-agent");
        self.node.rolled_out("awsvid", "daemonset/awsvid");
    }

    /// Returns a pod of an account that runs a shell script with the AWS CLI, and no setting that
    /// names credentials.
    pub(super) fn pod(&self, account: ServiceAccount, name: &str, script: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": account.namespace },
            "spec": {
                "serviceAccountName": account.name, "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
                "containers": [container("main", script)],
            },
        })
    }

    /// Returns awsvid's audit records so far.
    pub(super) fn audit(&self) -> Vec<Value> {
        let log = self.node.pod_log("awsvid", "awsvid");
        let records = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        records
            .filter(|record| record["target"] == "audit")
            .collect()
    }

    /// Waits until a record of the audit matches.
    pub(super) fn audited(&self, what: &str, matches: impl Fn(&Value) -> bool) -> Value {
        let timeout = std::time::Duration::from_secs(30);
        await_some(what, timeout, || {
            self.audit().into_iter().find(|record| matches(record))
        })
    }
}

/// Returns a container that runs a script with the AWS CLI.
pub(super) fn container(name: &str, script: &str) -> Value {
    json!({
        "name": name, "image": AWS, "command": ["/bin/busybox", "sh", "-ec", script],
        "env": [{ "name": "AWS_REGION", "value": "us-east-1" }],
    })
}

/// Returns the command that prints an account's object.
pub(super) fn copy(account: ServiceAccount) -> String {
    let ServiceAccount { namespace, .. } = account;
    format!("aws --endpoint-url http://{ADDRESS}:{MINIO_PORT} s3 cp s3://{namespace}/test.txt -")
}
