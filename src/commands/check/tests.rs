//! Compares `deploy/docs/troubleshooting.md` with the texts of this command.

use std::fs;
use std::path::{Path, PathBuf};

use super::doc_tables;

/// Returns the text of these files and of all files below these directories, with strings as the
/// compiler joins them.
fn sources(places: &[&str]) -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut left: Vec<PathBuf> = places.iter().map(|place| source.join(place)).collect();
    let mut all = String::new();
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if !path.ends_with("tests.rs") && !path.to_str().unwrap().contains("/tests/") {
            let text = fs::read_to_string(&path).unwrap();
            // A string continues at the first character of its next line.
            let mut parts = text.split("\\\n");
            all.push_str(parts.next().unwrap());
            parts.for_each(|part| all.push_str(part.trim_start()));
        }
    }
    all
}

#[test]
fn documented_table_has_only_texts_and_steps_of_check() {
    let steps = sources(&["commands/check", "commands/check.rs"]);
    let words = sources(&[
        "commands/check",
        "commands/check.rs",
        "commands/https_probe.rs",
        "commands/https_probe",
        "sdk_environment.rs",
        "sts",
        "sts.rs",
        "svid",
        "svid.rs",
    ]);
    let rows = doc_tables::rows();
    assert!(rows.len() > 20, "{rows:?}");
    for row in rows {
        for step in &row.steps {
            assert!(
                steps.contains(&format!(": &str = \"{step}\";")),
                "no step {step}: {row:?}"
            );
        }
        for text in &row.words {
            assert!(
                words.contains(text),
                "check does not print {text:?}: {row:?}"
            );
        }
    }
}
