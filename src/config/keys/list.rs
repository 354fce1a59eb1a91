//! The list itself, with the texts of `deploy/docs/configuration.md`.

use super::{KeySpec, TableSpec};

const fn key(
    name: &'static str,
    value: &'static str,
    default: &'static str,
    meaning: &'static str,
) -> KeySpec {
    KeySpec {
        name,
        value,
        default,
        meaning,
    }
}

/// All tables, in the order of the documents.
pub(in crate::config) const TABLES: &[TableSpec] = &[
    TableSpec {
        name: "",
        is_list: false,
        meaning: "what stands before the first table",
        keys: &[key(
            "include",
            "pattern, or a list of patterns",
            "`[]`",
            "more files, as in `\"conf.d/*.toml\"`, in the order of their names; each may have `[[workload]]` and `[[role]]` only; a name without `/` in front is relative to the directory of this file; `*`, `?` and `[...]` may be in the file's name",
        )],
    },
    TableSpec {
        name: "listen",
        is_list: false,
        meaning: "addresses at which workloads and operators reach the daemon",
        keys: &[
            key(
                "unix",
                "path",
                "`\"/run/awsvid/awsvid.sock\"`",
                "unix socket for workloads, mode 0666; `\"\"` disables it",
            ),
            key(
                "tcp",
                "list of addresses",
                "`[\"127.0.0.1:974\", \"[::1]:974\"]`",
                "loopback addresses for workloads; `[]` disables TCP; a port from `net.ipv4.ip_unprivileged_port_start` on (1024 by default) causes a warning, because any user can take it while awsvid is down",
            ),
            key(
                "admin",
                "address",
                "`\"127.0.0.1:975\"`",
                "health and metrics for operators; may be an address of the node; `\"\"` disables it; a port causes a warning as in `tcp`",
            ),
            key(
                "status",
                "path",
                "`\"/run/awsvid/status.sock\"`",
                "unix socket for root, mode 0600: `/status` and all of `admin`; `\"\"` disables it",
            ),
            key(
                "authorization",
                "`\"present\"`, `\"token\"`, `\"off\"`",
                "`\"present\"`",
                "the `Authorization` header that a request over TCP needs: any value, the content of `token_file`, or none",
            ),
            key(
                "token_file",
                "path",
                "`\"/run/awsvid/token\"`",
                "file with a random token, mode 0644, which awsvid writes if it is missing",
            ),
            key(
                "max_connections",
                "integer, 1 to 1000000",
                "`4096`",
                "open connections of all callers together",
            ),
            key(
                "max_connections_per_workload",
                "integer, 1 to 1000000",
                "`512`",
                "open connections of one workload; must be less than `max_connections`",
            ),
        ],
    },
    TableSpec {
        name: "pods",
        is_list: false,
        meaning: "listeners inside the network namespaces of pods",
        keys: &[
            key(
                "enabled",
                "boolean",
                "`false`",
                "open the addresses `127.0.0.1:974` and `[::1]:974` in each pod's network namespace",
            ),
            key(
                "netns_dir",
                "path",
                "`\"/run/netns\"`",
                "directory in which the container runtime mounts the namespaces",
            ),
            key(
                "cgroup_root",
                "path of a cgroup",
                "found at the usual paths",
                "the kubelet's cgroup root, as in `\"/kubepods.slice\"`; set it for a kubelet with `--cgroup-root` and for kind",
            ),
            key(
                "handover_socket",
                "path",
                "`\"/run/awsvid-handover/awsvid.sock\"`",
                "unix socket over which the listeners pass to the next awsvid; `\"\"` disables the handover; only root may enter its directory",
            ),
        ],
    },
    TableSpec {
        name: "identity",
        is_list: false,
        meaning: "source of identities",
        keys: &[
            key(
                "source",
                "`\"workload-api\"`, `\"spire-delegated\"`, `\"spiffe-broker\"`",
                "`\"workload-api\"`",
                "which API identifies callers and issues JWT-SVIDs",
            ),
            key(
                "workload_api_socket",
                "socket URI",
                "`SPIFFE_ENDPOINT_SOCKET`, else `\"unix:///run/spire/agent-sockets/spire-agent.sock\"`",
                "the SPIFFE Workload API; `spire-delegated` uses it only in `awsvid trust-policy`, for a live token",
            ),
            key(
                "admin_socket",
                "unix socket URI",
                "required by `spire-delegated`",
                "the agent's `admin_socket_path`",
            ),
            key(
                "broker_socket",
                "unix socket URI",
                "`SPIFFE_BROKER_SOCKET`; required by `spiffe-broker`",
                "the agent's broker socket",
            ),
            key(
                "broker_server_id",
                "SPIFFE ID pattern",
                "`\"spiffe://<own trust domain>/spire/agent/**\"`",
                "the agent's own SPIFFE ID, for `spiffe-broker`",
            ),
            key(
                "workload_reference",
                "`\"auto\"`, `\"process\"`",
                "`\"auto\"`",
                "how `spiffe-broker` names a caller in a pod: by the pod, or by its process",
            ),
            key(
                "audience",
                "string",
                "`\"sts.amazonaws.com\"`",
                "audience of the JWT-SVID for roles without one of their own",
            ),
        ],
    },
    TableSpec {
        name: "sts",
        is_list: false,
        meaning: "STS that exchanges a JWT-SVID for credentials",
        keys: &[
            key(
                "region",
                "string",
                "required unless every role has its own `region` or `sts_endpoint`, or `endpoint` is set",
                "AWS region, as in `\"eu-central-1\"`; its regional STS is used",
            ),
            key(
                "endpoint",
                "URL",
                "AWS's STS of `region`",
                "another STS, as in `\"https://minio.internal:9000\"`",
            ),
            key(
                "ca_file",
                "path",
                "the system's certificates",
                "PEM certificates of the authority that signed the endpoint's certificate; AWS's own STS is always verified by the system's certificates",
            ),
            key(
                "timeout",
                "duration, 100ms to 60s",
                "`\"5s\"`",
                "time limit of one call",
            ),
            key(
                "max_concurrent",
                "integer, 1 to 1000",
                "`16`",
                "calls at the same time",
            ),
        ],
    },
    TableSpec {
        name: "cache",
        is_list: false,
        meaning: "bounds of the cache",
        keys: &[
            key(
                "max_entries",
                "integer, 1 to 1000000",
                "`10000`",
                "cache entries at the same time; an entry is one SPIFFE ID's credentials for one role",
            ),
            key(
                "revocation_grace",
                "duration, 0s to 12h",
                "`\"5m\"`",
                "how long awsvid serves cached credentials after STS has rejected their refresh",
            ),
        ],
    },
    TableSpec {
        name: "audit",
        is_list: false,
        meaning: "audit records",
        keys: &[
            key(
                "file",
                "path, or `\"-\"`",
                "`\"-\"`",
                "destination of audit records; `\"-\"` is standard output",
            ),
            key(
                "required",
                "boolean",
                "`false`",
                "reject a request (503 `not_audited`) unless its record was written",
            ),
        ],
    },
    TableSpec {
        name: "log",
        is_list: false,
        meaning: "log, which goes to standard error",
        keys: &[
            key(
                "level",
                "string",
                "`\"info\"`",
                "`off`, `error`, `warn`, `info`, `debug`, `trace`, or a list such as `\"info,awsvid::sts=debug\"`; `AWSVID_LOG` overrides it",
            ),
            key(
                "format",
                "`\"auto\"`, `\"text\"`, `\"json\"`",
                "`\"auto\"`",
                "text on a terminal and JSON elsewhere, or always one of them",
            ),
        ],
    },
    TableSpec {
        name: "requested_roles",
        is_list: false,
        meaning: "roles that a workload may request by their ARN",
        keys: &[key(
            "allow",
            "list of patterns",
            "`[]`",
            "role ARNs that a workload may name in the path, as in `[\"arn:aws:iam::123456789012:role/app-*\"]`; `*` matches within one segment",
        )],
    },
    TableSpec {
        name: "workload",
        is_list: true,
        meaning: "rules that map a caller to a SPIFFE ID; the first one that matches wins",
        keys: &[
            key(
                "spiffe_id",
                "SPIFFE ID",
                "required",
                "the identity of callers that match",
            ),
            key("user", "string", "any", "name of the caller's user"),
            key(
                "uid",
                "integer",
                "any",
                "number of the caller's user, instead of `user`",
            ),
            key(
                "group",
                "string",
                "any",
                "name of the caller's primary group",
            ),
            key(
                "gid",
                "integer",
                "any",
                "number of the primary group, instead of `group`",
            ),
            key(
                "supplementary_group",
                "string or integer",
                "any",
                "name or number of another group of the caller",
            ),
            key(
                "systemd_unit",
                "string",
                "any",
                "the outermost unit that is not a slice, as in `\"billing.service\"`, `\"session-3.scope\"`, `\"user@1000.service\"`",
            ),
            key(
                "cgroup",
                "pattern",
                "only callers outside containers",
                "the cgroup's path; `*` matches within one segment, `**` across several",
            ),
            key(
                "exe",
                "path",
                "any",
                "the executable, by its device and inode; needs another key in the rule",
            ),
            key(
                "allow_exe_only",
                "boolean",
                "`false`",
                "permit a rule with `exe` alone",
            ),
        ],
    },
    TableSpec {
        name: "role",
        is_list: true,
        meaning: "roles, and the SPIFFE IDs that may have them; the first one is the default",
        keys: &[
            key(
                "name",
                "string, up to 64 of `A-Z a-z 0-9 . _ -`",
                "required",
                "the name in the path; must not begin with `arn:`",
            ),
            key(
                "spiffe_id",
                "SPIFFE ID pattern",
                "required",
                "the identities that may have the role: exact, or `*` for one segment and a last `**` for the rest",
            ),
            key(
                "role_arn",
                "ARN or template",
                "required",
                "the role to assume",
            ),
            key(
                "audience",
                "string, up to 255 bytes",
                "`[identity] audience`",
                "audience of the JWT-SVID; one audience belongs to one STS",
            ),
            key(
                "duration",
                "duration, 15m to 12h",
                "`\"1h\"`",
                "life of a session; below 30 minutes some SDKs fetch credentials for every call",
            ),
            key(
                "session_name",
                "string",
                "made from the SPIFFE ID",
                "fixed name of the session",
            ),
            key("region", "string", "`[sts] region`", "AWS region"),
            key("sts_endpoint", "URL", "`[sts] endpoint`", "another STS"),
            key(
                "policy",
                "string",
                "none",
                "session policy: one JSON object of up to 2048 characters",
            ),
            key(
                "policy_arns",
                "list of strings",
                "`[]`",
                "up to 10 managed session policies",
            ),
            key(
                "allow_shared_audience",
                "boolean",
                "`false`",
                "permit an audience that another STS uses as well",
            ),
        ],
    },
];
