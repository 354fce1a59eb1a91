//! Reads the table in `deploy/docs/troubleshooting.md`. Unit tests compare every finding of check
//! with it. The integration tests include this file and compare findings with real counterparts.

const DOCUMENT: &str = include_str!("../../../deploy/docs/troubleshooting.md");
const HEADER: &str = "| symptom | step | output of check |";

/// A line of the table.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    pub(crate) steps: Vec<&'a str>,
    /// Quoted words that check prints.
    pub(crate) words: Vec<&'a str>,
}

pub(crate) fn rows() -> Vec<Row<'static>> {
    let from = DOCUMENT.find(HEADER).expect("the table");
    let lines = DOCUMENT[from..]
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    lines
        .map(|line| {
            row(line).unwrap_or_else(|| panic!("three cells, with steps and words: {line}"))
        })
        .collect()
}

fn row(line: &str) -> Option<Row<'_>> {
    let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
    let [_, steps, texts] = cells[..] else {
        return None;
    };
    let (steps, words) = (within(steps, '`'), within(texts, '"'));
    (!steps.is_empty() && !words.is_empty()).then_some(Row { steps, words })
}

/// Returns the texts between pairs of `mark`.
fn within(cell: &str, mark: char) -> Vec<&str> {
    cell.split(mark).skip(1).step_by(2).collect()
}

/// Panics unless what was found at a step is in the table.
pub(crate) fn assert_documented(step: &str, saw: &str, fix: &str) {
    let has = |row: &Row<'_>| {
        row.steps.contains(&step)
            && row
                .words
                .iter()
                .any(|words| saw.contains(words) || fix.contains(words))
    };
    assert!(
        rows().iter().any(has),
        "no row of deploy/docs/troubleshooting.md for {step}: {saw} -> {fix}"
    );
}
