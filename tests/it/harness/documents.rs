//! Reads the fenced blocks of the documents, so that tests run the commands that the pages show.

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

/// The folders with pages, apart from README.md.
const FOLDERS: [&str; 4] = [".github", "deploy", "src", "tests"];
const DOCS: &str = "deploy/docs";

/// Returns the path of a page: its name below deploy/docs, or its path from the project's root.
pub(crate) fn path(page: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    match page == "README.md" || page.contains('/') {
        true => root.join(page),
        false => root.join(DOCS).join(page),
    }
}

/// Returns all pages of the project that have a block, as [`path`] takes them.
pub(crate) fn pages() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = vec![root.join("README.md")];
    for folder in FOLDERS {
        add_pages(&root.join(folder), &mut found);
    }
    let name = |path: PathBuf| {
        let page = path.strip_prefix(root).unwrap().to_str().unwrap();
        let name = page.strip_prefix(DOCS).unwrap_or(page);
        name.trim_start_matches('/').to_owned()
    };
    let mut pages: Vec<String> = found.into_iter().map(name).collect();
    pages.sort();
    pages.retain(|page| !blocks(page).is_empty());
    pages
}

fn add_pages(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let is_foreign = ["node_modules", "target"]
            .iter()
            .any(|name| entry.file_name() == *name);
        if path.is_dir() && !is_foreign {
            add_pages(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
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
