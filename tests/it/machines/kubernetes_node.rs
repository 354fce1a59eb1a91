//! A stock machine as a Kubernetes node: kubelet with systemd's cgroups, containerd with AppArmor.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::inside;
use crate::harness::counterparts::{folder, root, tool};
use crate::harness::daemon::PROGRAM;
use crate::harness::machine::{FILES, MachineStart, is_inside};
use crate::harness::release::Release;
use crate::harness::slow_only;
use crate::kubernetes;

/// Bounds all scenes under emulation.
const TIMEOUT: Duration = Duration::from_secs(5400);
const NAME: &str = "machines::kubernetes_node::pods_are_served_on_a_stock_machine";
/// The name of awsvid's image among the machine's files.
const IMAGE: &str = "awsvid.oci.tar";
const PROGRAMS: [&str; 19] = [
    "kubectl",
    "helm",
    "ctr",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "containerd",
    "containerd-shim-runc-v2",
    "runc",
    "ptp",
    "host-local",
    "loopback",
    "spire-server",
    "spire-agent",
    "oidc-discovery-provider",
    "minio",
    "mc",
];

/// Runs itself again in the machine, where it plays the scenes.
#[test]
fn pods_are_served_on_a_stock_machine() {
    if is_inside() {
        let folder = folder();
        let image = Path::new(FILES).join(IMAGE);
        kubernetes::serve_pods_on_machine(folder.path(), &image);
    } else if slow_only() && root() {
        run_inside();
    }
}

/// Starts the machine, with the programs of a node and the image of a release.
fn run_inside() -> Option<()> {
    let folder = folder();
    let files = folder.path().join("files");
    let bin = files.join(inside::CACHE).join("bin");
    fs::create_dir_all(&bin).unwrap();
    for name in PROGRAMS {
        fs::copy(tool(name)?, bin.join(name)).unwrap();
    }
    let pod_files = fs::canonicalize(tool("pod-files")?).unwrap();
    fs::create_dir(bin.join("pod-files")).unwrap();
    for name in ["busybox", "awscli"] {
        inside::copy(&pod_files.join(name), &bin.join("pod-files").join(name));
    }
    let release = Release::of_tests(&folder.path().join("release"), Path::new(PROGRAM))?;
    release.run(&["files", "image"]);
    fs::copy(release.ending(".oci.tar"), files.join(IMAGE)).unwrap();

    let mut machine = inside::start("trixie", MachineStart::BootedLarge, &files)?;
    let arguments = format!("--nocapture --exact {NAME}");
    inside::run_tests(&mut machine, &arguments, TIMEOUT);
    Some(())
}
