//! The fuzz target for the URL of an issuer, with arbitrary text.

use super::PlannedIssuer;

/// Checks that an accepted URL can stand in each format of the output: it has no quotes, blanks or
/// variables.
pub(crate) fn issuer(text: &str) -> bool {
    let Ok(issuer) = PlannedIssuer::parse(text) else {
        return false;
    };
    assert_eq!(issuer.url(), text);
    assert!(text.len() <= 255 && !issuer.key().is_empty());
    assert!(text.bytes().all(|c| c.is_ascii_graphic()));
    assert!(!text.contains(['"', '\'', '`', '$', '\\', '{', '<', '&', ';', '|', '(']));
    for warning in issuer.warnings() {
        assert!(!warning.contains('\n'), "{warning}");
    }
    true
}
