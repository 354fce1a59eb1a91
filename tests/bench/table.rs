//! The table that is printed, and the figures in it.

use std::time::Duration;

#[derive(Debug, Clone)]
pub(crate) struct Line {
    /// The row's name, or that of a part of it.
    pub(crate) row: String,
    /// The figure that the row is about.
    pub(crate) figure: String,
    /// Its bound, and the aim.
    pub(crate) bound: String,
    pub(crate) others: String,
}

impl Line {
    /// Makes a line of the table.
    pub(crate) fn new(
        row: impl Into<String>,
        figure: String,
        bound: impl Into<String>,
        others: String,
    ) -> Self {
        Self {
            row: row.into(),
            figure,
            bound: bound.into(),
            others,
        }
    }
}

/// Renders them as Markdown, in columns.
pub(crate) fn render(lines: &[Line]) -> String {
    let head = Line::new(
        "row",
        "measured".to_owned(),
        "bound",
        "other figures".to_owned(),
    );
    let rows: Vec<[&str; 4]> = std::iter::once(&head)
        .chain(lines)
        .map(|line| [&line.row, &line.figure, &line.bound, &line.others].map(String::as_str))
        .collect();
    let widths: Vec<usize> = (0..4)
        .map(|column| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or_default()
        })
        .collect();
    let text = |cells: &[&str], fill: char| {
        let cells = cells.iter().zip(&widths).map(|(cell, width)| {
            let missing = width - cell.chars().count();
            format!("{cell}{}", fill.to_string().repeat(missing))
        });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let mut out = text(&rows[0], ' ');
    out += &text(&["-", "-", "-", "-"], '-');
    out.extend(rows[1..].iter().map(|row| text(row, ' ')));
    out
}

/// The median of several values, and the outermost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spread {
    /// At least half of the values are not above it.
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    /// Computes it for at least one value.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |rank: usize| values.get(rank).copied().unwrap_or(f64::NAN);
        Self {
            median: at(values.len().saturating_sub(1) / 2),
            least: at(0),
            most: at(values.len().saturating_sub(1)),
        }
    }

    /// Formats it with its unit: `71.3 us (70.0 to 75.1)`.
    pub(crate) fn show(self, unit: &str) -> String {
        let Self {
            median,
            least,
            most,
        } = self;
        format!("{median:.1} {unit} ({least:.1} to {most:.1})")
    }
}

pub(crate) fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// Formats microseconds as milliseconds.
pub(crate) fn millis(micros: f64) -> String {
    format!("{:.2} ms", micros / 1000.0)
}

/// Formats bytes as MiB.
pub(crate) fn mebibytes(bytes: u64) -> String {
    let kibibytes = u32::try_from(bytes / 1024).unwrap_or(u32::MAX);
    format!("{:.1} MiB", f64::from(kibibytes) / 1024.0)
}
