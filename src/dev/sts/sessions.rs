//! The role sessions that STS has issued and has to recognise.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use super::answer::DevCaller;
use crate::credentials::Credentials;
use crate::dev::keys::{KeyError, random_bytes};
use crate::identity::RoleArn;

/// Maximum number of sessions. Beyond it, the session that expires first is removed.
const MAX_SESSIONS: usize = 10_000;
/// Alphabet of AWS's ids (base32).
const ID_ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
/// Number of characters after the four letters of the kind.
const ID_LENGTH: usize = 16;

/// A role session and its credentials.
#[derive(Debug, Clone)]
pub(super) struct Session {
    pub(super) credentials: Credentials,
    pub(super) caller: DevCaller,
    pub(super) facts: SessionFacts,
}

/// The parts of a session that later sessions of a chain depend on.
#[derive(Debug, Clone)]
pub(super) struct SessionFacts {
    pub(super) role_arn: RoleArn,
    /// The tags of the principal by their keys, those of earlier sessions included.
    pub(super) tags: BTreeMap<String, String>,
    /// The keys of tags that later sessions keep.
    pub(super) transitive_tags: Vec<String>,
    pub(super) source_identity: Option<String>,
}

impl SessionFacts {
    /// Returns the facts of a session without tags.
    pub(super) fn of(role_arn: &RoleArn) -> Self {
        Self {
            role_arn: role_arn.clone(),
            tags: BTreeMap::new(),
            transitive_tags: Vec::new(),
            source_identity: None,
        }
    }
}

/// All sessions, by access key id.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<HashMap<String, Session>>);

impl Sessions {
    /// Issues credentials for a session and stores the session.
    pub(super) fn issue(
        &self,
        caller: DevCaller,
        facts: SessionFacts,
        now: SystemTime,
        duration: Duration,
    ) -> Result<Session, KeyError> {
        let credentials = Credentials {
            access_key_id: random_id("ASIA")?,
            secret_access_key: Zeroizing::new(STANDARD.encode(random_bytes::<30>()?)),
            session_token: Zeroizing::new(STANDARD.encode(random_bytes::<192>()?)),
            expiration: now + duration,
            first_session_name: None,
        };
        let session = Session {
            credentials,
            caller,
            facts,
        };
        self.remember(session.clone(), now);
        Ok(session)
    }

    pub(super) fn remember(&self, session: Session, now: SystemTime) {
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.len() >= MAX_SESSIONS {
            sessions.retain(|_, session| session.credentials.expiration > now);
        }
        if sessions.len() >= MAX_SESSIONS {
            let first = sessions
                .iter()
                .min_by_key(|(_, session)| session.credentials.expiration);
            if let Some(first) = first.map(|(id, _)| id.clone()) {
                sessions.remove(&first);
            }
        }
        sessions.insert(session.credentials.access_key_id.clone(), session);
    }

    /// Returns the session of an access key id, expired or not.
    pub(super) fn find(&self, access_key_id: &str) -> Option<Session> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(access_key_id)
            .cloned()
    }
}

/// Returns an id in the form of AWS's: a prefix for the kind, and random letters.
pub(super) fn random_id(prefix: &str) -> Result<String, KeyError> {
    let letters = random_bytes::<ID_LENGTH>()?;
    let letters = letters
        .iter()
        .map(|byte| char::from(ID_ALPHABET[usize::from(byte % 32)]));
    Ok(prefix.chars().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_bounded_and_the_first_to_expire_is_removed() {
        let sessions = Sessions::default();
        let now = SystemTime::UNIX_EPOCH;
        let caller = DevCaller {
            arn: String::new(),
            user_id: String::new(),
            account: String::new(),
        };
        let facts = || SessionFacts::of(&RoleArn::opaque("x").unwrap());
        let short = sessions
            .issue(caller.clone(), facts(), now, Duration::from_secs(900))
            .unwrap();
        let long: Vec<Session> = (0..MAX_SESSIONS)
            .map(|_| {
                sessions
                    .issue(caller.clone(), facts(), now, Duration::from_secs(3600))
                    .unwrap()
            })
            .collect();
        assert!(sessions.find(&short.credentials.access_key_id).is_none());
        assert!(
            long.iter()
                .all(|session| sessions.find(&session.credentials.access_key_id).is_some())
        );
    }
}
