//! Random configurations: the page of an accepted one reads back to the same configuration.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::random_cases::for_random_cases;

const CASES: u64 = 300;
/// Paths with characters that a TOML string has to escape.
const PATHS: [&str; 7] = [
    "/run/a",
    "/run/a b/'c'",
    "/run/\"d\"",
    "/run/e\\f # g",
    "/run/\u{e9}",
    "/run/'''h",
    "/run/{i}[j]",
];
const POLICIES: [&str; 3] = [
    "{\"Version\": \"2012-10-17\",\n \"Statement\": []}",
    "{\"a\": \"'''\"}",
    "{\"a\": \"\\\\ \\\" \u{e9}\"}",
];

/// One key and values of it, as TOML.
type TomlKey = (&'static str, Vec<String>);

fn raw(values: &[&str]) -> Vec<String> {
    values.iter().map(|value| (*value).to_owned()).collect()
}

/// Returns these texts as TOML strings. JSON escapes in a way that TOML reads.
fn texts(values: &[&str]) -> Vec<String> {
    let text = |value: &&str| serde_json::to_string(value).unwrap();
    values.iter().map(text).collect()
}

fn tables() -> Vec<(&'static str, Vec<TomlKey>)> {
    let mut paths_or_none = texts(&PATHS);
    paths_or_none.push("\"\"".to_owned());
    vec![
        (
            "listen",
            vec![
                ("unix", paths_or_none.clone()),
                (
                    "tcp",
                    raw(&[
                        "[]",
                        "[\"127.0.0.1:80\"]",
                        "[\"[::1]:81\", \"127.0.0.2:80\"]",
                    ]),
                ),
                ("admin", texts(&["", "127.0.0.1:976", "192.0.2.1:977"])),
                ("status", paths_or_none.clone()),
                ("max_connections", raw(&["100", "4096"])),
                ("max_connections_per_workload", raw(&["1", "99"])),
            ],
        ),
        (
            "pods",
            vec![
                ("enabled", raw(&["true", "false"])),
                ("netns_dir", texts(&PATHS)),
                ("handover_socket", paths_or_none),
            ],
        ),
        (
            "imds",
            vec![
                ("mode", texts(&["off", "endpoint"])),
                ("region", raw(&["true", "false"])),
                ("key_file", texts(&PATHS)),
            ],
        ),
        (
            "identity",
            vec![
                (
                    "workload_api_socket",
                    texts(&["unix:///run/a.sock", "tcp://127.0.0.1:8081"]),
                ),
                ("audience", texts(&["sts.amazonaws.com", "other"])),
            ],
        ),
        (
            "sts",
            vec![
                ("region", texts(&["eu-central-1", "us-gov-west-1"])),
                ("timeout", texts(&["1s", "1s 500ms", "10s", "1m"])),
                ("max_concurrent", raw(&["1", "64"])),
            ],
        ),
        (
            "cache",
            vec![
                ("max_entries", raw(&["1", "100000"])),
                ("revocation_grace", texts(&["0s", "1h", "15m 1s"])),
            ],
        ),
        (
            "audit",
            vec![
                ("file", texts(&PATHS)),
                ("required", raw(&["true", "false"])),
            ],
        ),
        (
            "log",
            vec![
                ("level", texts(&["debug", "awsvid=trace,info"])),
                ("format", texts(&["json", "text"])),
            ],
        ),
        (
            "requested_roles",
            vec![(
                "allow",
                raw(&["[]", "[\"arn:aws:iam::123456789012:role/app-*\"]"]),
            )],
        ),
    ]
}

fn rule_keys() -> Vec<TomlKey> {
    vec![
        ("uid", raw(&["0", "7", "61001"])),
        ("group", texts(&["backup", "a-b_c.d"])),
        ("supplementary_group", texts(&["backup"])),
        ("systemd_unit", texts(&["a.service", "a@\\x2d.service"])),
        ("cgroup", texts(&["/system.slice/a.service", "/a/*"])),
        ("exe", texts(&PATHS)),
    ]
}

fn role_keys() -> Vec<TomlKey> {
    vec![
        ("duration", texts(&["15m", "1h 30m", "12h"])),
        ("session_name", texts(&["fixed", "a=b,c@d"])),
        ("region", texts(&["us-east-1"])),
        ("policy", texts(&POLICIES)),
        (
            "policy_arns",
            raw(&["[]", "[\"arn:aws:iam::aws:policy/ReadOnlyAccess\"]"]),
        ),
    ]
}

fn chained_keys() -> Vec<TomlKey> {
    vec![
        ("duration", texts(&["15m", "1h"])),
        ("session_name", texts(&["{session_name}", "x@{path[0]}"])),
        ("external_id", texts(&["a/b:c"])),
        (
            "tags",
            raw(&["{}", "{ \"a b\" = \"{spiffe_id}\", \"c\" = \"\" }"]),
        ),
        ("policy", texts(&POLICIES)),
        ("policy_arns", raw(&["[]"])),
    ]
}

/// Appends about every second of these keys with a random value.
fn add(text: &mut String, keys: &[TomlKey], random: &mut fastrand::Rng) {
    for (key, values) in keys {
        if let (true, Some(value)) = (random.bool(), random.choice(values)) {
            text.push_str(&format!("{key} = {value}\n"));
        }
    }
}

fn configuration(random: &mut fastrand::Rng) -> String {
    let mut text = String::new();
    for (table, keys) in tables() {
        if random.u8(..3) > 0 {
            text.push_str(&format!("[{table}]\n"));
            add(&mut text, &keys, random);
        }
    }
    for id in ["a", "b", "c"].iter().take(random.usize(1..=3)) {
        text.push_str(&format!(
            "[[workload]]\nspiffe_id = \"spiffe://example.org/{id}\"\n"
        ));
        add(&mut text, &rule_keys(), random);
    }
    for name in ["a", "b"].iter().take(random.usize(1..=2)) {
        text.push_str(&format!(
            "[[role]]\nname = \"{name}\"\nspiffe_id = \"spiffe://example.org/{name}/**\"\n\
             role_arn = \"arn:aws:iam::123456789012:role/{name}-{{path[0]}}\"\n"
        ));
        add(&mut text, &role_keys(), random);
        for chained in ["one", "two"].iter().take(random.usize(..3)) {
            text.push_str(&format!(
                "[[role.chain]]\nrole_arn = \"arn:aws:iam::222222222222:role/{chained}\"\n"
            ));
            add(&mut text, &chained_keys(), random);
        }
    }
    text
}

#[test]
fn page_of_a_random_configuration_is_read_again_to_the_same() {
    let accepted = AtomicU64::new(0);
    let checked = AtomicU64::new(0);
    for_random_cases(CASES, |random| {
        checked.fetch_add(1, Ordering::Relaxed);
        let text = configuration(random);
        let Ok(loaded) = Config::parse(&text, &|_| None) else {
            return;
        };
        accepted.fetch_add(1, Ordering::Relaxed);
        let page = loaded.show(&|_| None);
        let again = parsed(&page, &|_| None);
        let [again, config] = [again, loaded].map(|loaded| without_lines(loaded.config));
        assert_eq!(
            format!("{again:?}"),
            format!("{config:?}"),
            "{text}\n{page}"
        );
    });
    let [accepted, checked] = [accepted, checked].map(AtomicU64::into_inner);
    assert!(
        checked < CASES || accepted > CASES / 20,
        "{accepted} of {checked} were accepted"
    );
}
