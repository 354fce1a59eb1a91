//! Helpers that the tests share: real counterparts, the daemon as a process, a machine with
//! systemd, a Kubernetes node.
#![allow(
    dead_code,
    reason = "each counterpart has its whole repertoire, for the tests that come"
)]

pub(crate) mod actor;
pub(crate) mod agent;
pub(crate) mod cgroup;
pub(crate) mod chain;
pub(crate) mod client;
pub(crate) mod counterparts;
pub(crate) mod daemon;
pub(crate) mod directory;
pub(crate) mod documents;
pub(crate) mod env;
pub(crate) mod fake_docker;
pub(crate) mod forward;
pub(crate) mod hanging;
pub(crate) mod kubelet;
pub(crate) mod kubernetes;
pub(crate) mod machine;
pub(crate) mod namespaces;
pub(crate) mod outcome;
pub(crate) mod pausable_proxy;
#[path = "../support/random_cases.rs"]
mod random_cases;
pub(crate) mod release;
#[path = "../support/skip.rs"]
pub(crate) mod skip;
pub(crate) mod slow_proxy;
pub(crate) mod sts;
pub(crate) mod stub_http;
pub(crate) mod systemd;
pub(crate) mod terminal;
pub(crate) mod tls;
pub(crate) mod tokens;
pub(crate) mod upstream;

/// Returns whether campaigns run at full length (`tests/run slow`).
pub(crate) fn is_slow() -> bool {
    std::env::var("AWSVID_TESTS").is_ok_and(|mode| mode == "slow")
}

/// Returns whether the slow form of a test that has no other runs. If not, it records a skip, which
/// is not a failure in CI.
pub(crate) fn slow_only() -> bool {
    let slow = is_slow();
    if !slow {
        skip::record("it has only a slow form: AWSVID_TESTS=slow");
    }
    slow
}

/// Returns the seed of a campaign, which `AWSVID_SEED` sets, and prints it.
pub(crate) fn campaign_seed() -> u64 {
    let seed = random_cases::fixed_seed().unwrap_or_else(|| fastrand::u64(..));
    eprintln!("AWSVID_SEED={seed}");
    seed
}
