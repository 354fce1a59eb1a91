//! The table of clients in `deploy/docs/sdks.md`, which these tests write and compare.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::catalogue::{self, Client};

const BEGIN: &str = "<!-- The clients: made by tests/it/clients.rs. -->\n";
const END: &str = "<!-- The end of the clients. -->\n";
const HEADER: &str = "| client | version | works | IMDS | 169.254.169.254 | cold wait | fetches | re-fetches | on a 403 | on a 503 | note |\n|---|---|---|---|---|---|---|---|---|---|---|\n";

/// A column of the table, in the order of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    Client,
    /// The version, with the name of its registry.
    Version,
    /// The ways to the daemon that work.
    Works,
    /// Whether the variable with the address of the instance metadata service alone is enough.
    Metadata,
    /// Whether it needs no variable at all where that service has its usual address.
    MetadataAddress,
    /// The time that its first credentials may take.
    Waits,
    /// The number of requests with sessions of an hour.
    Requests,
    /// The remaining lifetime below which it sends a request for each call.
    EachCall,
    /// The client's behaviour after a 403.
    Rejected,
    /// The client's behaviour after a 503.
    Unavailable,
    Note,
}

const COLUMNS: usize = 11;

/// The result of a test with one client.
pub(crate) struct Cell {
    pub(crate) client: &'static str,
    pub(crate) column: Column,
    pub(crate) text: String,
}

impl Cell {
    pub(crate) fn new(client: &'static str, column: Column, text: impl Into<String>) -> Self {
        Self {
            client,
            column,
            text: text.into(),
        }
    }
}

/// The table as it is in the document.
pub(crate) struct Table {
    rows: Vec<[String; COLUMNS]>,
}

impl Table {
    /// Reads the table of the document.
    pub(crate) fn committed() -> Self {
        let text = fs::read_to_string(document()).expect("sdks.md");
        let (_, table, _) = split(&text);
        let row = |line: &str| {
            let cells: Vec<String> = line
                .trim()
                .trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect();
            cells
                .try_into()
                .unwrap_or_else(|cells| panic!("a row with {COLUMNS} cells: {cells:?}"))
        };
        Self {
            rows: table.lines().skip(2).map(row).collect(),
        }
    }

    /// The version that it has for a client; nothing if any will do.
    pub(crate) fn version(&self, client: &Client) -> Option<&str> {
        let version = self.row(client.name)?[Column::Version as usize]
            .split(' ')
            .next_back();
        version.filter(|_| !is_written())
    }

    fn row(&self, client: &str) -> Option<&[String; COLUMNS]> {
        self.rows.iter().find(|row| row[0] == client)
    }

    /// Rows for all of the catalogue in its order, with what is known of them.
    fn in_order(mut self) -> Self {
        let row = |client: Client| {
            let known = self.rows.iter().position(|row| row[0] == client.name);
            known.map_or_else(
                || new_row(client.name),
                |known| self.rows.swap_remove(known),
            )
        };
        Self {
            rows: catalogue::all().into_iter().map(row).collect(),
        }
    }

    fn set(&mut self, cell: &Cell) {
        let row = self
            .rows
            .iter_mut()
            .find(|row| row[0] == cell.client)
            .expect("a client of the catalogue");
        let old = &mut row[cell.column as usize];
        // What is not compared is not changed by itself either.
        if compared(cell.column, old) != compared(cell.column, &cell.text) {
            old.clone_from(&cell.text);
        }
    }
}

fn new_row(client: &str) -> [String; COLUMNS] {
    let mut row = [const { String::new() }; COLUMNS];
    client.clone_into(&mut row[0]);
    row
}

/// Compares what was seen with the table, or puts it there if `AWSVID_WRITE_TABLE` is set.
pub(crate) fn settle(seen: &[Cell]) {
    assert!(!seen.is_empty(), "no client was seen");
    if is_written() {
        return write(seen);
    }
    let table = Table::committed();
    let wrong: Vec<String> = seen
        .iter()
        .filter_map(|cell| {
            let committed = table
                .row(cell.client)
                .map_or("", |row| &row[cell.column as usize]);
            let same = compared(cell.column, committed) == compared(cell.column, &cell.text);
            (!same).then(|| {
                format!(
                    "{}, {:?}: {committed:?}, but seen: {:?}",
                    cell.client, cell.column, cell.text
                )
            })
        })
        .collect();
    assert!(
        wrong.is_empty(),
        "sdks.md's table of clients is not true any more (AWSVID_WRITE_TABLE=1 writes what is):\n{}",
        wrong.join("\n")
    );
}

/// The header is right, and the rows are those of the catalogue.
pub(crate) fn settle_rows() {
    let clients: Vec<&str> = catalogue::all().iter().map(|client| client.name).collect();
    if is_written() {
        return;
    }
    let text = fs::read_to_string(document()).expect("sdks.md");
    assert!(
        split(&text).1.starts_with(HEADER),
        "sdks.md's table of clients has another header"
    );
    let rows: Vec<String> = Table::committed()
        .rows
        .into_iter()
        .map(|[client, ..]| client)
        .collect();
    assert_eq!(
        rows, clients,
        "sdks.md's table of clients has other rows (AWSVID_WRITE_TABLE=1 writes them)"
    );
}

fn is_written() -> bool {
    std::env::var_os("AWSVID_WRITE_TABLE").is_some_and(|value| !value.is_empty())
}

fn write(seen: &[Cell]) {
    // Another test may write its own columns at the same time.
    let _lock = Flock::lock(
        File::open(document()).expect("sdks.md"),
        FlockArg::LockExclusive,
    )
    .expect("a lock");
    let mut table = Table::committed().in_order();
    seen.iter().for_each(|cell| table.set(cell));
    let text = fs::read_to_string(document()).expect("sdks.md");
    let (before, _, after) = split(&text);
    let rows: String = table
        .rows
        .iter()
        .map(|row| format!("| {} |\n", row.join(" | ")))
        .collect();
    fs::write(document(), format!("{before}{HEADER}{rows}{after}")).expect("sdks.md");
}

/// Returns the part of a cell that the tests compare. Text in parentheses is for people: seconds
/// and counts that differ between machines and runs.
fn compared(column: Column, text: &str) -> String {
    if matches!(column, Column::Client | Column::Version | Column::Note) {
        return text.to_owned();
    }
    let parts = text
        .split('(')
        .map(|part| part.rsplit_once(')').map_or(part, |(_, rest)| rest).trim());
    parts.collect::<Vec<_>>().join(" ").trim().to_owned()
}

/// Splits the document: the text before the table with the marker, the table, and the rest.
fn split(text: &str) -> (&str, &str, &str) {
    let begin = text
        .find(BEGIN)
        .expect("sdks.md has the table's first marker")
        + BEGIN.len();
    let end = begin
        + text[begin..]
            .find(END)
            .expect("sdks.md has the table's last marker");
    (&text[..begin], &text[begin..end], &text[end..])
}

fn document() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/docs/sdks.md")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_may_differ_only_in_parentheses() {
        let same = |a, b| compared(Column::Rejected, a) == compared(Column::Rejected, b);
        assert!(same(
            "shows why, 3 tries (9 s)",
            "shows why, 3 tries (11 s)"
        ));
        assert!(!same(
            "shows why, 3 tries (9 s)",
            "shows why, 4 tries (9 s)"
        ));
        assert!(!same("when due (2)", "each run"));
        assert_ne!(
            compared(Column::Client, "C++ (pyarrow)"),
            compared(Column::Client, "C++ (other)")
        );
    }
}
