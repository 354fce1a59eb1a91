//! Cached credentials as they are served, and for how long.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::clock::Clock;
use crate::credentials::Credentials;
use crate::role::Grant;

/// Credentials with at most this remaining lifetime are not served.
pub(super) const MIN_REMAINING: Duration = Duration::from_secs(60);
/// SDKs (botocore, Java, .NET) fetch on each call once less than this remains.
const SDK_REFRESH_WINDOW: Duration = Duration::from_secs(15 * 60);
/// Lead of the daemon's refresh over that of the SDKs.
const SDK_MARGIN: Duration = Duration::from_secs(90);
/// Sessions that exceed [`SDK_REFRESH_WINDOW`] by less than this are refreshed at half their life,
/// not before the SDKs. Otherwise they would be refreshed all the time.
const MIN_REFRESH_GAIN: Duration = Duration::from_secs(5 * 60);

/// Credentials as they are served. Only the body has the secrets.
#[derive(Debug)]
pub struct CachedCredentials {
    /// Access key ID, which is not a secret.
    pub access_key_id: Arc<str>,
    /// Time at which AWS stops accepting the credentials.
    pub expiration: SystemTime,
    /// Response body for SDKs, rendered once.
    pub body: CachedBody,
    /// The expiration by the monotonic clock.
    expires: Instant,
    /// The lifetime at the time of issue.
    pub(super) lifetime: Duration,
    /// The remaining lifetime at which a refresh is due.
    pub(super) refresh_at_remaining: Duration,
}

/// A rendered response body. It is zeroized when its last holder drops it, and `Debug` does not
/// print it.
#[derive(Clone)]
pub struct CachedBody(pub Arc<Zeroizing<Vec<u8>>>);

impl fmt::Debug for CachedBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Body({} bytes)", self.0.len())
    }
}

impl CachedCredentials {
    /// Wraps credentials that STS has just issued. The lifetime is bounded by the requested
    /// duration. If this node's clock is behind, `Expiration` alone seems further off than it is.
    pub(super) fn new(grant: &Grant, credentials: &Credentials, clock: &Clock) -> Self {
        let lifetime = clock.until(credentials.expiration).min(grant.role.duration);
        Self {
            access_key_id: credentials.access_key_id.as_str().into(),
            expiration: credentials.expiration,
            body: CachedBody(Arc::new(credentials.body(&grant.role_arn))),
            expires: Instant::now() + lifetime,
            lifetime,
            refresh_at_remaining: refresh_at_remaining(lifetime),
        }
    }

    /// Returns the remaining lifetime, by the monotonic or the wall clock, whichever is less. The
    /// monotonic clock of a suspended machine stands still. A wall clock that is set back gives too
    /// much.
    pub(super) fn remaining(&self, clock: &Clock) -> Duration {
        self.expires
            .saturating_duration_since(Instant::now())
            .min(clock.until(self.expiration))
    }
}

/// Returns the remaining lifetime at which credentials of this lifetime are refreshed. It is about
/// half, with jitter so that the identities of a node do not refresh together. It is before the
/// time at which SDKs begin to fetch on each call.
pub(super) fn refresh_at_remaining(lifetime: Duration) -> Duration {
    let half = lifetime.mul_f64(0.45 + 0.1 * fastrand::f64());
    if lifetime < SDK_REFRESH_WINDOW + MIN_REFRESH_GAIN {
        return half;
    }
    half.max(SDK_REFRESH_WINDOW + SDK_MARGIN.mul_f64(1.0 + 0.5 * fastrand::f64()))
}
