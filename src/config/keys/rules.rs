//! The tables of which a file may have several.

use super::{TableSpec, key};

/// The rules for callers.
pub(super) const WORKLOAD: TableSpec = TableSpec {
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
};

/// The roles of identities.
pub(super) const ROLE: TableSpec = TableSpec {
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
            "exchange",
            "`\"web-identity\"`, `\"roles-anywhere\"`, `\"both\"`",
            "`\"web-identity\"`",
            "how the role is assumed: with a JWT-SVID at STS, with an X.509-SVID at IAM Roles Anywhere, or the second while the first is unavailable",
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
        key(
            "region",
            "string",
            "`[sts] region`",
            "AWS region of STS, and of the workload's metadata service",
        ),
        key(
            "sts_endpoint",
            "URL",
            "`[sts] endpoint`",
            "another STS; an error in a role that calls none",
        ),
        key(
            "policy",
            "string",
            "none",
            "session policy: one JSON object of up to 2048 characters; a template within its strings, where `${...}` stays as it is",
        ),
        key(
            "policy_arns",
            "list of strings",
            "`[]`",
            "up to 10 managed session policies, by ARN or template",
        ),
        key(
            "allow_shared_audience",
            "boolean",
            "`false`",
            "permit an audience that another STS uses as well",
        ),
    ],
};

/// The roles of a chain after the first one.
pub(super) const ROLE_CHAIN: TableSpec = TableSpec {
    name: "role.chain",
    is_list: true,
    meaning: "up to two roles that are assumed one after the other with the credentials of the `[[role]]` above; a workload gets the credentials of the last",
    keys: &[
        key(
            "role_arn",
            "ARN or template",
            "required",
            "the role to assume with the credentials before it",
        ),
        key(
            "duration",
            "duration, 15m to 1h",
            "`\"1h\"`",
            "life of a session; STS allows no more than an hour in a chain",
        ),
        key(
            "session_name",
            "template",
            "`\"{session_name}\"`",
            "name of the session",
        ),
        key(
            "external_id",
            "template",
            "none",
            "external ID that the role's trust policy compares",
        ),
        key(
            "source_identity",
            "template",
            "none",
            "source identity, which this session and all later ones keep; only one role of a chain may set it",
        ),
        key(
            "tags",
            "table of templates",
            "`{}`",
            "up to 50 session tags, as in `{ \"team\" = \"{path[1]}\" }`",
        ),
        key(
            "transitive_tags",
            "list of strings",
            "`[]`",
            "keys of the tags that all later sessions keep",
        ),
        key(
            "policy",
            "string",
            "none",
            "session policy, as in `[[role]]`",
        ),
        key(
            "policy_arns",
            "list of strings",
            "`[]`",
            "managed session policies, as in `[[role]]`",
        ),
    ],
};
