//! The fuzz target for units of systemd, with arbitrary text.

use super::parse;

/// Checks a unit, and its drop-in files after a NUL each: an address is a word of the text, and an
/// empty value removes all before it.
pub(crate) fn socket_unit(text: &str) -> bool {
    let texts = |more: &str| {
        let texts: Vec<_> = text.split('\0').map(str::to_owned).collect();
        parse(texts.into_iter().chain([more.to_owned()]))
    };
    let addresses = texts("");
    for address in &addresses {
        assert!(
            !address.is_empty() && address.trim() == address,
            "{address:?}"
        );
        assert!(!address.contains('\n') && text.contains(address.as_str()));
    }
    assert_eq!(
        texts("[Socket]\nListenStream=\nListenStream=974\n"),
        ["974"]
    );
    let one_more = addresses.iter().map(String::as_str).chain(["974"]);
    assert!(one_more.eq(texts("ListenStream = 974\n")));
    !addresses.is_empty()
}
