//! Finds prose in source files and documents: comments, doc comments, messages, paragraphs.

/// Where a piece of prose comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TextKind {
    Doc,
    Comment,
    Message,
    Paragraph,
}

/// A piece of prose, and the number of its first line.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) kind: TextKind,
    pub(super) line: usize,
    pub(super) prose: String,
}

/// Returns all prose of a file.
pub(super) fn texts(file: &str, source: &str) -> Vec<Text> {
    let extension = file.rsplit_once('.').map_or("", |(_, extension)| extension);
    match extension {
        "md" => paragraphs(source),
        "rs" => comments_and_messages(source),
        "proto" | "go" | "java" | "js" => {
            let mut found = comments_and_messages(source);
            found.retain(|text| text.kind != TextKind::Message);
            found
        }
        _ => lines(source),
    }
}

/// Returns whether a line of Markdown begins a paragraph of its own: a list item, a row, a heading.
fn begins_paragraph(line: &str) -> bool {
    let numbered = line.trim_start_matches(|c: char| c.is_ascii_digit());
    ["- ", "* ", "|", "#", "> "]
        .iter()
        .any(|mark| line.starts_with(mark))
        || (numbered.len() < line.len() && numbered.starts_with(". "))
}

fn paragraphs(source: &str) -> Vec<Text> {
    let (mut in_code, mut continues) = (false, false);
    let mut found: Vec<Text> = Vec::new();
    for (index, line) in source.lines().enumerate() {
        let trimmed = line.trim_start();
        if trimmed.starts_with("```") {
            in_code = !in_code;
            continues = false;
        } else if in_code || trimmed.is_empty() {
            continues = false;
        } else if let Some(last) = found
            .last_mut()
            .filter(|_| continues && !begins_paragraph(trimmed))
        {
            last.prose.push('\n');
            last.prose.push_str(line);
        } else {
            continues = true;
            found.push(Text {
                kind: TextKind::Paragraph,
                line: index + 1,
                prose: line.to_owned(),
            });
        }
    }
    found
}

/// Returns the comments of a file in which they begin with `#`, and its descriptions.
fn lines(source: &str) -> Vec<Text> {
    let mut found = Vec::new();
    for (index, line) in source.lines().enumerate() {
        let line_number = index + 1;
        let trimmed = line.trim_start();
        let description = ["Description=", "description = "]
            .iter()
            .find_map(|key| trimmed.strip_prefix(key));
        let trailing = || {
            let (code, comment) = line.split_once(" # ")?;
            (code.matches(['"', '\'']).count() % 2 == 0).then_some(comment)
        };
        let (kind, prose) = if let Some(description) = description {
            (TextKind::Message, description)
        } else if trimmed.starts_with("#!") {
            continue;
        } else if let Some(comment) = trimmed.strip_prefix('#') {
            (TextKind::Comment, comment)
        } else if let Some(comment) = trailing() {
            (TextKind::Comment, comment)
        } else {
            continue;
        };
        push(
            &mut found,
            Text {
                kind,
                line: line_number,
                prose: prose.to_owned(),
            },
        );
    }
    found
}

fn comments_and_messages(source: &str) -> Vec<Text> {
    let mut found: Vec<Text> = Vec::new();
    let mut line = 1;
    for (piece, text) in pieces(source) {
        if let Some((kind, prose)) = text {
            push(&mut found, Text { kind, line, prose });
        }
        line += piece.matches('\n').count();
    }
    found.retain(|text| text.kind != TextKind::Message || text.prose.contains(' '));
    found
}

/// Returns a source without its comments and string literals.
pub(super) fn code(source: &str) -> String {
    let code = pieces(source).filter(|(_, text)| text.is_none());
    code.map(|(piece, _)| piece).collect()
}

/// Splits a source into comments, string literals, and the characters of its code.
fn pieces(source: &str) -> impl Iterator<Item = (&str, Option<(TextKind, String)>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = &source[at..];
        if rest.is_empty() {
            return None;
        }
        let is_in_url = source[..at].ends_with(':');
        let (length, text) = if rest.starts_with("//") && !is_in_url {
            comment(rest)
        } else if let Some((length, message)) = string(source, at) {
            (length, Some((TextKind::Message, message)))
        } else {
            (character(rest), None)
        };
        at += length;
        Some((&rest[..length], text))
    })
}

/// Adds a piece, or continues the comment of the line above.
fn push(found: &mut Vec<Text>, text: Text) {
    match found.last_mut() {
        Some(last)
            if last.kind == text.kind
                && text.kind != TextKind::Message
                && last.line + last.prose.matches('\n').count() + 1 == text.line =>
        {
            last.prose.push('\n');
            last.prose.push_str(&text.prose);
        }
        _ => found.push(text),
    }
}

fn comment(rest: &str) -> (usize, Option<(TextKind, String)>) {
    let line = rest.lines().next().unwrap_or_default();
    let kind = if (line.starts_with("///") && !line.starts_with("////")) || line.starts_with("//!")
    {
        TextKind::Doc
    } else {
        TextKind::Comment
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
