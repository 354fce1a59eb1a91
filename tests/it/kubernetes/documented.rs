//! The commands of install-kubernetes.md and upgrade.md, and the recipe of troubleshooting.md for a
//! 403 in a pod, on a real node.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::cluster::{Cluster, READER, manifests};
use crate::harness::counterparts::process::{await_some, run};
use crate::harness::documents::block;
use crate::harness::kubernetes::{Image, root_of};

const TIMEOUT: Duration = Duration::from_secs(180);
/// The time that the page promises. The first step may need several rounds: a pod counts as new for
/// ten seconds.
const RECIPE_TIME: Duration = Duration::from_secs(180);
/// An identity that no role covers.
const STRANGER: &str = "spiffe://example.org/stranger";
const CURL: &str = "docker.io/curlimages/curl:test";
/// The overlay that the guide's kustomization names.
const OVERLAY: &str = "spiffe-broker";

/// Writes the kustomization of the guide next to a checkout of the manifests, with the overlay's
/// own `awsvid.toml`. The guide's digest is a placeholder.
fn kustomization(folder: &Path, text: &str) -> PathBuf {
    fs::create_dir_all(folder.join("awsvid/deploy")).unwrap();
    let mut copy = Command::new("cp");
    copy.arg("--recursive").arg(manifests());
    copy.arg(folder.join("awsvid/deploy/kubernetes"));
    run(copy, b"", TIMEOUT).success("copy the manifests");
    let own = manifests().join(OVERLAY).join("awsvid.toml");
    fs::copy(own, folder.join("awsvid.toml")).unwrap();
    let digest = format!("sha256:{}", "0".repeat(64));
    let text = text.replace("sha256:...", &digest);
    assert!(text.contains(&digest), "{text}");
    fs::write(folder.join("kustomization.yaml"), text).unwrap();
    folder.to_owned()
}

/// Runs a block in this folder. It applies on trial only, because the example's role is one of AWS.
fn run_on_trial(cluster: &Cluster, folder: &Path, block: &str) -> String {
    let on_trial = "kubectl() {
          verb=$1; shift
          case $verb in apply|create) set -- \"$@\" --dry-run=server ;; esac
          command kubectl \"$verb\" \"$@\"
        }";
    let script = format!("cd {}\n{on_trial}\n{block}", folder.display());
    cluster.node.shell(&script).success(block)
}

/// Runs the commands of install-kubernetes.md, README.md and upgrade.md with the guide's
/// kustomization, in the order of the guide.
pub(super) fn documented_commands_work(cluster: &Cluster, folder: &Path) {
    let guide = block(
        "install-kubernetes.md",
        "2. Write a kustomization of your own",
        "apiVersion: kustomize",
    );
    let directory = kustomization(&folder.join("guide"), &guide);
    let rendered = cluster
        .node
        .shell(&format!("kubectl kustomize {}", directory.display()))
        .success("kubectl kustomize");
    assert!(
        rendered.contains("image: images.example.org/awsvid@sha256:")
            && rendered.contains("kind: MutatingAdmissionPolicy")
            && !rendered.contains("ghcr.io/awsvid"),
        "{rendered}"
    );
    for block in [
        block("install-kubernetes.md", "4. Install", "kubectl apply -k ."),
        block(
            "install-kubernetes.md",
            "4. Install",
            "kubectl --namespace awsvid rollout",
        ),
        block("README.md", "Install", "kubectl apply -k ."),
        block("upgrade.md", "Upgrade on Kubernetes", "kubectl apply -k ."),
    ] {
        run_on_trial(cluster, &directory, &block);
    }
}

/// Imports an image with curl and the shell, as the documented one has them.
pub(super) fn import_curl(cluster: &Cluster, folder: &Path) {
    let curl = root_of(
        &folder.join("curl"),
        Path::new("/usr/bin/curl"),
        "/usr/bin/curl",
    );
    let busybox = cluster.node.bin().join("pod-files/busybox");
    let links = folder.join("links");
    fs::create_dir_all(links.join("bin")).unwrap();
    for name in ["sh", "grep", "env"] {
        symlink("/bin/busybox", links.join("bin").join(name)).unwrap();
    }
    cluster.node.import(&Image {
        name: CURL,
        layers: &[&busybox, &links, &curl],
        entrypoint: &["/bin/busybox"],
    });
}

/// Runs the documented steps for a pod without a registration entry, then for one without a role.
pub(super) fn documented_recipe_explains_a_403(cluster: &Cluster) {
    let node = &cluster.node;
    let mut pod = cluster.pod(READER, "billing-0", "busybox sleep 36000");
    pod["spec"]["serviceAccountName"] = "default".into();
    pod["spec"]["containers"][0]["image"] = CURL.into();
    node.apply(&pod);
    let wait = ["wait", "--namespace", READER.namespace, "pod/billing-0"];
    let wait = [&wait[..], &["--for=condition=Ready", "--timeout=60s"]].concat();
    node.kubectl(&wait).success("the pod is ready");

    let start = Instant::now();
    let reason = block("troubleshooting.md", "In a pod", "kubectl -n shop debug")
        .replace(" -it ", " -i ")
        .replace("docker.io/curlimages/curl", CURL);
    // kubectl detaches at the end of its input, and shows nothing if it attaches too late. The
    // agent may still learn about a new pod, so that it gets `source_unavailable` at first.
    let reason = format!("sleep 20 | {reason}");
    await_some("the reason", RECIPE_TIME, || {
        let output = node.shell(&reason).success(&reason);
        output.contains("\"code\":\"no_identity\"").then_some(())
    });

    let record = block("troubleshooting.md", "In a pod", "uid=$(kubectl");
    let output = node.shell(&record).success(&record);
    assert!(output.contains("\"reason\":\"no_identity\""), "{output}");

    // The variables are those of the step before.
    let check = format!(
        "{}\n{}",
        record.replace("tail -n 3", "tail -n 0"),
        block("troubleshooting.md", "In a pod", "kubectl -n awsvid exec")
    );
    let output = node.shell(&check);
    assert!(
        !output.status.success()
            && output.stdout.contains("no registration entry matches")
            && output.stdout.contains("spire-server entry"),
        "{output:?}"
    );
    let took = start.elapsed();
    eprintln!("the steps for a 403 took {took:.1?}");
    assert!(took < RECIPE_TIME, "{took:?}");

    // With an entry the pod has an identity, and still no role.
    let entry = cluster
        .spire
        .register(STRANGER, &["k8s:ns:shop", "k8s:sa:default"]);
    await_some("the roles that do not cover it", TIMEOUT, || {
        let output = node.shell(&check);
        let explains = |words: &str| output.stdout.contains(words);
        let has_id = explains(&format!("has {STRANGER}"));
        (has_id && explains("role \"all\" does not cover it") && explains("(no_role)"))
            .then(|| assert!(!output.status.success(), "{output:?}"))
    });
    cluster.spire.delete_entry(&entry);

    let names = block(
        "troubleshooting.md",
        "In a pod",
        "kubectl -n shop exec billing-0",
    );
    let output = node.shell(&names).success(&names);
    assert!(
        output
            .lines()
            .any(|line| line == "AWS_CONTAINER_CREDENTIALS_FULL_URI")
            && !output.contains("http://"),
        "{output}"
    );
    node.kubectl(&["delete", "--namespace", READER.namespace, "pod/billing-0"])
        .success("delete the pod");
    role_of_pod_is_explained(cluster);
}

/// Runs the same command for a pod with a role. It assumes the role only with `--exchange`.
fn role_of_pod_is_explained(cluster: &Cluster) {
    let node = &cluster.node;
    let name = "explained";
    node.apply(&cluster.pod(READER, name, "busybox sleep 36000"));
    let uid = await_some("the pod runs", TIMEOUT, || {
        let pod = node.get(&["pod", "--namespace", READER.namespace, name]);
        let runs = pod["status"]["phase"] == "Running";
        runs.then(|| pod["metadata"]["uid"].as_str().expect("a UID").to_owned())
    });
    let check = |arguments: &[&str]| {
        let words = ["exec", "--namespace", "awsvid", "daemonset/awsvid", "--"];
        let words = [&words[..], &["awsvid", "check", "--pod", &uid], arguments].concat();
        node.kubectl(&words)
    };
    // The agent may still learn about the pod.
    let output = await_some("its role", TIMEOUT, || {
        let output = check(&[]);
        let covers = format!("role \"all\" covers {}", READER.id());
        output.stdout.contains(&covers).then_some(output)
    });
    assert!(
        output.status.success() && !output.stdout.contains("assumed by"),
        "{output:?}"
    );
    let output = check(&["--exchange"]);
    let assumed = format!("assumed by {}", READER.id());
    assert!(output.stdout.contains(&assumed), "{output:?}");
    let delete = ["delete", "--namespace", READER.namespace, "pod", name];
    node.kubectl(&delete).success("delete the pod");
}
