//! Names and prose follow the rules of `.github/CONTRIBUTING.md`, in source files and documents.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

mod exceptions;
mod names;
mod scan;

use exceptions::{ALLOWED_WORDS, QUOTING, UNSWEPT};
use scan::{Text, TextKind, texts};

/// Words that the rules ban, because each has a plainer or more exact one.
const BANNED_WORDS: [&str; 45] = [
    "anew",
    "anybody",
    "anyone",
    "ask",
    "asked",
    "asking",
    "asks",
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
    "place",
    "places",
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
    "turn",
    "turns",
    "who",
    "whoever",
    "whom",
    "whosoever",
];

/// Words for which the glossary has another. Names may have them, as values of the contract do.
const BANNED_IN_PROSE: [&str; 6] = [
    "refusal", "refusals", "refuse", "refused", "refuses", "refusing",
];
/// The kernel's words for an error, in which one of them is right.
const KERNEL_ERROR: &str = "connection refused";

/// The same for words that are wrong only in such company.
const BANNED_PHRASES: [&str; 13] = [
    "be had",
    "came to",
    "come to",
    "comes to",
    "had to be had",
    "hand out",
    "handed out",
    "hands each",
    "hands out",
    "nobody but",
    "nothing of",
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

/// Extensions of files with prose. A script without an extension begins with `#!`.
const EXTENSIONS: [&str; 15] = [
    "conf", "go", "java", "js", "md", "proto", "py", "rb", "rs", "service", "sh", "socket", "toml",
    "yaml", "yml",
];

/// Lists the files with prose below `folder`.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() {
            if !["target", "seeds", "node_modules"]
                .iter()
                .any(|skipped| name == *skipped)
            {
                files(&path, found);
            }
        } else {
            let extension = path.extension().map(|kind| kind.to_str().unwrap());
            let is_script = || std::fs::read(&path).unwrap().starts_with(b"#!");
            if extension.map_or_else(is_script, |kind| EXTENSIONS.contains(&kind)) {
                found.push(path);
            }
        }
    }
}

/// Reads every source file and document of the project, as paths relative to its root.
fn sources() -> BTreeMap<String, String> {
    let mut found = Vec::new();
    for folder in ["src", "tests", "proto", "deploy", ".github"] {
        files(&root().join(folder), &mut found);
    }
    found.extend(["README.md", "Cargo.toml", ".ci/run"].map(|name| root().join(name)));
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

/// Returns whether a sentence trails off. In a synopsis `WORD...` and `[WORD]...` are repetitions.
fn has_ellipsis(text: &str) -> bool {
    let prose: String = text.split('`').step_by(2).collect();
    let is_repetition =
        |before: &str| before.ends_with(|c: char| c.is_ascii_uppercase() || c == ']');
    prose.contains('…')
        || prose
            .match_indices("...")
            .any(|(at, _)| !is_repetition(&prose[..at]))
}

/// Returns a message without its placeholders, such as `{name:?}`.
fn without_placeholders(message: &str) -> String {
    let parts = message.split('{').enumerate();
    parts
        .map(|(index, part)| match part.split_once('}') {
            Some((_, rest)) if index > 0 => rest,
            _ => part,
        })
        .collect()
}

/// Lists the faults of one comment, message or paragraph.
fn faults(file: &str, text: &Text) -> Vec<String> {
    let words = match text.kind {
        TextKind::Message => words(&without_placeholders(&text.prose)),
        _ => words(&text.prose),
    };
    let mut faults: Vec<String> = Vec::new();
    let banned = words
        .iter()
        .filter(|word| BANNED_WORDS.contains(&word.as_str()) && !is_allowed(file, word));
    faults.extend(banned.map(|word| format!("the word {word:?}")));
    let joined = format!(" {} ", words.join(" "));
    let others = joined.replace(KERNEL_ERROR, "");
    let banned = others
        .split(' ')
        .filter(|word| BANNED_IN_PROSE.contains(word) && !is_allowed(file, word));
    faults.extend(banned.map(|word| format!("the word {word:?}")));
    let phrases = BANNED_PHRASES
        .iter()
        .filter(|phrase| joined.contains(&format!(" {phrase} ")));
    faults.extend(
        phrases
            .filter(|phrase| !is_allowed(file, phrase))
            .map(|phrase| format!("the phrase {phrase:?}")),
    );
    if text.kind != TextKind::Message && has_ellipsis(&text.prose) {
        faults.push("an ellipsis".to_owned());
    }
    let contraction = words
        .iter()
        .find(|word| word.ends_with("n't") && !is_allowed(file, word));
    if let Some(word) = contraction
        && text.kind == TextKind::Message
        && file.starts_with("src/")
    {
        faults.push(format!("the contraction {word:?} in a message"));
    }
    if text.kind == TextKind::Doc {
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
        let quotes = QUOTING.iter().any(|prefix| file.starts_with(prefix));
        for text in texts(&file, &source)
            .into_iter()
            .filter(|text| !quotes || text.kind != TextKind::Message)
        {
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
    for (file, source) in sources().iter().filter(|(file, _)| !file.ends_with(".md")) {
        let lines: Vec<&str> = source.lines().collect();
        let comments = texts(file, source);
        for comment in comments
            .iter()
            .filter(|text| matches!(text.kind, TextKind::Doc | TextKind::Comment))
        {
            for (index, prose) in comment.prose.split('\n').enumerate() {
                let number = comment.line + index;
                let columns = lines[number - 1].chars().count();
                // A link cannot be wrapped.
                let is_exempt = prose.contains("://") || prose.trim_start().starts_with('|');
                if columns > MAX_COLUMNS && !is_exempt {
                    wrong.push(format!("{file}:{number}: {columns} columns"));
                }
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
        ["the word \"who\"", "the word \"asked\""]
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
        faults_of("// STS refuses; the caller gets \"connection refused\".\n"),
        ["the word \"refuses\""]
    );
    assert_eq!(
        faults_of("let x = \"{rejected:?} of {all} refused\";\n"),
        ["the word \"refused\""]
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
