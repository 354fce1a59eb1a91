//! The configuration of a node's programs.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::certificates::{Authority, key_pair};
use super::cri_o;

pub(crate) const NAME: &str = "node";
/// The node's own address, at which pods reach the node's listeners.
pub(crate) const ADDRESS: &str = "10.98.0.1";
pub(super) const ADDRESS6: &str = "fd98::1";
/// The address of the API server's service, which the node has as its own.
pub(super) const SERVICE: &str = "10.96.0.1";
pub(super) const ADMIN: &str = "etc/kubernetes/admin.conf";
pub(super) const PAUSE: &str = "docker.io/library/pause:test";
/// containerd's interface for kubelet and `ctr`.
const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// The address families that new pods get.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Families {
    Four,
    Six,
    Dual,
}

/// The computer that a node is, and its container runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Computer {
    /// Namespaces on the tests' own kernel, without systemd, with containerd.
    Namespaces,
    /// The same with CRI-O.
    NamespacesCriO,
    /// A whole machine with systemd and AppArmor, with containerd.
    Machine,
}

impl Computer {
    fn cgroup_driver(self) -> &'static str {
        match self {
            Self::Namespaces | Self::NamespacesCriO => "cgroupfs",
            Self::Machine => "systemd",
        }
    }

    fn runtime_socket(self) -> &'static str {
        match self {
            Self::Namespaces | Self::Machine => CONTAINERD,
            Self::NamespacesCriO => cri_o::SOCKET,
        }
    }
}

/// Writes all of it below `files`, as it is to be in the node's root, with the programs in `bin`.
pub(super) fn write(files: &Path, bin: &Path, computer: Computer) {
    let kubernetes = files.join("etc/kubernetes");
    for directory in [&kubernetes, &files.join("etc/cni/net.d")] {
        fs::create_dir_all(directory).expect("a directory");
    }
    let authority = Authority::new(&kubernetes);
    let loopback = "127.0.0.1";
    authority.issue(
        "apiserver",
        "kube-apiserver",
        None,
        &["kubernetes.default.svc", SERVICE, ADDRESS, loopback],
    );
    authority.issue(
        "kubelet",
        &format!("system:node:{NAME}"),
        Some("system:nodes"),
        &[NAME, ADDRESS, loopback],
    );
    authority.issue("admin", "admin", Some("system:masters"), &[]);
    authority.issue(
        "controller-manager",
        "system:kube-controller-manager",
        None,
        &[],
    );
    authority.issue("scheduler", "system:kube-scheduler", None, &[]);
    key_pair(&kubernetes, "service-accounts");
    for name in ["kubelet", "admin", "controller-manager", "scheduler"] {
        let text = kubeconfig(&kubernetes, name, &format!("{SERVICE}:443"));
        fs::write(kubernetes.join(format!("{name}.conf")), text).expect("a file");
    }
    let kubelet = KUBELET
        .replace("SOCKET", computer.runtime_socket())
        .replace("DRIVER", computer.cgroup_driver());
    fs::write(kubernetes.join("kubelet.yaml"), kubelet).expect("a file");
    match computer {
        Computer::Namespaces => write_containerd(files, bin, NAMESPACES_RUNTIME),
        Computer::NamespacesCriO => cri_o::write(files, bin),
        Computer::Machine => write_containerd(files, bin, MACHINE_RUNTIME),
    }
    write_network(files, Families::Dual);
    fs::write(
        files.join("etc/nsswitch.conf"),
        "passwd: files\ngroup: files\nhosts: files\n",
    )
    .expect("a file");
    fs::write(files.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").expect("a file");
    fs::write(files.join("etc/resolv.conf"), "").expect("a file");
    let hosts = format!("127.0.0.1 localhost\n{ADDRESS} {NAME} spire-server.spire\n");
    fs::write(files.join("etc/hosts"), hosts).expect("a file");
}

fn write_containerd(files: &Path, bin: &Path, runtime: &str) {
    let directory = files.join("etc/containerd");
    fs::create_dir_all(&directory).expect("a directory");
    let text = CONTAINERD_CONFIGURATION
        .replace("BIN", &bin.display().to_string())
        .replace("PAUSE", PAUSE)
        + runtime;
    fs::write(directory.join("config.toml"), text).expect("a file");
}

/// Writes the pods' network. It has 510 addresses: the kubelet allows 300 pods, and others are
/// still ending.
pub(super) fn write_network(root: &Path, families: Families) {
    let four = r#"[{ "subnet": "10.97.0.0/23" }]"#;
    let six = r#"[{ "subnet": "fd97::/64" }]"#;
    let (ranges, routes) = match families {
        Families::Four => (four.to_owned(), r#"{ "dst": "0.0.0.0/0" }"#),
        Families::Six => (six.to_owned(), r#"{ "dst": "::/0" }"#),
        Families::Dual => (
            format!("{four}, {six}"),
            r#"{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }"#,
        ),
    };
    let text = format!(
        r#"{{ "cniVersion": "1.0.0", "name": "pods", "plugins": [{{ "type": "ptp",
            "ipam": {{ "type": "host-local", "ranges": [{ranges}], "routes": [{routes}] }} }}] }}"#
    );
    // In one step: containerd reads it at once when it changes.
    let directory = root.join("etc/cni/net.d");
    fs::write(directory.join(".new"), text)
        .and_then(|()| fs::rename(directory.join(".new"), directory.join("pods.conflist")))
        .expect("a file");
}

/// Returns a kubeconfig for a client with its certificate in `directory`.
pub(super) fn kubeconfig(directory: &Path, name: &str, server: &str) -> String {
    let data = |file: String| STANDARD.encode(fs::read(directory.join(file)).expect("a file"));
    format!(
        r#"{{ "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{{ "name": "c", "cluster": {{ "server": "https://{server}", "certificate-authority-data": "{}" }} }}],
            "users": [{{ "name": "u", "user": {{ "client-certificate-data": "{}", "client-key-data": "{}" }} }}],
            "contexts": [{{ "name": "c", "context": {{ "cluster": "c", "user": "u" }} }}] }}"#,
        data("ca.crt".to_owned()),
        data(format!("{name}.crt")),
        data(format!("{name}.key")),
    )
}

pub(super) fn etcd() -> Vec<String> {
    words(
        "--data-dir /var/lib/etcd --unsafe-no-fsync --log-level warn --name node
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379
        --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380
        --initial-cluster node=http://127.0.0.1:2380",
    )
}

pub(super) fn apiserver() -> Vec<String> {
    words(&format!(
        "--etcd-servers http://127.0.0.1:2379 --secure-port 443 --advertise-address {ADDRESS}
        --tls-cert-file /etc/kubernetes/apiserver.crt --tls-private-key-file /etc/kubernetes/apiserver.key
        --client-ca-file /etc/kubernetes/ca.crt --cert-dir /var/run/kubernetes
        --kubelet-client-certificate /etc/kubernetes/admin.crt --kubelet-client-key /etc/kubernetes/admin.key
        --kubelet-certificate-authority /etc/kubernetes/ca.crt --kubelet-preferred-address-types InternalIP
        --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction --allow-privileged
        --service-cluster-ip-range 10.96.0.0/24 --service-account-issuer https://kubernetes.default.svc
        --service-account-key-file /etc/kubernetes/service-accounts.pub
        --service-account-signing-key-file /etc/kubernetes/service-accounts.key"
    ))
}

pub(super) fn controller_manager() -> Vec<String> {
    words(
        "--kubeconfig /etc/kubernetes/controller-manager.conf --leader-elect=false --bind-address 127.0.0.1
        --use-service-account-credentials --root-ca-file /etc/kubernetes/ca.crt
        --service-account-private-key-file /etc/kubernetes/service-accounts.key",
    )
}

pub(super) fn scheduler() -> Vec<String> {
    words(
        "--kubeconfig /etc/kubernetes/scheduler.conf --leader-elect=false --bind-address 127.0.0.1",
    )
}

pub(super) fn kubelet() -> Vec<String> {
    words(&format!(
        "--config /etc/kubernetes/kubelet.yaml --kubeconfig /etc/kubernetes/kubelet.conf
        --hostname-override {NAME} --node-ip {ADDRESS} --v 2"
    ))
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// The thresholds are those of a computer with a disk that may be nearly full.
const KUBELET: &str = r#"
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: { anonymous: { enabled: false }, webhook: { enabled: true }, x509: { clientCAFile: /etc/kubernetes/ca.crt } }
authorization: { mode: Webhook }
tlsCertFile: /etc/kubernetes/kubelet.crt
tlsPrivateKeyFile: /etc/kubernetes/kubelet.key
containerRuntimeEndpoint: unix://SOCKET
cgroupDriver: DRIVER
failCgroupV1: false
failSwapOn: false
makeIPTablesUtilChains: false
maxPods: 300
imageGCHighThresholdPercent: 100
evictionHard: { memory.available: 1Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1% }
"#;

const CONTAINERD_CONFIGURATION: &str = r#"
version = 3
[plugins.'io.containerd.cri.v1.images']
discard_unpacked_layers = true
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "PAUSE"
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["BIN"]
"#;

/// Without CAP_SYS_RESOURCE, which a computer may deny its tests, no process can lower its OOM
/// score.
const NAMESPACES_RUNTIME: &str = r#"
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
disable_apparmor = true
"#;

const MACHINE_RUNTIME: &str = r#"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
SystemdCgroup = true
"#;
