mod properties;

use std::collections::BTreeSet;

use super::*;
use crate::config::keys::TABLES;

fn parsed(text: &str, env: &dyn Fn(&str) -> Option<String>) -> LoadedConfig {
    Config::parse(text, env).unwrap_or_else(|problems| panic!("{text}\n{problems:?}"))
}

fn without_lines(mut config: Config) -> Config {
    for workload in &mut config.workloads {
        workload.line = None;
        workload
            .accounts
            .iter_mut()
            .for_each(|(_, (_, line))| *line = None);
    }
    config
}

const SMALL: &str = "\
[sts]
region = \"eu-central-1\"
[[workload]]
user = \"billing\"
spiffe_id = \"spiffe://example.org/billing\"
[[role]]
name = \"billing\"
spiffe_id = \"spiffe://example.org/billing\"
role_arn = \"arn:aws:iam::123456789012:role/billing\"
";

const LARGE: &str = "\
requested_roles.allow = [\"arn:aws:iam::123456789012:role/app-*\"]
[listen]
unix = \"\"
tcp = [\"127.0.0.1:80\"]
admin = \"\"
status = \"/run/other/status.sock\"
authorization = \"off\"
token_file = \"/run/other/token\"
max_connections = 100
max_connections_per_workload = 10
[pods]
enabled = true
netns_dir = \"/run/other\"
cgroup_root = \"/kubepods\"
handover_socket = \"\"
[imds]
mode = \"address\"
region = false
key_file = \"/run/other/key\"
[identity]
source = \"spiffe-broker\"
workload_reference = \"process\"
broker_socket = \"unix:///run/b.sock\"
broker_server_id = \"spiffe://example.org/agent\"
workload_api_socket = \"unix:///run/a.sock\"
audience = \"other\"
[sts]
region = \"eu-central-1\"
timeout = \"1s 500ms\"
max_concurrent = 3
[cache]
max_entries = 7
revocation_grace = \"0s\"
[audit]
file = \"/var/log/audit.log\"
required = true
[log]
level = \"debug\"
format = \"json\"
[[role]]
name = \"a\"
spiffe_id = \"spiffe://example.org/*\"
role_arn = \"arn:aws:iam::123456789012:role/{path[0]}\"
duration = \"1h 30m\"
session_name = \"fixed\"
region = \"us-east-1\"
policy = '''{\"Version\": \"2012-10-17\",
 \"Statement\": []}'''
policy_arns = [\"arn:aws:iam::aws:policy/ReadOnlyAccess\"]
[[role]]
name = \"b\"
spiffe_id = \"spiffe://example.org/b\"
role_arn = \"arn:minio:iam:::role/b\"
sts_endpoint = \"https://minio.internal:9000\"
audience = \"minio\"
";

const BY_CERTIFICATE: &str = "\
[roles_anywhere]
trust_anchor_arn = \"arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/1\"
profile_arn = \"arn:aws:rolesanywhere:eu-central-1:123456789012:profile/1\"
endpoint = \"https://ra.internal\"
ca_file = \"/etc/awsvid/ra.pem\"
[[workload]]
user = \"billing\"
spiffe_id = \"spiffe://example.org/billing\"
[[role]]
name = \"billing\"
spiffe_id = \"spiffe://example.org/billing\"
role_arn = \"arn:aws:iam::123456789012:role/billing\"
exchange = \"roles-anywhere\"
[[role]]
name = \"either\"
spiffe_id = \"spiffe://example.org/billing\"
role_arn = \"arn:aws:iam::123456789012:role/billing\"
exchange = \"both\"
region = \"eu-west-1\"
";

#[test]
fn page_is_read_again_to_the_same() {
    for text in [SMALL, LARGE, BY_EXE, BY_NAMES, BY_CERTIFICATE] {
        let loaded = parsed(text, &|_| None);
        let shown = loaded.show(&|_| None);
        let again = parsed(&shown, &|_| None);
        let [again, config] = [again, loaded].map(|loaded| without_lines(loaded.config));
        assert_eq!(format!("{again:?}"), format!("{config:?}"), "{shown}");
    }
}

const BY_NAMES: &str = "\
[sts]
region = \"eu-central-1\"
endpoint = \"https://minio.internal:9000\"
ca_file = \"/etc/awsvid/ca.pem\"
[identity]
audience = \"minio\"
[[workload]]
uid = 7
gid = 8
supplementary_group = \"backup\"
systemd_unit = \"a.service\"
cgroup = \"/system.slice/a.service\"
spiffe_id = \"spiffe://example.org/a\"
[[workload]]
user = \"a\"
group = \"b\"
exe = \"/opt/a\"
spiffe_id = \"spiffe://example.org/a\"
[[role]]
name = \"a\"
spiffe_id = \"spiffe://example.org/a\"
role_arn = \"arn:minio:iam:::role/a\"
";

const BY_EXE: &str = "\
[sts]
region = \"eu-central-1\"
[[workload]]
exe = \"/opt/a\"
allow_exe_only = true
spiffe_id = \"spiffe://example.org/a\"
[[role]]
name = \"a\"
spiffe_id = \"spiffe://example.org/a\"
role_arn = \"arn:aws:iam::123456789012:role/a\"
";

const CHAINED: &str = "\
[sts]
region = \"eu-central-1\"
[[workload]]
user = \"billing\"
spiffe_id = \"spiffe://example.org/ns/shop\"
[[role]]
name = \"billing\"
spiffe_id = \"spiffe://example.org/ns/*\"
role_arn = \"arn:aws:iam::123456789012:role/hop\"
policy = '{\"Statement\": \"{path[1]} ${aws:username}\"}'
[[role.chain]]
role_arn = \"arn:aws:iam::222222222222:role/{path[1]}\"
duration = \"30m\"
session_name = \"{path[1]}@x\"
external_id = \"a:{path[1]}\"
source_identity = \"{session_name}\"
tags = { \"spiffe id\" = \"{spiffe_id}\", b = \"{user}\", c = \"\" }
transitive_tags = [\"b\"]
policy = '{\"Statement\": \"{path[1]}\"}'
policy_arns = [\"arn:aws:iam::aws:policy/{path[1]}\"]
[[role.chain]]
role_arn = \"arn:aws:iam::333333333333:role/last\"
";

#[test]
fn page_of_a_chain_is_read_again_to_the_same() {
    let loaded = parsed(CHAINED, &|_| None);
    let page = loaded.show(&|_| None);
    let again = without_lines(parsed(&page, &|_| None).config);
    let config = without_lines(loaded.config);
    assert_eq!(
        format!("{:?}", again.roles),
        format!("{:?}", config.roles),
        "{page}"
    );
    assert_eq!(config.roles.defined[0].chain.len(), 2);
}

#[test]
fn page_names_each_listed_key() {
    let delegated = LARGE
        .replace("spiffe-broker", "spire-delegated")
        .replace("workload_reference = \"process\"\n", "")
        .replace("broker_server_id = \"spiffe://example.org/agent\"\n", "")
        .replace("broker_socket", "admin_socket");
    let mut shown = BTreeSet::new();
    let texts = [
        SMALL,
        LARGE,
        &delegated,
        BY_EXE,
        BY_NAMES,
        BY_CERTIFICATE,
        CHAINED,
    ];
    for text in texts {
        let page = parsed(text, &|_| None).show(&|_| None);
        let mut table = "";
        for line in page.lines() {
            if line.starts_with('[') {
                table = line.trim_matches(['[', ']']);
            } else if let Some(key) = line.trim_start_matches("# ").split(' ').next()
                // A policy may have several lines.
                && key.starts_with(|c: char| c.is_ascii_lowercase())
            {
                shown.insert((table.to_owned(), key.to_owned()));
            }
        }
    }
    let listed: BTreeSet<_> = TABLES
        .iter()
        .flat_map(|table| {
            table
                .keys
                .iter()
                .map(|key| (table.name.into(), key.name.into()))
        })
        .collect();
    assert_eq!(shown, listed);
}

#[test]
fn page_names_the_origin_of_each_value() {
    let env = |name: &str| match name {
        "AWSVID_LOG" => Some("debug".to_owned()),
        "SPIFFE_ENDPOINT_SOCKET" => Some("unix:///run/other.sock".to_owned()),
        _ => None,
    };
    let shown = parsed(SMALL, &env).show(&env);
    let origin = |line: &str| {
        let found = shown
            .lines()
            .find(|found| found.starts_with(line))
            .unwrap_or_else(|| panic!("{line}"));
        found.split_once(" # ").map(|(_, origin)| origin.to_owned())
    };
    let table = [
        ("region = \"eu-central-1\"", None),
        ("unix = \"/run/awsvid/awsvid.sock\"", Some("default")),
        ("tcp = [\"127.0.0.1:974\", \"[::1]:974\"]", Some("default")),
        (
            "workload_api_socket = \"unix:///run/other.sock\"",
            Some("from SPIFFE_ENDPOINT_SOCKET"),
        ),
        ("level = \"debug\"", Some("from AWSVID_LOG")),
        ("user = \"billing\"", None),
        ("audience = \"sts.amazonaws.com\"", Some("default")),
        ("# session_name", Some("default: from the SPIFFE ID")),
        ("duration = \"1h\"", Some("default")),
    ];
    for (line, expected) in table {
        assert_eq!(origin(line).as_deref(), expected, "{line}");
    }
    assert!(shown.contains("# from [identity] audience") && shown.contains("# from [sts] region"));
}
