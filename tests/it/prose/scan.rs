//! Finds prose in source files and documents: comments, doc comments, messages, paragraphs.

/// Where a piece of prose comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Doc,
    Comment,
    Message,
    Paragraph,
}

/// A piece of prose, and the number of its first line.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) kind: Kind,
    pub(super) line: usize,
    pub(super) prose: String,
}

/// Returns all prose of a file.
pub(super) fn texts(file: &str, source: &str) -> Vec<Text> {
    if file.ends_with(".md") {
        paragraphs(source)
    } else {
        comments_and_messages(source, is_test(file))
    }
}

/// Returns whether messages in this file are the tests' own data, such as bytes of a bad request.
fn is_test(file: &str) -> bool {
    !file.starts_with("src/")
        || file.ends_with("tests.rs")
        || file.contains("/tests/")
        || file.ends_with("fuzzing.rs")
}

fn paragraphs(source: &str) -> Vec<Text> {
    let mut in_code = false;
    let mut found = Vec::new();
    for (index, line) in source.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if !in_code && !line.trim().is_empty() {
            found.push(Text {
                kind: Kind::Paragraph,
                line: index + 1,
                prose: line.to_owned(),
            });
        }
    }
    found
}

fn comments_and_messages(source: &str, is_test: bool) -> Vec<Text> {
    let mut found: Vec<Text> = Vec::new();
    let bytes = source.as_bytes();
    let (mut at, mut line) = (0, 1);
    let mut in_tests = is_test;
    while at < bytes.len() {
        let rest = &source[at..];
        let (length, text) = if rest.starts_with("//") {
            comment(rest)
        } else if let Some((length, message)) = string(source, at) {
            (length, Some((Kind::Message, message)).filter(|_| !in_tests))
        } else {
            in_tests |= rest.starts_with("#[cfg(test)]");
            (character(rest), None)
        };
        if let Some((kind, prose)) = text {
            push(&mut found, Text { kind, line, prose });
        }
        line += source[at..at + length].matches('\n').count();
        at += length;
    }
    found.retain(|text| text.kind != Kind::Message || text.prose.contains(' '));
    found
}

/// Adds a piece, or continues the comment of the line above.
fn push(found: &mut Vec<Text>, text: Text) {
    match found.last_mut() {
        Some(last)
            if last.kind == text.kind
                && text.kind != Kind::Message
                && last.line + last.prose.matches('\n').count() + 1 == text.line =>
        {
            last.prose.push('\n');
            last.prose.push_str(&text.prose);
        }
        _ => found.push(text),
    }
}

fn comment(rest: &str) -> (usize, Option<(Kind, String)>) {
    let line = rest.lines().next().unwrap_or_default();
    let kind = if line.starts_with("///") || line.starts_with("//!") {
        Kind::Doc
    } else {
        Kind::Comment
    };
    (
        line.len(),
        Some((kind, line.trim_start_matches(['/', '!']).to_owned())),
    )
}

/// Returns the length and the content of the string literal that begins at `at`.
fn string(source: &str, at: usize) -> Option<(usize, String)> {
    let rest = &source[at..];
    let raw = rest
        .strip_prefix('r')
        .filter(|_| !source[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'));
    if let Some(raw) = raw {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        let content = raw[hashes..].strip_prefix('"')?;
        let end = format!("\"{}", "#".repeat(hashes));
        let length = content.find(&end)?;
        return Some((
            1 + hashes + 1 + length + end.len(),
            content[..length].to_owned(),
        ));
    }
    let content = rest.strip_prefix('"')?;
    let mut escaped = false;
    for (index, c) in content.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some((index + 2, content[..index].replace("\\n", " "))),
            _ => {}
        }
    }
    None
}

/// Returns the length of a character literal, or of one character of code.
fn character(rest: &str) -> usize {
    for literal in ["'\"'", "'\\''", "'\\\\'", "'\\\"'"] {
        if rest.starts_with(literal) {
            return literal.len();
        }
    }
    rest.chars().next().map_or(1, char::len_utf8)
}
