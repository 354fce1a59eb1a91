//! Users that `dev` serves: the one that runs it, and for root also the people of this machine.

use std::collections::BTreeSet;

use crate::config::DEV_TRUST_DOMAIN;
use crate::identity::{InvalidName, SpiffeId};
use crate::workload_rule::OVERFLOW_ID;

/// Maximum number of users. A directory of thousands is too much for a trial.
const MAX_USERS: usize = 100;
/// First uid of people's accounts.
const FIRST_PERSONAL_UID: u32 = 1000;
/// Shells of accounts without a login.
const NO_SHELLS: [&str; 6] = ["", "nologin", "false", "sync", "shutdown", "halt"];

/// A user with an identity in `dev`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The uid, which the rule matches.
    pub uid: u32,
    /// SPIFFE ID of the user: `spiffe://dev.local/user/<name>`.
    pub spiffe_id: SpiffeId,
}

/// An account in the user database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LocalAccount {
    pub(super) uid: u32,
    /// The login name, if the account has one.
    pub(super) name: Option<String>,
}

/// Gives each account its own SPIFFE ID, in this order. For a uid with several names the first one
/// counts.
pub(super) fn identities(
    accounts: impl IntoIterator<Item = LocalAccount>,
) -> Result<Vec<User>, InvalidName> {
    let (mut uids, mut names) = (BTreeSet::from([OVERFLOW_ID]), BTreeSet::new());
    let mut users = Vec::new();
    for account in accounts {
        if users.len() == MAX_USERS || !uids.insert(account.uid) {
            continue;
        }
        // A login name may not be valid in a SPIFFE ID, or may equal another account's number. Then
        // the number replaces it.
        let by_number = format!("uid-{}", account.uid);
        let name = account
            .name
            .filter(|name| !names.contains(name) && spiffe_id(name).is_ok())
            .unwrap_or(by_number);
        users.push(User {
            uid: account.uid,
            spiffe_id: spiffe_id(&name)?,
        });
        names.insert(name);
    }
    Ok(users)
}

fn spiffe_id(name: &str) -> Result<SpiffeId, InvalidName> {
    // One segment: a name with a slash would be the path of another user.
    let name = if name.contains('/') { "" } else { name };
    SpiffeId::parse(&format!("spiffe://{DEV_TRUST_DOMAIN}/user/{name}"))
}

/// Returns the people in the text of a passwd(5) file: accounts with a person's uid, and those with
/// a login shell.
pub(super) fn people(passwd: &str) -> impl Iterator<Item = LocalAccount> {
    passwd.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, _, _, _, shell] = fields[..] else {
            return None;
        };
        let uid = uid.parse().ok()?;
        let program = shell.rsplit('/').next().unwrap_or_default();
        let can_log_in = !NO_SHELLS.contains(&program);
        (uid >= FIRST_PERSONAL_UID || can_log_in).then(|| LocalAccount {
            uid,
            name: Some(name.to_owned()),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
sync:x:4:65534:sync:/bin:/bin/sync
postgres:x:70:70::/var/lib/postgresql:/bin/sh
billing:x:1001:1001::/nonexistent:/usr/sbin/nologin
DOM\\carol:x:1002:1002::/home/carol:/bin/zsh
double:x:1001:1001::/home/double:/bin/bash
billing:x:1003:1003::/home/other:/bin/bash
broken:x:nobody
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
";

    #[test]
    fn people_have_one_identity_each() {
        let users = identities(people(PASSWD)).unwrap();
        let found: Vec<(u32, &str)> = users
            .iter()
            .map(|user| (user.uid, user.spiffe_id.as_str()))
            .collect();
        let expected = [
            (0, "spiffe://dev.local/user/root"),
            (70, "spiffe://dev.local/user/postgres"),
            (1001, "spiffe://dev.local/user/billing"),
            (1002, "spiffe://dev.local/user/uid-1002"),
            (1003, "spiffe://dev.local/user/uid-1003"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn names_with_a_slash_become_numbers() {
        for name in ["a/b", "..", "", "user name"] {
            let users = identities([LocalAccount {
                uid: 7,
                name: Some(name.to_owned()),
            }])
            .unwrap();
            assert_eq!(
                users[0].spiffe_id.as_str(),
                "spiffe://dev.local/user/uid-7",
                "{name:?}"
            );
        }
    }

    #[test]
    fn number_of_users_is_bounded() {
        let many = (2000..4000).map(|uid| LocalAccount { uid, name: None });
        assert_eq!(identities(many).unwrap().len(), MAX_USERS);
    }
}
