//! The text of `/proc/<pid>/status`, by proc_pid_status(5).

use caps::Capability;

/// The status of a process.
#[derive(Debug, Clone, Copy)]
pub struct ProcessStatus<'a>(pub &'a str);

impl<'a> ProcessStatus<'a> {
    /// Returns the words of the line `name`. None if it is missing.
    pub fn fields(self, name: &str) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut lines = self.0.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().split_ascii_whitespace()
    }

    /// Returns whether the process has the capability in effect.
    pub fn has_capability(self, capability: Capability) -> bool {
        let set = self.fields("CapEff").next();
        let set = set.and_then(|set| u64::from_str_radix(set, 16).ok());
        set.is_some_and(|set| set & capability.bitmask() != 0)
    }
}
