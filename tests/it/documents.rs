//! The documents agree with the code and with each other: links, reasons, log lines.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::counterparts::process::run;
use crate::harness::daemon::PROGRAM;

const TROUBLESHOOTING: &str = include_str!("../../deploy/docs/troubleshooting.md");
const METRICS: &str = include_str!("../../deploy/docs/metrics-and-alerts.md");
const README: &str = include_str!("../../README.md");

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Adds the files below `folder` whose names end with `.extension`, without build output.
fn files(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            if entry.file_name() != "target" {
                files(&path, extension, found);
            }
        } else if path.extension().is_some_and(|kind| kind == extension) {
            found.push(path);
        }
    }
}

/// Reads all documents of the project.
fn documents() -> Vec<(PathBuf, String)> {
    let mut found = vec![root().join("README.md")];
    for folder in ["deploy", ".github", "tests"] {
        files(&root().join(folder), "md", &mut found);
    }
    assert!(found.len() > 5, "{found:?}");
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path, text)
    };
    found.into_iter().map(read).collect()
}

/// Returns the lines of a document outside its code blocks.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut in_code = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        !in_code && !fence
    })
}

/// Returns the anchors that GitHub makes of the headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let heading = |line: &str| {
        let title = line
            .strip_prefix('#')?
            .trim_start_matches('#')
            .strip_prefix(' ')?
            .to_lowercase();
        let kept = title
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        Some(kept.map(|c| if c == ' ' { '-' } else { c }).collect())
    };
    prose(text).filter_map(heading).collect()
}

/// Returns the targets of the links in a document.
fn links(text: &str) -> Vec<&str> {
    prose(text)
        .flat_map(|line| line.split("](").skip(1))
        .filter_map(|rest| rest.split(')').next())
        .collect()
}

/// Resolves `..` without the file system, in which a folder may be a link.
fn joined(folder: &Path, target: &str) -> PathBuf {
    let mut path = folder.to_owned();
    for part in Path::new(target).components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            Component::CurDir => {}
            part => path.push(part),
        }
    }
    path
}

#[test]
fn relative_links_resolve() {
    let mut wrong = Vec::new();
    for (document, text) in documents() {
        for link in links(&text)
            .into_iter()
            .filter(|link| !link.contains("://") && !link.starts_with("mailto:"))
        {
            let (target, anchor) = link
                .split_once('#')
                .map_or((link, None), |(target, anchor)| (target, Some(anchor)));
            let path = if target.is_empty() {
                document.clone()
            } else {
                joined(document.parent().unwrap(), target)
            };
            let has = |anchor: &str| {
                fs::read_to_string(&path).is_ok_and(|text| anchors(&text).contains(anchor))
            };
            if !path.exists() || anchor.is_some_and(|anchor| !has(anchor)) {
                wrong.push(format!(
                    "{}: {link}",
                    document.strip_prefix(root()).unwrap().display()
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "links that lead nowhere:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn complete_configurations_are_valid() {
    let mut seen = 0;
    for (document, text) in documents() {
        let blocks = text
            .split("```toml\n")
            .skip(1)
            .filter_map(|rest| rest.split("```").next());
        for block in blocks.filter(|block| block.contains("[sts]") && block.contains("[[role]]")) {
            let mut command = Command::new(PROGRAM);
            command
                .env_clear()
                .args(["config", "validate", "-", "--offline"]);
            let validated = run(command, block.as_bytes(), Duration::from_secs(20));
            assert_eq!(
                validated.status.code(),
                Some(0),
                "{}: {validated:?}\n{block}",
                document.display()
            );
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn readme_is_short() {
    assert!(
        README.lines().count() <= 250,
        "{} lines",
        README.lines().count()
    );
}

/// Returns the production sources, each with its strings as the compiler has them: a string
/// continues at the first character of its next line.
fn sources() -> Vec<String> {
    let mut found = Vec::new();
    files(&root().join("src"), "rs", &mut found);
    let is_production =
        |path: &PathBuf| !path.ends_with("tests.rs") && !path.to_str().unwrap().contains("/tests/");
    let read = |path: PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        let mut lines = text.split("\\\n");
        let first = lines.next().unwrap().to_owned();
        lines.fold(first, |text, line| text + line.trim_start())
    };
    found.into_iter().filter(is_production).map(read).collect()
}

/// Returns whether this is a word such as `caller_gone`.
fn is_reason(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

/// Returns the reasons in the code: what functions of the name `reason` return, and STS's.
fn reasons() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for source in sources() {
        let functions = source
            .split("fn reason(")
            .skip(1)
            .filter_map(|rest| rest.split("\n    }").next());
        for function in functions {
            let strings = function.split('"').skip(1).step_by(2);
            found.extend(strings.filter(|text| is_reason(text)).map(str::to_owned));
        }
        let strings = source
            .split('"')
            .filter(|text| text.starts_with("sts_") && is_reason(text));
        found.extend(strings.map(str::to_owned));
    }
    // Metrics, and a key of the configuration.
    let others = ["sts_calls", "sts_call_duration", "sts_up", "sts_endpoint"];
    found.retain(|name| !others.contains(&name.as_str()));
    found
}

#[test]
fn troubleshooting_has_every_reason_and_no_other() {
    let code = reasons();
    assert!(code.len() > 60, "{code:?}");
    // Reasons without a request are in the reference of the metric that counts them.
    let (_, dropped) = METRICS.split_once("\n### Dropped connections\n").unwrap();
    let (dropped, _) = dropped.split_once("\n### ").unwrap();
    let cells = || {
        prose(TROUBLESHOOTING)
            .chain(prose(dropped))
            .filter(|line| line.starts_with('|'))
            .flat_map(|line| line.split(" | "))
    };
    let missing: Vec<&String> = code
        .iter()
        .filter(|reason| {
            !cells().any(|cell| cell.trim_matches(['|', ' ']) == format!("`{reason}`"))
        })
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
    let (_, section) = TROUBLESHOOTING.split_once("\n## Reasons\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let first_cells = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let unknown: Vec<&str> = first_cells
        .filter(|reason| !code.contains(*reason))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

/// Returns the log lines that troubleshooting.md quotes.
fn quoted_log_lines() -> Vec<&'static str> {
    let (_, section) = TROUBLESHOOTING.split_once("\n## Log lines\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    section
        .lines()
        .filter_map(|line| line.strip_prefix("| \"")?.split('"').next())
        .collect()
}

#[test]
fn troubleshooting_quotes_log_lines_of_the_code() {
    let code = sources().join("\n");
    let quoted = quoted_log_lines();
    assert!(quoted.len() > 30, "{quoted:?}");
    let unknown: Vec<&&str> = quoted
        .iter()
        .filter(|line| !code.contains(**line))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

/// Returns the events that a source logs at `warn` and `error`.
fn events(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    for call in ["warn!(", "error!("] {
        for (at, _) in source.match_indices(call) {
            let rest = &source[at + call.len()..];
            let (mut depth, mut in_string, mut escaped) = (1, false, false);
            let mut text = String::new();
            for c in rest.chars() {
                match c {
                    _ if escaped => escaped = false,
                    '\\' if in_string => escaped = true,
                    '"' => {
                        in_string = !in_string;
                        // The event is the last string.
                        if in_string {
                            text.clear();
                        }
                        continue;
                    }
                    '(' if !in_string => depth += 1,
                    ')' if !in_string => depth -= 1,
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
                if in_string {
                    text.push(c);
                }
            }
            found.push(text);
        }
    }
    found
}

/// Returns the value of the constant that the event names as `{NAME}`, or the event.
fn resolved(event: &str, code: &str) -> String {
    let name = event
        .strip_prefix('{')
        .and_then(|rest| rest.strip_suffix('}'));
    let value = name.and_then(|name| {
        let (_, rest) = code.split_once(&format!("const {name}: &str ="))?;
        rest.split('"').nth(1)
    });
    value.unwrap_or(event).to_owned()
}

#[test]
fn log_events_are_constant_and_in_troubleshooting() {
    let code = sources().join("\n");
    let quoted = quoted_log_lines();
    let mut count = 0;
    let mut wrong = Vec::new();
    // `awsvid dev` logs on the terminal of its user.
    let is_of_dev = |event: &str| event.starts_with("dev: ");
    for event in sources().iter().flat_map(|source| events(source)) {
        count += 1;
        let event = resolved(&event, &code);
        if event.contains('{') {
            wrong.push(format!("not constant: {event}"));
        } else if !is_of_dev(&event) && !quoted.iter().any(|words| event.contains(words)) {
            wrong.push(format!("not in troubleshooting.md: {event}"));
        }
    }
    assert!(count > 70, "{count} events");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_in_architecture_and_threat_model_exist() {
    let pages = [
        (include_str!("../../deploy/docs/architecture.md"), "src"),
        (
            include_str!("../../deploy/docs/threat-model.md"),
            "tests/it",
        ),
    ];
    let is_path = |text: &str| {
        (text.ends_with(".rs") || text.starts_with("src/"))
            && !text.contains([' ', '*'])
            && !text.starts_with('/')
    };
    let mut missing = Vec::new();
    for (text, folder) in pages {
        let code = prose(text).flat_map(|line| line.split('`').skip(1).step_by(2));
        for path in code.filter(|text| is_path(text)) {
            let at = |path: String| root().join(path).exists();
            // A module is a file or a folder.
            if !at(format!("{folder}/{path}")) && !at(path.to_owned()) && !at(format!("{path}.rs"))
            {
                missing.push(format!("{path} (below {folder})"));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

/// Reads the Rust sources of the project, by their paths relative to its root.
fn rust_sources() -> BTreeMap<String, String> {
    let mut found = Vec::new();
    for folder in ["src", "tests", "proto"] {
        files(&root().join(folder), "rs", &mut found);
    }
    let named = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(root()).unwrap().to_str().unwrap();
        (name.to_owned(), text)
    };
    found.into_iter().map(named).collect()
}

fn is_identifier(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || c == '_')
}

/// Returns whether one of these keywords defines `name` in the source.
fn has_item(source: &str, keywords: &[&str], name: &str) -> bool {
    keywords.iter().any(|keyword| {
        let item = format!("{keyword} {name}");
        source.match_indices(&item).any(|(at, _)| {
            !source[at + item.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_')
        })
    })
}

/// Returns whether the source has a field or a variant of this name.
fn has_field(source: &str, name: &str) -> bool {
    source.lines().any(|line| {
        let line = line.trim_start();
        let line = line
            .strip_prefix("pub(super) ")
            .or_else(|| line.strip_prefix("pub(crate) "))
            .or_else(|| line.strip_prefix("pub "))
            .unwrap_or(line);
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with([':', ',', '(', ' ', '{']))
    })
}

const TYPES: [&str; 5] = ["struct", "enum", "trait", "type", "union"];

/// Returns whether `Type::member` or `module::item` exists.
fn has_path(sources: &BTreeMap<String, String>, owner: &str, member: &str) -> bool {
    if owner.starts_with(char::is_uppercase) {
        let is_of_type = |source: &str| {
            has_item(source, &TYPES, owner)
                || source
                    .lines()
                    .any(|line| line.starts_with("impl") && line.contains(owner))
        };
        return sources
            .values()
            .any(|source| has_item(source, &TYPES, owner))
            && sources.values().any(|source| {
                is_of_type(source)
                    && (has_item(source, &["fn", "const", "type"], member)
                        || has_field(source, member))
            });
    }
    let (file, folder) = (format!("/{owner}.rs"), format!("/{owner}/"));
    let items = ["fn", "const", "static", "mod"];
    sources
        .iter()
        .filter(|(path, _)| path.ends_with(&file) || path.contains(&folder))
        .any(|(_, source)| has_item(source, &TYPES, member) || has_item(source, &items, member))
}

#[test]
fn code_that_documents_name_exists() {
    let sources = rust_sources();
    let mut count = 0;
    let mut missing = Vec::new();
    for (document, text) in documents() {
        let name = document.strip_prefix(root()).unwrap().display().to_string();
        let folder = document.parent().unwrap();
        let own_folder = folder.file_name().unwrap_or_default().to_str().unwrap();
        let code = prose(&text).flat_map(|line| line.split('`').skip(1).step_by(2));
        for span in code {
            let span = span.trim_end_matches("()");
            let (path, rest) = match span.split_once(".rs") {
                Some((path, rest)) => (format!("{path}.rs"), rest),
                None => (String::new(), span),
            };
            let is_path = path
                .chars()
                .all(|c| c.is_alphanumeric() || "_-/.".contains(c));
            if !path.is_empty() && is_path && (rest.is_empty() || rest.starts_with("::")) {
                count += 1;
                let parents = ["", "src/", "tests/it/", &format!("tests/it/{own_folder}/")];
                let exists = parents
                    .iter()
                    .any(|parent| sources.contains_key(&format!("{parent}{path}")))
                    || folder.join(&path).exists();
                if !exists {
                    missing.push(format!("{name}: {span}"));
                }
                continue;
            }
            let words: Vec<&str> = span.split("::").collect();
            if let [.., owner, member] = words[..]
                && words.iter().all(|word| is_identifier(word))
            {
                count += 1;
                if !has_path(&sources, owner, member) {
                    missing.push(format!("{name}: {span}"));
                }
            }
        }
    }
    assert!(count > 100, "{count} names");
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

/// CONTRIBUTING.md names tests as examples.
#[test]
fn tests_that_contributing_names_exist() {
    let text = include_str!("../../.github/CONTRIBUTING.md");
    let (_, rest) = text.split_once("Test functions are named").unwrap();
    let (examples, _) = rest.split_once("\n\n").unwrap();
    let names = examples.split('`').skip(1).step_by(2);
    let names: Vec<&str> = names.filter(|name| is_identifier(name)).collect();
    assert!(names.len() >= 2, "{names:?}");
    let sources = rust_sources();
    for name in names {
        let exists = sources
            .values()
            .any(|source| has_item(source, &["fn"], name));
        assert!(exists, "{name}");
    }
}

/// Returns the threats that a text refers to: `T` and a number without a leading zero.
fn threats(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| {
            word.strip_prefix('T').is_some_and(|number| {
                (1..3).contains(&number.len()) && number.chars().all(|c| c.is_ascii_digit())
            })
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn threats_that_sources_name_are_in_the_threat_model() {
    let model = include_str!("../../deploy/docs/threat-model.md");
    let known: BTreeSet<String> = model
        .lines()
        .filter_map(|line| Some(line.strip_prefix("| T")?.split(' ').next()?.to_owned()))
        .map(|number| format!("T{number}"))
        .collect();
    assert!(known.len() >= 38, "{known:?}");
    let documents = documents().into_iter().map(|(path, text)| {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        (name, text)
    });
    let mut wrong = Vec::new();
    for (name, text) in rust_sources()
        .into_iter()
        .chain(documents)
        .filter(|(name, _)| name != "tests/it/documents.rs")
    {
        let unknown = threats(&text)
            .into_iter()
            .filter(|one| !known.contains(one));
        wrong.extend(unknown.map(|threat| format!("{name}: {threat}")));
        // The numbers of a list outside the repository, and letters for sources.
        let has_number = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
        if text.split("(attack ").skip(1).any(has_number) {
            wrong.push(format!("{name}: (attack N)"));
        }
        let letters = ["source A", "source B", "source C", "source D"];
        let is_letter = |rest: &str| !rest.starts_with(char::is_alphanumeric);
        if letters
            .iter()
            .any(|letter| text.split(letter).skip(1).any(is_letter))
        {
            wrong.push(format!("{name}: a source by its letter"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
