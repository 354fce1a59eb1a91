//! Removal of secrets from the texts of other servers.

/// Replaces the parts of `text` that quote the token or another secret. AWS's validation errors
/// quote the values that they reject.
///
/// A fragment of at least twice `WINDOW` is always found. It contains a window that begins at a
/// multiple of `WINDOW` of its word.
pub(super) fn without_secrets(text: &str, secrets: &[&str]) -> String {
    const WINDOW: usize = 16;
    const MAX_CHARS: usize = 8192;
    if secrets.is_empty() {
        return text.to_owned();
    }
    let text: String = text.chars().take(MAX_CHARS).collect();
    let in_token =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '/' | '=');
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let word = rest.find(|c| !in_token(c)).unwrap_or(rest.len());
        let (word, other) = rest.split_at(word);
        // A word is ASCII, so it can be cut at any byte.
        let quoted = word.as_bytes().chunks_exact(WINDOW).any(|window| {
            let is_part = |window: &str| secrets.iter().any(|secret| secret.contains(window));
            std::str::from_utf8(window).is_ok_and(is_part)
        });
        clean.push_str(if quoted { "[token]" } else { word });
        let next = other.find(in_token).unwrap_or(other.len());
        clean.push_str(&other[..next]);
        rest = &other[next..];
    }
    clean
}
