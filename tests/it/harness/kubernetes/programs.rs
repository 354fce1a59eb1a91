//! The programs of a node, which run until it is dropped.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::super::counterparts::process::Process;
use super::configuration::Computer;
use super::{BUSYBOX, Image, NAME, Node, TIMEOUT, configuration, cri_o};

const PROGRAMS: [&str; 12] = [
    "kubectl",
    "helm",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "runc",
    "ptp",
    "host-local",
    "loopback",
    "pod-files",
];
const CONTAINERD: [&str; 3] = ["containerd", "containerd-shim-runc-v2", "ctr"];

impl Node {
    /// Starts a node with all programs, and its files below `folder`. Returns `None` as `create`
    /// does.
    pub(crate) fn start(folder: &Path) -> Option<Self> {
        let programs = [&PROGRAMS[..], &CONTAINERD].concat();
        let mut node = Self::create(folder, &programs, Computer::Namespaces)?;
        node.start_programs();
        Some(node)
    }

    /// Starts a node whose container runtime is CRI-O.
    pub(crate) fn start_with_cri_o(folder: &Path) -> Option<Self> {
        let programs = [&PROGRAMS[..], &cri_o::PROGRAMS].concat();
        let mut node = Self::create(folder, &programs, Computer::NamespacesCriO)?;
        node.start_programs();
        Some(node)
    }

    /// Starts a node with all programs that is this whole machine, with its systemd and its root
    /// directory. Returns `None` as `create` does.
    pub(crate) fn start_on_machine(folder: &Path) -> Option<Self> {
        let programs = [&PROGRAMS[..], &CONTAINERD].concat();
        let mut node = Self::create_on_machine(folder, &programs)?;
        node.start_programs();
        Some(node)
    }

    /// Starts etcd and this API server alone, with more options. Such a cluster admits and stores
    /// objects, and runs no pod. Returns `None` as `create` does.
    pub(crate) fn start_api_server(
        folder: &Path,
        api_server: &str,
        options: &[&str],
    ) -> Option<Self> {
        let programs = ["kubectl", "helm", "etcd", api_server];
        let mut node = Self::create(folder, &programs, Computer::Namespaces)?;
        node.start_program("etcd", &configuration::etcd());
        node.start_api_server_with(api_server, options);
        Some(node)
    }

    /// Replaces the API server by another version with these options, on the same objects.
    pub(crate) fn replace_api_server(&mut self, old: &str, new: &str, options: &[&str]) {
        self.processes.retain(|program| program.name() != old);
        self.start_api_server_with(new, options);
        // kubectl and helm remember what the former one served.
        fs::remove_dir_all(self.folder.join(".kube")).expect("the clients' cache");
    }

    fn start_api_server_with(&mut self, name: &str, options: &[&str]) {
        let mut arguments = configuration::apiserver();
        arguments.extend(options.iter().map(|&option| option.to_owned()));
        self.start_program(name, &arguments);
        self.await_api_server(name);
    }

    fn start_programs(&mut self) {
        let (runtime, version) = match self.computer {
            Computer::Namespaces | Computer::Machine => ("containerd", "ctr version"),
            Computer::NamespacesCriO => ("crio", "crio status info"),
        };
        self.start_program(runtime, &[]);
        self.start_program("etcd", &configuration::etcd());
        self.start_program("kube-apiserver", &configuration::apiserver());
        let busybox = self.bin.join("pod-files/busybox");
        self.await_program(runtime, "the container runtime", || {
            let words: Vec<&str> = version.split(' ').collect();
            let output = self.command(&words).output().ok()?;
            output.status.success().then_some(())
        });
        self.import(&Image {
            name: BUSYBOX,
            layers: &[&busybox],
            entrypoint: &[],
        });
        let pause = ["/bin/busybox", "sleep", "2147483647"];
        self.import(&Image {
            name: configuration::PAUSE,
            layers: &[&busybox],
            entrypoint: &pause,
        });
        self.await_api_server("kube-apiserver");
        self.start_program(
            "kube-controller-manager",
            &configuration::controller_manager(),
        );
        self.start_program("kube-scheduler", &configuration::scheduler());
        self.start_program("kubelet", &configuration::kubelet());
        self.await_program("kubelet", "the node is ready", || {
            let node = self.kubectl(&["get", "node", NAME, "--output", "json"]);
            let node: Value = serde_json::from_str(&node.stdout).ok()?;
            let conditions = node["status"]["conditions"].as_array()?;
            conditions
                .iter()
                .any(|one| one["type"] == "Ready" && one["status"] == "True")
                .then_some(())
        });
        self.await_program("kube-controller-manager", "a service account", || {
            self.kubectl(&["get", "serviceaccount", "default"])
                .status
                .success()
                .then_some(())
        });
    }

    fn await_api_server(&self, name: &str) {
        self.await_program(name, "the API server is ready", || {
            self.kubectl(&["get", "--raw", "/readyz"])
                .status
                .success()
                .then_some(())
        });
    }

    fn start_program(&mut self, name: &str, arguments: &[String]) {
        self.start_program_with(name, &[], arguments);
    }

    /// Starts one of the counterparts' programs on the node, with these variables.
    pub(crate) fn start_program_with(
        &mut self,
        name: &str,
        variables: &[(&str, &str)],
        arguments: &[String],
    ) {
        let program = self.bin.join(name);
        let mut command = self.command(&[program.to_str().expect("a path in UTF-8")]);
        command.args(arguments).envs(variables.iter().copied());
        let log = self.folder.join(format!("{name}.log"));
        self.processes.push(Process::start(name, command, &log));
    }

    /// Waits until `ready` returns a value. Panics at once if this program of the node has ended.
    fn await_program<T>(&self, name: &str, what: &str, ready: impl FnMut() -> Option<T>) -> T {
        let program = self.processes.iter().find(|one| one.name() == name);
        program
            .expect("a program of the node")
            .await_some(what, TIMEOUT, ready)
    }
}
