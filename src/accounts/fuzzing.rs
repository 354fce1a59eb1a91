//! The fuzz target for the local account files, with arbitrary bytes.

use super::local::LocalAccounts;
use crate::workload_rule::AccountName;

/// Checks `/etc/passwd` and `/etc/group`: a name of one line is known, and no line changes whose
/// name another number has.
pub(crate) fn accounts(bytes: &[u8]) -> bool {
    let accounts = LocalAccounts::of(bytes, bytes);
    let mut accepted = false;
    for line in bytes
        .split(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
    {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, id, ..] = fields[..] else {
            continue;
        };
        let name = AccountName::Group(name.to_owned());
        if !accounts.has(&name) {
            continue;
        }
        accepted = true;
        assert!(!name.as_str().is_empty() && !name.as_str().starts_with(['+', '-', '#']));
        assert!(
            accounts.has(&AccountName::User(name.as_str().to_owned())),
            "both files have one format"
        );
        if let Ok(id) = id.parse() {
            assert!(!accounts.is_other(&name, id), "{line} belongs to its name");
            let other = AccountName::Group(format!("{}:", name.as_str()));
            assert!(
                !accounts.has(&other) && accounts.is_other(&other, id),
                "{line}"
            );
        }
    }
    accepted
}
