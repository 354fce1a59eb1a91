use toml::Value;
use toml::value::Datetime;

use super::*;
use crate::config::{Config, LoadedConfig, Problem};

/// A configuration without errors, for tests to add a key to.
const BASE: &str = r#"
[pods]
enabled = true
[sts]
region = "eu-central-1"
[[workload]]
spiffe_id = "spiffe://example.org/billing"
uid = 1001
[[role]]
name = "billing"
spiffe_id = "spiffe://example.org/billing"
role_arn = "arn:aws:iam::123456789012:role/billing"
"#;
/// A role of a chain without errors.
const CHAINED: &str = "role_arn = \"arn:aws:iam::123456789012:role/next\"";
const SOURCES: [(&str, &str); 2] = [
    (
        "admin_socket",
        "source = \"spire-delegated\"\nadmin_socket = \"unix:///a\"",
    ),
    (
        "broker_socket broker_server_id workload_reference",
        "source = \"spiffe-broker\"\nbroker_socket = \"unix:///b\"",
    ),
];

fn parse(text: &str) -> Result<LoadedConfig, Vec<Problem>> {
    Config::parse(text, &|_| None)
}

/// Returns the base with this key, and with the source that has it.
fn with(table: &TableSpec, key: &KeySpec, value: Value) -> String {
    let source = SOURCES.iter().find(|(keys, _)| {
        table.name == "identity" && keys.split(' ').any(|of_source| of_source == key.name)
    });
    let mut file: toml::Table = match source {
        Some((_, source)) => format!("{BASE}[identity]\n{source}\n").parse().unwrap(),
        None => BASE.parse().unwrap(),
    };
    if source.is_some() {
        file.remove("workload");
    }
    if table.name.is_empty() {
        file.insert(key.name.to_owned(), value);
        return toml::to_string(&file).unwrap();
    }
    if let Some(inner) = table.name.strip_prefix("role.") {
        let role = file["role"][0].as_table_mut().unwrap();
        let mut entry: toml::Table = CHAINED.parse().unwrap();
        entry.insert(key.name.to_owned(), value);
        role.insert(inner.to_owned(), vec![Value::Table(entry)].into());
        return toml::to_string(&file).unwrap();
    }
    let entry = file
        .entry(table.name)
        .or_insert_with(|| Value::Table(toml::Table::new()));
    let entry = match entry {
        Value::Array(entries) => entries[0].as_table_mut().unwrap(),
        entry => entry.as_table_mut().unwrap(),
    };
    if key.name == "user" {
        // A rule has a user either by name or by number.
        entry.remove("uid");
    }
    entry.insert(key.name.to_owned(), value);
    toml::to_string(&file).unwrap()
}

fn all() -> impl Iterator<Item = (&'static TableSpec, &'static KeySpec)> {
    TABLES
        .iter()
        .flat_map(|table| table.keys.iter().map(move |key| (table, key)))
}

/// A key that is read and not listed fails at the assertion of `reader::Table::value`.
#[test]
fn reader_reads_each_listed_key() {
    assert!(parse(BASE).is_ok());
    for (table, key) in all() {
        let wrong: Datetime = "2026-01-01".parse().unwrap();
        let text = with(table, key, Value::Datetime(wrong));
        let path = format!("{}.{}", table.name, key.name);
        let path = path.trim_start_matches('.');
        let problems = parse(&text).expect_err(&text);
        let found = problems.iter().find(|problem| problem.key == path);
        let found = found.unwrap_or_else(|| panic!("{path} is not read: {problems:#?}"));
        assert!(found.what.contains("datetime"), "{path}: {found}");
    }
}

#[test]
fn defaults_are_those_of_the_code() {
    let shown = |text: &str| {
        let mut config = parse(text)
            .unwrap_or_else(|e| panic!("{text}\n{e:#?}"))
            .config;
        config.workloads.iter_mut().for_each(|rule| {
            rule.line = None;
            rule.accounts.clear();
        });
        format!("{config:?}")
    };
    let mut literal = 0;
    for (table, key) in all() {
        let code = key
            .default
            .strip_prefix('`')
            .and_then(|code| code.strip_suffix('`'));
        let code = code.and_then(|code| format!("x = {code}").parse::<toml::Table>().ok());
        // What stands in angle brackets depends on the node.
        let Some(mut value) = code.filter(|_| !key.default.contains('<')) else {
            continue;
        };
        literal += 1;
        let text = with(table, key, value.remove("x").unwrap());
        let base = with(table, key, Value::Boolean(true));
        let base: Vec<&str> = base
            .lines()
            .filter(|line| *line != format!("{} = true", key.name))
            .collect();
        let base = match key.name {
            // The same line as in the base.
            "enabled" => text.replace("enabled = false", ""),
            _ => base.join("\n"),
        };
        assert_eq!(shown(&text), shown(&base), "{}.{}", table.name, key.name);
    }
    assert!(literal > 25, "{literal}");
}

#[test]
fn renamed_keys_lead_to_the_present_ones() {
    let table = [
        ("listen", "pods", "write it as [pods]"),
        ("listen", "pods_dir", "did you mean `netns_dir` in [pods]?"),
        (
            "listen",
            "pods_cgroup",
            "did you mean `cgroup_root` in [pods]?",
        ),
        (
            "listen",
            "handover",
            "did you mean `handover_socket` in [pods]?",
        ),
        (
            "identity",
            "socket",
            "did you mean `workload_api_socket` or `admin_socket` or `broker_socket`?",
        ),
        (
            "identity",
            "broker_server",
            "did you mean `broker_server_id`?",
        ),
        (
            "identity",
            "reference",
            "did you mean `workload_reference`?",
        ),
        (
            "",
            "allow_requested_roles",
            "did you mean `allow` in [requested_roles]?",
        ),
        (
            "cache",
            "size",
            "remove it; known here: max_entries, revocation_grace",
        ),
    ];
    for (table, name, words) in table {
        let found = suggestion(table, name);
        assert!(found.starts_with(words), "{table} {name}: {found}");
    }
}

/// Returns the default of a key as the example file shows it.
fn example_default(key: &KeySpec) -> Option<&str> {
    key.default
        .split('`')
        .nth(1)
        .filter(|_| key.default.starts_with('`'))
}

#[test]
fn example_file_shows_each_default() {
    const EXAMPLE: &str = include_str!("../../../deploy/awsvid.toml");
    let mut table = "";
    let mut shown: Vec<(&str, &str, &str)> = Vec::new();
    for line in EXAMPLE.lines() {
        // A table that most configurations do not have is a comment.
        let header = line.strip_prefix("# ").unwrap_or(line);
        if header.starts_with('[') {
            let name = header.trim_matches(['[', ']']);
            table = super::table(name).unwrap_or_else(|| panic!("{line}")).name;
        } else if let Some((key, value)) = line.split_once(" = ")
            && !key.trim_start_matches(['#', ' ']).contains(' ')
        {
            shown.push((table, key, value));
        }
    }
    for (table, key, value) in &shown {
        let name = key.trim_start_matches(['#', ' ']);
        assert!(is_known(table, name), "{table}.{name}");
        let found = super::table(table).unwrap().key(name).unwrap();
        // A line that begins with # and a key shows the key's default; "# key" is an example.
        if key.starts_with('#') && !key.starts_with("# ") {
            let expected = match (*table, name) {
                ("identity", "workload_api_socket") => {
                    found.default.split('`').nth(3).unwrap_or_default()
                }
                ("role", "audience") => table_default("identity", "audience"),
                _ => example_default(found).unwrap_or_default(),
            };
            assert_eq!(*value, expected, "{table}.{name}");
        }
    }
    for (table, key) in all() {
        let is_shown = shown.iter().any(|(of, name, _)| {
            *of == table.name && name.trim_start_matches(['#', ' ']) == key.name
        });
        assert!(is_shown, "{}.{}", table.name, key.name);
    }
}

const HEAD: &str = "| key | type | default | meaning |";

/// Returns the cells of the reference's tables, without the links of their texts.
fn reference_rows(text: &str) -> Vec<(String, [String; 4])> {
    let mut rows = Vec::new();
    let (mut header, mut is_reference) = (String::new(), false);
    for line in text.lines() {
        is_reference = line == HEAD || (is_reference && !line.is_empty());
        if let Some(title) = line.strip_prefix("## ") {
            header = title.trim_matches('`').replacen("The", "the", 1);
        }
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        if let ([name, value, default, meaning], true) = (&cells[..], line.starts_with("| `"))
            && is_reference
        {
            let cells = [name.trim_matches('`'), value, default, meaning];
            rows.push((header.clone(), cells.map(without_links)));
        }
    }
    rows
}

/// Replaces each `[text](address)` by its text.
fn without_links(cell: &str) -> String {
    let mut text = cell.to_owned();
    while let Some(middle) = text.find("](") {
        let begin = text[..middle].rfind('[').unwrap();
        let end = middle + text[middle..].find(')').unwrap();
        let shown = text[begin + 1..middle].to_owned();
        text.replace_range(begin..=end, &shown);
    }
    text
}

/// Compares `deploy/docs/configuration.md`: one row for each key, in the order of the list.
#[test]
fn reference_has_each_key_as_it_is_listed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/docs/configuration.md");
    let Ok(text) = std::fs::read_to_string(path) else {
        assert!(!std::path::Path::new(path).parent().unwrap().exists());
        return;
    };
    let row = |(table, key): (&TableSpec, &KeySpec)| {
        let cells = [key.name, key.value, key.default, key.meaning];
        (table.header(), cells.map(str::to_owned))
    };
    let listed: Vec<_> = all().map(row).collect();
    let documented = reference_rows(&text);
    for (listed, documented) in listed.iter().zip(&documented) {
        assert_eq!(documented, listed);
    }
    assert_eq!(documented.len(), listed.len());
}

fn table_default(name: &str, key: &str) -> &'static str {
    let key = table(name).and_then(|table| table.key(key)).unwrap();
    example_default(key).unwrap()
}
