//! Attacks 2, 5, 9, 10 and 12 on a real node: what a pod's process can try in order to get another pod's credentials, or to keep
//! it from its own. What runs in the pods is `attacker.py`.

use std::path::Path;

use serde_json::{Value, json};

use super::cluster::{AWS, Account, Cluster, OTHER, READER};

const ATTACKER: &str = include_str!("attacker.py");
/// Where the victim and those who would trick it meet: a directory of the node that both mount.
const MEETING: &str = "/run/awsvid-test-meeting";

/// The pod whose credentials the others are after, and awsvid's source.
pub(super) struct Site<'a> {
    cluster: &'a Cluster,
    source: &'a str,
    victim: Value,
    namespace: Value,
}

/// A pod that tries something, and what came of it.
#[derive(Debug)]
struct Tried {
    pod: Value,
    /// What it has printed.
    log: String,
    /// What the audit has of it.
    records: Vec<Value>,
}

/// What a pod has that tries something.
#[derive(Debug, Default)]
struct With<'a> {
    arguments: &'a [&'a str],
    privileged: bool,
    capabilities: &'a [&'a str],
    host_network: bool,
    /// Directories of the node, and where they are mounted.
    mounts: &'a [(&'a str, &'a str)],
}

impl<'a> Site<'a> {
    /// Starts the victim, which is known to be the owner of its network namespace once this returns.
    pub(super) fn set(cluster: &'a Cluster, source: &'a str, name: &str) -> Self {
        cluster.node.run(&["rm", "-rf", MEETING]).success("rm");
        cluster.node.apply(&pod(OTHER, name, "victim", &With { mounts: &[(MEETING, "/shared")], ..With::default() }));
        let mut namespace = Value::Null;
        let uid = || cluster.node.get(&["pod", "--namespace", OTHER.namespace, name])["metadata"]["uid"].clone();
        let uid = uid();
        let own = cluster.audited("the victim has its own credentials", |record| record["pod_uid"] == uid);
        assert_eq!((&own["outcome"], &own["spiffe_id"]), (&"issued".into(), &OTHER.id().into()), "{own}");
        namespace.clone_from(&own["network_namespace"]);
        let victim = cluster.node.get(&["pod", "--namespace", OTHER.namespace, name]);
        assert!(victim["status"]["podIP"].is_string(), "{victim}");
        Self { cluster, source, victim, namespace }
    }

    /// Starts a pod of another account that tries this.
    fn start(&self, scene: &str, with: &With<'_>) {
        self.cluster.node.apply(&pod(READER, &self.name(scene), scene, with));
    }

    fn name(&self, scene: &str) -> String {
        format!("{scene}-{}-{}", self.source, self.victim["metadata"]["name"].as_str().unwrap())
    }

    /// What came of it.
    fn tried(&self, scene: &str) -> Tried {
        let name = self.name(scene);
        let ended = self.cluster.node.ended(READER.namespace, &name);
        assert!(ended.succeeded, "{scene}: {ended:?}");
        let pod = self.cluster.node.get(&["pod", "--namespace", READER.namespace, &name]);
        let uid = &pod["metadata"]["uid"];
        let records = self.cluster.audit().into_iter().filter(|record| record["pod_uid"] == *uid).collect();
        Tried { pod, log: ended.log, records }
    }

    fn victims_records(&self) -> usize {
        self.cluster.audit().iter().filter(|record| record["pod_uid"] == self.victim["metadata"]["uid"]).count()
    }
}

impl Tried {
    /// Asserts what the pod has printed, and the reasons in its records.
    #[track_caller]
    fn is(&self, printed: &[&str], reasons: &[&str]) {
        let log: Vec<&str> = self.log.lines().collect();
        assert_eq!(log, printed, "{self:#?}");
        let found: Vec<&str> = self.records.iter().map(|record| record["reason"].as_str().unwrap()).collect();
        assert_eq!(found, reasons, "{self:#?}");
        // Whatever a pod of this account was given is its own.
        for record in &self.records {
            let own = record["outcome"] != "issued" || record["spiffe_id"] == READER.id();
            assert!(own && record["pod_uid"] == self.pod["metadata"]["uid"], "{record}");
        }
    }
}

fn pod(account: Account, name: &str, scene: &str, with: &With<'_>) -> Value {
    let (mut volumes, mut mounts) = (Vec::new(), Vec::new());
    for (number, (directory, inside)) in with.mounts.iter().enumerate() {
        let name = format!("directory-{number}");
        volumes.push(json!({ "name": name, "hostPath": { "path": directory, "type": "DirectoryOrCreate" } }));
        // As a careful owner mounts the socket's directory; the others have to be written to.
        let read_only = *inside == "/run/awsvid";
        mounts.push(json!({ "name": name, "mountPath": inside, "readOnly": read_only,
            "mountPropagation": if with.privileged { "HostToContainer" } else { "None" } }));
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

/// All that is tried against a pod's own listener.
pub(super) fn no_pod_is_taken_for_another(cluster: &Cluster, source: &str) {
    let site = Site::set(cluster, source, &format!("victim-{source}"));
    let victim = &site.victim;
    let (uid, address) = (victim["metadata"]["uid"].as_str().unwrap(), victim["status"]["podIP"].as_str().unwrap());
    let container = victim["status"]["containerStatuses"][0]["containerID"].as_str().unwrap();
    let container = container.strip_prefix("containerd://").unwrap();
    let privileged = With { privileged: true, ..With::default() };
    site.start("new-network", &privileged);
    site.start("source", &With { arguments: &["$(POD_IP)", address], ..With::default() });
    let mounts = &[("/sys/fs/cgroup", "/cgroup")];
    site.start("nested", &With { arguments: &["$(POD_UID)", uid, container], mounts, ..privileged });
    site.start("enter", &With { arguments: &[address], mounts: &[("/run/netns", "/netns")], ..privileged });
    site.start("destroy", &With { capabilities: &["NET_ADMIN"], ..With::default() });
    for scene in ["given", "given-alone", "taken"] {
        site.start(scene, &With { mounts: &[(MEETING, "/shared")], ..With::default() });
    }

    sockets_stay_in_their_network(&site);
    addresses_say_nothing(&site);
    names_below_ones_own_cgroup_say_nothing(&site);
    another_pods_network_is_no_ones_but_its_own(&site);
    a_killed_listener_comes_back(&site);
    who_made_the_socket_is_answered(&site);
    cluster.node.run(&["rm", "-rf", MEETING]).success("rm");
    let name = victim["metadata"]["name"].as_str().unwrap();
    let arguments = ["delete", "pod", "--namespace", OTHER.namespace, name, "--wait=false"];
    cluster.node.kubectl(&arguments).success("kubectl delete");
}

/// A network namespace of one's own has no listener; a socket that was made before is still the pod's.
fn sockets_stay_in_their_network(site: &Site<'_>) {
    site.tried("new-network")
        .is(&["new network: ECONNREFUSED", "connected before: 200", "made before: 200"], &["ok", "ok"]);
}

fn addresses_say_nothing(site: &Site<'_>) {
    let tried = site.tried("source");
    tried.is(
        &[
            "another loopback address: 200",
            "the pod's address: 403",
            "to the pod's address: ECONNREFUSED",
            "to the other pod: ECONNREFUSED",
            "to the other pod from a loopback address: EINVAL",
        ],
        &["ok"],
    );
    let namespace = &tried.records[0]["network_namespace"];
    assert_ne!(*namespace, site.namespace);
    let refused = site.cluster.audit().into_iter().filter(|record| record["reason"] == "not_loopback").count();
    assert!(refused > 0);
}

/// Attack 2. An agent that is told the process would read the victim's name.
fn names_below_ones_own_cgroup_say_nothing(site: &Site<'_>) {
    let tried = site.tried("nested");
    eprintln!("{}", tried.log);
}

fn another_pods_network_is_no_ones_but_its_own(site: &Site<'_>) {
    let tried = site.tried("enter");
    tried.is(&["own: 200", "entered: 403"], &["ok", "other_pod"]);
    let [own, entered] = &tried.records[..] else { panic!("{tried:?}") };
    assert_eq!(entered["network_namespace"], site.namespace);
    assert_ne!(own["network_namespace"], site.namespace);
}

/// Attack 9.
fn a_killed_listener_comes_back(site: &Site<'_>) {
    site.tried("destroy").is(&["before: 200", "destroyed: 0", "destroyed: 0", "after: 200"], &["ok", "ok"]);
}

/// Over a volume that both pods mount.
fn who_made_the_socket_is_answered(site: &Site<'_>) {
    eprintln!("{}", site.tried("taken").log);
    eprintln!("{}", site.tried("given").log);
    eprintln!("{} {}", site.tried("given-alone").log, site.victims_records());
}

#[allow(unused)]
fn unused(_: &Path) {}
