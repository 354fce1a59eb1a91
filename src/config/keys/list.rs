//! The list itself, with the texts of `deploy/docs/configuration.md`.

use super::rules::{ROLE, ROLE_CHAIN, WORKLOAD};
use super::{TableSpec, key};

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
        name: "imds",
        is_list: false,
        meaning: "EC2's instance metadata service, for programs that know no other source",
        keys: &[
            key(
                "mode",
                "`\"off\"`, `\"endpoint\"`, `\"address\"`",
                "`\"off\"`",
                "where awsvid serves it: nowhere, at the TCP addresses of `[listen]` and of pods, or also at `169.254.169.254` in pods that opt in",
            ),
            key(
                "region",
                "boolean",
                "`true`",
                "also serve the region of the workload's first role, and a zone made from it",
            ),
            key(
                "key_file",
                "path",
                "`\"/run/awsvid/imds-key\"`",
                "file with the key of metadata tokens, mode 0600, which awsvid writes if it is missing",
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
        name: "roles_anywhere",
        is_list: false,
        meaning: "IAM Roles Anywhere, which exchanges an X.509-SVID for credentials",
        keys: &[
            key(
                "trust_anchor_arn",
                "ARN",
                "required in this table",
                "the trust anchor, which holds the CAs of the SVIDs; its region is that of the calls",
            ),
            key(
                "profile_arn",
                "ARN",
                "required in this table",
                "the profile, which lists the roles; of the same region",
            ),
            key(
                "endpoint",
                "URL",
                "AWS's endpoint of the region",
                "another endpoint, as in `\"https://vpce-1.rolesanywhere.eu-central-1.vpce.amazonaws.com\"`",
            ),
            key(
                "ca_file",
                "path",
                "the system's certificates",
                "PEM certificates of the authority that signed the endpoint's certificate; AWS's own endpoints are always verified by the system's certificates",
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
    WORKLOAD,
    ROLE,
    ROLE_CHAIN,
];
