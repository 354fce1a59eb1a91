//! A real Kubernetes node, alone in its cluster, in namespaces of its own on this computer's
//! kernel: etcd, API server, controller manager, scheduler, kubelet, containerd, runc, CNI. It is
//! ready after about fifteen seconds. Inside a machine of `harness::machine` it can be that whole
//! machine instead.
//!
//! Its files, network, processes and cgroups are its own, so that several may run at a time. All of
//! it ends with the value, or with the test process in whichever way that ends.

mod certificates;
mod configuration;
mod cri_o;
mod hierarchies;
mod images;
mod pods;
mod programs;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::unistd::Pid;
use serde_json::Value;

use super::counterparts::process::{Output, Process, run};
use super::counterparts::{root, skip, tool};
use super::forward::{Forward, Network};
use super::machine;
use super::tls::TlsFront;
use configuration::Computer;
pub(crate) use configuration::{ADDRESS, Families, NAME};
use hierarchies::Hierarchies;
pub(crate) use images::{Image, root_of};

/// Bounds steps that take seconds on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(120);
const NAMESPACES: [&str; 7] = [
    "--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup", "--fork",
];
/// The image that most pods run.
pub(crate) const BUSYBOX: &str = "docker.io/library/busybox:test";

pub(crate) struct Node {
    computer: Computer,
    init: Pid,
    folder: PathBuf,
    /// The folder of the counterparts' programs.
    bin: PathBuf,
    // Dropped in this order, so that no program logs complaints about one that has ended. A cgroup
    // can be removed when no process is in it.
    processes: Vec<Process>,
    namespaces: Option<(Process, Hierarchies)>,
}

impl Node {
    /// Creates one without programs, with its files below `folder`. Returns `None` after a printed
    /// skip if one of `programs` is missing or this computer does not let the test create
    /// namespaces. In CI that is a panic.
    fn create(folder: &Path, programs: &[&str], computer: Computer) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !root() {
            return None;
        }
        let bin = bin(programs)?;
        let probe = run(
            outside("unshare", NAMESPACES.iter().copied().chain(["true"])),
            b"",
            TIMEOUT,
        );
        if !probe.status.success() {
            skip(&format!("no namespaces can be made here: {}", probe.stderr));
            return None;
        }
        let hierarchies = match Hierarchies::create(NEXT.fetch_add(1, Ordering::Relaxed)) {
            Ok(hierarchies) => hierarchies,
            Err(error) => {
                skip(&format!("no cgroups can be made here: {error}"));
                return None;
            }
        };
        let folder = folder.join("kubernetes");
        Some(Self::boot(folder, bin, hierarchies, computer))
    }

    /// Makes this machine a node without programs, with configuration and certificates in its own
    /// root directory. Returns `None` as `create` does.
    fn create_on_machine(folder: &Path, programs: &[&str]) -> Option<Self> {
        assert!(machine::is_inside(), "the system's files are overwritten");
        let (bin, folder) = (bin(programs)?, folder.join("kubernetes"));
        let files = folder.join("node/files");
        fs::create_dir_all(&files).expect("a directory for the node");
        configuration::write(&files, &bin, Computer::Machine);
        let node = Self {
            computer: Computer::Machine,
            init: Pid::from_raw(1),
            folder,
            bin,
            processes: Vec::new(),
            namespaces: None,
        };
        // Not the lists of users, which the machine's own services need.
        let mut copy = outside("cp", ["--recursive", "--parents"]);
        copy.args(["etc/kubernetes", "etc/containerd", "etc/cni"]);
        copy.args(["etc/hosts", "etc/resolv.conf", "/"]);
        copy.current_dir(&files);
        run(copy, b"", TIMEOUT).success("the configuration");
        node.add_addresses();
        Some(node)
    }

    /// Creates the namespaces, which are still empty.
    fn boot(folder: PathBuf, bin: PathBuf, hierarchies: Hierarchies, computer: Computer) -> Self {
        let home = folder.join("node");
        fs::create_dir_all(home.join("files")).expect("a directory for the node");
        configuration::write(&home.join("files"), &bin, computer);
        fs::write(home.join("cgroups"), hierarchies.mounts()).expect("a file");
        // The programs are links to sibling folders.
        let cache = bin.parent().expect("a directory").display().to_string();
        fs::write(home.join("mounts"), format!("{cache} {cache}\n")).expect("a file");
        // The shell enters the cgroups before it creates a cgroup namespace, so that they become
        // its roots. No process is needed to end the node: pid 1 is killed with `unshare`, and the
        // rest with pid 1.
        let enter = r#"while [ "$1" != -- ]; do echo $$ >"$1"; shift; done; shift; exec unshare --kill-child "$@""#;
        let mut command = outside("sh", ["-ec", enter, "enter"]);
        command.args(hierarchies.procs()).arg("--").args(NAMESPACES);
        command
            .args(["sh", "-c", include_str!("kubernetes/boot.sh"), "boot"])
            .arg(&home);
        let machine = Process::start("the node", command, &folder.join("node.log"));
        let init = machine.await_some("the node's pid 1", TIMEOUT, || {
            fs::read_to_string(home.join("init.pid"))
                .ok()?
                .trim()
                .parse()
                .ok()
        });
        let mut node = Self {
            computer,
            init: Pid::from_raw(init),
            folder,
            bin,
            processes: Vec::new(),
            namespaces: None,
        };
        machine.await_some("the node has booted", TIMEOUT, || {
            node.path("/run/booted").exists().then_some(())
        });
        node.namespaces = Some((machine, hierarchies));
        node.add_addresses();
        node
    }

    /// Gives the node its addresses, and that of the API server's service: with it on the node,
    /// pods need no kube-proxy to reach it.
    fn add_addresses(&self) {
        let script = r#"
            for address; do ip address add "$address" dev lo; done
            for name in ipv4/ip_forward ipv6/conf/all/forwarding; do
                echo 1 >"/proc/sys/net/$name"
            done"#;
        let addresses = [ADDRESS, configuration::ADDRESS6, configuration::SERVICE];
        let arguments = [&["sh", "-ec", script, "addresses"][..], &addresses].concat();
        self.run(&arguments).success("the node's addresses");
    }

    /// Returns the folder of the counterparts' programs.
    pub(crate) fn bin(&self) -> &Path {
        &self.bin
    }

    /// Returns a command that runs on the node as root, outside of every pod.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let init = self.init.to_string();
        let namespaces = [
            "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--",
        ];
        let mut command = outside("nsenter", ["--target", &init].into_iter().chain(namespaces));
        command
            .env("PATH", format!("{}:/usr/sbin:/usr/bin", self.bin.display()))
            .args(arguments);
        command
    }

    /// Runs such a command to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        run(self.command(arguments), b"", TIMEOUT)
    }

    /// Forwards this port of the node to a loopback address of this computer. Pods can reach it
    /// there too.
    pub(crate) fn offer(&self, port: u16, to: SocketAddr) -> Forward {
        let address = SocketAddr::new(ADDRESS.parse().expect("an address"), port);
        Forward::start(Network::Of(self.init), address, Network::Own, to)
    }

    /// Forwards this port with TLS.
    pub(crate) fn offer_with_tls(&self, port: u16, to: SocketAddr) -> TlsFront {
        let address = SocketAddr::new(ADDRESS.parse().expect("an address"), port);
        TlsFront::start(Network::Of(self.init), address, to)
    }

    /// Returns a kubeconfig of the cluster's administrator for programs outside the node, and the
    /// forward that must live as long as those.
    pub(crate) fn kubeconfig_outside(&self) -> (PathBuf, Forward) {
        let (own, api) = (
            (Ipv4Addr::LOCALHOST, 0).into(),
            (Ipv4Addr::LOCALHOST, 443).into(),
        );
        let forward = Forward::start(Network::Own, own, Network::Of(self.init), api);
        let certificates = self.folder.join("node/files/etc/kubernetes");
        let text =
            configuration::kubeconfig(&certificates, "admin", &forward.address().to_string());
        let file = self.folder.join("outside.conf");
        fs::write(&file, text).expect("a file");
        (file, forward)
    }

    /// Returns a path of the node as this process sees it.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init))
    }

    /// Runs kubectl as the cluster's administrator. It sees the files of this computer.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Output {
        self.kubectl_with(arguments, "")
    }

    /// Runs kubectl with standard input.
    pub(crate) fn kubectl_with(&self, arguments: &[&str], input: &str) -> Output {
        self.client("kubectl", arguments, input)
    }

    /// Runs helm as the cluster's administrator. It sees the files of this computer.
    pub(crate) fn helm(&self, arguments: &[&str]) -> Output {
        self.client("helm", arguments, "")
    }

    fn client(&self, program: &str, arguments: &[&str], input: &str) -> Output {
        let init = self.init.to_string();
        let mut command = outside("nsenter", ["--target", &init, "--net", "--"]);
        command.arg(self.bin.join(program)).args(arguments);
        command
            .env(
                "KUBECONFIG",
                self.folder.join("node/files").join(configuration::ADMIN),
            )
            .env("HOME", &self.folder);
        run(command, input.as_bytes(), TIMEOUT)
    }

    /// Runs a script of the cluster's administrator, which finds kubectl in its path.
    pub(crate) fn shell(&self, script: &str) -> Output {
        let init = self.init.to_string();
        let mut command = outside("nsenter", ["--target", &init, "--net", "--"]);
        command.args(["sh", "-euc", script]);
        command
            .env(
                "PATH",
                format!("{}:/usr/sbin:/usr/bin:/bin", self.bin.display()),
            )
            .env(
                "KUBECONFIG",
                self.folder.join("node/files").join(configuration::ADMIN),
            )
            .env("HOME", &self.folder);
        run(command, b"", TIMEOUT)
    }

    /// Returns the output of `kubectl get` as JSON. Panics if the object does not exist.
    pub(crate) fn get(&self, arguments: &[&str]) -> Value {
        let got = self.kubectl(&[&["get", "--output", "json"], arguments].concat());
        serde_json::from_str(&got.success(&format!("kubectl get {}", arguments.join(" "))))
            .expect("JSON")
    }

    pub(crate) fn apply(&self, manifest: &Value) {
        self.kubectl_with(&["apply", "--filename", "-"], &manifest.to_string())
            .success("kubectl apply");
    }

    /// Imports an image into the container runtime.
    pub(crate) fn import(&self, image: &Image<'_>) {
        let directory = tempfile::tempdir_in(&self.folder).expect("a directory for an image");
        self.import_archive(&image.archive(directory.path()));
    }

    /// Returns whether the container runtime mounts the node's own network for pods with
    /// `hostNetwork`, among the networks of the other pods.
    pub(crate) fn pins_own_network(&self) -> bool {
        self.computer == Computer::NamespacesCriO
    }

    /// Imports an OCI archive into the container runtime, under the name that is in it.
    pub(crate) fn import_archive(&self, path: &Path) {
        if self.computer == Computer::NamespacesCriO {
            return cri_o::import(self, path);
        }
        let archive = fs::File::open(path).expect("the image's archive");
        let arguments = [
            "ctr",
            "--namespace",
            "k8s.io",
            "images",
            "import",
            "--local",
            "-",
        ];
        let mut command = self.command(&arguments);
        let output = command.stdin(archive).output().expect("ctr");
        assert!(
            output.status.success(),
            "import of {}: {output:?}",
            path.display()
        );
    }

    /// Sets the address families of pods that start from now on.
    pub(crate) fn use_families(&self, families: Families) {
        configuration::write_network(&self.path("/"), families);
    }
}

/// Returns the folder of the counterparts' programs. Returns `None` after a printed skip if one of
/// `programs` is missing.
fn bin(programs: &[&str]) -> Option<PathBuf> {
    for program in programs {
        tool(program)?;
    }
    Some(tool("kubectl")?.parent().expect("a directory").to_owned())
}

/// Returns a command on this computer with an empty environment.
fn outside<'a>(program: &str, arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env(
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    );
    command.env("LC_ALL", "C.UTF-8").args(arguments);
    command
}
