//! Exceptions to the rules of prose, each with its reason.

/// Banned words that are right in some files: the beginning of the path, the word, the reason.
pub(super) const ALLOWED_WORDS: [(&str, &str, &str); 7] = [
    ("src/commands/node/tests.rs", "nobody", "the name of a user"),
    ("src/config/", "nobody", "the name of a user"),
    (
        "src/config/manual.rs",
        "isn't",
        "a test of roff's apostrophe",
    ),
    ("src/", "couldn't", "a message of AWS's STS"),
    ("src/dev/sts/chained.rs", "can't", "a message of AWS's STS"),
    (
        "src/commands/status/table.rs",
        "refused",
        "a state of cache entries",
    ),
    ("tests/it/status.rs", "refused", "a state of cache entries"),
];

/// Files that quote what the rules ban.
pub(super) const QUOTING: [&str; 2] = ["tests/it/prose.rs", "tests/it/prose/"];

/// Files that do not follow the rules yet, by the beginnings of their paths.
pub(super) const UNSWEPT: [&str; 0] = [];

/// Names with a banned word that are right, with the reason.
pub(super) const ALLOWED_NAMES: [(&str, &str); 3] = [
    ("ConnectionRefused", "an error of the standard library"),
    (
        "Refused",
        "the values `refused` and `sts_refused` of the contract",
    ),
    ("refused_since", "a field of `/status`"),
];
