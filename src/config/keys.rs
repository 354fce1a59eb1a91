//! Every table and key of the configuration file, once.
//!
//! The reader takes the known names from here, `awsvid.toml(5)` is made from it, and tests compare
//! it with `config show`, `deploy/awsvid.toml` and `deploy/docs/configuration.md`.

mod list;
mod rules;

pub(super) use list::TABLES;

/// A table of the configuration file.
#[derive(Debug)]
pub(super) struct TableSpec {
    pub(super) name: &'static str,
    /// Whether a file may have several, as `[[name]]`.
    pub(super) is_list: bool,
    pub(super) meaning: &'static str,
    pub(super) keys: &'static [KeySpec],
}

/// A key of a table. Its texts have code in backticks.
#[derive(Debug)]
pub(super) struct KeySpec {
    pub(super) name: &'static str,
    /// Type of the value, with its bounds.
    pub(super) value: &'static str,
    /// The default as TOML in backticks, or what a missing key means.
    pub(super) default: &'static str,
    pub(super) meaning: &'static str,
}

const fn key(
    name: &'static str,
    value: &'static str,
    default: &'static str,
    meaning: &'static str,
) -> KeySpec {
    KeySpec {
        name,
        value,
        default,
        meaning,
    }
}

/// Keys of a later version, by table: only a value that requests nothing is allowed.
const RESERVED: [(&str, &str); 1] = [("listen", "node")];

impl TableSpec {
    /// Returns the header that begins the table in a file.
    pub(super) fn header(&self) -> String {
        if self.name.is_empty() {
            return "the top of the file".to_owned();
        }
        match self.is_list {
            true => format!("[[{}]]", self.name),
            false => format!("[{}]", self.name),
        }
    }

    pub(super) fn key(&self, name: &str) -> Option<&'static KeySpec> {
        self.keys.iter().find(|key| key.name == name)
    }
}

/// Finds a table by its name.
pub(super) fn table(name: &str) -> Option<&'static TableSpec> {
    TABLES.iter().find(|table| table.name == name)
}

/// Returns the names that are known in a table, those of its own tables included. The empty name
/// is the top of the file.
pub(super) fn names_in(table_name: &str) -> Vec<&'static str> {
    let keys = table(table_name).into_iter().flat_map(|table| table.keys);
    let keys = keys.map(|key| key.name);
    let tables = TABLES.iter().filter_map(|table| {
        let (parent, name) = table.name.rsplit_once('.').unwrap_or(("", table.name));
        (parent == table_name && !name.is_empty()).then_some(name)
    });
    keys.chain(tables).collect()
}

/// Returns whether a file may have this key in this table.
pub(super) fn is_known(table: &str, key: &str) -> bool {
    RESERVED.contains(&(table, key)) || names_in(table).contains(&key)
}

/// Returns the key of this table that an unknown one is by a typing error.
pub(super) fn mistyped(table_name: &str, name: &str) -> Option<&'static str> {
    let distance = |key: &&str| strsim::damerau_levenshtein(name, key);
    let near = names_in(table_name).into_iter().min_by_key(distance);
    near.filter(|key| distance(key) <= MAX_TYPOS)
}

/// Returns what the writer of an unknown key of this table probably meant.
pub(super) fn suggestion(table_name: &str, name: &str) -> String {
    let here = names_in(table_name);
    if let Some(meant) = mistyped(table_name, name) {
        return format!("did you mean `{meant}`?");
    }
    if let Some(table) = table(name).filter(|_| !table_name.is_empty()) {
        return format!("write it as {}, with its keys below", table.header());
    }
    let elsewhere = TABLES.iter().filter(|table| table.key(name).is_some());
    let mut elsewhere: Vec<String> = elsewhere.map(TableSpec::header).collect();
    if !elsewhere.is_empty() {
        elsewhere.sort_by(|a, b| a.trim_matches('[').cmp(b.trim_matches('[')));
        return format!("it belongs to {}", elsewhere.join(" or to "));
    }
    let similar = similar(table_name, name);
    if (1..=MAX_SIMILAR).contains(&similar.len()) {
        return format!("did you mean {}?", similar.join(" or "));
    }
    format!("remove it; known here: {}", here.join(", "))
}

/// Names that differ by more edits than this are not the same name mistyped.
const MAX_TYPOS: usize = 2;
/// More names than this are not a help.
const MAX_SIMILAR: usize = 3;

/// Returns the keys with all words of an unknown name, those of the same table if it has any.
fn similar(table_name: &str, name: &str) -> Vec<String> {
    let words: Vec<&str> = name.split('_').collect();
    let has_all = |table: &str, key: &str| {
        let known: Vec<&str> = table.split('_').chain(key.split('_')).collect();
        words.iter().all(|word| known.contains(word))
    };
    let here = names_in(table_name);
    let here: Vec<String> = here
        .iter()
        .filter(|key| has_all("", key))
        .map(|key| format!("`{key}`"))
        .collect();
    if !here.is_empty() {
        return here;
    }
    let in_table = |table: &'static TableSpec| {
        let keys = table.keys.iter();
        keys.filter(|key| has_all(table.name, key.name))
            .map(|key| format!("`{}` in {}", key.name, table.header()))
    };
    TABLES.iter().flat_map(in_table).collect()
}

#[cfg(test)]
mod tests;
