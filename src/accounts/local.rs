//! Accounts in the local files, which are read without a name service.

use std::collections::{HashMap, HashSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use crate::workload_rule::AccountName;

/// The file of the local users.
pub(super) const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// Numbers that systemd assigns to units with `DynamicUser=`. Directory servers do not assign them.
const DYNAMIC_IDS: std::ops::RangeInclusive<u32> = 61_184..=65_519;

/// The users of `/etc/passwd` and the groups of `/etc/group` (`passwd(5)`, `group(5)`).
#[derive(Debug, Default)]
pub struct LocalAccounts {
    users: LocalNames,
    groups: LocalNames,
    versions: Option<[FileVersion; 2]>,
}

#[derive(Debug, Default)]
struct LocalNames {
    names: HashSet<String>,
    by_id: HashMap<u32, Vec<String>>,
}

/// Values that change with a file's content.
type FileVersion = (u64, u64, u64, (i64, i64));

impl LocalAccounts {
    /// Reads the files, unless they are the same as those of `previous`. Blocks.
    pub fn read(previous: &Arc<Self>) -> Arc<Self> {
        let version = |path: &str| {
            fs::metadata(path)
                .map(|found| version(&found))
                .unwrap_or_default()
        };
        let versions = [PASSWD, GROUP].map(version);
        if previous.versions == Some(versions) {
            return previous.clone();
        }
        let read = |path: &str| LocalNames::parse(&fs::read(Path::new(path)).unwrap_or_default());
        Arc::new(Self {
            users: read(PASSWD),
            groups: read(GROUP),
            versions: Some(versions),
        })
    }

    /// Parses these texts instead of the files.
    #[cfg(any(test, fuzzing))]
    pub(super) fn of(passwd: &[u8], group: &[u8]) -> Arc<Self> {
        let [users, groups] = [passwd, group].map(LocalNames::parse);
        Arc::new(Self {
            users,
            groups,
            versions: None,
        })
    }

    /// Reports whether the files contain this name.
    pub fn has(&self, name: &AccountName) -> bool {
        self.of_kind(name).names.contains(name.as_str())
    }

    /// Reports whether a local user or group has this number, and none of them has the name `name`.
    pub fn is_other(&self, name: &AccountName, id: u32) -> bool {
        let names = self.of_kind(name).by_id.get(&id);
        let is_dynamic = matches!(name, AccountName::User(_)) && DYNAMIC_IDS.contains(&id);
        names.map_or(is_dynamic, |names| {
            !names.iter().any(|one| one == name.as_str())
        })
    }

    /// Returns the name of the local user with this number. `None` if none has it, or several have.
    pub fn user_name(&self, uid: u32) -> Option<&str> {
        match self.users.by_id.get(&uid).map(Vec::as_slice) {
            Some([name]) => Some(name),
            Some(_) | None => None,
        }
    }

    fn of_kind(&self, name: &AccountName) -> &LocalNames {
        match name {
            AccountName::User(_) => &self.users,
            AccountName::Group(_) => &self.groups,
        }
    }
}

impl LocalNames {
    /// Parses a file. In both files the name is the first field of a line, and the number the
    /// third.
    fn parse(text: &[u8]) -> Self {
        let mut all = Self::default();
        for line in text
            .split(|byte| *byte == b'\n')
            .filter_map(|line| std::str::from_utf8(line).ok())
        {
            let mut fields = line.split(':');
            let (Some(name), Some(id)) =
                (fields.next(), fields.nth(1).and_then(|id| id.parse().ok()))
            else {
                continue;
            };
            // "+" and "-" include or exclude entries of a directory server.
            if name.is_empty() || name.starts_with(['+', '-', '#']) {
                continue;
            }
            all.names.insert(name.to_owned());
            all.by_id.entry(id).or_default().push(name.to_owned());
        }
        all
    }
}

fn version(file: &Metadata) -> FileVersion {
    (
        file.dev(),
        file.ino(),
        file.len(),
        (file.mtime(), file.mtime_nsec()),
    )
}
