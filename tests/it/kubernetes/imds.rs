//! Programs in pods that opted in to EC2's instance metadata service at its usual address. Nothing
//! in their environment names credentials.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{AWS, Cluster, MINIO_PORT, READER, STS_PORT, copy};
use super::life::{PollingPod, run_updates};
use super::policy::{self, admitted};
use crate::clients::catalogue::{self, Client, ReadObject};
use crate::clients::table::{self, Cell, Column};
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::python;
use crate::harness::is_slow;
use crate::harness::kubernetes::{ADDRESS, BUSYBOX, Image};
use crate::harness::tls::PROXIED_NAME;

/// The image of programs that know no other source of credentials than this service.
const PROGRAMS: &str = "docker.io/library/metadata-programs:test";
/// The object of the reader.
const FOUND: &str = "hello from the shop";
/// The directory of files for clients, on the node.
const FILES: &str = "/srv/clients";
/// The sysctl by which a pod opts in.
const OPT_IN: &str = "net.ipv4.ip_local_reserved_ports";
/// The clients of the short form.
const SHORT: [&str; 2] = ["boto3", "Go v2"];
/// Each starts a program of its own, one after the other.
const CLIENTS_OF_A_POD: usize = 4;
/// Shell functions that get a token, and a path with it.
const FUNCTIONS: &str = r#"
at=http://169.254.169.254/latest
token() { curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 3600' $at/api/token; }
get() { curl -sf --retry 20 --retry-delay 1 -H "X-aws-ec2-metadata-token: $token" "$at/meta-data/$1"; }
token=$(token)
"#;
/// Signs a request as shell scripts do.
const BY_CURL: &str = r#"
role=$(get iam/security-credentials/)
get "iam/security-credentials/$role" >/tmp/answer
value() { busybox sed -n "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/p" /tmp/answer; }
curl -sf --aws-sigv4 aws:amz:us-east-1:s3 --user "$(value AccessKeyId):$(value SecretAccessKey)" \
    -H "X-Amz-Security-Token: $(value Token)" "$S3/shop/test.txt"
"#;
/// Restores a file as PostgreSQL's `restore_command` does.
const BY_PGBACKREST: &str = r#"
echo "$CA" >/tmp/ca.crt
pgbackrest --log-level-file=off --log-level-console=warn --repo1-path=/ \
    --repo1-type=s3 --repo1-s3-key-type=auto --repo1-s3-bucket=shop --repo1-s3-region=us-east-1 \
    --repo1-s3-endpoint="$HOST" --repo1-storage-port="$TLS_PORT" --repo1-s3-uri-style=path \
    --repo1-storage-ca-file=/tmp/ca.crt repo-get /test.txt
"#;
/// Mounts the bucket. The program ends with the container. Version 1.90 would list the roles
/// without a token, so it gets the role's name.
const BY_S3FS: &str = r#"
busybox mknod /dev/fuse c 10 229
busybox mkdir /bucket
s3fs shop /bucket -f -o iam_role=all,url="$S3",use_path_request_style,endpoint=us-east-1 &
until busybox grep -q " /bucket fuse" /proc/mounts; do kill -0 $!; busybox usleep 100000; done
busybox cat /bucket/test.txt
busybox umount /bucket
"#;

/// Has the name of its role, and serves another port of all addresses.
const SERVED: &str = r#"
echo "gets the role $(get iam/security-credentials/)"
busybox mkdir -p /www
echo served >/www/index.html
exec busybox httpd -f -p 81 -h /www
"#;
/// Requests a page of the pod, and a token of its metadata service. The status 7 of curl is that of
/// a rejected connection.
const REACH: &str = r#"
curl="curl -s --max-time 20"
echo "another port: $($curl http://169.254.169.254:81/)"
status=0
$curl -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 3600' \
    http://169.254.169.254/latest/api/token || status=$?
echo "port 80: $status"
"#;

/// Each fetch is a PUT and two GETs, with one attempt and a timeout of a second.
const BY_BOTOCORE: &str = r#"
import os, time
from botocore.utils import InstanceMetadataFetcher
# The first process of the container has its files.
while not os.path.exists("/proc/1/root/enough"):
    found = InstanceMetadataFetcher(timeout=1, num_attempts=1).retrieve_iam_role_credentials()
    print("answered" if found else "failed: no credentials")
    print("at", time.clock_gettime(time.CLOCK_BOOTTIME))
    time.sleep(0.02)
"#;

/// Runs them after an opt-in of their namespace, without the variables of the environment's policy.
pub(super) fn programs_need_no_setting(cluster: &Cluster) {
    cluster.install_with_metadata_address("spiffe-broker");
    let labels = ["awsvid.io/environment-", "awsvid.io/imds=true"];
    let label = [&["label", "namespace", READER.namespace][..], &labels].concat();
    cluster.node.kubectl(&label).success("the labels");
    await_opt_in(cluster);
    policy_leaves_out_some_pods(cluster);
    import_programs(cluster);
    for (name, image, script) in [
        ("by-curl", PROGRAMS, &format!("{FUNCTIONS}{BY_CURL}")),
        ("by-pgbackrest", PROGRAMS, &BY_PGBACKREST.to_owned()),
        ("by-s3fs", PROGRAMS, &BY_S3FS.to_owned()),
        ("by-aws", AWS, &copy(READER)),
    ] {
        let ended = cluster.node.run_pod(&pod(cluster, name, image, script));
        assert!(
            ended.succeeded && ended.log.contains(FOUND),
            "{name}: {ended:?}"
        );
        assert_protocol(cluster, name);
    }
    clients_find_the_address(cluster);
    no_route_leads_to_another_pod(cluster);
    tokens_outlive_updates(cluster);
}

/// Waits until the API server has the policy, and adds the sysctl.
fn await_opt_in(cluster: &Cluster) {
    let trial = pod(cluster, "trial", BUSYBOX, "true");
    await_some("the policy is active", Duration::from_secs(30), || {
        let stored = admitted(&cluster.node, &trial);
        let sysctl = &stored["spec"]["securityContext"]["sysctls"][0];
        (sysctl["value"] == "974").then_some(())
    });
}

/// Asserts which pods the policy opts in, as the page has them.
fn policy_leaves_out_some_pods(cluster: &Cluster) {
    let sysctl = |name: &str, value: &str| json!({ "name": name, "value": value });
    let opt_in = sysctl(OPT_IN, "974");
    let [other, own] = [
        sysctl("net.ipv4.tcp_syncookies", "1"),
        sysctl(OPT_IN, "8080"),
    ];
    let container =
        |port: u16| json!([{ "name": "one", "image": "i", "ports": [{ "containerPort": port }] }]);
    for (what, field, value, expected) in [
        ("nothing", "priority", Value::Null, vec![&opt_in]),
        ("the host's users", "hostUsers", json!(false), vec![&opt_in]),
        ("another port", "containers", container(8080), vec![&opt_in]),
        (
            "another sysctl",
            "securityContext",
            json!({ "sysctls": [other] }),
            vec![&other, &opt_in],
        ),
        (
            "a group",
            "securityContext",
            json!({ "fsGroup": 1 }),
            vec![&opt_in],
        ),
        (
            "its own value",
            "securityContext",
            json!({ "sysctls": [own] }),
            vec![&own],
        ),
        ("port 80", "containers", container(80), vec![]),
        (
            "port 80 of an init container",
            "initContainers",
            container(80),
            vec![],
        ),
        ("the node's network", "hostNetwork", json!(true), vec![]),
        (
            "the annotation",
            "annotations",
            json!({ "awsvid.io/imds": "false" }),
            vec![],
        ),
    ] {
        let mut trial = policy::pod(
            READER.namespace,
            json!({ "containers": [{ "name": "plain", "image": "i" }] }),
        );
        match field {
            "annotations" => trial["metadata"][field] = value,
            _ => trial["spec"][field] = value,
        }
        let stored = admitted(&cluster.node, &trial);
        let found = stored["spec"]["securityContext"]["sysctls"].as_array();
        let found: Vec<_> = found.into_iter().flatten().collect();
        assert_eq!(found, expected, "{what}");
    }
}

fn import_programs(cluster: &Cluster) {
    let files = cluster.node.bin().join("pod-files");
    let (busybox, programs) = (files.join("busybox"), files.join("metadata-programs"));
    cluster.node.import(&Image {
        name: PROGRAMS,
        layers: &[&busybox, &programs],
        entrypoint: &[],
    });
}

/// Returns a pod of the reader's, privileged because some programs mount.
fn pod(cluster: &Cluster, name: &str, image: &str, script: &str) -> Value {
    let script = format!("busybox mkdir -p /tmp\n{script}");
    let variables = [
        ("AWS_REGION", "us-east-1".to_owned()),
        ("HOST", PROXIED_NAME.to_owned()),
        ("TLS_PORT", STS_PORT.to_string()),
        ("S3", endpoint()),
        ("CA", cluster.certificate()),
    ];
    let variables = variables.map(|(name, value)| json!({ "name": name, "value": value }));
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": READER.namespace },
        "spec": {
            "serviceAccountName": READER.name, "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false,
            // pgBackRest does not compare a certificate with an address.
            "hostAliases": [{ "ip": ADDRESS, "hostnames": [PROXIED_NAME] }],
            "containers": [{
                "name": "main", "image": image, "command": ["/bin/busybox", "sh", "-ec", script],
                "env": variables, "securityContext": { "privileged": true },
                "volumeMounts": [{ "name": "node", "mountPath": "/node" }],
            }],
            "volumes": [{ "name": "node", "hostPath": { "path": "/" } }],
        },
    })
}

fn endpoint() -> String {
    format!("http://{ADDRESS}:{MINIO_PORT}")
}

/// Asserts that the pod's credentials came over this protocol alone.
fn assert_protocol(cluster: &Cluster, name: &str) {
    let pod = ["pod", "--namespace", READER.namespace, name];
    let uid = cluster.node.get(&pod)["metadata"]["uid"].clone();
    cluster.audited("credentials of the pod", |record| {
        record["pod_uid"] == uid && record["outcome"] == "issued"
    });
    let records = cluster.audit().into_iter();
    let of_pod: Vec<Value> = records.filter(|record| record["pod_uid"] == uid).collect();
    assert!(
        of_pod.iter().all(|record| record["protocol"] == "imds"),
        "{name}: {of_pod:#?}"
    );
}

/// Runs the SDKs and clients of this computer in pods, and compares the page of the SDKs.
fn clients_find_the_address(cluster: &Cluster) {
    let mut clients: Vec<(Client, PathBuf)> = catalogue::all()
        .into_iter()
        .filter_map(|client| client.program().map(|program| (client, program)))
        .collect();
    clients.retain(|(client, _)| is_slow() || SHORT.contains(&client.name));
    let mut cells = Vec::new();
    for (number, few) in clients.chunks(CLIENTS_OF_A_POD).enumerate() {
        let scripts = few
            .iter()
            .map(|(client, program)| client_script(cluster, client, program));
        let script = format!(
            "busybox mount --bind /proc /node/proc
             busybox mkdir -p /node/tmp/home
             {}",
            scripts.collect::<String>()
        );
        let name = format!("clients-{number}");
        let ended = cluster.node.run_pod(&pod(cluster, &name, BUSYBOX, &script));
        eprintln!("{}", ended.log);
        assert_protocol(cluster, &name);
        cells.extend(few.iter().map(|(client, _)| {
            let found = format!("{} has read it\n", client.slug());
            let found = ended.log.contains(&found);
            let text = if found { "yes" } else { "no" };
            Cell::new(client.name, Column::MetadataAddress, text)
        }));
    }
    if !cells.is_empty() {
        table::settle(&cells);
    }
}

/// Returns the part of a script that runs the client in the node's files, as its users have it
/// installed, and prints what it has read.
fn client_script(cluster: &Cluster, client: &Client, program: &Path) -> String {
    let endpoint = endpoint();
    let object = ReadObject {
        endpoint: &endpoint,
        bucket: READER.namespace,
        key: "test.txt",
        times: 1,
        pause: Duration::ZERO,
    };
    let arguments = client.arguments(&object, |word| {
        let file = Path::new(FILES).join(word);
        let copy = cluster.node.path(file.to_str().unwrap());
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(word), copy).unwrap();
        file
    });
    let mut words = vec![
        "PATH=/usr/bin:/bin".to_owned(),
        "HOME=/tmp/home".to_owned(),
        "AWS_REGION=us-east-1".to_owned(),
    ];
    let variables = client.variables(&endpoint).into_iter();
    words.extend(variables.map(|(name, value)| format!("{name}={value}")));
    words.push(program.display().to_string());
    words.extend(
        arguments
            .into_iter()
            .map(|word| word.into_string().unwrap()),
    );
    let slug = client.slug();
    let words = shlex::try_join(words.iter().map(String::as_str)).unwrap();
    format!(
        "busybox timeout 60 busybox chroot /node /usr/bin/env -i {words} >/tmp/found 2>&1 || true
         if busybox grep -q '{FOUND}' /tmp/found; then echo '{slug} has read it'
         else echo '{slug} has not read it:'; busybox cat /tmp/found; fi\n",
    )
}

/// The node routes the address to a served pod, and forwards what other pods send there (T39).
fn no_route_leads_to_another_pod(cluster: &Cluster) {
    let node = &cluster.node;
    let served = format!("{FUNCTIONS}{SERVED}");
    node.apply(&pod(cluster, "served", PROGRAMS, &served));
    await_some("the pod is served", Duration::from_secs(90), || {
        let log = node.pod_log(READER.namespace, "served");
        log.contains("gets the role all\n").then_some(())
    });
    let found = node.get(&["pod", "--namespace", READER.namespace, "served"]);
    let ip = found["status"]["podIP"].as_str().expect("an address");
    let route = |act: &str| {
        let words = ["ip", "route", act, "169.254.169.254/32", "via", ip];
        node.run(&words).success("the route");
    };
    // The server at the other port shows that packets reach the pod.
    let expected = "another port: served\nport 80: 7\n";
    route("add");
    let by_node = node.run(&["sh", "-ec", REACH]);
    assert_eq!(by_node.success("the requests of the node"), expected);
    let mut other = pod(cluster, "other", PROGRAMS, REACH);
    other["metadata"]["annotations"] = json!({ "awsvid.io/imds": "false" });
    let by_pod = node.run_pod(&other);
    assert_eq!(by_pod.log, expected, "{by_pod:?}");
    route("delete");
    node.kubectl(&["delete", "pod", "--namespace", READER.namespace, "served"])
        .success("its end");
}

/// Programs send requests while awsvid's pod is replaced: one with a token that it keeps, and
/// botocore with a new token each time. Neither repeats a request.
fn tokens_outlive_updates(cluster: &Cluster) {
    let fetch = r#"role=$(get iam/security-credentials/)
        fetch() { curl -sS --fail-with-body -o /dev/null -H "X-aws-ec2-metadata-token: $token" \
            "$at/meta-data/iam/security-credentials/$role" 2>&1; }"#;
    let script = format!("{FUNCTIONS}{fetch}\n{}", PollingPod::LOOP);
    let run = |name, image, script: &str| {
        PollingPod::run(cluster, name, &pod(cluster, name, image, script))
    };
    let mut askers = vec![run("with-one-token", PROGRAMS, &script)];
    if let Some(python) = python("client-boto3") {
        askers.push(run("with-new-tokens", BUSYBOX, &by_botocore(&python)));
    }
    run_updates(cluster, askers);
}

/// Returns a script that runs botocore's class in the node's files, as [`PollingPod::LOOP`] runs a
/// function.
fn by_botocore(python: &Path) -> String {
    let python = python.display();
    format!(
        "busybox mount --bind /proc /node/proc
         busybox chroot /node /usr/bin/env -i PATH=/usr/bin:/bin HOME=/tmp {python} -u -c '{BY_BOTOCORE}'
         echo ended",
    )
}
