//! The name service of this node, through the C library.

use std::sync::Arc;

use nix::unistd::{Gid, Group, Uid, User};

use super::local::LocalAccounts;
use crate::workload_rule::AccountName;

/// Lookup of numbers and names. Each call may block for as long as a directory server does not
/// answer.
pub trait NameService: Send + Sync {
    /// Returns the number of the user or group with this name. `None` if it does not exist.
    fn number(&self, name: &AccountName) -> nix::Result<Option<u32>>;

    /// Returns the name of the account with this number, of the same kind as `kind`.
    fn name(&self, kind: &AccountName, number: u32) -> nix::Result<Option<String>>;

    /// Returns the local accounts: `known` itself if the files have not changed.
    fn local(&self, known: &Arc<LocalAccounts>) -> Arc<LocalAccounts>;
}

/// The C library's name service, by `getpwnam_r(3)` and its like: `/etc/passwd` and the sources in
/// `/etc/nsswitch.conf`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nss;

impl NameService for Nss {
    fn number(&self, name: &AccountName) -> nix::Result<Option<u32>> {
        Ok(match name {
            AccountName::User(name) => User::from_name(name)?.map(|user| user.uid.as_raw()),
            AccountName::Group(name) => Group::from_name(name)?.map(|group| group.gid.as_raw()),
        })
    }

    fn name(&self, kind: &AccountName, number: u32) -> nix::Result<Option<String>> {
        Ok(match kind {
            AccountName::User(_) => User::from_uid(Uid::from_raw(number))?.map(|user| user.name),
            AccountName::Group(_) => {
                Group::from_gid(Gid::from_raw(number))?.map(|group| group.name)
            }
        })
    }

    fn local(&self, known: &Arc<LocalAccounts>) -> Arc<LocalAccounts> {
        LocalAccounts::read(known)
    }
}
