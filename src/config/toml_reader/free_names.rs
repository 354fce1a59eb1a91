//! Tables whose names are not keys of the configuration, as in `tags`.

use super::{Location, Table, join};

impl<'r> Table<'r> {
    /// Returns the location of a name in the table `key`, or of that table if the name is missing.
    pub(in crate::config) fn location_in(&self, key: &str, name: &str) -> Location {
        let at = self.location(key);
        let inner = self.entries.and_then(|entries| entries.get(key));
        let inner = inner.and_then(|value| value.get_ref().as_table());
        let found = inner.and_then(|inner| inner.get(name));
        Location {
            line: found.map_or(at.line, |value| Some(self.line(value.span()))),
            key: join(&at.key, name),
        }
    }

    /// Reads the strings of a table with free names, each with its location, in the order of the
    /// names. `None` if the key is missing or not a table.
    pub(in crate::config) fn string_map(
        &self,
        key: &'static str,
    ) -> Option<Vec<(Location, String, &'r str)>> {
        const FIX: &str = "write strings by their names: { \"name\" = \"...\" }";
        let value = self.value(key)?;
        let Some(entries) = value.as_table() else {
            self.wrong_type(&self.location(key), "a table of strings", value, FIX);
            return None;
        };
        let mut strings = Vec::with_capacity(entries.len());
        for (name, value) in entries {
            let name = name.get_ref().to_string();
            let at = self.location_in(key, &name);
            match value.get_ref().as_str() {
                Some(text) => strings.push((at, name, text)),
                None => self.wrong_type(&at, "a string", value.get_ref(), FIX),
            }
        }
        strings.sort_by(|(_, one, _), (_, other, _)| one.cmp(other));
        Some(strings)
    }
}
