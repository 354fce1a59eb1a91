//! Names of types, functions, fields, variables and tests.

use std::collections::{BTreeMap, BTreeSet};

use super::exceptions::ALLOWED_NAMES;
use super::scan::code;
use super::{BANNED_IN_PROSE, BANNED_WORDS, sources};

/// Nouns that end like participles.
const NOUNS: [&str; 1] = ["Setting"];

/// Metaphors, and participles in the position of a noun.
const BANNED_IN_NAMES: [&str; 11] = [
    "crowd", "desk", "given", "herd", "made", "walk", "walked", "walks", "wanted", "whose", "world",
];

/// Returns the name of the type, trait or alias that this line defines.
fn defined_type(line: &str) -> Option<&str> {
    let mut words = line
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !["pub", "crate", "super", "in", "unsafe", ""].contains(word));
    if !line.trim_start().starts_with(char::is_alphabetic) {
        return None;
    }
    let keyword = words.next()?;
    let is_item = match keyword {
        "struct" | "enum" | "trait" | "union" => true,
        // An associated type has the name that its trait gives it.
        "type" => !line.starts_with(' '),
        _ => false,
    };
    words
        .next()
        .filter(|name| is_item && name.starts_with(char::is_uppercase))
}

#[test]
fn type_names_are_defined_once() {
    for crate_root in ["src/", "tests/it/", "tests/actor/", "tests/bench/"] {
        let mut defined: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (file, source) in sources()
            .into_iter()
            .filter(|(file, _)| file.starts_with(crate_root) && file.ends_with(".rs"))
        {
            for name in source.lines().filter_map(defined_type) {
                defined
                    .entry(name.to_owned())
                    .or_default()
                    .push(file.clone());
            }
        }
        defined.retain(|_, files| files.len() > 1);
        assert!(defined.is_empty(), "{defined:#?}");
    }
}

/// A type that is named by a participle alone leaves open what it is: a process, a record, or an
/// error.
#[test]
fn type_names_are_not_participles() {
    for (file, source) in sources().iter().filter(|(file, _)| file.ends_with(".rs")) {
        for name in source.lines().filter_map(defined_type) {
            let is_participle = words(name).len() == 1
                && ["ed", "ing", "own", "aken"]
                    .iter()
                    .any(|end| name.ends_with(end))
                && !NOUNS.contains(&name);
            assert!(!is_participle, "{file}: {name}");
        }
    }
}

/// Splits a name into lower-case words, at underscores and at capital letters.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = '_';
    for c in name.chars() {
        if c == '_' || (c.is_uppercase() && !before.is_uppercase()) {
            words.push(String::new());
        }
        if c != '_' {
            words.last_mut().unwrap().extend(c.to_lowercase());
        }
        before = c;
    }
    words.retain(|word| !word.is_empty());
    words
}

/// Returns the word of a name that the rules ban.
fn banned_word(name: &str) -> Option<String> {
    words(name).into_iter().find(|word| {
        BANNED_WORDS.contains(&word.as_str())
            || BANNED_IN_PROSE.contains(&word.as_str())
            || BANNED_IN_NAMES.contains(&word.as_str())
    })
}

/// Reads each identifier, wherever it is used, so that none is missed: functions, fields, variants,
/// parameters, variables.
#[test]
fn names_have_no_banned_words() {
    let mut wrong = BTreeMap::new();
    let mut used: Vec<&str> = Vec::new();
    for (file, source) in sources() {
        if !file.ends_with(".rs") {
            continue;
        }
        let code = code(&source);
        let names: BTreeSet<&str> = code
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .collect();
        for name in names {
            let Some(word) = banned_word(name) else {
                continue;
            };
            match ALLOWED_NAMES.iter().find(|(allowed, _)| *allowed == name) {
                Some((allowed, _)) => used.push(allowed),
                None => drop(wrong.insert(name.to_owned(), format!("{word:?} in {file}"))),
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let unused = ALLOWED_NAMES.iter().find(|(name, _)| !used.contains(name));
    assert_eq!(unused, None, "an exception that nothing needs");
}

#[test]
fn names_are_split_into_words() {
    assert_eq!(words("is_newJwtSvid"), ["is", "new", "jwt", "svid"]);
    assert_eq!(words("MAX_ROLES"), ["max", "roles"]);
    assert_eq!(words("NotAsked"), ["not", "asked"]);
    assert_eq!(banned_word("ask_as").as_deref(), Some("ask"));
    assert_eq!(banned_word("StsRefusal").as_deref(), Some("refusal"));
    assert_eq!(banned_word("replace_task"), None);
    assert_eq!(
        code("let a = \"ask\"; // told\nlet b = 'x';"),
        "let a = ; \nlet b = 'x';"
    );
}

#[test]
fn test_names_follow_the_rules() {
    let mut wrong = Vec::new();
    for (file, source) in sources()
        .iter()
        .filter(|(file, _)| file.ends_with(".rs") && file.starts_with(['s', 't']))
    {
        for name in test_names(source) {
            let words: Vec<&str> = name.split('_').collect();
            let banned = words.iter().find(|word| BANNED_WORDS.contains(word));
            let begins = ["it", "the", "they", "who", "what", "a", "an"];
            if let Some(word) = banned.or(words.first().filter(|word| begins.contains(word))) {
                wrong.push(format!("{file}: {name}: {word}"));
            }
            if words.len() < 2 {
                wrong.push(format!("{file}: {name} has no verb"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Returns the names of the tests in a source.
fn test_names(source: &str) -> impl Iterator<Item = &str> {
    ["    #[test]\n", "\n#[test]\n", concat!("#[tokio", "::test")]
        .into_iter()
        .flat_map(|mark| source.split(mark).skip(1))
        .filter_map(|rest| rest.split("fn ").nth(1)?.split('(').next())
}
