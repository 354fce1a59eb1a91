//! Reads the fenced blocks of deploy/docs, so that tests run the commands that the pages show.

use std::fs;
use std::path::{Path, PathBuf};

/// A fenced block of a page.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    /// The word after the opening fence, such as `sh`; empty without one.
    pub(crate) language: String,
    /// The heading that it stands below, without its marks.
    pub(crate) heading: String,
    /// Its lines, without the indentation of a list item.
    pub(crate) text: String,
}

/// Returns the path of a page of deploy/docs, or of README.md.
pub(crate) fn path(page: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    match page {
        "README.md" => root.join(page),
        _ => root.join("deploy/docs").join(page),
    }
}

/// Returns all blocks of a page, in their order.
pub(crate) fn blocks(page: &str) -> Vec<Block> {
    let text = fs::read_to_string(path(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
    let mut found = Vec::new();
    let mut heading = String::new();
    let mut open: Option<(usize, Block)> = None;
    for line in text.lines() {
        let content = line.trim_start();
        let indent = line.len() - content.len();
        match &mut open {
            Some(_) if content == "```" => found.extend(open.take().map(|(_, block)| block)),
            Some((outer, block)) => {
                block
                    .text
                    .push_str(line.get((*outer).min(indent)..).unwrap_or_default());
                block.text.push('\n');
            }
            None => match content.strip_prefix("```") {
                Some(language) => {
                    let (language, heading) = (language.to_owned(), heading.clone());
                    open = Some((
                        indent,
                        Block {
                            language,
                            heading,
                            text: String::new(),
                        },
                    ));
                }
                None if line.starts_with('#') => {
                    heading = line.trim_start_matches(['#', ' ']).to_owned()
                }
                None => {}
            },
        }
    }
    assert!(
        open.is_none(),
        "{page} has a block without an end: {open:?}"
    );
    found
}

/// Returns the one block of a page that begins with these words below this heading.
pub(crate) fn block(page: &str, heading: &str, begin: &str) -> String {
    let fits = |block: &Block| block.heading == heading && block.text.starts_with(begin);
    let found: Vec<Block> = blocks(page).into_iter().filter(fits).collect();
    let [block] = &found[..] else {
        panic!(
            "{page}, {heading}: {} blocks begin with {begin:?}",
            found.len()
        )
    };
    block.text.clone()
}
