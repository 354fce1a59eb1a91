//! The pages for contributors show how to run one test, or one row of the bench. Their examples
//! have to exist.

use std::fs;
use std::path::Path;

/// The pages, each with the number of its examples.
const PAGES: [(&str, &str, usize); 2] = [
    (
        ".github/CONTRIBUTING.md",
        include_str!("../../../.github/CONTRIBUTING.md"),
        3,
    ),
    ("tests/README.md", include_str!("../../README.md"), 8),
];
const ROWS: &str = include_str!("../../bench/cases.rs");

/// Returns the commands of a page: code in a line, and indented lines.
fn commands(page: &str) -> impl Iterator<Item = &str> {
    let spans = page
        .lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2));
    spans.chain(page.lines().filter_map(|line| line.strip_prefix("    ")))
}

/// Returns the last word of a command, if it is a filter and not an option or its value.
fn filter(command: &str) -> Option<&str> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let [.., before, last] = words[..] else {
        return None;
    };
    (!last.starts_with('-') && before != "--test").then_some(last)
}

/// Returns whether this filter is a module, or begins the name of a test in one.
fn names_a_test(filter: &str) -> bool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let filter = filter.trim_end_matches("::");
    let file = |module: &str| {
        let is_lib = root
            .join(format!("src/{}.rs", module.split("::").next().unwrap()))
            .exists();
        let folder = if is_lib { "src" } else { "tests/it" };
        root.join(folder).join(module.replace("::", "/") + ".rs")
    };
    let begins_a_test = || {
        let (module, name) = filter.rsplit_once("::")?;
        let source = fs::read_to_string(file(module)).ok()?;
        source.contains(&format!("fn {name}")).then_some(())
    };
    file(filter).exists() || begins_a_test().is_some()
}

#[test]
fn filters_of_pages_name_tests_and_rows() {
    for (page, text, expected) in PAGES {
        let mut count = 0;
        for command in commands(text) {
            let Some(filter) = filter(command) else {
                continue;
            };
            let exists = if command.contains("cargo test ") {
                names_a_test(filter)
            } else if command.starts_with("cargo bench ") {
                ROWS.contains(&format!("name: \"{filter}\""))
            } else {
                continue;
            };
            assert!(exists, "{page}: {command}");
            count += 1;
        }
        assert_eq!(count, expected, "{page}");
    }
}
