//! The files of awsvid's code that take text or bytes apart. Each has a target, or a reason for
//! none.

use std::path::Path;

use super::{PARSERS, folder};

/// The fuzz target of a file, or its absence.
#[derive(Debug, Clone, Copy)]
enum Reader {
    /// The target of this name.
    Target(&'static str),
    /// None, because the text is harmless.
    None(&'static str),
}

use Reader::{None, Target};

/// The operator or the user wrote it, and only it is harmed.
const OPERATOR: Reader = None("a setting or an argument of this process");
/// awsvid wrote the text, so it has the right form.
const OWN: Reader = None("text that awsvid itself made or has checked");
/// Only `str::parse` of a whole text reads it.
const NUMBER: Reader = None("single numbers of the kernel; other text is left out");
/// A library parses it.
const FIELDS: Reader = None("serde_json parses it, and this compares single fields");
/// The feature is not in packages, and its clients are the developer's own.
const DEV: Reader = None("part of `awsvid dev`");

const FILES: [(&str, Reader); 80] = [
    ("accounts/local.rs", Target("accounts")),
    ("admin/format.rs", Target("accept")),
    ("attest/cgroup_mounts.rs", Target("mountinfo")),
    ("attest/cgroup_tree.rs", NUMBER),
    ("attest/kernel.rs", NUMBER),
    ("attest/proc_files.rs", Target("proc")),
    ("attest/process_cache.rs", NUMBER),
    ("attest/sock_diag.rs", Target("sock_diag")),
    ("attest/socket_owner.rs", NUMBER),
    ("cgroup.rs", Target("cgroup")),
    ("cgroup/pod.rs", Target("cgroup")),
    ("commands/check.rs", OPERATOR),
    ("commands/check/agent.rs", OWN),
    ("commands/check/doc_tables.rs", OWN),
    (
        "commands/check/host.rs",
        None("words of single lines of the kernel"),
    ),
    ("commands/check/issuer.rs", Target("documents")),
    ("commands/check/issuer/documents.rs", Target("documents")),
    ("commands/check/workload.rs", OPERATOR),
    ("commands/credential_process.rs", FIELDS),
    ("commands/exec.rs", OPERATOR),
    ("commands/exec/over_tcp.rs", OPERATOR),
    ("commands/https_probe.rs", Target("url")),
    ("commands/local_client.rs", Target("client")),
    ("commands/node/socket_unit.rs", Target("socket_unit")),
    ("commands/trust_policy.rs", FIELDS),
    ("commands/trust_policy/anywhere.rs", OWN),
    ("commands/trust_policy/aws_cli.rs", OWN),
    ("commands/trust_policy/plan.rs", OWN),
    ("commands/trust_policy/plan/issuer.rs", Target("url")),
    ("commands/trusted_socket.rs", FIELDS),
    ("config/aws.rs", Target("configuration")),
    ("config/cross_checks.rs", Target("configuration")),
    ("config/keys.rs", Target("configuration")),
    ("config/listen.rs", Target("configuration")),
    ("config/log.rs", Target("configuration")),
    ("config/role.rs", Target("configuration")),
    ("config/roles_anywhere.rs", Target("configuration")),
    ("config/show.rs", OWN),
    ("daemon.rs", OWN),
    ("dev.rs", DEV),
    ("dev/local_users.rs", DEV),
    ("dev/loopback_http.rs", DEV),
    ("dev/sts.rs", DEV),
    ("dev/sts/create_session.rs", DEV),
    ("dev/sts/create_session/proof.rs", DEV),
    ("dev/sts/request.rs", DEV),
    ("dev/sts/sigv4.rs", DEV),
    ("dev/sts/token.rs", DEV),
    (
        "hardening/apparmor.rs",
        None("the last word of a line of the kernel"),
    ),
    ("hardening/proc_mount.rs", Target("mountinfo")),
    ("hardening/process_status.rs", Target("proc")),
    (
        "http/metadata_request.rs",
        None("the products of a user agent, compared with one name"),
    ),
    ("http/request_validation.rs", Target("request")),
    ("identity.rs", Target("spiffe_id")),
    ("identity/arn.rs", Target("arn")),
    ("identity/template.rs", Target("configuration")),
    ("imds/path.rs", Target("metadata_path")),
    ("imds/token.rs", Target("metadata_token")),
    ("listen/unprivileged_ports.rs", NUMBER),
    ("main.rs", OWN),
    ("metrics/exposition.rs", OWN),
    ("metrics/process.rs", Target("proc")),
    ("netns.rs", NUMBER),
    ("pod_listeners/handover_protocol.rs", Target("handover")),
    ("pod_listeners/netns_watch.rs", Target("mountinfo")),
    ("pod_listeners/opt_in.rs", NUMBER),
    ("readiness.rs", FIELDS),
    ("role/parameters.rs", Target("configuration")),
    ("roles_anywhere.rs", OWN),
    ("roles_anywhere/session.rs", FIELDS),
    ("roles_anywhere/signature.rs", OWN),
    ("sdk_environment/profiles.rs", Target("profiles")),
    ("socket_endpoint.rs", Target("endpoint")),
    ("sts/advice.rs", OWN),
    ("sts/client.rs", OWN),
    ("sts/error_response.rs", Target("sts_error")),
    ("sts/network.rs", Target("proxy")),
    ("sts/no_proxy.rs", Target("proxy")),
    ("svid/jwt.rs", Target("token")),
    ("svid/own_svid/certificates.rs", Target("certificates")),
];

/// Calls that take text or bytes apart.
const CALLS: [&str; 12] = [
    "split_ascii_whitespace(",
    "split_whitespace(",
    ".lines()",
    ".split(",
    ".splitn(",
    ".rsplit",
    "split_once(",
    "::from_slice(",
    "from_ne_bytes(",
    "from_be_bytes(",
    ".parse()",
    ".parse::<",
];

/// Adds the files below `folder` that have one of the calls.
fn find(root: &Path, folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if name != "tests" && name != "fuzzing" {
                find(root, &path, found);
            }
        } else if !matches!(name, "tests.rs" | "fuzzing.rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            if CALLS.iter().any(|call| code.contains(call)) {
                found.push(
                    path.strip_prefix(root)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned(),
                );
            }
        }
    }
}

#[test]
fn file_that_parses_has_a_target_or_a_reason_for_none() {
    let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let mut found = Vec::new();
    find(source, source, &mut found);
    found.sort();
    let listed: Vec<_> = FILES.iter().map(|(file, _)| (*file).to_owned()).collect();
    assert_eq!(
        listed, found,
        "list each file, with its target or the reason for none"
    );
    for (file, reader) in FILES {
        match reader {
            Target(name) => assert!(PARSERS.iter().any(|(parser, _)| *parser == name), "{file}"),
            None(reason) => assert!(!reason.is_empty(), "{file}"),
        }
    }
}

#[test]
fn readme_has_each_target() {
    let readme = std::fs::read_to_string(folder().join("README.md")).unwrap();
    let rows: Vec<_> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(rows, PARSERS.map(|(name, _)| name));
}
