//! Errors, by their lines, keys and words. A row is complete: an error that it does not list fails
//! the test.

use super::*;

/// The line (0: none), the key, and what the message holds.
type ExpectedProblem<'a> = (usize, &'a str, &'a str);

#[track_caller]
pub(super) fn rejected(text: &str, expected: &[ExpectedProblem<'_>]) {
    let problems = parse(text).expect_err(text);
    let fits = |problem: &Problem, (line, key, words): &ExpectedProblem<'_>| {
        line_of(problem).unwrap_or(0) == *line
            && problem.key == *key
            && problem.to_string().contains(words)
    };
    let all =
        problems.len() == expected.len() && problems.iter().zip(expected).all(|(p, e)| fits(p, e));
    assert!(all, "{text}\ngave {problems:#?}\nnot {expected:#?}");
    assert!(
        problems
            .iter()
            .all(|problem| !problem.what.is_empty() && !problem.fix.is_empty()),
        "{problems:#?}"
    );
}

/// Each row: a line of `LEAST` to replace (or nothing: to add), by what, and the one error.
#[track_caller]
fn each(rows: &[(&str, &str, ExpectedProblem<'_>)]) {
    for (line, new, expected) in rows {
        let text = if line.is_empty() {
            format!("{LEAST}{new}\n")
        } else {
            with(line, new)
        };
        rejected(&text, &[*expected]);
    }
}

#[test]
fn all_errors_are_reported_together_in_their_order() {
    let text = r#"requested_role.allow = []
[listen]
tcp = "127.0.0.1:974"
admin = "localhost:975"
[sts]
regoin = "eu-central-1"
timeout = 5
[[workload]]
spiffe_id = "example.org/billing"
user = "bil:ing"
[[role]]
name = "billing"
spiffe_id = "spiffe://example.org/billing"
role_arn = "arn:aws:iam::1234:role/billing"
duration = "1"
"#;
    rejected(
        text,
        &[
            (1, "requested_role", "did you mean `requested_roles`?"),
            (3, "listen.tcp", "this is a string, where a list is wanted"),
            (
                4,
                "listen.admin",
                "\"localhost:975\": invalid socket address",
            ),
            (6, "sts.regoin", "did you mean `region`?"),
            (
                7,
                "sts.timeout",
                "this is an integer, where a duration is wanted; write a number and a unit",
            ),
            (9, "workload.spiffe_id", "begins with spiffe://"),
            (
                10,
                "workload.user",
                "\"bil:ing\": it is not a name; write the name of a user",
            ),
            (14, "role.role_arn", "arn:aws:iam::<12 digits>:role/<name>"),
            (15, "role.duration", "time unit needed"),
        ],
    );
}

#[test]
fn errors_print_as_file_line_key_text_and_fix() {
    let problems = parse("[listen]\nadmin = 975\n[[workload]]\nuid = 1\n").unwrap_err();
    let text = ConfigErrors {
        path: "/etc/awsvid.toml".into(),
        problems,
    }
    .to_string();
    let expected = "\
        /etc/awsvid.toml:2: listen.admin: this is an integer, where a string is wanted; write a string in quotes\n\
        /etc/awsvid.toml:3: workload.spiffe_id: it is missing; add the SPIFFE ID that these callers have\n\
        /etc/awsvid.toml: role: no caller has a role, so every request would be rejected; add a [[role]]";
    assert_eq!(text, expected);
}

#[test]
fn syntax_error_is_reported_alone() {
    let table: [(&str, usize, &str); 6] = [
        (
            "unknown = 1\n[listen\n",
            2,
            "this is not TOML: unclosed table",
        ),
        ("[listen]\nunknown = 1\nunix = /run/x\n", 3, "(column 8)"),
        (
            "[listen]\nadmin = \"a\"\nadmin = \"b\"\n",
            3,
            "duplicate key at `admin`",
        ),
        ("[listen]\n\n[listen]\n", 3, "duplicate key at `listen`"),
        ("a = \"", 1, "this is not TOML"),
        ("\n\nfoo", 3, "this is not TOML"),
    ];
    for (text, line, words) in table {
        rejected(text, &[(line, "", words)]);
    }
}

#[test]
fn empty_file_is_an_error() {
    let nothing = [
        (0, "workload", "add a [[workload]]"),
        (0, "role", "add a [[role]]"),
    ];
    rejected("", &nothing);
    rejected(
        "workload = []\nrole = []\n",
        &[(1, "workload", "add a"), (2, "role", "add a")],
    );
    rejected(
        "[[workload]]\n[[role]]\n",
        &[
            (1, "workload.spiffe_id", "it is missing"),
            (1, "workload", "matches every caller"),
            (2, "role.name", "it is missing"),
            (2, "role.spiffe_id", "it is missing"),
            (2, "role.role_arn", "it is missing"),
            (0, "sts.region", "no AWS region"),
        ],
    );
}

/// A typing error does not hide an error of the key that is there.
#[test]
fn suggestion_hides_only_that_its_key_is_missing() {
    rejected(
        &with("name = \"billing\"", "name = \"\"\nnme = \"billing\""),
        &[
            (7, "role.name", "it is empty"),
            (8, "role.nme", "did you mean `name`?"),
        ],
    );
    // The table before has the same key.
    rejected(
        "[[role]]\n[[role]]\nname = \"a\"\nspiffe_id = \"spiffe://example.org/a\"\nrole-arn = \"\"\n[sts]\nregion = \"eu-central-1\"\n[[workload]]\nspiffe_id = \"spiffe://example.org/a\"\nuid = 7\n",
        &[
            (1, "role.name", "it is missing"),
            (1, "role.spiffe_id", "it is missing"),
            (1, "role.role_arn", "it is missing"),
            (5, "role.role-arn", "did you mean `role_arn`?"),
        ],
    );
}

#[test]
fn unknown_key_has_a_suggestion() {
    each(&[
        ("", "[listne]", (10, "listne", "did you mean `listen`?")),
        (
            "",
            "[[roles]]\nx = 1",
            (10, "roles", "did you mean `role`?"),
        ),
        // The key that is meant is not reported as missing, too.
        (
            "region = \"eu-central-1\"",
            "regoin = \"eu-central-1\"",
            (2, "sts.regoin", "did you mean `region`?"),
        ),
        (
            "[[role]]",
            "[[roles]]",
            (6, "roles", "did you mean `role`?"),
        ),
        (
            "role_arn = \"arn:aws:iam::123456789012:role/billing\"",
            "role-arn = \"arn:aws:iam::123456789012:role/billing\"",
            (9, "role.role-arn", "did you mean `role_arn`?"),
        ),
        (
            "",
            "[[workloads]]\nx = 1",
            (10, "workloads", "did you mean `workload`?"),
        ),
        (
            "",
            "region = \"eu-west-1\"\nregion_ = 1",
            (11, "role.region_", "did you mean `region`?"),
        ),
        (
            "",
            "[listen]\nregion = \"eu-west-1\"",
            (
                11,
                "listen.region",
                "it belongs to [imds] or to [[role]] or to [sts]",
            ),
        ),
        (
            "",
            "[listen]\nsocket = \"unix:///x\"",
            (11, "listen.socket", "remove it; known here: unix, tcp"),
        ),
        (
            "",
            "[listen]\nworkload_api_socket = \"unix:///x\"",
            (11, "listen.workload_api_socket", "it belongs to [identity]"),
        ),
        (
            "",
            "[listen]\nallow_requested_roles = []",
            (
                11,
                "listen.allow_requested_roles",
                "did you mean `allow` in [requested_roles]?",
            ),
        ),
        (
            "",
            "[cache]\nsize = 3",
            (
                11,
                "cache.size",
                "remove it; known here: max_entries, revocation_grace",
            ),
        ),
        (
            "uid = 1001",
            "uid = 1001\n\"user name\" = 1",
            (6, "workload.user name", "has no such key"),
        ),
        (
            "uid = 1001",
            "uid = 1001\nUID = 1001",
            (6, "workload.UID", "has no such key"),
        ),
        (
            "",
            "[listen]\nunix.path = \"/x\"",
            (
                11,
                "listen.unix",
                "this is a table, where a string is wanted",
            ),
        ),
    ]);
}

#[test]
fn wrong_type_is_named() {
    each(&[
        (
            "",
            "[listen]\nunix = 1",
            (
                11,
                "listen.unix",
                "this is an integer, where a string is wanted",
            ),
        ),
        (
            "",
            "[listen]\nunix = false",
            (11, "listen.unix", "this is a boolean"),
        ),
        (
            "",
            "[listen]\ntcp = [\n 974]",
            (
                12,
                "listen.tcp",
                "this is an integer, where a string is wanted",
            ),
        ),
        (
            "",
            "[listen]\nmax_connections = \"10\"",
            (
                11,
                "listen.max_connections",
                "a string, where a number is wanted",
            ),
        ),
        (
            "",
            "[listen]\nmax_connections = 1.5",
            (11, "listen.max_connections", "this is a float"),
        ),
        (
            "",
            "[audit]\nrequired = \"yes\"",
            (
                11,
                "audit.required",
                "a string, where true or false is wanted",
            ),
        ),
        (
            "",
            "[audit]\nfile = 1979-05-27",
            (11, "audit.file", "this is a datetime"),
        ),
        (
            "",
            "duration = 3600",
            (
                10,
                "role.duration",
                "an integer, where a duration is wanted",
            ),
        ),
        (
            "",
            "policy = { Statement = [] }",
            (
                10,
                "role.policy",
                "this is a table, where a string is wanted",
            ),
        ),
        (
            "",
            "policy_arns = \"arn:aws:iam::aws:policy/x\"",
            (10, "role.policy_arns", "where a list is wanted"),
        ),
        (
            "",
            "[[listen]]\nunix = \"/x\"",
            (
                10,
                "listen",
                "this is an array, where a table is wanted; write it as [listen]",
            ),
        ),
        (
            "uid = 1001",
            "uid = \"1001\"",
            (
                5,
                "workload.uid",
                "this is a string, where a number is wanted",
            ),
        ),
        (
            "uid = 1001",
            "user = true",
            (
                5,
                "workload.user",
                "this is a boolean, where a string is wanted",
            ),
        ),
        (
            "uid = 1001",
            "supplementary_group = true",
            (5, "workload.supplementary_group", "this is a boolean"),
        ),
        (
            "uid = 1001",
            "uid = 1\nallow_exe_only = 1",
            (
                6,
                "workload.allow_exe_only",
                "where true or false is wanted",
            ),
        ),
    ]);
    let role = "[role]\nname = \"x\"\n";
    rejected(
        &format!(
            "[sts]\nregion = \"eu-west-1\"\n[[workload]]\nspiffe_id = \"spiffe://a/b\"\nuid = 1\n{role}"
        ),
        &[(
            6,
            "role",
            "this is a table, where a list of tables is wanted; write each as [[role]]",
        )],
    );
    rejected(
        "workload = [1]\nrole = [\"x\"]\n",
        &[
            (1, "workload", "where a table is wanted"),
            (2, "role", "where a table is wanted"),
        ],
    );
}

#[test]
fn mistake_is_reported_once() {
    // What stands in for a wrong value must not be compared with the rest of the file.
    let role = "[[role]]\nname = \"m\"\nspiffe_id = \"spiffe://example.org/billing\"\nrole_arn = \"arn:minio:iam:::role/m\"\n";
    let minio = with("region = \"eu-central-1\"", "endpoint = \"http://minio\"") + role;
    rejected(&minio, &[(2, "sts.endpoint", "without TLS")]);
    rejected(
        &format!("{LEAST}{role}sts_endpoint = \"minio\"\n"),
        &[(14, "role.sts_endpoint", "it is not a URL")],
    );
    let audience =
        format!("{LEAST}{role}sts_endpoint = \"https://minio\"\n[identity]\naudience = \"\"\n");
    rejected(&audience, &[(16, "identity.audience", "1 to 255 bytes")]);
    let later = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/billing\"\nuid = 1001";
    let ghost = with("uid = 1001", &format!("user = \"\"{later}"));
    rejected(&ghost, &[(5, "workload.user", "it is not a name")]);
    let partly = with(
        "uid = 1001",
        &format!("uid = 1001\nsystemd_unit = \"x\"{later}\nsystemd_unit = \"y.service\""),
    );
    rejected(
        &partly,
        &[(6, "workload.systemd_unit", "did you mean x.service?")],
    );
    rejected(
        &format!(
            "{LEAST}[listen]\nadmin = \"x\"\ntcp = [\"127.0.0.1:975\"]\nmax_connections = 0\nmax_connections_per_workload = 5000"
        ),
        &[
            (11, "listen.admin", "invalid socket address"),
            (13, "listen.max_connections", "out of range"),
        ],
    );
    rejected(
        &format!("{LEAST}[listen]\nunix = \"x\"\nstatus = \"/run/awsvid/awsvid.sock\"\n"),
        &[(11, "listen.unix", "it is relative")],
    );
}

#[test]
fn reserved_key_is_an_error() {
    each(&[
        (
            "",
            "[listen]\nnode = [\"169.254.170.23:80\"]",
            (
                11,
                "listen.node",
                "this version of awsvid does not have it yet; remove it",
            ),
        ),
        (
            "",
            "chain = [\"arn:aws:iam::123456789012:role/x\"]",
            (
                10,
                "role.chain",
                "this is a string, where a table is wanted; write each as [[chain]]",
            ),
        ),
    ]);
}

#[test]
fn listeners_are_checked() {
    let long = format!("[listen]\nunix = \"/{}\"", "x".repeat(107));
    each(&[
        (
            "",
            "[listen]\nunix = \"run/awsvid.sock\"",
            (11, "listen.unix", "it is relative"),
        ),
        (
            "",
            "[listen]\nunix = \"/run/awsvid/\"",
            (11, "listen.unix", "it names a directory"),
        ),
        (
            "",
            "[listen]\nunix = \"/a\\u0000b\"",
            (11, "listen.unix", "NUL"),
        ),
        ("", &long, (11, "listen.unix", "at most 107 bytes")),
        (
            "",
            "[listen]\nstatus = \"status.sock\"",
            (11, "listen.status", "it is relative"),
        ),
        (
            "",
            "[listen]\ntoken_file = \"\"",
            (11, "listen.token_file", "it is empty"),
        ),
        (
            "",
            "[pods]\nnetns_dir = \"netns\"",
            (11, "pods.netns_dir", "it is relative"),
        ),
        (
            "",
            "[pods]\nnetns_dir = \"/\"",
            (11, "pods.netns_dir", "it is empty"),
        ),
        (
            "",
            "[pods]\nenabled = \"yes\"",
            (11, "pods.enabled", "true or false"),
        ),
        (
            "",
            "[pods]\nenabled = true\n[listen]\nunix = \"/run/awsvid-handover/awsvid.sock\"",
            (
                13,
                "listen.unix",
                "is also what `pods.handover_socket` names",
            ),
        ),
        (
            "",
            "[imds]\nmode = \"on\"",
            (
                11,
                "imds.mode",
                "write \"off\" or \"endpoint\" or \"address\"",
            ),
        ),
        (
            "",
            "[imds]\nmode = \"address\"",
            (11, "imds.mode", "[pods] serves none"),
        ),
        (
            "",
            "[listen]\ntcp = []\n[imds]\nmode = \"endpoint\"",
            (13, "imds.mode", "no TCP address is left"),
        ),
        (
            "",
            "[listen]\nauthorization = \"token\"\n[imds]\nmode = \"endpoint\"",
            (13, "imds.mode", "would not hold"),
        ),
        (
            "",
            "[imds]\nkey_file = \"/run/awsvid/token\"",
            (
                11,
                "imds.key_file",
                "is also what `listen.token_file` names",
            ),
        ),
        (
            "",
            "[pods]\ncgroup_root = \"/\"",
            (
                11,
                "pods.cgroup_root",
                "not a path of a cgroup below the root",
            ),
        ),
        (
            "",
            "[pods]\ncgroup_root = \"kubepods\"",
            (
                11,
                "pods.cgroup_root",
                "not a path of a cgroup below the root",
            ),
        ),
        (
            "",
            "[pods]\ncgroup_root = \"/sys/fs/cgroup/kubepods\"",
            (11, "pods.cgroup_root", "not of its directory"),
        ),
        (
            "",
            "[listen]\nunix = \"/run/awsvid/status.sock\"",
            (11, "listen.unix", "is also what `listen.status` names"),
        ),
        (
            "",
            "[listen]\nstatus = \"/run//awsvid/token\"",
            (
                11,
                "listen.status",
                "is also what `listen.token_file` names",
            ),
        ),
        (
            "",
            "[audit]\nfile = \"/run/awsvid/token\"",
            (11, "audit.file", "is also what `listen.token_file` names"),
        ),
        (
            "",
            "[identity]\nworkload_api_socket = \"unix:/run/awsvid/awsvid.sock\"",
            (
                11,
                "identity.workload_api_socket",
                "what `listen.unix` names",
            ),
        ),
        (
            "",
            "[listen]\nunix = \"\"\ntcp = []",
            (12, "listen.tcp", "neither a unix socket nor a TCP address"),
        ),
        (
            "",
            "[listen]\ntcp = [\"0.0.0.0:974\"]",
            (11, "listen.tcp", "0.0.0.0:974 is not loopback"),
        ),
        (
            "",
            "[listen]\ntcp = [\"[::]:974\"]",
            (11, "listen.tcp", "[::]:974 is not loopback"),
        ),
        (
            "",
            "[listen]\ntcp = [\"[::ffff:127.0.0.1]:974\"]",
            (11, "listen.tcp", "is not loopback"),
        ),
        (
            "",
            "[listen]\ntcp = [\"10.0.0.1:974\"]",
            (11, "listen.tcp", "10.0.0.1:974 is not loopback"),
        ),
        (
            "",
            "[listen]\ntcp = [\"127.0.0.1\"]",
            (
                11,
                "listen.tcp",
                "\"127.0.0.1\" is not an IP address with a port",
            ),
        ),
        (
            "",
            "[listen]\ntcp = [\"localhost:974\"]",
            (11, "listen.tcp", "is not an IP address with a port"),
        ),
        (
            "",
            "[listen]\ntcp = [\"127.0.0.1:99999\"]",
            (11, "listen.tcp", "is not an IP address with a port"),
        ),
        (
            "",
            "[listen]\ntcp = [\"127.0.0.1:80\",\n\"127.0.0.1:80\"]",
            (12, "listen.tcp", "127.0.0.1:80 occurs twice"),
        ),
        (
            "",
            "[listen]\nadmin = \"127.0.0.1:974\"",
            (11, "listen.admin", "`tcp` (127.0.0.1:974) overlap"),
        ),
        (
            "",
            "[listen]\nadmin = \"0.0.0.0:974\"",
            (11, "listen.admin", "`tcp` (127.0.0.1:974) overlap"),
        ),
        (
            "",
            "[listen]\nadmin = \"[::]:974\"",
            (11, "listen.admin", "overlap"),
        ),
        (
            "",
            "[listen]\ntcp = [\"127.0.0.1:975\"]",
            (11, "listen.tcp", "`admin` (127.0.0.1:975)"),
        ),
        (
            "",
            "[listen]\nauthorization = \"none\"",
            (
                11,
                "listen.authorization",
                "write \"present\" or \"token\" or \"off\"",
            ),
        ),
        (
            "",
            "[listen]\nmax_connections = 0",
            (
                11,
                "listen.max_connections",
                "0 is out of range; write a whole number from 1",
            ),
        ),
        (
            "",
            "[listen]\nmax_connections = -1",
            (11, "listen.max_connections", "-1 is out of range"),
        ),
        (
            "",
            "[listen]\nmax_connections = 9999999999999999999999999999999999999999",
            (11, "listen.max_connections", "out of range"),
        ),
        (
            "",
            "[listen]\nmax_connections = 100",
            (
                11,
                "listen.max_connections",
                "one workload may have 512 connections",
            ),
        ),
        (
            "",
            "[listen]\nmax_connections_per_workload = 5000",
            (
                11,
                "listen.max_connections_per_workload",
                "none of all 4096",
            ),
        ),
    ]);
    // Port 0 is a new one each time, so nothing overlaps.
    loaded(&format!(
        "{LEAST}[listen]\ntcp = [\"127.0.0.1:0\", \"127.0.0.1:0\", \"[::1]:0\"]\nadmin = \"127.0.0.1:0\"\n"
    ));
    loaded(&format!(
        "{LEAST}[listen]\ntcp = [\"127.0.0.1:975\"]\nadmin = \"\"\nstatus = \"\"\n"
    ));
    loaded(&format!(
        "{LEAST}[listen]\ntcp = [\"[::1]:975\"]\nadmin = \"0.0.0.0:975\"\n"
    ));
}

#[test]
fn identity_is_checked() {
    let long = format!("[identity]\naudience = \"{}\"", "a".repeat(256));
    each(&[
        (
            "",
            "[identity]\nworkload_api_socket = \"/run/spire.sock\"",
            (
                11,
                "identity.workload_api_socket",
                "an endpoint begins with unix:// or tcp://; write unix:///run/spire.sock",
            ),
        ),
        (
            "",
            "[identity]\nworkload_api_socket = \"\"",
            (
                11,
                "identity.workload_api_socket",
                "begins with unix:// or tcp://",
            ),
        ),
        (
            "",
            "[identity]\nworkload_api_socket = \"tcp://agent:8081\"",
            (11, "identity.workload_api_socket", "no name"),
        ),
        (
            "",
            "[identity]\naudience = \"\"",
            (11, "identity.audience", "1 to 255 bytes"),
        ),
        (
            "",
            "[identity]\naudience = \"a b\"",
            (11, "identity.audience", "no spaces"),
        ),
        ("", &long, (11, "identity.audience", "1 to 255 bytes")),
    ]);
}

#[test]
fn sts_cache_audit_and_log_are_checked() {
    each(&[
        (
            "region = \"eu-central-1\"",
            "",
            (1, "sts.region", "no AWS region is set"),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"eu_central_1\"",
            (2, "sts.region", "a-z, 0-9 and '-'"),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"eu-1.evil.example/\"",
            (2, "sts.region", "a-z, 0-9 and '-'"),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"\"",
            (2, "sts.region", "a-z, 0-9 and '-'"),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"frankfurt\"",
            (2, "sts.region", "AWS has no region of such a name"),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"eu-central-1a\"",
            (2, "sts.region", "AWS has no region"),
        ),
        (
            "region = \"eu-central-1\"",
            "endpoint = \"http://minio.internal:9000\"",
            (2, "sts.endpoint", "without TLS"),
        ),
        (
            "region = \"eu-central-1\"",
            "endpoint = \"http://10.0.0.1:9000\"",
            (2, "sts.endpoint", "without TLS"),
        ),
        (
            "region = \"eu-central-1\"",
            "endpoint = \"http://127.evil.example\"",
            (2, "sts.endpoint", "without TLS"),
        ),
        (
            "region = \"eu-central-1\"",
            "endpoint = \"minio:9000\"",
            (2, "sts.endpoint", "it is not a URL"),
        ),
        (
            "region = \"eu-central-1\"",
            "endpoint = \"\"",
            (2, "sts.endpoint", "it is not a URL"),
        ),
        (
            "",
            "sts_endpoint = \"http://minio.internal:9000\"",
            (10, "role.sts_endpoint", "without TLS"),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"eu-central-1\"\nca_file = \"ca.pem\"",
            (3, "sts.ca_file", "relative"),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"eu-central-1\"\nca_file = \"/etc/ca.pem\"",
            (3, "sts.ca_file", "no role uses an STS endpoint of its own"),
        ),
        (
            "region = \"eu-central-1\"",
            "endpoint = \"https://sts.eu-central-1.amazonaws.com\"\nca_file = \"/etc/ca.pem\"",
            (
                3,
                "sts.ca_file",
                "AWS's are trusted by the system's certificates alone",
            ),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"eu-central-1\"\ntimeout = \"0s\"",
            (3, "sts.timeout", "out of range"),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"eu-central-1\"\ntimeout = \"5 parsecs\"",
            (3, "sts.timeout", "is not a duration"),
        ),
        (
            "region = \"eu-central-1\"",
            "region = \"eu-central-1\"\nmax_concurrent = 0",
            (3, "sts.max_concurrent", "out of range"),
        ),
        (
            "",
            "[cache]\nmax_entries = 0",
            (11, "cache.max_entries", "out of range"),
        ),
        (
            "",
            "[cache]\nrevocation_grace = \"13h\"",
            (11, "cache.revocation_grace", "13h is out of range"),
        ),
        (
            "",
            "[audit]\nfile = \"audit.log\"",
            (11, "audit.file", "it is relative"),
        ),
        (
            "",
            "[log]\nlevel = \"inof\"",
            (11, "log.level", "`inof` is not a level"),
        ),
        (
            "",
            "[log]\nlevel = \"\"",
            (11, "log.level", "is not a level"),
        ),
        (
            "",
            "[log]\nlevel = \"info,hyper=loud\"",
            (11, "log.level", "`loud` is not a level"),
        ),
        (
            "",
            "[log]\nformat = \"xml\"",
            (11, "log.format", "write \"auto\" or \"text\" or \"json\""),
        ),
    ]);
}

#[test]
fn rules_are_checked() {
    each(&[
        (
            "uid = 1001",
            "",
            (
                3,
                "workload",
                "without a key this rule matches every caller",
            ),
        ),
        (
            "uid = 1001",
            "uid = 1001\nuser = \"billing\"",
            (6, "workload.user", "`user` and `uid` mean the same"),
        ),
        (
            "uid = 1001",
            "gid = 1001\ngroup = \"billing\"",
            (6, "workload.group", "`group` and `gid` mean the same"),
        ),
        (
            "uid = 1001",
            "uid = -1",
            (5, "workload.uid", "out of range"),
        ),
        (
            "uid = 1001",
            "uid = 4294967295",
            (5, "workload.uid", "out of range"),
        ),
        (
            "uid = 1001",
            "uid = 65534",
            (5, "workload.uid", "no caller matches it"),
        ),
        (
            "uid = 1001",
            "gid = 65534",
            (5, "workload.gid", "no caller matches it"),
        ),
        (
            "uid = 1001",
            "supplementary_group = 65534",
            (5, "workload.supplementary_group", "no caller matches it"),
        ),
        (
            "uid = 1001",
            "user = \"\"",
            (5, "workload.user", "it is not a name"),
        ),
        (
            "uid = 1001",
            "user = \"billing\\u0000x\"",
            (5, "workload.user", "it is not a name"),
        ),
        (
            "uid = 1001",
            "user = \"1001\"",
            (
                5,
                "workload.user",
                "1001 is a number, where a name is wanted; write uid = 1001",
            ),
        ),
        (
            "uid = 1001",
            "user = 1001",
            (
                5,
                "workload.user",
                "1001 is a number, where a name is wanted; write uid = 1001",
            ),
        ),
        (
            "uid = 1001",
            "group = 100",
            (
                5,
                "workload.group",
                "100 is a number, where a name is wanted; write gid = 100",
            ),
        ),
        (
            "uid = 1001",
            "supplementary_group = \"8\"",
            (
                5,
                "workload.supplementary_group",
                "write supplementary_group = 8",
            ),
        ),
        (
            "uid = 1001",
            "exe = \"/opt/billing\"",
            (5, "workload.exe", "set `allow_exe_only = true`"),
        ),
        (
            "uid = 1001",
            "exe = \"/opt/billing\"\nallow_exe_only = false",
            (5, "workload.exe", "any user that runs this program"),
        ),
        (
            "uid = 1001",
            "uid = 1001\nexe = \"billing\"",
            (6, "workload.exe", "it is relative"),
        ),
        (
            "uid = 1001",
            "systemd_unit = \"billing\"",
            (5, "workload.systemd_unit", "did you mean billing.service?"),
        ),
        (
            "uid = 1001",
            "systemd_unit = \"system.slice\"",
            (5, "workload.systemd_unit", "in a .service or .scope"),
        ),
        (
            "uid = 1001",
            "systemd_unit = \"a/b.service\"",
            (5, "workload.systemd_unit", "it is not the name of a unit"),
        ),
        (
            "uid = 1001",
            "systemd_unit = \".service\"",
            (5, "workload.systemd_unit", "it is not the name of a unit"),
        ),
        (
            "uid = 1001",
            "systemd_unit = \"shop@.service\"",
            (5, "workload.systemd_unit", "name an instance"),
        ),
        (
            "uid = 1001",
            "systemd_unit = \"libpod-1.scope\"",
            (5, "workload.systemd_unit", "only `cgroup` can name"),
        ),
        (
            "uid = 1001",
            "cgroup = \"system.slice/x.service\"",
            (5, "workload.cgroup", "it begins with `/`"),
        ),
        (
            "uid = 1001",
            "cgroup = \"/system.slice/\"",
            (5, "workload.cgroup", "a `/` at the end"),
        ),
        (
            "uid = 1001",
            "cgroup = \"/../x\"",
            (5, "workload.cgroup", "`..`"),
        ),
        (
            "uid = 1001",
            "cgroup = \"/**\"",
            (5, "workload.cgroup", "all processes would match"),
        ),
        (
            "uid = 1001",
            "cgroup = \"/*/**\"",
            (5, "workload.cgroup", "all processes would match"),
        ),
        (
            "uid = 1001",
            "cgroup = \"/a[\"",
            (5, "workload.cgroup", "invalid range pattern"),
        ),
        (
            "uid = 1001",
            "cgroup = \"/a/b**\"",
            (5, "workload.cgroup", "recursive wildcards"),
        ),
        (
            "uid = 1001",
            "systemd_unit = \"a.service\"\ncgroup = \"/system.slice/b.service\"",
            (
                6,
                "workload.cgroup",
                "this rule can never match: /system.slice/b.service is not in a.service",
            ),
        ),
        (
            "spiffe_id = \"spiffe://example.org/billing\"\nuid",
            "spiffe_id = \"spiffe://example.org/*\"\nuid",
            (4, "workload.spiffe_id", "`*` is not a path segment"),
        ),
        (
            "spiffe_id = \"spiffe://example.org/billing\"\nuid",
            "spiffe_id = \"spiffe://example.org\"\nuid",
            (
                4,
                "workload.spiffe_id",
                "names a trust domain, not a workload",
            ),
        ),
    ]);
    loaded(&with(
        "uid = 1001",
        "exe = \"/opt/billing\"\nallow_exe_only = true",
    ));
    loaded(&with("uid = 1001", "cgroup = \"/\""));
    loaded(&with(
        "uid = 1001",
        "systemd_unit = \"a.service\"\ncgroup = \"/system.slice/a.service/worker\"",
    ));
}

#[test]
fn roles_are_checked() {
    let policy = format!("policy = '{{\"a\": \"{}\"}}'", "x".repeat(2040));
    let arns = format!(
        "policy_arns = [{}]",
        "\"arn:aws:iam::aws:policy/ReadOnlyAccess\", ".repeat(11)
    );
    let name = format!("name = \"{}\"", "x".repeat(65));
    each(&[
        (
            "name = \"billing\"",
            "name = \"\"",
            (7, "role.name", "it is empty"),
        ),
        (
            "name = \"billing\"",
            "name = \"a/b\"",
            (7, "role.name", "the path of a URL"),
        ),
        (
            "name = \"billing\"",
            "name = \"a%2Fb\"",
            (7, "role.name", "the path of a URL"),
        ),
        (
            "name = \"billing\"",
            "name = \"..\"",
            (7, "role.name", "out of the path"),
        ),
        (
            "name = \"billing\"",
            "name = \"arn:x\"",
            (7, "role.name", "begins with arn:"),
        ),
        ("name = \"billing\"", &name, (7, "role.name", "too long")),
        ("name = \"billing\"", "", (6, "role.name", "it is missing")),
        (
            "",
            "session_name = \"a b\"",
            (10, "role.session_name", "2 to 64 of the characters"),
        ),
        (
            "",
            "session_name = \"x\"",
            (10, "role.session_name", "2 to 64 of the characters"),
        ),
        (
            "",
            "audience = \"\"",
            (10, "role.audience", "1 to 255 bytes"),
        ),
        (
            "",
            "duration = \"14m 59s\"",
            (10, "role.duration", "14m 59s is out of range"),
        ),
        (
            "",
            "duration = \"12h 1s\"",
            (
                10,
                "role.duration",
                "out of range; write a number and a unit in quotes, from \"15m\" to \"12h\"",
            ),
        ),
        (
            "",
            "duration = \"3600\"",
            (10, "role.duration", "time unit needed"),
        ),
        (
            "",
            "duration = \"1h 1ms\"",
            (10, "role.duration", "whole seconds"),
        ),
        (
            "",
            "region = \"eu west\"",
            (10, "role.region", "a-z, 0-9 and '-'"),
        ),
        (
            "",
            "region = \"x\"",
            (10, "role.region", "AWS has no region of such a name"),
        ),
        (
            "",
            "policy = '[]'",
            (10, "role.policy", "it is not a JSON object"),
        ),
        (
            "",
            "policy = '{'",
            (10, "role.policy", "it is not JSON: EOF"),
        ),
        (
            "",
            &policy,
            (10, "role.policy", "at most 2048 characters, this one 2049"),
        ),
        (
            "",
            &arns,
            (10, "role.policy_arns", "at most 10, these are 11"),
        ),
        (
            "",
            "policy_arns = [\"ReadOnlyAccess\"]",
            (10, "role.policy_arns", "is not the ARN of a policy"),
        ),
        (
            "",
            "policy_arns = [\"arn:aws:iam::123456789012:role/x\"]",
            (10, "role.policy_arns", "is not the ARN of a policy"),
        ),
        (
            "",
            "[[role]]\nname = \"billing\"\nspiffe_id = \"spiffe://example.org/billing\"\nrole_arn = \"arn:aws:iam::123456789012:role/x\"",
            (11, "role.name", "the one in line 7 has this name, too"),
        ),
    ]);
    let arn = "role_arn = \"arn:aws:iam::123456789012:role/billing\"";
    each(&[
        (
            arn,
            "role_arn = \"billing\"",
            (9, "role.role_arn", "20 to 2048 characters"),
        ),
        (
            arn,
            "role_arn = \"arn:aws:iam::123456789012:user/billing\"",
            (9, "role.role_arn", "not of the form"),
        ),
        (
            arn,
            "role_arn = \"arn:aws:sts::123456789012:assumed-role/b\"",
            (9, "role.role_arn", "not of the form"),
        ),
        (
            arn,
            "role_arn = \"arn:aws:iam::123456789012:role/{path[1]}\"",
            (
                9,
                "role.role_arn",
                "{path[1]} is not in every SPIFFE ID that `spiffe_id` covers; use {path[0]} to {path[0]}",
            ),
        ),
        (
            arn,
            "role_arn = \"arn:aws:iam::123456789012:role/{name}\"",
            (9, "role.role_arn", "`{name}` is not known"),
        ),
        (
            arn,
            "role_arn = \"arn:minio:iam:::role/billing\"",
            (
                9,
                "role.role_arn",
                "AWS has no roles in a partition `minio`",
            ),
        ),
    ]);
}

#[test]
fn requested_roles_are_checked() {
    let top = |list: &str| format!("requested_roles.allow = {list}\n{LEAST}");
    let table = [
        (r#"["app-*"]"#, "it is not the ARN of a role"),
        (r#"["*"]"#, "it is not the ARN of a role"),
        (r#"["arn:aws:iam::12:role/x"]"#, "<12 digits>"),
        (r#"["arn:aws:iam::123456789012:role/"]"#, "not of the form"),
        (r#"["arn:aws:iam::123456789012:user/*"]"#, "not of the form"),
        (
            r#"["arn:minio:iam:::role/*"]"#,
            "AWS has no roles in a partition `minio`",
        ),
        (
            r#"["arn:aws:iam::123456789012:role/[x"]"#,
            "invalid range pattern",
        ),
    ];
    for (list, words) in table {
        rejected(&top(list), &[(1, "requested_roles.allow", words)]);
    }
    for list in [
        r#"["arn:aws:iam::123456789012:role/app-*"]"#,
        r#"["arn:aws-cn:iam::123456789012:role/[ab]/**"]"#,
        "[]",
    ] {
        loaded(&top(list));
    }
    let minio = top(r#"["arn:aws:iam::123456789012:role/*"]"#)
        .replace("region = \"eu-central-1\"", "endpoint = \"https://minio\"");
    rejected(
        &format!("{minio}audience = \"minio\"\n"),
        &[(1, "requested_roles.allow", "[sts] endpoint is not AWS's")],
    );
    // With requested roles alone, a region is needed as well.
    rejected(
        "requested_roles.allow = [\"arn:aws:iam::123456789012:role/*\"]\n[[workload]]\nspiffe_id = \"spiffe://a/b\"\nuid = 1\n",
        &[(0, "sts.region", "no AWS region is set")],
    );
}

#[test]
fn audience_belongs_to_one_endpoint() {
    // A role with its own endpoint and audience, and one at AWS.
    let second = |keys: &str| {
        format!(
            "{LEAST}[[role]]\nname = \"second\"\nspiffe_id = \"spiffe://example.org/billing\"\nrole_arn = \"arn:minio:iam:::role/second\"\n{keys}\n"
        )
    };
    let third = |keys: &str| {
        format!(
            "[[role]]\nname = \"third\"\nspiffe_id = \"spiffe://example.org/billing\"\nrole_arn = \"arn:minio:iam:::role/third\"\n{keys}\n"
        )
    };

    let replayable = "tokens for \"sts.amazonaws.com\" go to https://minio, and its operator could use them at AWS";
    rejected(
        &second("sts_endpoint = \"https://minio\""),
        &[(10, "role.audience", replayable)],
    );
    rejected(
        &second("sts_endpoint = \"https://minio\"\naudience = \"sts.amazonaws.com\""),
        &[(15, "role.audience", replayable)],
    );
    let alone = with("region = \"eu-central-1\"", "endpoint = \"https://minio\"");
    rejected(&alone, &[(6, "role.audience", replayable)]);
    let china =
        second("sts_endpoint = \"https://minio\"\naudience = \"sts.cn-north-1.amazonaws.com.cn\"");
    rejected(&china, &[(15, "role.audience", "could use them at AWS")]);
    loaded(&second(
        "sts_endpoint = \"https://minio\"\naudience = \"sts.amazonaws.com\"\nallow_shared_audience = true",
    ));

    let minio = second("sts_endpoint = \"https://minio\"\naudience = \"m\"");
    let same = third("sts_endpoint = \"https://MINIO:443/\"\naudience = \"m\"");
    loaded(&format!("{minio}{same}"));
    let other = third("sts_endpoint = \"https://ceph\"\naudience = \"m\"");
    let shared =
        "tokens for \"m\" go to https://ceph, and its operator could use them at https://minio";
    rejected(&format!("{minio}{other}"), &[(21, "role.audience", shared)]);
    loaded(&format!("{minio}{other}allow_shared_audience = true\n"));

    // Two regions are one operator; a name below amazonaws.com is not AWS's STS by that alone.
    let aws =
        |keys: &str| second(keys).replace("arn:minio:iam:::role", "arn:aws:iam::123456789012:role");
    loaded(&aws("region = \"us-west-2\""));
    loaded(&aws(
        "sts_endpoint = \"https://sts-fips.us-west-2.amazonaws.com\"",
    ));
    loaded(&aws(
        "sts_endpoint = \"https://vpce-0123-abc.sts.eu-central-1.vpce.amazonaws.com\"",
    ));
    let customer = aws("sts_endpoint = \"https://sts.abc.execute-api.eu-central-1.amazonaws.com\"");
    rejected(&customer, &[(10, "role.audience", "could use them at AWS")]);

    // A requested role goes to AWS with the audience of [identity].
    let requested = format!(
        "requested_roles.allow = [\"arn:aws:iam::123456789012:role/*\"]\n{minio}[identity]\naudience = \"m\"\n"
    );
    rejected(
        &requested,
        &[(16, "role.audience", "could use them at AWS")],
    );
}

#[test]
fn names_of_dev_are_errors() {
    each(&[
        (
            "spiffe_id = \"spiffe://example.org/billing\"\nuid = 1001",
            "spiffe_id = \"spiffe://dev.local/user/billing\"\nuid = 1001",
            (
                3,
                "workload",
                "is the trust domain of `awsvid dev`, which is not a provider for production",
            ),
        ),
        (
            "spiffe_id = \"spiffe://example.org/billing\"\nrole_arn",
            "spiffe_id = \"spiffe://dev.local/user/*\"\nrole_arn",
            (7, "role.name", "is the trust domain of `awsvid dev`"),
        ),
        (
            "role_arn = \"arn:aws:iam::123456789012:role/billing\"",
            "role_arn = \"arn:aws:iam::000000000000:role/dev\"",
            (
                7,
                "role.name",
                "no AWS account has the number 000000000000: it is that of `awsvid dev`",
            ),
        ),
    ]);
}
