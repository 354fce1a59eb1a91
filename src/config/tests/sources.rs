//! `[identity] source` and the keys that go with it.

use super::*;
use crate::identity::SpiffeIdPattern;

/// The smallest configuration for an agent that attests workloads itself: [sts] is lines 1 and 2,
/// [[role]] 3 to 6, [identity] line 7.
const ATTESTED: &str = r#"[sts]
region = "eu-central-1"
[[role]]
name = "billing"
spiffe_id = "spiffe://example.org/billing"
role_arn = "arn:aws:iam::123456789012:role/billing"
[identity]
"#;
const DELEGATED: &str = "source = \"spire-delegated\"\n";
const BROKER: &str = "source = \"spiffe-broker\"\n";

#[track_caller]
fn rejected(identity: &str, line: usize, key: &str, words: &str) {
    let text = format!("{ATTESTED}{identity}");
    let problems = parse(&text).expect_err(&text);
    let [problem] = &problems[..] else {
        panic!("{text}\n{problems:#?}")
    };
    let shown = problem.to_string();
    assert!(
        (line_of(problem), &*problem.key) == (Some(line), key) && shown.contains(words),
        "{text}\n{problem:#?}"
    );
}

#[test]
fn attesting_source_needs_no_rules() {
    let delegated = loaded(&format!(
        "{ATTESTED}{DELEGATED}admin_socket = \"unix:///run/spire/admin.sock\"\n"
    ));
    assert_eq!(
        delegated.config.identity.source,
        Source::SpireDelegated {
            socket: "/run/spire/admin.sock".into()
        }
    );
    assert_eq!(
        delegated.warnings,
        [],
        "no rule gives the role, and none has to"
    );
    let broker = loaded(&format!(
        "{ATTESTED}{BROKER}broker_socket = \"unix:/run/spire/broker.sock\"\n"
    ));
    let socket = PathBuf::from("/run/spire/broker.sock");
    assert_eq!(
        broker.config.identity.source,
        Source::SpiffeBroker {
            socket: socket.clone(),
            server: None,
            reference: Reference::Auto
        }
    );

    let all = format!(
        "{ATTESTED}{BROKER}broker_server_id = \"spiffe://example.org/agent\"\nworkload_reference = \"process\"\naudience = \"minio\"\n"
    );
    let env = |name: &str| {
        (name == "SPIFFE_BROKER_SOCKET").then(|| "unix:///run/spire/broker.sock".to_owned())
    };
    let identity = Config::parse(&all, &env).unwrap().config.identity;
    let server = SpiffeIdPattern::parse("spiffe://example.org/agent").unwrap();
    assert_eq!(
        identity.source,
        Source::SpiffeBroker {
            socket,
            server: Some(server),
            reference: Reference::Process
        }
    );
    assert_eq!(identity.audience, "minio");
}

#[test]
fn wrong_keys_of_a_source_are_errors() {
    rejected(
        "source = \"vault\"\n",
        8,
        "identity.source",
        "this source does not exist",
    );
    rejected(DELEGATED, 8, "identity.source", "needs `admin_socket`");
    rejected(BROKER, 8, "identity.source", "needs `broker_socket`");
    let admin = format!("{DELEGATED}admin_socket = ");
    rejected(
        &format!("{admin}\"/run/admin.sock\"\n"),
        9,
        "identity.admin_socket",
        "write unix:///run/admin.sock",
    );
    rejected(
        &format!("{admin}\"tcp://127.0.0.1:1\"\n"),
        9,
        "identity.admin_socket",
        "on this node only",
    );
    let admin = format!("{admin}\"unix:///run/spire/admin.sock\"\n");
    let others = [
        ("broker_socket", "unix:///b"),
        ("broker_server_id", "x"),
        ("workload_reference", "process"),
    ];
    for (key, value) in others {
        let text = format!("{admin}{key} = \"{value}\"\n");
        rejected(
            &text,
            10,
            &format!("identity.{key}"),
            "only the source \"spiffe-broker\" has it",
        );
    }
    let broker = format!("{BROKER}broker_socket = \"unix:///run/spire/broker.sock\"\n");
    rejected(
        &format!("{broker}admin_socket = \"unix:///a\"\n"),
        10,
        "identity.admin_socket",
        "\"spire-delegated\" has it",
    );
    rejected(
        &format!("{broker}broker_server_id = \"agent\"\n"),
        10,
        "identity.broker_server_id",
        "begins with spiffe://",
    );
    rejected(
        &format!("{broker}workload_reference = \"pod\"\n"),
        10,
        "identity.workload_reference",
        "write \"auto\" or \"process\"",
    );
    rejected(
        &format!("{admin}workload_api_socket = \"unix:///run/spire/admin.sock\"\n"),
        10,
        "identity.workload_api_socket",
        "is also what",
    );
    let workload = "[[workload]]\nspiffe_id = \"spiffe://example.org/billing\"\nuid = 1001\n";
    rejected(
        &format!("{admin}{workload}"),
        10,
        "workload",
        "the daemon never uses rules",
    );
}
