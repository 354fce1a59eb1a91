use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::workload_rule::{ExeMatcher, NamedRule};

mod chains;
mod errors;
mod mutations;
mod names;
mod sources;
mod warnings;

/// The example that is installed first.
const EXAMPLE: &str = include_str!("../../deploy/awsvid.toml");

/// The smallest complete configuration, for tests to add to: [sts] is lines 1 and 2, [[workload]] 3
/// to 5, [[role]] 6 to 9.
const LEAST: &str = r#"[sts]
region = "eu-central-1"
[[workload]]
spiffe_id = "spiffe://example.org/billing"
uid = 1001
[[role]]
name = "billing"
spiffe_id = "spiffe://example.org/billing"
role_arn = "arn:aws:iam::123456789012:role/billing"
"#;

/// Each key with another value than its default.
const EVERY_KEY: &str = r#"requested_roles.allow = ["arn:aws:iam::123456789012:role/app-*"]
[listen]
unix = ""
tcp = ["127.0.0.1:80"]
node = []
admin = "10.0.0.7:9100"
status = "/srv/status"
authorization = "off"
token_file = "/srv/token"
max_connections = 1_000
max_connections_per_workload = 0x10
[pods]
enabled = true
netns_dir = "/var/run/netns/"
cgroup_root = "/kubelet/kubepods/"
handover_socket = "/srv/handover"
[imds]
mode = "address"
region = false
key_file = "/srv/key"
[identity]
source = "workload-api"
workload_api_socket = "tcp://127.0.0.1:8081"
audience = "aws"
[sts]
region = "eu-west-1"
endpoint = "https://STS.eu-west-1.amazonaws.com:443/"
ca_file = "/etc/ca.pem"
timeout = "1s 500ms"
max_concurrent = 1
[cache]
max_entries = 1
revocation_grace = "0s"
[audit]
file = "/var/log/audit.json"
required = true
[log]
level = "warn,awsvid::sts=debug"
format = "json"
[[workload]]
spiffe_id = "spiffe://example.org/shop/billing"
user = "billing"
gid = 0
supplementary_group = "billing"
exe = "/usr/bin/billing"
systemd_unit = "billing.service"
cgroup = "/system.slice/billing.service"
[[workload]]
spiffe_id = "spiffe://example.org/shop/other"
uid = 7
group = "billing"
supplementary_group = 8
[[role]]
name = "shop"
spiffe_id = "spiffe://example.org/shop/*"
role_arn = "arn:minio:iam:::role/{path[1]}"
audience = "minio"
duration = "12h"
session_name = "shop@node"
region = "x"
sts_endpoint = "http://[::1]:9000"
policy = '{"Statement": []}'
policy_arns = ["arn:aws:iam::aws:policy/ReadOnlyAccess"]
allow_shared_audience = false
chain = []
"#;

fn no_env(_: &str) -> Option<String> {
    None
}

/// Returns the number of a problem's line.
fn line_of(problem: &Problem) -> Option<usize> {
    problem.line.as_ref().map(ConfigLine::number)
}

fn parse(text: &str) -> Result<LoadedConfig, Vec<Problem>> {
    Config::parse(text, &no_env)
}

fn loaded(text: &str) -> LoadedConfig {
    parse(text).unwrap_or_else(|problems| panic!("{text}\n{problems:#?}"))
}

/// `LEAST` with one of its lines replaced by `new` (which may have several).
fn with(line: &str, new: &str) -> String {
    assert!(LEAST.contains(line), "{line}");
    LEAST.replacen(line, new, 1)
}

#[test]
fn missing_key_has_the_documented_default() {
    let LoadedConfig {
        config, warnings, ..
    } = loaded(LEAST);
    assert_eq!(warnings, []);
    let address = |text: &str| text.parse::<SocketAddr>().unwrap();
    let listen = ListenConfig {
        unix: Some(PathBuf::from("/run/awsvid/awsvid.sock")),
        tcp: vec![address("127.0.0.1:974"), address("[::1]:974")],
        admin: Some(address("127.0.0.1:975")),
        status: Some(PathBuf::from("/run/awsvid/status.sock")),
        authorization: AuthorizationMode::Present,
        token_file: PathBuf::from("/run/awsvid/token"),
        max_connections: 4096,
        max_connections_per_workload: 512,
    };
    assert_eq!(config.listen, listen);
    let pods = PodsConfig {
        enabled: false,
        netns_dir: PathBuf::from("/run/netns"),
        cgroup_root: None,
        handover_socket: None,
    };
    assert_eq!(config.pods, pods);
    let imds = ImdsConfig {
        mode: ImdsMode::Off,
        region: true,
        key_file: PathBuf::from("/run/awsvid/imds-key"),
    };
    assert_eq!(config.imds, imds);
    assert_eq!(config.identity.source, Source::WorkloadApi);
    assert_eq!(
        config.identity.workload_api_socket.to_string(),
        "unix:///run/spire/agent-sockets/spire-agent.sock"
    );
    assert_eq!(config.identity.audience, "sts.amazonaws.com");
    assert_eq!(config.sts.timeout, Duration::from_secs(5));
    assert_eq!(
        (
            config.sts.endpoint,
            config.sts.ca_file,
            config.sts.max_concurrent
        ),
        (None, None, 16)
    );
    assert_eq!(
        config.cache,
        CacheConfig {
            max_entries: 10_000,
            revocation_grace: Duration::from_secs(300)
        }
    );
    assert_eq!(
        config.audit,
        AuditConfig {
            file: AuditFile::Stdout,
            required: false
        }
    );
    assert_eq!(
        config.log,
        LogConfig {
            level: "info".to_owned(),
            format: LogFormat::Auto
        }
    );
    let role = &config.roles.defined[0];
    assert_eq!(
        (role.audience.as_str(), role.duration),
        ("sts.amazonaws.com", Duration::from_secs(3600))
    );
    assert_eq!(
        (role.sts.region.as_str(), &role.sts.endpoint),
        ("eu-central-1", &None)
    );
    assert!(role.session_name.is_none() && role.policy.is_none() && role.policy_arns.is_empty());
    assert!(config.roles.requested.is_none());
}

#[test]
fn reader_reads_every_key_of_the_tables() {
    let config = loaded(EVERY_KEY).config;
    let ListenConfig {
        unix,
        tcp,
        admin,
        status,
        authorization,
        token_file,
        ..
    } = config.listen;
    assert_eq!(
        (unix, status, token_file),
        (None, Some("/srv/status".into()), "/srv/token".into())
    );
    assert_eq!(
        (tcp, admin),
        (
            vec!["127.0.0.1:80".parse().unwrap()],
            Some("10.0.0.7:9100".parse().unwrap())
        )
    );
    let pods = config.pods;
    assert_eq!(
        (pods.enabled, pods.netns_dir, pods.handover_socket),
        (true, "/var/run/netns".into(), Some("/srv/handover".into()))
    );
    let imds = ImdsConfig {
        mode: ImdsMode::Address,
        region: false,
        key_file: "/srv/key".into(),
    };
    assert_eq!(config.imds, imds);
    assert_eq!(authorization, AuthorizationMode::Off);
    assert_eq!(pods.cgroup_root.unwrap().as_str(), "/kubelet/kubepods");
    assert_eq!(
        (
            config.listen.max_connections,
            config.listen.max_connections_per_workload
        ),
        (1000, 16)
    );
    assert_eq!(
        (
            config.identity.workload_api_socket.to_string(),
            config.identity.audience
        ),
        ("tcp://127.0.0.1:8081".into(), "aws".into())
    );
    assert_eq!(config.sts.region.as_deref(), Some("eu-west-1"));
    assert_eq!(
        config.sts.endpoint.as_deref(),
        Some("https://sts.eu-west-1.amazonaws.com")
    );
    assert_eq!(
        (config.sts.ca_file, config.sts.max_concurrent),
        (Some("/etc/ca.pem".into()), 1)
    );
    assert_eq!(config.sts.timeout, Duration::from_millis(1500));
    assert_eq!(
        config.cache,
        CacheConfig {
            max_entries: 1,
            revocation_grace: Duration::ZERO
        }
    );
    assert_eq!(
        config.audit,
        AuditConfig {
            file: AuditFile::Path("/var/log/audit.json".into()),
            required: true
        }
    );
    assert_eq!(
        config.log,
        LogConfig {
            level: "warn,awsvid::sts=debug".into(),
            format: LogFormat::Json
        }
    );
}

#[test]
fn reader_reads_every_key_of_rules_and_roles() {
    let config = loaded(EVERY_KEY).config;
    let [first, second] = &config.workloads[..] else {
        panic!("{:?}", config.workloads)
    };
    let [user, group] = [
        AccountName::User("billing".to_owned()),
        AccountName::Group("billing".to_owned()),
    ];
    let lines = |workload: &ParsedWorkload| {
        workload
            .accounts
            .iter()
            .map(|(_, (_, line))| line.as_ref().unwrap().number())
            .collect::<Vec<_>>()
    };
    let names = |rule: &NamedRule| {
        (
            rule.user.clone(),
            rule.group.clone(),
            rule.supplementary_group.clone(),
        )
    };
    assert_eq!(
        names(&first.rule),
        (Some(user.clone()), None, Some(group.clone()))
    );
    assert_eq!(names(&second.rule), (None, Some(group.clone()), None));
    assert_eq!((lines(first), lines(second)), (vec![42, 44], vec![51]));
    assert_eq!(
        config.accounts(),
        [(user, vec![42.into()]), (group, vec![44.into(), 51.into()])].into()
    );
    let (first, second) = (&first.rule.rule, &second.rule.rule);
    assert_eq!(
        (first.uid, first.gid, first.supplementary_group),
        (None, Some(0), None)
    );
    assert_eq!(
        (&first.exe, first.systemd_unit.as_deref()),
        (
            &Some(ExeMatcher::new("/usr/bin/billing".into())),
            Some("billing.service")
        )
    );
    assert_eq!(
        first.cgroup.as_ref().map(glob::Pattern::as_str),
        Some("/system.slice/billing.service")
    );
    assert_eq!(
        (second.uid, second.gid, second.supplementary_group),
        (Some(7), None, Some(8))
    );
    assert_eq!(second.spiffe_id.as_str(), "spiffe://example.org/shop/other");

    let role = &config.roles.defined[0];
    assert_eq!(
        (role.name.as_str(), role.audience.as_str()),
        ("shop", "minio")
    );
    assert_eq!(
        (role.spiffe_id.as_str(), role.role_arn.as_str()),
        (
            "spiffe://example.org/shop/*",
            "arn:minio:iam:::role/{path[1]}"
        )
    );
    assert_eq!(role.duration, Duration::from_secs(12 * 3600));
    assert_eq!(
        role.session_name.as_ref().map(|name| name.as_str()),
        Some("shop@node")
    );
    assert_eq!(
        (role.sts.region.as_str(), role.sts.endpoint.as_deref()),
        ("x", Some("http://[::1]:9000"))
    );
    assert_eq!(
        (
            role.policy.as_ref().map(|policy| policy.as_str()),
            role.policy_arns.len()
        ),
        (Some(r#"{"Statement": []}"#), 1)
    );
    let requested = config.roles.requested.unwrap();
    assert_eq!(
        (requested.allowed[0].as_str(), requested.audience.as_str()),
        ("arn:aws:iam::123456789012:role/app-*", "aws")
    );
    assert_eq!(
        requested.sts.endpoint.as_deref(),
        Some("https://sts.eu-west-1.amazonaws.com")
    );
}

#[test]
fn example_has_no_warning() {
    let LoadedConfig {
        config, warnings, ..
    } = loaded(EXAMPLE);
    assert_eq!(warnings, []);
    assert_eq!((config.workloads.len(), config.roles.defined.len()), (1, 1));
}

#[test]
fn example_shows_the_defaults_of_the_code() {
    let is_default = |line: &&str| {
        line.starts_with('#') && line[1..].starts_with(|c: char| c.is_ascii_lowercase())
    };
    let shown = EXAMPLE.lines().filter(is_default).count();
    let written: Vec<_> = EXAMPLE
        .lines()
        .map(|line| if is_default(&line) { &line[1..] } else { line })
        .collect();
    let [plain, written] = [loaded(EXAMPLE), loaded(&written.join("\n"))];
    let [plain, written] =
        [plain, written].map(|loaded| format!("{:?} {:?}", loaded.config, loaded.warnings));
    assert_eq!(plain, written);
    // One for each key with a default that a file for workload-api may have.
    assert_eq!(shown, 1 + 11 + 3 + 3 + 2 + 2 + 2 + 2 + 7);
}

#[test]
fn environment_replaces_the_socket_and_overrides_the_level() {
    let env = |name: &str| match name {
        "SPIFFE_ENDPOINT_SOCKET" => Some("unix:///env.sock".to_owned()),
        "AWSVID_LOG" => Some("debug".to_owned()),
        _ => None,
    };
    let config = Config::parse(LEAST, &env).unwrap().config;
    assert_eq!(
        (
            config.identity.workload_api_socket.to_string().as_str(),
            config.log.level.as_str()
        ),
        ("unix:///env.sock", "debug")
    );

    let text = format!(
        "{LEAST}[identity]\nworkload_api_socket = \"unix:///file.sock\"\n[log]\nlevel = \"warn\"\n"
    );
    let config = Config::parse(&text, &env).unwrap().config;
    assert_eq!(
        (
            config.identity.workload_api_socket.to_string().as_str(),
            config.log.level.as_str()
        ),
        ("unix:///file.sock", "debug")
    );

    let empty = |_: &str| Some(String::new());
    let config = Config::parse(LEAST, &empty).unwrap().config;
    assert_eq!(
        (
            config.identity.workload_api_socket,
            config.log.level.as_str()
        ),
        (IdentityConfig::default().workload_api_socket, "info")
    );

    let wrong = |_: &str| Some("/no/uri=".to_owned());
    let problems = Config::parse(LEAST, &wrong).unwrap_err();
    let keys: Vec<_> = problems
        .iter()
        .map(|problem| (line_of(problem), problem.key.as_str()))
        .collect();
    assert_eq!(
        keys,
        [(None, "SPIFFE_ENDPOINT_SOCKET"), (None, "AWSVID_LOG")]
    );
}

#[test]
fn endpoint_of_another_kind_needs_no_region() {
    let text = with(
        "region = \"eu-central-1\"",
        "endpoint = \"https://minio:9000\"",
    );
    let config = loaded(&format!("{text}[identity]\naudience = \"minio\"\n")).config;
    let sts = &config.roles.defined[0].sts;
    assert_eq!(
        (sts.region.as_str(), sts.endpoint.as_deref()),
        ("us-east-1", Some("https://minio:9000"))
    );
    let own = with("region = \"eu-central-1\"", "");
    assert_eq!(
        loaded(&format!("{own}region = \"eu-north-1\""))
            .config
            .roles
            .defined[0]
            .sts
            .region,
        "eu-north-1"
    );
}

#[test]
fn load_reads_the_file_at_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("awsvid.toml");
    let load = |exposure| Config::load(&path, exposure, no_env);
    let missing = load(Exposure::Rejected).unwrap_err().to_string();
    let expected = format!(
        "{}: the file cannot be read: No such file or directory (os error 2); name a",
        path.display()
    );
    assert!(missing.starts_with(&expected), "{missing}");

    std::fs::write(&path, b"[listen]\n\xff\n").unwrap();
    let errors = load(Exposure::Rejected).unwrap_err();
    assert_eq!(
        errors.to_string(),
        format!(
            "{}:2: this is not UTF-8; save the file as UTF-8",
            path.display()
        )
    );

    std::fs::write(&path, LEAST).unwrap();
    let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(&path, mode(0o644)).unwrap();
    let LoadedConfig {
        config, warnings, ..
    } = load(Exposure::Rejected).unwrap();
    assert_eq!((config.workloads.len(), warnings.len()), (1, 0));
}

#[test]
fn load_rejects_or_warns_of_a_file_that_others_can_change() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("awsvid.toml");
    std::fs::write(&path, LEAST).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o646)).unwrap();
    let load = |exposure| Config::load(&path, exposure, no_env);
    let words = "every user of this node can write the configuration; chmod o-w ";
    let rejected = load(Exposure::Rejected).unwrap_err().to_string();
    assert!(
        rejected.starts_with(&format!("{}: {words}", path.display())),
        "{rejected}"
    );
    let [warning] = &load(Exposure::Warned).unwrap().warnings[..] else {
        panic!("one warning")
    };
    assert!(warning.to_string().starts_with(words), "{warning}");
    assert_eq!(load(Exposure::Ignored).unwrap().warnings, []);
    // With all that is wrong in it.
    std::fs::write(&path, with("uid = 1001", "")).unwrap();
    for exposure in [Exposure::Rejected, Exposure::Warned] {
        let errors = load(exposure).unwrap_err().problems;
        assert!(
            errors.len() == 2 && errors[1].to_string().starts_with(words),
            "{errors:?}"
        );
    }
}

#[test]
fn pod_listeners_suffice_and_have_a_handover_socket() {
    let pods = |keys: &str| {
        loaded(&format!(
            "{LEAST}[listen]\nunix = \"\"\ntcp = []\n[pods]\nenabled = true\n{keys}"
        ))
        .config
        .pods
    };
    let default = pods("");
    assert_eq!(
        (default.netns_dir, default.handover_socket),
        (
            "/run/netns".into(),
            Some("/run/awsvid-handover/awsvid.sock".into())
        )
    );
    assert_eq!(pods("handover_socket = \"\"").handover_socket, None);
}

#[test]
fn changed_names_the_keys_that_differ() {
    let [default, other] = [LEAST, EVERY_KEY].map(|text| loaded(text).config.listen);
    assert!(default.changed(&default).is_empty());
    let keys = "unix tcp admin status authorization token_file max_connections \
                max_connections_per_workload";
    assert_eq!(default.changed(&other).join(" "), keys);
    assert_eq!(
        default.changed(&ListenConfig {
            admin: None,
            ..default.clone()
        }),
        ["admin"]
    );
    let [default, other] = [LEAST, EVERY_KEY].map(|text| loaded(text).config.pods);
    assert!(default.changed(&default).is_empty());
    let keys = "enabled netns_dir cgroup_root handover_socket";
    assert_eq!(default.changed(&other).join(" "), keys);
    let [default, other] = [LEAST, EVERY_KEY].map(|text| loaded(text).config.imds);
    assert!(default.changed(&default).is_empty());
    assert_eq!(default.changed(&other).join(" "), "mode region key_file");
}
