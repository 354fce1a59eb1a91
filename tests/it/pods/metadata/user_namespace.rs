//! Pods with a user namespace of their own (`hostUsers: false`), to which their network belongs.

use nix::unistd::Pid;

use super::*;
use crate::harness::counterparts::process::{OwnedProcess, spawn};

/// The uid of the pod's root on the host. The kubelet gives each such pod as many ids.
const FIRST_UID: u32 = 200_000;
const UIDS: u32 = 65_536;
/// A rule for the host's root, before that of the pods.
const ROOT_RULE: &str =
    "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/host-root\"\nuid = 0\n";
/// Prints the uid in the pod, and then credentials.
const AS_ROOT: &str = "test $(id -u) = 0 || exit";

/// A process that owns a user namespace and a network namespace below it.
struct Sandbox(OwnedProcess);

impl Sandbox {
    fn start() -> Self {
        let unshare = ["unshare", "--user", "--net"];
        let mut command = behind(&unshare, Path::new("sh"));
        command
            .args(["-c", "echo; exec sleep infinity"])
            .stdout(std::process::Stdio::piped());
        let mut owned = spawn(command).expect("unshare");
        // Its first output shows that it is in its namespaces.
        let mut output = owned.stdout().expect("a pipe");
        output.read_exact(&mut [0]).expect("its word");
        let sandbox = Self(owned);
        for map in ["uid_map", "gid_map"] {
            let ids = format!("0 {FIRST_UID} {UIDS}\n");
            fs::write(format!("/proc/{}/{map}", sandbox.pid()), ids).expect(map);
        }
        sandbox
    }

    fn pid(&self) -> Pid {
        self.0.id()
    }

    /// Runs a script as root of the pod.
    fn run(&self, node: &NetnsNode, cgroup: &Cgroup, script: &str, address: &str) -> Output {
        let user = format!("--user=/proc/{}/ns/user", self.pid());
        let url = format!("http://{}", address.trim_end_matches(":80"));
        let words = ["nsenter", &user, "--", "sh", "-c", script, "sh", &url];
        run_in_pod(node, "a", cgroup, &words)
    }
}

#[test]
fn pod_with_its_own_users_is_served_as_its_host_uid() {
    if !root() {
        return;
    }
    let sandbox = Sandbox::start();
    let set_stage = |node: &NetnsNode| {
        node.add_of("a", sandbox.pid(), || {
            ip(&[
                "link", "add", "eth0", "type", "veth", "peer", "name", "eth1",
            ]);
            ip(&["link", "set", "eth1", "up"]);
            connect_device(1);
            opt_in();
        });
    };
    let configuration =
        |folder: &Path, node: &NetnsNode| serving("address", folder, node) + ROOT_RULE;
    let Some(stage) = PodsStage::set_with(set_stage, configuration) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    assert_eq!(daemon.metric(NAMESPACES), 1);
    let cgroup = Cgroup::of_pod(66);
    let script = format!("{AS_ROOT}\n{SCRIPT}");
    for address in [METADATA_V4, METADATA_V6] {
        let output = sandbox.run(node, &cgroup, &script, address);
        let found = output.success(address);
        assert!(found.contains("\"SecretAccessKey\""), "{found}");
    }
    // Its root is not that of the host, for which there is another rule.
    let records = daemon.audit();
    let issued = records.iter().filter(|one| one["outcome"] == "issued");
    let issued: Vec<_> = issued.collect();
    assert_eq!(issued.len(), 2, "{records:#?}");
    for record in issued {
        assert_eq!(
            (&record["listener"], &record["protocol"]),
            (&"pod".into(), &"imds".into())
        );
        assert_eq!(record["uid"], FIRST_UID, "{record}");
        let id = "spiffe://example.org/user/pod";
        assert_eq!(record["spiffe_id"], id, "{record}");
    }
    // Its root may change its own network, and gets the address back like any other pod.
    let deletes = "ip address delete 169.254.169.254/32 dev lo";
    sandbox.run(node, &cgroup, deletes, "").success(deletes);
    await_some("the address is back", TIMEOUT, || {
        (failures(daemon, "imds_removed") == 1).then_some(())
    });
    let again = sandbox.run(node, &cgroup, &script, METADATA_V4);
    assert!(again.success("again").contains("\"SecretAccessKey\""));
}
