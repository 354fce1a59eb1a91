//! STS fails at one hop of a chain: it is unavailable, throttles, or rejects.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::{TIMEOUT, await_credentials, request, start, start_with};
use crate::harness::chain::{HOPS, HopFault};
use crate::harness::client::answer;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::daemon::Daemon;

/// Lifetime of the sessions of a test that waits for their renewal. awsvid renews them after about
/// half of it, and serves none in its last minute, so there is room for a fault between the two.
const LIFETIME: Duration = Duration::from_secs(200);
/// Bounds the wait for that renewal, on a busy machine.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(300);
/// Number of tries of one exchange, and the least time that the pauses between them take.
const TRIES: u128 = 4;
const PAUSES: Duration = Duration::from_millis(875);
/// The least time until the next exchange: while the failure is cached for requests, and before the
/// cache tries to renew what it has.
const CACHED_FAILURE: Duration = Duration::from_secs(1);
const RENEWAL_PAUSE: Duration = Duration::from_millis(500);
/// With this, a fault that counts as a rejection ends what is warm at once.
const NO_GRACE: &str = "[cache]\nrevocation_grace = \"0s\"\n";
/// A second role, which ends at the middle role of the first one.
const SHORT: &str = "\
[[role]]
name = \"short\"
spiffe_id = \"spiffe://example.org/ns/*/sa/*\"
role_arn = \"arn:aws:iam::111111111111:role/hop\"
[[role.chain]]
role_arn = \"arn:aws:iam::222222222222:role/middle\"
external_id = \"shared-id\"
";

fn key_of(body: &Value) -> String {
    let key = body["AccessKeyId"].as_str();
    key.unwrap_or_else(|| panic!("{body}")).to_owned()
}

/// Requests credentials, which the daemon must have.
fn warm_key(daemon: &Daemon) -> String {
    let (status, body) = request(daemon);
    assert_eq!(status, 200, "{body}");
    key_of(&body)
}

/// Requests the credentials of the role with this name.
fn request_role(daemon: &Daemon, role: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(daemon.unix()).unwrap();
    let head = format!("GET /v1/credentials/{role} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    answer(&mut stream)
}

/// Returns the number of credentials that the cache has cleared: those rejected, and those expired.
fn evictions(daemon: &Daemon) -> [u64; 2] {
    ["refused", "expired"].map(|reason| {
        let series = format!("awsvid_cache_evictions_total{{reason=\"{reason}\"}}");
        daemon.metric(&series)
    })
}

#[test]
fn fault_of_each_hop_is_named_and_repeats_no_other() {
    const FAULTS: [(HopFault, u16, &str); 3] = [
        (HopFault::Denied, 403, "sts_access_denied"),
        (HopFault::Closed, 503, "sts_unreachable"),
        (HopFault::Throttled, 503, "sts_throttled"),
    ];
    let folder = folder();
    let (upstream, daemon) = start(folder.path());
    for (hop, role_arn) in HOPS.iter().enumerate() {
        for (fault, status, code) in FAULTS {
            upstream.fail(role_arn, Some(fault));
            let what = format!("{fault:?} of hop {}", hop + 1);
            let body = await_some(&what, TIMEOUT, || {
                let (found, body) = request(&daemon);
                (found == status && body["code"] == code).then_some(body)
            });
            let message = body["message"].as_str().unwrap();
            let named = format!("hop {} ({role_arn})", hop + 1);
            assert!(message.contains(&named), "{what}: {message}");
        }
        let counts = upstream.counts();
        let (before, after) = (&counts[..hop], &counts[hop + 1..]);
        assert!(before.iter().all(|calls| *calls == 1), "{hop}: {counts:?}");
        assert!(after.iter().all(|calls| *calls == 0), "{hop}: {counts:?}");
        // The session of this hop is the first one that it gets, and the next hop fails at once.
        if let Some(next) = HOPS.get(hop + 1) {
            upstream.fail(next, Some(FAULTS[0].0));
        }
        upstream.restart_count(role_arn);
        upstream.fail(role_arn, None);
    }
    let body = await_credentials(&daemon);
    assert_eq!(body["RoleArn"], HOPS[2]);
    assert_eq!(upstream.counts(), [1, 1, 1]);
}

/// STS is unavailable between the first hop and the others when each session is due for renewal.
#[test]
fn warm_chain_outlives_outage_of_sts_between_hops() {
    let folder = folder();
    let (upstream, daemon) = start_with(folder.path(), NO_GRACE, Some(LIFETIME));
    let warm = key_of(&await_credentials(&daemon));
    for role_arn in &HOPS[1..] {
        upstream.fail(role_arn, Some(HopFault::Closed));
    }
    await_some("failed renewals", RENEWAL_TIMEOUT, || {
        assert_eq!(warm_key(&daemon), warm);
        upstream
            .counts()
            .iter()
            .all(|calls| *calls > 1)
            .then_some(())
    });
    for role_arn in &HOPS[1..] {
        upstream.fail(role_arn, None);
    }
    await_some("the renewal", RENEWAL_TIMEOUT, || {
        (warm_key(&daemon) != warm).then_some(())
    });
    assert_eq!(evictions(&daemon), [0, 0]);
}

/// STS throttles the last hop when its session is due. It is called again at intervals, and the
/// other hops are renewed meanwhile.
#[test]
fn throttled_hop_of_a_warm_chain_is_held_off_alone() {
    let folder = folder();
    let (upstream, daemon) = start_with(folder.path(), NO_GRACE, Some(LIFETIME));
    let warm = key_of(&await_credentials(&daemon));
    upstream.fail(HOPS[2], Some(HopFault::Throttled));
    let began = await_some("a throttled renewal", RENEWAL_TIMEOUT, || {
        assert_eq!(warm_key(&daemon), warm);
        (upstream.counts()[2] > 1).then(Instant::now)
    });
    await_some("the renewal of the others", RENEWAL_TIMEOUT, || {
        assert_eq!(warm_key(&daemon), warm);
        (upstream.counts()[..2] == [2, 2]).then_some(())
    });
    let calls = upstream.counts()[2] - 1;
    assert_bounded(calls, began, RENEWAL_PAUSE);
    upstream.fail(HOPS[2], None);
    await_some("the renewal of the last", RENEWAL_TIMEOUT, || {
        (warm_key(&daemon) != warm).then_some(())
    });
    assert_eq!(evictions(&daemon), [0, 0]);
    assert_eq!(upstream.counts()[..2], [2, 2]);
}

/// Checks that the time between the exchanges was at least `pause`, whatever the requests.
#[track_caller]
fn assert_bounded(calls: usize, began: Instant, pause: Duration) {
    let took = began.elapsed();
    let most = TRIES * (1 + took.as_millis() / (PAUSES + pause).as_millis());
    assert!(
        calls as u128 <= most,
        "{calls} calls of at most {most} in {took:?}"
    );
}

/// Callers without credentials send a thousand requests while STS throttles the last hop.
#[test]
fn throttled_hop_of_a_cold_chain_is_not_called_for_each_request() {
    let folder = folder();
    let (upstream, daemon) = start_with(folder.path(), SHORT, None);
    upstream.fail(HOPS[2], Some(HopFault::Throttled));
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let (status, body) = request(&daemon);
                    let is_known =
                        ["sts_throttled", "pending"].contains(&body["code"].as_str().unwrap());
                    assert!(status == 503 && is_known, "{status} {body}");
                }
            });
        }
        // The chain of this role ends before that hop.
        await_some("the other role", TIMEOUT, || {
            let (status, body) = request_role(&daemon, "short");
            assert!(status == 200 || body["code"] == "pending", "{body}");
            (status == 200).then_some(())
        });
    });
    let [first, middle, last] = upstream.counts();
    // As the last role of a chain, the middle one has a session of its own.
    assert_eq!((first, middle), (1, 2));
    assert_bounded(last, began, CACHED_FAILURE);
    upstream.fail(HOPS[2], None);
    await_credentials(&daemon);
    assert_eq!(upstream.counts()[..2], [1, 2]);
}

/// A middle role is revoked, with sessions of all hops in the cache: they go on while STS accepts
/// them, and end once it rejects the renewal of that role.
#[test]
fn revoked_middle_role_ends_what_is_warm() {
    let folder = folder();
    let (upstream, daemon) = start_with(folder.path(), NO_GRACE, Some(LIFETIME));
    let warm = await_credentials(&daemon);
    upstream.fail(HOPS[1], Some(HopFault::Denied));
    let mut served = HashSet::new();
    let rejection = await_some("the end of the session", RENEWAL_TIMEOUT, || {
        let (status, body) = request(&daemon);
        if status != 200 {
            return Some(body);
        }
        served.insert(body["AccessKeyId"].as_str().unwrap().to_owned());
        None
    });
    let message = rejection["message"].as_str().unwrap();
    assert_eq!(rejection["code"], "sts_access_denied");
    let named = format!("hop 2 ({})", HOPS[1]);
    assert!(message.contains(&named), "{message}");
    // The session of the middle role may have renewed the last one before it was rejected.
    assert!(served.contains(warm["AccessKeyId"].as_str().unwrap()));
    assert_eq!(served.len(), upstream.counts()[2]);
    // The middle session and the last one, each before its end.
    assert_eq!(evictions(&daemon), [2, 0]);
    let (_, status) = daemon.query_status_socket("/status");
    assert!(!status.contains("shared-id"), "{status}");
    upstream.fail(HOPS[1], None);
    let renewed = await_credentials(&daemon);
    assert_ne!(renewed["AccessKeyId"], warm["AccessKeyId"]);
    for file in ["audit.log", "awsvid.log"] {
        let text = fs::read_to_string(folder.path().join(file)).unwrap();
        assert!(!text.contains("shared-id"), "{file}: {text}");
    }
}

/// With a grace, what is warm is served to its end, and rejected from then on.
#[test]
fn revoked_middle_role_ends_what_is_warm_after_the_grace() {
    const GRACE: Duration = Duration::from_secs(10);
    let folder = folder();
    let grace = format!("[cache]\nrevocation_grace = \"{}s\"\n", GRACE.as_secs());
    let (upstream, daemon) = start_with(folder.path(), &grace, Some(LIFETIME));
    await_credentials(&daemon);
    upstream.fail(HOPS[1], Some(HopFault::Denied));
    let (mut since, mut served) = (None, 0);
    let rejection = await_some("the end of the grace", RENEWAL_TIMEOUT, || {
        since = since.or_else(|| refused_since(&daemon));
        let (status, body) = request(&daemon);
        served += usize::from(status == 200 && since.is_some());
        (status != 200).then_some(body)
    });
    let message = rejection["message"].as_str().unwrap();
    let named = format!("hop 2 ({})", HOPS[1]);
    assert_eq!(rejection["code"], "sts_access_denied");
    assert!(message.contains(&named), "{message}");
    // The status has whole seconds, rounded down.
    let since: SystemTime = since.expect("a rejection in /status");
    assert!(served > 0);
    // All times are the daemon's own, so that a slow client does not matter.
    let ended = removed_at(&daemon, HOPS[2]);
    let grace = ended.duration_since(since).unwrap();
    assert!((GRACE..3 * GRACE).contains(&grace), "{grace:?}");
    // The grace has ended the middle session and the last one, each before its own end.
    assert_eq!(evictions(&daemon), [2, 0]);
}

/// Returns the time since which STS rejects the renewal of what callers get.
fn refused_since(daemon: &Daemon) -> Option<SystemTime> {
    let entries = daemon.cached_credentials();
    let last = entries.iter().find(|entry| entry["role"] == "chained")?;
    let since = last["refused_since"].as_str()?;
    Some(humantime::parse_rfc3339(since).unwrap())
}

/// Returns the time at which the log has the removal of a role's credentials.
fn removed_at(daemon: &Daemon, role_arn: &str) -> SystemTime {
    let log = daemon.log();
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut removed = lines.filter(|line| {
        line["message"] == "credentials removed: refresh failed" && line["role_arn"] == role_arn
    });
    let line = removed.next().unwrap_or_else(|| panic!("{log}"));
    humantime::parse_rfc3339(line["time"].as_str().unwrap()).unwrap()
}
