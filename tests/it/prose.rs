//! Names and prose follow the rules of `.github/CONTRIBUTING.md`, in source files and documents.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

mod exceptions;
mod scan;

use exceptions::{ALLOWED_WORDS, UNSWEPT};
use scan::{Kind, Text, texts};

/// Words that the rules ban, because each has a plainer or more exact one.
const BANNED_WORDS: [&str; 38] = [
    "anew",
    "anybody",
    "anyone",
    "away",
    "beside",
    "besides",
    "everybody",
    "everyone",
    "he",
    "her",
    "him",
    "his",
    "look",
    "looked",
    "looks",
    "mend",
    "mended",
    "news",
    "nobody",
    "noone",
    "said",
    "say",
    "saying",
    "says",
    "she",
    "somebody",
    "someone",
    "tell",
    "telling",
    "tells",
    "told",
    "trouble",
    "troubles",
    "turns",
    "who",
    "whoever",
    "whom",
    "whosoever",
];

/// The same for words that are wrong only in such company.
const BANNED_PHRASES: [&str; 12] = [
    "ask for",
    "asked for",
    "asks for",
    "be had",
    "come to",
    "comes to",
    "had to be had",
    "hand out",
    "handed out",
    "hands out",
    "the daemon before",
    "is no",
];

/// How a doc comment must not begin: it is to be a sentence, not a question's second half.
const BANNED_OPENINGS: [&str; 5] = ["What", "Who", "Whose", "Which", "Whom"];

const MAX_COLUMNS: usize = 100;
const MIN_DOC_WORDS: usize = 4;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Lists the files below `folder` whose names end with `.rs` or `.md`.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() {
            if name != "target" && name != "seeds" {
                files(&path, found);
            }
        } else if path
            .extension()
            .is_some_and(|kind| kind == "rs" || kind == "md")
        {
            found.push(path);
        }
    }
}

/// Reads every source file and document of the project, as paths relative to its root.
fn sources() -> BTreeMap<String, String> {
    let mut found = Vec::new();
    for folder in ["src", "tests", "proto", "deploy", ".github"] {
        files(&root().join(folder), &mut found);
    }
    found.push(root().join("README.md"));
    let relative = |path: &Path| {
        path.strip_prefix(root())
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    };
    let is_swept = |name: &String| !UNSWEPT.iter().any(|prefix| name.starts_with(prefix));
    let read = |path: PathBuf| (relative(&path), std::fs::read_to_string(&path).unwrap());
    found
        .into_iter()
        .map(read)
        .filter(|(name, _)| is_swept(name))
        .collect()
}

/// Splits text into lower-case words, without what stands in backquotes: that is code.
fn words(text: &str) -> Vec<String> {
    let prose: String = text
        .split('`')
        .step_by(2)
        .collect::<Vec<_>>()
        .join(" code ");
    let word = |word: &str| word.trim_matches('\'').to_lowercase();
    let separator = |c: char| !c.is_alphanumeric() && c != '\'' && c != '_' && c != '-';
    prose
        .split(separator)
        .filter(|word| !word.is_empty())
        .map(word)
        .collect()
}

fn is_allowed(file: &str, word: &str) -> bool {
    ALLOWED_WORDS
        .iter()
        .any(|(prefix, allowed, _)| file.starts_with(prefix) && *allowed == word)
}

/// Lists the faults of one comment, message or paragraph.
fn faults(file: &str, text: &Text) -> Vec<String> {
    let words = words(&text.prose);
    let mut faults: Vec<String> = Vec::new();
    let banned = words
        .iter()
        .filter(|word| BANNED_WORDS.contains(&word.as_str()) && !is_allowed(file, word));
    faults.extend(banned.map(|word| format!("the word {word:?}")));
    let joined = format!(" {} ", words.join(" "));
    let phrases = BANNED_PHRASES
        .iter()
        .filter(|phrase| joined.contains(&format!(" {phrase} ")));
    faults.extend(
        phrases
            .filter(|phrase| !is_allowed(file, phrase))
            .map(|phrase| format!("the phrase {phrase:?}")),
    );
    if text.kind == Kind::Doc {
        let first = text.prose.split_whitespace().next().unwrap_or_default();
        if BANNED_OPENINGS.contains(&first) {
            faults.push(format!("a doc comment that opens with {first:?}"));
        }
        if words.len() < MIN_DOC_WORDS {
            faults.push(format!("a doc comment of {} words", words.len()));
        }
    }
    faults
}

#[test]
fn prose_follows_the_rules() {
    let mut wrong = Vec::new();
    for (file, source) in sources() {
        for text in texts(&file, &source) {
            wrong.extend(
                faults(&file, &text)
                    .into_iter()
                    .map(|fault| format!("{file}:{}: {fault}", text.line)),
            );
        }
    }
    assert!(
        wrong.is_empty(),
        "{} faults:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn comment_lines_fit_into_100_columns() {
    let mut wrong = Vec::new();
    for (file, source) in sources().iter().filter(|(file, _)| file.ends_with(".rs")) {
        for (index, line) in source.lines().enumerate() {
            // A link cannot be wrapped.
            let is_comment = line.trim_start().starts_with("//") && !line.contains("://");
            let is_table = line
                .trim_start()
                .trim_start_matches(['/', '!', ' '])
                .starts_with('|');
            if is_comment && !is_table && line.chars().count() > MAX_COLUMNS {
                wrong.push(format!(
                    "{file}:{}: {} columns",
                    index + 1,
                    line.chars().count()
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} lines:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn type_names_are_defined_once() {
    let mut defined: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (file, source) in sources()
        .into_iter()
        .filter(|(file, _)| file.starts_with("src/"))
    {
        for line in source.lines() {
            let words: Vec<&str> = line
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .collect();
            let is_item = ["pub", "struct ", "enum ", "trait ", "union "]
                .iter()
                .any(|start| line.trim_start().starts_with(start));
            let keyword = words
                .iter()
                .position(|word| ["struct", "enum", "trait", "union"].contains(word));
            if let Some(name) = keyword.filter(|_| is_item).and_then(|at| words.get(at + 1))
                && name.starts_with(char::is_uppercase)
            {
                defined
                    .entry((*name).to_owned())
                    .or_default()
                    .push(file.clone());
            }
        }
    }
    defined.retain(|_, files| files.len() > 1);
    assert!(defined.is_empty(), "{defined:#?}");
}

#[test]
fn scanner_finds_faults() {
    let faults_of = |source: &str| -> Vec<String> {
        texts("src/x.rs", source)
            .iter()
            .flat_map(|text| faults("src/x.rs", text))
            .collect()
    };
    assert_eq!(
        faults_of("/// Returns the name of the caller.\nfn f() {}\n"),
        Vec::<String>::new()
    );
    assert_eq!(
        faults_of("/// Returns who asked for it.\n"),
        ["the word \"who\"", "the phrase \"asked for\""]
    );
    assert_eq!(
        faults_of("/// Which process it is.\n"),
        ["a doc comment that opens with \"Which\""]
    );
    assert_eq!(faults_of("/// The name.\n"), ["a doc comment of 2 words"]);
    assert_eq!(
        faults_of("// `told` is code, told is not.\n"),
        ["the word \"told\""]
    );
    assert_eq!(
        faults_of("let x = \"the agent says no\"; // \"quoted\n"),
        ["the word \"says\""]
    );
    assert_eq!(
        faults_of("let x = 'a'; let y = \"https://says.example\";\n"),
        Vec::<String>::new()
    );
    assert_eq!(
        faults_of("let x = r#\"nobody is \"here\" today\"#;\n"),
        ["the word \"nobody\""]
    );
}
