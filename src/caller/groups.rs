//! Supplementary groups of a process, or a digest of them.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::AttestError;

/// How much a decision needs to know of a process's supplementary groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum GroupDetail {
    /// The groups are not needed and not read.
    #[default]
    None,
    /// A digest that shows changes, for an agent that attests the process and sees its groups.
    Digest,
    /// The list, for a rule with a group.
    List,
}

/// The supplementary groups of a process, at most [`Groups::MAX_GROUPS`].
///
/// Any local user can have 65,536 groups, through a user namespace with subordinate ids. Callers
/// with many groups must not fill the daemon's memory. The bound prevents that, and so does the
/// digest where no rule has a group (T27).
#[derive(Clone)]
pub struct Groups {
    /// SHA-256 of the ascending list: two values are equal if the lists are.
    digest: [u8; 32],
    list: Option<Arc<[u32]>>,
}

impl Groups {
    /// The bound on the number of groups. Where groups matter, a caller with more is rejected.
    /// Active Directory allows 1,015 groups per user.
    pub const MAX_GROUPS: usize = 1024;

    /// Takes the groups in any order. Fails with [`AttestError::TooManyGroups`] if there are more
    /// than [`Self::MAX_GROUPS`].
    pub fn new(mut groups: Vec<u32>, detail: GroupDetail) -> Result<Self, AttestError> {
        if groups.len() > Self::MAX_GROUPS {
            return Err(AttestError::TooManyGroups);
        }
        groups.sort_unstable();
        groups.dedup();
        let mut hash = Sha256::new();
        groups
            .iter()
            .for_each(|group| hash.update(group.to_le_bytes()));
        let list = (detail == GroupDetail::List).then(|| groups.into());
        Ok(Self {
            digest: hash.finalize().into(),
            list,
        })
    }

    /// Returns the groups in ascending order. `None` if only the digest is known.
    pub fn list(&self) -> Option<&[u32]> {
        self.list.as_deref()
    }

    /// Returns whether `group` is among them. `None` if only the digest is known.
    pub fn contains(&self, group: u32) -> Option<bool> {
        self.list().map(|list| list.binary_search(&group).is_ok())
    }
}

impl PartialEq for Groups {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for Groups {}

impl Hash for Groups {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl fmt::Debug for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.list {
            Some(list) => f.debug_tuple("Groups").field(list).finish(),
            None => write!(f, "Groups({:02x?})", &self.digest[..4]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_equal_if_their_lists_are() {
        let groups = |list: &[u32], detail| Groups::new(list.to_vec(), detail).unwrap();
        let listed = groups(&[44, 4, 44], GroupDetail::List);
        assert_eq!(listed, groups(&[4, 44], GroupDetail::Digest));
        for other in [&[4][..], &[44], &[4, 44, 45], &[], &[4, 45]] {
            assert_ne!(listed, groups(other, GroupDetail::Digest), "{other:?}");
        }
        assert_eq!(
            (listed.contains(4), listed.contains(5)),
            (Some(true), Some(false))
        );
        assert_eq!(groups(&[4, 44], GroupDetail::Digest).contains(4), None);
    }

    #[test]
    fn groups_are_bounded() {
        let most = u32::try_from(Groups::MAX_GROUPS).unwrap();
        for detail in [GroupDetail::Digest, GroupDetail::List] {
            Groups::new((0..most).collect(), detail).unwrap();
            assert_eq!(
                Groups::new((0..=most).collect(), detail).unwrap_err(),
                AttestError::TooManyGroups
            );
        }
        // The groups that are kept if no rule has a group.
        assert!(
            Groups::new((0..most).collect(), GroupDetail::Digest)
                .unwrap()
                .list
                .is_none()
        );
    }
}
