//! Every table and key of the configuration file, once.
//!
//! The reader takes the known names from here, `awsvid.toml(5)` is made from it, and tests compare
//! it with `config show`, `deploy/awsvid.toml` and `deploy/docs/configuration.md`.

/// A table of the configuration file.
#[derive(Debug)]
pub(super) struct TableSpec {
    pub(super) name: &'static str,
    /// Whether a file may have several, as `[[name]]`.
    pub(super) is_list: bool,
    pub(super) meaning: &'static str,
    pub(super) keys: &'static [KeySpec],
}

/// A key of a table. Its texts have code in backticks.
#[derive(Debug)]
pub(super) struct KeySpec {
    pub(super) name: &'static str,
    /// What a value is, with its bounds.
    pub(super) value: &'static str,
    /// The default as TOML in backticks, or what a missing key means.
    pub(super) default: &'static str,
    pub(super) meaning: &'static str,
}

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

/// Keys of a later version, by table: only a value that requests nothing is allowed.
const RESERVED: [(&str, &str); 2] = [("listen", "node"), ("role", "chain")];

impl TableSpec {
    /// Returns the header that begins the table in a file.
    pub(super) fn header(&self) -> String {
        match self.is_list {
            true => format!("[[{}]]", self.name),
            false => format!("[{}]", self.name),
        }
    }

    pub(super) fn key(&self, name: &str) -> Option<&'static KeySpec> {
        self.keys.iter().find(|key| key.name == name)
    }
}

/// Finds a table by its name.
pub(super) fn table(name: &str) -> Option<&'static TableSpec> {
    TABLES.iter().find(|table| table.name == name)
}

/// Returns the names that are known in a table, or at the top of the file for the empty name.
pub(super) fn names_in(table_name: &str) -> Vec<&'static str> {
    match table(table_name) {
        Some(table) => table.keys.iter().map(|key| key.name).collect(),
        None if table_name.is_empty() => TABLES.iter().map(|table| table.name).collect(),
        None => Vec::new(),
    }
}

/// Returns whether a file may have this key in this table.
pub(super) fn is_known(table: &str, key: &str) -> bool {
    RESERVED.contains(&(table, key)) || names_in(table).contains(&key)
}

/// Returns what the writer of an unknown key of this table probably meant.
pub(super) fn suggestion(table_name: &str, name: &str) -> String {
    let here = names_in(table_name);
    let distance = |key: &&str| strsim::damerau_levenshtein(name, key);
    let near = here.iter().copied().min_by_key(distance);
    if let Some(near) = near.filter(|key| distance(key) <= MAX_TYPOS) {
        return format!("did you mean `{near}`?");
    }
    if let Some(table) = table(name).filter(|_| !table_name.is_empty()) {
        return format!("write it as {}, with its keys below", table.header());
    }
    let elsewhere = TABLES.iter().filter(|table| table.key(name).is_some());
    let mut elsewhere: Vec<String> = elsewhere.map(TableSpec::header).collect();
    if !elsewhere.is_empty() {
        elsewhere.sort_by(|a, b| a.trim_matches('[').cmp(b.trim_matches('[')));
        return format!("it belongs to {}", elsewhere.join(" or to "));
    }
    let similar = similar(table_name, name);
    if (1..=MAX_SIMILAR).contains(&similar.len()) {
        return format!("did you mean {}?", similar.join(" or "));
    }
    format!("remove it; known here: {}", here.join(", "))
}

/// Names that differ by more edits than this are not the same name mistyped.
const MAX_TYPOS: usize = 2;
/// More names than this are not a help.
const MAX_SIMILAR: usize = 3;

/// Returns the keys with all words of an unknown name, those of the same table if it has any.
fn similar(table_name: &str, name: &str) -> Vec<String> {
    let words: Vec<&str> = name.split('_').collect();
    let has_all = |table: &str, key: &str| {
        let known: Vec<&str> = table.split('_').chain(key.split('_')).collect();
        words.iter().all(|word| known.contains(word))
    };
    let here = names_in(table_name);
    let here: Vec<String> = here
        .iter()
        .filter(|key| has_all("", key))
        .map(|key| format!("`{key}`"))
        .collect();
    if !here.is_empty() {
        return here;
    }
    let in_table = |table: &'static TableSpec| {
        let keys = table.keys.iter();
        keys.filter(|key| has_all(table.name, key.name))
            .map(|key| format!("`{}` in {}", key.name, table.header()))
    };
    TABLES.iter().flat_map(in_table).collect()
}

/// All tables, in the order of the documents.
pub(super) const TABLES: &[TableSpec] = &[
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
                "loopback addresses for workloads; `[]` disables TCP; a port from 1024 on causes a warning, because any user can take it while awsvid is down",
            ),
            key(
                "admin",
                "address",
                "`\"127.0.0.1:975\"`",
                "health and metrics for operators; may be an address of the node; `\"\"` disables it",
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
                "the SPIFFE Workload API; `spire-delegated` does not use it",
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
                "number of the caller's user, in place of `user`",
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
                "number of the primary group, in place of `group`",
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

#[cfg(test)]
mod tests;
