//! Credentials as they are handed out, and how long that may be.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::clock::Clock;
use crate::credentials::Credentials;
use crate::role::Grant;

/// Credentials with less than this left are not handed out any more.
pub(super) const MIN_REMAINING: Duration = Duration::from_secs(60);
/// SDKs (botocore, Java, .NET) fetch again on each call what has less than this left ...
const SDK_REFRESH_WINDOW: Duration = Duration::from_secs(15 * 60);
/// ... so a refresh has this long before they do ...
const SDK_MARGIN: Duration = Duration::from_secs(90);
/// ... where the session is longer by at least this; shorter ones would be refreshed all the time.
const MIN_REFRESH_GAIN: Duration = Duration::from_secs(5 * 60);

/// Credentials as they are handed out: the secrets are in the body alone.
#[derive(Debug)]
pub struct CachedCredentials {
    /// Not secret.
    pub access_key_id: Arc<str>,
    /// When AWS stops to accept them.
    pub expiration: SystemTime,
    /// The body for SDKs, rendered once.
    pub body: CachedBody,
    /// The same by the monotonic clock.
    expires: Instant,
    /// How long they last when they are issued.
    pub(super) lifetime: Duration,
    /// With this much left they are due for a refresh.
    pub(super) refresh_left: Duration,
}

/// A rendered answer. Zeroized when the last holder drops it, and not printed.
#[derive(Clone)]
pub struct CachedBody(pub Arc<Zeroizing<Vec<u8>>>);

impl fmt::Debug for CachedBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Body({} bytes)", self.0.len())
    }
}

impl CachedCredentials {
    /// Of credentials that were issued now. No session lasts longer than was asked for, whatever this node's clock says:
    /// with a clock that is behind, `Expiration` alone looks further away than it is.
    pub(super) fn new(grant: &Grant, credentials: &Credentials, clock: &Clock) -> Self {
        let lifetime = clock.until(credentials.expiration).min(grant.role.duration);
        Self {
            access_key_id: credentials.access_key_id.as_str().into(),
            expiration: credentials.expiration,
            body: CachedBody(Arc::new(credentials.body(&grant.role_arn))),
            expires: Instant::now() + lifetime,
            lifetime,
            refresh_left: refresh_at_remaining(lifetime),
        }
    }

    /// How long they last still: by the monotonic clock or by the wall clock, whichever says less. A suspended machine's
    /// monotonic clock stands still; a wall clock that is set back says too much.
    pub(super) fn remaining(&self, clock: &Clock) -> Duration {
        self.expires
            .saturating_duration_since(Instant::now())
            .min(clock.until(self.expiration))
    }
}

/// With how much left credentials of this lifetime are due for a refresh: about half, spread so that a node's identities
/// don't refresh together, and before SDKs that refresh early begin to ask for better ones.
pub(super) fn refresh_at_remaining(lifetime: Duration) -> Duration {
    let half = lifetime.mul_f64(0.45 + 0.1 * fastrand::f64());
    if lifetime < SDK_REFRESH_WINDOW + MIN_REFRESH_GAIN {
        return half;
    }
    half.max(SDK_REFRESH_WINDOW + SDK_MARGIN.mul_f64(1.0 + 0.5 * fastrand::f64()))
}
