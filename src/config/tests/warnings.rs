//! Each thing that is allowed but not wise.

use super::*;

#[track_caller]
fn warned(text: &str, expected: &[(usize, &str, &str)]) {
    let warnings = loaded(text).warnings;
    let fits = |problem: &Problem, (line, key, words): &(usize, &str, &str)| {
        line_of(problem) == Some(*line)
            && problem.key == *key
            && problem.to_string().contains(words)
    };
    let all =
        warnings.len() == expected.len() && warnings.iter().zip(expected).all(|(w, e)| fits(w, e));
    assert!(all, "{text}\ngave {warnings:#?}\nnot {expected:#?}");
}

#[test]
fn risky_key_has_a_warning() {
    let table = [
        (
            "",
            "duration = \"29m 59s\"",
            (10, "role.duration", "SDKs fetch credentials for every call"),
        ),
        (
            "",
            "[listen]\nauthorization = \"off\"",
            (11, "listen.authorization", "fetch a URL"),
        ),
        (
            "",
            "[pods]\nenabled = true\n[listen]\nauthorization = \"token\"",
            (13, "listen.authorization", "pods do not have `token_file`"),
        ),
        (
            "",
            "[identity]\nworkload_api_socket = \"tcp://10.0.0.1:8081\"",
            (11, "identity.workload_api_socket", "in clear text"),
        ),
        (
            "uid = 1001",
            "uid = 1001\nexe = \"/usr/bin/python3.12\"",
            (6, "workload.exe", "runs any text that its caller gives it"),
        ),
        (
            "uid = 1001",
            "exe = \"/bin/sh\"\nallow_exe_only = true",
            (5, "workload.exe", "runs any text"),
        ),
        (
            "",
            "region = \"cn-north-1\"",
            (9, "role.role_arn", "cannot be assumed in cn-north-1"),
        ),
    ];
    for (line, new, expected) in table {
        let text = if line.is_empty() {
            format!("{LEAST}{new}\n")
        } else {
            with(line, new)
        };
        warned(&text, &[expected]);
    }
    for quiet in [
        "duration = \"30m\"",
        "[listen]\nauthorization = \"off\"\ntcp = []",
        "[listen]\nauthorization = \"token\"",
        "[identity]\nworkload_api_socket = \"tcp://[::1]:1\"",
    ] {
        warned(&format!("{LEAST}{quiet}\n"), &[]);
    }
    warned(
        &with("uid = 1001", "uid = 1001\nexe = \"/opt/pythonesque\""),
        &[],
    );
    for (root, warns) in [
        ("uid = 0", true),
        ("user = \"root\"\ngid = 7", true),
        ("uid = 0\nsystemd_unit = \"billing.service\"", false),
        ("uid = 0\ncgroup = \"/system.slice/*\"", false),
        ("uid = 0\nexe = \"/usr/bin/billing\"", false),
    ] {
        let expected = [(3, "workload", "every process of root matches")];
        warned(
            &with("uid = 1001", root),
            if warns { &expected } else { &[] },
        );
    }
}

#[test]
fn open_wildcard_has_a_warning() {
    let role = |id: &str, arn: &str, more: &str| {
        let text = with(
            "uid = 1001",
            "uid = 1001\n[[workload]]\nspiffe_id = \"spiffe://example.org/ns/shop/sa/x\"\nuid = 7",
        );
        format!(
            "{text}[[role]]\nname = \"x\"\nspiffe_id = \"{id}\"\nrole_arn = \"arn:aws:iam::123456789012:role/{arn}\"\n{more}\n"
        )
    };
    let claim = (15, "role.spiffe_id", "a new name instead of `*` is enough");
    warned(&role("spiffe://example.org/ns/*/sa/x", "x", ""), &[claim]);
    warned(
        &role("spiffe://example.org/ns/*/sa/x", "{path[1]}", ""),
        &[],
    );
    // What is named depends on a later part alone: a namespace of one's own is enough.
    warned(
        &role("spiffe://example.org/ns/*/sa/*", "{path[3]}", ""),
        &[claim],
    );
    warned(
        &role("spiffe://example.org/ns/*/sa/*", "{path[1]}", ""),
        &[],
    );
    warned(
        &role("spiffe://example.org/ns/*/sa/*", "{path[1]}={path[3]}", ""),
        &[],
    );
    warned(&role("spiffe://example.org/ns/shop/sa/*", "x", ""), &[]);
    warned(&role("spiffe://example.org/ns/**", "x", ""), &[]);
    let alike = (17, "role.session_name", "have the same name in CloudTrail");
    warned(
        &role("spiffe://example.org/ns/**", "x", "session_name = \"shop\""),
        &[alike],
    );
    warned(
        &role(
            "spiffe://example.org/ns/shop/sa/x",
            "x",
            "session_name = \"shop\"",
        ),
        &[],
    );
}

#[test]
fn role_of_a_whole_trust_domain_has_a_warning() {
    let role = |id: &str, arn: &str| {
        with(
            "spiffe_id = \"spiffe://example.org/billing\"\nrole_arn",
            &format!("spiffe_id = \"{id}\"\nrole_arn"),
        )
        .replace("role/billing", arn)
    };
    let all = (
        8,
        "role.spiffe_id",
        "every workload of example.org can have this role; name the workloads, or use {path[N]}",
    );
    for id in ["spiffe://example.org/**", "spiffe://example.org/*"] {
        warned(&role(id, "role/x"), &[all]);
        warned(&role(id, "role/{path[0]}"), &[]);
    }
    warned(&role("spiffe://example.org/billing", "role/x"), &[]);
}

#[test]
fn hidden_role_has_a_warning() {
    let two = |first: &str, second: &str| {
        let text = with(
            "uid = 1001",
            "uid = 1001\n[[workload]]\nspiffe_id = \"spiffe://example.org/a/b\"\nuid = 7",
        );
        let text = text.replace(
            "spiffe_id = \"spiffe://example.org/billing\"\nrole_arn",
            &format!("spiffe_id = \"{first}\"\nrole_arn"),
        );
        format!(
            "{text}[[role]]\nname = \"second\"\nspiffe_id = \"{second}\"\nrole_arn = \"arn:aws:iam::123456789012:role/x\"\n"
        )
    };
    let hidden = (
        14,
        "role.name",
        "/v1/credentials answers its workloads with the one in line 10 instead",
    );
    let other = (3, "workload", "no role is for spiffe://example.org/billing");
    warned(
        &two("spiffe://example.org/a/*", "spiffe://example.org/a/b"),
        &[other, hidden],
    );
    warned(
        &two("spiffe://example.org/a/**", "spiffe://example.org/a/*"),
        &[other, hidden],
    );
    // The narrow one first; one of two for the same workloads, which is named.
    warned(
        &two("spiffe://example.org/a/b", "spiffe://example.org/a/**"),
        &[other],
    );
    warned(
        &two("spiffe://example.org/a/b", "spiffe://example.org/a/b"),
        &[other],
    );
}

#[test]
fn long_role_name_has_a_warning() {
    let long = "x".repeat(65);
    let text = with(
        "spiffe_id = \"spiffe://example.org/billing\"\nuid",
        &format!("spiffe_id = \"spiffe://example.org/{long}\"\nuid"),
    );
    let text = text.replace(
        "spiffe_id = \"spiffe://example.org/billing\"",
        "spiffe_id = \"spiffe://example.org/*\"",
    );
    let words = format!("spiffe://example.org/{long} cannot have it");
    warned(
        &text.replace("role/billing", "role/{path[0]}"),
        &[(7, "role.name", &words)],
    );
}

#[test]
fn unused_identity_or_role_has_a_warning() {
    let other = with(
        "spiffe_id = \"spiffe://example.org/billing\"\nuid",
        "spiffe_id = \"spiffe://example.org/other\"\nuid",
    );
    let role = (
        7,
        "role.name",
        "no workload on this node is spiffe://example.org/billing",
    );
    warned(
        &other,
        &[
            (3, "workload", "no role is for spiffe://example.org/other"),
            role,
        ],
    );
    // A workload may still request roles by their ARN.
    let requested =
        format!("requested_roles.allow = [\"arn:aws:iam::123456789012:role/*\"]\n{other}");
    warned(&requested, &[(8, "role.name", "no workload on this node")]);
    let any = requested.replace("::123456789012:role/*", "::*:role/*");
    warned(
        &any,
        &[
            (1, "requested_roles.allow", "roles of any account"),
            (8, "role.name", "no workload"),
        ],
    );
}

#[test]
fn rules_that_differ_by_exe_have_a_warning() {
    let two = |first: &str, second: &str| {
        let text = format!(
            "{first}\nexe = \"/a\"\n[[workload]]\nspiffe_id = \"spiffe://example.org/other\"\n{second}\nexe = \"/b\""
        );
        with("uid = 1001", &text)
            .replace("/billing\"\nrole_arn", "/*\"\nrole_arn")
            .replace("role/billing", "role/{path[0]}")
    };
    warned(
        &two("uid = 1", "uid = 1"),
        &[(
            7,
            "workload",
            "only `exe` separates its callers from those of the one in line 3",
        )],
    );
    warned(&two("uid = 1", "uid = 2"), &[]);
    warned(
        &two("uid = 1", "uid = 1").replace("/other", "/billing"),
        &[],
    );
}

/// The kernel's setting decides which ports any user can take.
#[test]
fn shadowed_rule_has_a_warning() {
    let second = |first: &str, second: &str| {
        let rule = format!(
            "{first}\n[[workload]]\nspiffe_id = \"spiffe://example.org/billing\"\n{second}"
        );
        with("uid = 1001", &rule)
    };
    let hidden = [
        ("uid = 1", "uid = 1"),
        ("uid = 1", "uid = 1\ngid = 2"),
        ("user = \"billing\"", "user = \"billing\"\ngid = 2"),
        (
            "systemd_unit = \"a.service\"",
            "uid = 1\nsystemd_unit = \"a.service\"\nexe = \"/x\"",
        ),
        ("cgroup = \"/a/*\"", "cgroup = \"/a/b\""),
        ("cgroup = \"/a/**\"", "uid = 3\ncgroup = \"/a/b/c\""),
        ("cgroup = \"/a/*\"", "cgroup = \"/a/*\""),
        ("cgroup = \"/a/**\"", "cgroup = \"/a/*\""),
        ("cgroup = \"/a/**\"", "cgroup = \"/a/b-*/**\""),
    ];
    for (earlier, later) in hidden {
        let text = second(earlier, later);
        warned(
            &text,
            &[(
                6,
                "workload",
                "this rule can never match: the one in line 3 matches all of its callers first",
            )],
        );
    }
    let seen = [
        ("uid = 1", "gid = 1"),
        ("uid = 1\ngid = 2", "uid = 1"),
        // The first is for the host only, the second for a container of that user.
        ("uid = 1", "uid = 1\ncgroup = \"/machine.slice/**\""),
        ("uid = 1\ncgroup = \"/machine.slice/**\"", "uid = 1"),
        ("cgroup = \"/a/*\"", "cgroup = \"/a/b/c\""),
        ("cgroup = \"/a/*\"", "cgroup = \"/a/**\""),
        ("cgroup = \"/a/b/**\"", "cgroup = \"/a/*/**\""),
        ("cgroup = \"/a-*/**\"", "cgroup = \"/a-*/b\""),
        ("gid = 1", "supplementary_group = 1"),
    ];
    for (earlier, later) in seen {
        // The number of lines in the first rule moves the second.
        warned(&second(earlier, later), &[]);
    }
}

#[test]
fn port_has_a_warning_where_any_user_can_take_it() {
    let text =
        format!("{LEAST}[listen]\ntcp = [\"127.0.0.1:80\",\n\"127.0.0.1:1024\", \"[::1]:0\"]\n");
    let loaded = loaded(&text);
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    let warned = |first: u16| -> Vec<(Option<usize>, String)> {
        let problems = loaded.config.unprivileged_ports(first);
        problems
            .into_iter()
            .filter(|problem| problem.key == "listen.tcp")
            .map(|problem| {
                let line = line_of(&problem);
                (line, format!("{}; {}", problem.what, problem.fix))
            })
            .collect()
    };
    let text = |port: u16, fix: &str| {
        format!("any user can take port {port} while awsvid is down, and answer for it; {fix}")
    };
    let low = "set net.ipv4.ip_unprivileged_port_start to 1024";
    assert_eq!(warned(u16::MAX), []);
    assert_eq!(warned(1025), []);
    assert_eq!(
        warned(FIRST_UNPRIVILEGED_PORT),
        [(Some(12), text(1024, "use a port below 1024"))]
    );
    assert_eq!(
        warned(80),
        [(Some(11), text(80, low)), (Some(12), text(1024, low))]
    );
    // The default ports have no line.
    let default = super::loaded(LEAST).config.unprivileged_ports(0);
    assert!(
        default.len() == 3 && default.iter().all(|problem| problem.line.is_none()),
        "{default:?}"
    );
}

#[test]
fn admin_port_has_a_warning_where_others_share_its_network() {
    let warned = |listen: &str, first: u16| -> Vec<_> {
        let problems = loaded(&format!("{LEAST}{listen}"))
            .config
            .unprivileged_ports(first);
        let admin = |problem: &Problem| problem.key == "listen.admin";
        problems
            .into_iter()
            .filter(admin)
            .map(|problem| (line_of(&problem), problem.what))
            .collect()
    };
    let taken = |port: u16| {
        format!("any user can take port {port} while awsvid is down, and answer for it")
    };
    let named = "[listen]\nadmin = \"10.0.0.7:9100\"\n";
    assert_eq!(warned(named, 1024), [(Some(11), taken(9100))]);
    assert_eq!(warned(named, 9101), []);
    assert_eq!(warned("", 975), [(None, taken(975))]);
    assert_eq!(warned("", 976), []);
    for listen in ["admin = \"127.0.0.1:0\"", "admin = \"\""] {
        assert_eq!(warned(&format!("[listen]\n{listen}\n"), 0), []);
    }
    // A daemon of pods alone has a network of its own.
    let pods = "[listen]\ntcp = []\nadmin = \"[::]:975\"\n[pods]\nenabled = true\n";
    assert_eq!(warned(pods, 0), []);
    let both = pods.replace("tcp = []", "");
    assert_eq!(warned(&both, 0), [(Some(12), taken(975))]);
}
