//! T2, T5, T9, T10 and T12 on a real node: attacks by a pod's process to get another pod's
//! credentials, or to keep that pod from its own. The pods run `attacker.py`.

use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{AWS, Cluster, OTHER, READER, ServiceAccount};
use crate::harness::counterparts::process::await_some;

const TIMEOUT: Duration = Duration::from_secs(30);
const ATTACKER: &str = include_str!("attacker.py");
/// A directory of the node that the victim and its attackers both mount.
const MEETING: &str = "/run/awsvid-test-meeting";
const URI: &str = "http://127.0.0.1:974/v1/credentials";
/// A user of the node, and its identity where SPIRE attests processes that are in no pod.
const PLAIN: u32 = 61234;
const PLAIN_ID: &str = "spiffe://example.org/ns/node/sa/plain";
/// Runs the words after it in a systemd unit, as far as cgroups show.
const IN_A_UNIT: &str = r#"cd /sys/fs/cgroup
unit=system.slice/plain.service
if [ ! -e cgroup.controllers ]; then
    for tree in *; do echo $$ >"$tree/cgroup.procs"; done
    cd unified
fi
mkdir -p "$unit"
echo $$ >"$unit/cgroup.procs"
exec "$0" "$@""#;

/// The pod that the others attack, and awsvid's source.
pub(super) struct AttackSite<'a> {
    cluster: &'a Cluster,
    source: &'a str,
    victim: Value,
    namespace: Value,
}

/// A pod that carries out an attack, and the outcome.
#[derive(Debug)]
struct AttackResult {
    pod: Value,
    /// The output of the pod.
    log: String,
    /// The audit records about the pod.
    records: Vec<Value>,
}

/// The settings of an attacking pod.
#[derive(Debug, Default)]
struct AttackSetup<'a> {
    arguments: &'a [&'a str],
    privileged: bool,
    capabilities: &'a [&'a str],
    host_network: bool,
    /// Directories of the node, and their mount points.
    mounts: &'a [(&'a str, &'a str)],
}

impl<'a> AttackSite<'a> {
    /// Starts the victim, and waits until the daemon knows it as the owner of its network
    /// namespace.
    pub(super) fn set(cluster: &'a Cluster, source: &'a str, name: &str) -> Self {
        cluster.node.run(&["rm", "-rf", MEETING]).success("rm");
        cluster.node.apply(&pod(
            OTHER,
            name,
            "victim",
            &AttackSetup {
                mounts: &[(MEETING, "/shared")],
                ..AttackSetup::default()
            },
        ));
        let timeout = cluster.node.kubectl_timeout();
        let ready = [
            "wait",
            "--for=condition=Ready",
            "pod",
            name,
            "--namespace",
            OTHER.namespace,
            &timeout,
        ];
        cluster.node.kubectl(&ready).success("the victim");
        let victim = cluster
            .node
            .get(&["pod", "--namespace", OTHER.namespace, name]);
        let uid = &victim["metadata"]["uid"];
        let own = cluster.audited("the victim has its own credentials", |record| {
            record["pod_uid"] == *uid
        });
        assert_eq!(
            (&own["outcome"], &own["spiffe_id"]),
            (&"issued".into(), &OTHER.id().into()),
            "{own}"
        );
        let namespace = own["network_namespace"].clone();
        Self {
            cluster,
            source,
            victim,
            namespace,
        }
    }

    /// Starts a pod of another account that carries out this attack.
    fn start(&self, scene: &str, with: &AttackSetup<'_>) {
        self.cluster
            .node
            .apply(&pod(READER, &self.name(scene), scene, with));
    }

    fn name(&self, scene: &str) -> String {
        format!(
            "{scene}-{}-{}",
            self.source,
            self.victim["metadata"]["name"].as_str().unwrap()
        )
    }

    /// Returns the outcome of the attack.
    fn attack_result(&self, scene: &str) -> AttackResult {
        let name = self.name(scene);
        let ended = self.cluster.node.ended(READER.namespace, &name);
        assert!(ended.succeeded, "{scene}: {ended:?}");
        let pod = self
            .cluster
            .node
            .get(&["pod", "--namespace", READER.namespace, &name]);
        let records = self.decided(&pod["metadata"]["uid"]);
        AttackResult {
            pod,
            log: ended.log,
            records,
        }
    }

    /// Returns the audit records of this pod's requests, without those that it repeated after a
    /// 503.
    fn decided(&self, pod_uid: &Value) -> Vec<Value> {
        let mut records = self.cluster.audit();
        records.retain(|record| record["pod_uid"] == *pod_uid && record["outcome"] != "failed");
        records
    }

    /// Returns the audit records of the victim's sockets.
    fn victims_records(&self) -> Vec<Value> {
        self.decided(&self.victim["metadata"]["uid"])
    }
}

impl AttackResult {
    /// Asserts the pod's output, and the reasons in its records.
    #[track_caller]
    fn assert_outcome(&self, printed: &[&str], reasons: &[&str]) {
        let log: Vec<&str> = self.log.lines().collect();
        assert_eq!(log, printed, "{self:#?}");
        let found: Vec<&str> = self
            .records
            .iter()
            .map(|record| record["reason"].as_str().unwrap())
            .collect();
        assert_eq!(found, reasons, "{self:#?}");
        // All credentials of a pod of this account are its own.
        for record in &self.records {
            let own = record["outcome"] != "issued" || record["spiffe_id"] == READER.id();
            assert!(
                own && record["pod_uid"] == self.pod["metadata"]["uid"],
                "{record}"
            );
        }
    }
}

fn pod(account: ServiceAccount, name: &str, scene: &str, with: &AttackSetup<'_>) -> Value {
    let (mut volumes, mut mounts) = (Vec::new(), Vec::new());
    for (number, (directory, inside)) in with.mounts.iter().enumerate() {
        let name = format!("directory-{number}");
        volumes.push(
            json!({ "name": name, "hostPath": { "path": directory, "type": "DirectoryOrCreate" } }),
        );
        // A careful owner mounts the socket's directory like this; the others have to be writable.
        let read_only = *inside == "/run/awsvid";
        mounts.push(
            json!({ "name": name, "mountPath": inside, "readOnly": read_only,
            "mountPropagation": if with.privileged { "HostToContainer" } else { "None" } }),
        );
    }
    let command = [&["/usr/bin/python3", "-c", ATTACKER, scene], with.arguments].concat();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": account.namespace },
        "spec": {
            "serviceAccountName": account.name, "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
            "hostNetwork": with.host_network, "volumes": volumes,
            "containers": [{
                "name": "main", "image": AWS, "command": command, "volumeMounts": mounts,
                "env": [
                    { "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
                    { "name": "POD_UID", "valueFrom": { "fieldRef": { "fieldPath": "metadata.uid" } } },
                ],
                "securityContext": { "privileged": with.privileged, "capabilities": { "add": with.capabilities } },
            }],
        },
    })
}

/// Runs all attacks on a pod's own listener.
pub(super) fn pod_listeners_attest_each_pod(cluster: &Cluster, source: &str) {
    let site = AttackSite::set(cluster, source, &format!("victim-{source}"));
    let victim = &site.victim;
    let (uid, address) = (
        victim["metadata"]["uid"].as_str().unwrap(),
        victim["status"]["podIP"].as_str().unwrap(),
    );
    let container = victim["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .unwrap();
    let (_runtime, container) = container.split_once("://").unwrap();
    let privileged = AttackSetup {
        privileged: true,
        ..AttackSetup::default()
    };
    site.start("unshared", &privileged);
    site.start(
        "source",
        &AttackSetup {
            arguments: &["$(POD_IP)", address],
            ..AttackSetup::default()
        },
    );
    let mounts = &[("/sys/fs/cgroup", "/cgroup")];
    site.start(
        "nested",
        &AttackSetup {
            arguments: &["$(POD_UID)", uid, container],
            mounts,
            ..privileged
        },
    );
    site.start(
        "enter",
        &AttackSetup {
            arguments: &[address],
            mounts: &[("/run/netns", "/netns")],
            ..privileged
        },
    );
    site.start(
        "request",
        &AttackSetup {
            host_network: true,
            ..AttackSetup::default()
        },
    );
    site.start(
        "destroy",
        &AttackSetup {
            capabilities: &["NET_ADMIN"],
            ..AttackSetup::default()
        },
    );
    for scene in ["given", "given-alone", "taken"] {
        site.start(
            scene,
            &AttackSetup {
                mounts: &[(MEETING, "/shared")],
                ..AttackSetup::default()
            },
        );
    }

    sockets_stay_in_their_network(&site);
    spoofed_addresses_are_ignored(&site);
    cgroup_names_below_container_are_ignored(&site);
    pod_network_serves_only_its_pod(&site);
    killed_listener_is_rebound(&site);
    socket_maker_is_answered(&site);
    host_process_is_rejected_in_pod(&site, address);
    // T5: the node has no listener unless it is configured. awsvid knows a node's network by the
    // kernel's first namespace, which that of a node of namespaces is not.
    let (answer, reason): (_, &[&str]) = match cluster.node.pins_own_network() {
        true => ("request: 200", &["ok"]),
        false => ("request: ECONNREFUSED", &[]),
    };
    site.attack_result("request")
        .assert_outcome(&[answer], reason);
    site.end();
}

/// Checks that a network namespace of one's own has no listener, and that an earlier socket is
/// still the pod's.
fn sockets_stay_in_their_network(site: &AttackSite<'_>) {
    site.attack_result("unshared").assert_outcome(
        &[
            "new network: ECONNREFUSED",
            "connected before: 200",
            "made before: 200",
        ],
        &["ok", "ok"],
    );
}

fn spoofed_addresses_are_ignored(site: &AttackSite<'_>) {
    let result = site.attack_result("source");
    result.assert_outcome(
        &[
            "another loopback address: 200",
            "the pod's address: 403",
            "to the pod's address: ECONNREFUSED",
            "to the other pod: ECONNREFUSED",
            "to the other pod from a loopback address: EINVAL",
        ],
        &["ok"],
    );
    let namespace = &result.records[0]["network_namespace"];
    assert_ne!(*namespace, site.namespace);
    let rejected = site
        .cluster
        .audit()
        .into_iter()
        .filter(|record| record["reason"] == "not_loopback")
        .count();
    assert!(rejected > 0);
}

/// Checks T2: an agent that gets the process would read the victim's name.
fn cgroup_names_below_container_are_ignored(site: &AttackSite<'_>) {
    let result = site.attack_result("nested");
    let (printed, reason) = match site.source {
        "spiffe-broker" => ("nested: 200", "ok"),
        _ => ("nested: 403", "nested_container"),
    };
    result.assert_outcome(&["moved: True", printed], &[reason]);
    let container = result.pod["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .unwrap();
    let record = &result.records[0];
    assert!(
        container.ends_with(record["container_id"].as_str().unwrap()),
        "{result:?}"
    );
    assert!(
        record["cgroup"]
            .as_str()
            .unwrap()
            .contains(site.victim["metadata"]["uid"].as_str().unwrap()),
        "{record}"
    );
}

fn pod_network_serves_only_its_pod(site: &AttackSite<'_>) {
    let result = site.attack_result("enter");
    result.assert_outcome(&["own: 200", "entered: 403"], &["ok", "other_pod"]);
    let [own, entered] = &result.records[..] else {
        panic!("{result:?}")
    };
    assert_eq!(entered["network_namespace"], site.namespace);
    assert_ne!(own["network_namespace"], site.namespace);
}

/// Checks a process of the node that enters the pod's network.
fn host_process_is_rejected_in_pod(site: &AttackSite<'_>, address: &str) {
    let find = r#"for file in /run/netns/*; do nsenter --net="$file" ip -o address | grep -qF " $0/" && echo "$file"; done"#;
    let found = site.cluster.node.run(&["sh", "-c", find, address]).stdout;
    let record = site.plain(PLAIN, &["nsenter", &format!("--net={}", found.trim())]);
    assert_eq!(
        (&record["reason"], &record["network_namespace"]),
        (&"not_a_pod".into(), &site.namespace),
        "{record}"
    );
    assert!(record.get("pod_uid").is_none(), "{record}");
}

/// Checks T9 on a node: a killed listener is bound again.
fn killed_listener_is_rebound(site: &AttackSite<'_>) {
    site.attack_result("destroy").assert_outcome(
        &["before: 200", "destroyed: 0", "destroyed: 0", "after: 200"],
        &["ok", "ok"],
    );
}

/// Checks a connection that is passed over a volume of both pods.
fn socket_maker_is_answered(site: &AttackSite<'_>) {
    // Its maker has passed it on, and sends a request through the other pod, which has connected
    // it: in the maker's network.
    let taken = site.attack_result("taken");
    taken.assert_outcome(&["taken: 200"], &["ok"]);
    assert_ne!(taken.records[0]["network_namespace"], site.namespace);
    // The victim has made these and passed them on itself. Each record is the victim's.
    site.attack_result("given")
        .assert_outcome(&["given: 200"], &[]);
    // By its process it has no owner any more, which the daemon detects at once or at the end.
    let by_socket = site.source == "spiffe-broker";
    let (printed, reasons): (_, &[&str]) = if by_socket {
        ("given: 200", &["ok"])
    } else {
        ("given: 403", &["no_holder", "caller_gone"])
    };
    site.attack_result("given-alone")
        .assert_outcome(&[printed], &[]);
    let records = site.victims_records();
    let found: Vec<_> = records
        .iter()
        .map(|record| record["reason"].as_str().unwrap())
        .collect();
    let fits = |found: &[&str]| found[..2] == ["ok"; 2] && reasons.contains(&found[2]);
    let [own, one, other] = found[..] else {
        panic!("{records:#?}")
    };
    assert!(
        fits(&[own, one, other]) || fits(&[own, other, one]),
        "{records:#?}"
    );
    assert!(
        records
            .iter()
            .all(|record| record["network_namespace"] == site.namespace),
        "{records:#?}"
    );
}

/// Runs the attacks on the node's own listeners: by pods with its network, and by pods and
/// processes over the unix socket.
pub(super) fn node_listeners_attest_each_caller(cluster: &Cluster, source: &str) {
    cluster
        .spire
        .register(PLAIN_ID, &[&format!("unix:uid:{PLAIN}")]);
    cluster.install_for_host(source);
    let site = AttackSite::set(cluster, source, &format!("host-victim-{source}"));
    let by_process = source == "spire-delegated";
    site.start(
        "request",
        &AttackSetup {
            host_network: true,
            ..AttackSetup::default()
        },
    );
    site.start(
        "mounted",
        &AttackSetup {
            mounts: &[("/run/awsvid", "/run/awsvid")],
            ..AttackSetup::default()
        },
    );
    let result = site.attack_result("request");
    result.assert_outcome(&["request: 200"], &["ok"]);
    assert_eq!(result.records[0]["listener"], "tcp");

    // T10 and T12 on the node's listeners.
    let (answer, reasons): (_, &[&str]) = if by_process {
        ("request: 200", &["ok"])
    } else {
        ("request: 403", &[])
    };
    let files = "files: awsvid.sock awsvid.sock.lock";
    // AppArmor's profile decides before the capability does.
    let parameter = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    let mount_again = match parameter.is_ok_and(|enabled| enabled.starts_with('Y')) {
        true => "mount again: EACCES",
        false => "mount again: EPERM",
    };
    site.attack_result("mounted").assert_outcome(
        &[
            files,
            "remove: EROFS",
            "replace: EROFS",
            mount_again,
            answer,
        ],
        reasons,
    );

    // Processes that are in no pod.
    for (uid, id) in [(PLAIN, Some(PLAIN_ID)), (PLAIN + 1, None)] {
        let record = site.plain(uid, &[]);
        let id = id.filter(|_| by_process);
        let reason = match id {
            Some(_) => "ok",
            None if by_process => "no_identity",
            None => "invisible_process",
        };
        assert_eq!(
            (record["reason"].as_str(), record["spiffe_id"].as_str()),
            (Some(reason), id),
            "{record}"
        );
        assert!(
            record.get("pod_uid").is_none() && record["systemd_unit"] == "plain.service",
            "{record}"
        );
    }
    site.end();
}

impl AttackSite<'_> {
    /// Returns the audit record of a process of the node, in no pod, that sends a request on the
    /// loopback address: that of the node, or of the network that `behind` enters.
    fn plain(&self, uid: u32, behind: &[&str]) -> Value {
        let of_it = || {
            self.cluster
                .audit()
                .into_iter()
                .filter(|record| record["uid"] == uid)
                .collect::<Vec<_>>()
        };
        let before = of_it().len();
        let id = uid.to_string();
        let user = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"];
        let busybox = self
            .cluster
            .node
            .bin()
            .join("pod-files/busybox/bin/busybox");
        let fetch = [
            busybox.to_str().unwrap(),
            "wget",
            "-q",
            "-O",
            "/dev/null",
            "--header",
            "Authorization: any",
            URI,
        ];
        self.cluster
            .node
            .run(&[&["sh", "-ec", IN_A_UNIT], behind, &user, &fetch].concat());
        await_some("its record", TIMEOUT, || of_it().get(before).cloned())
    }

    fn end(&self) {
        self.cluster.node.run(&["rm", "-rf", MEETING]).success("rm");
        let name = self.victim["metadata"]["name"].as_str().unwrap();
        let arguments = [
            "delete",
            "pod",
            "--namespace",
            OTHER.namespace,
            name,
            "--wait=false",
        ];
        self.cluster
            .node
            .kubectl(&arguments)
            .success("kubectl delete");
    }
}
