//! Events on a node: updates, pods that start and end by the dozen, and outages.

mod bursts;
mod configuration;
mod families;
mod missing;
mod outages;
mod request_pod;
mod startup;
mod updates;

use std::fs;
use std::time::Duration;

use crate::harness::counterparts::process::await_some;
use crate::harness::kubernetes::Node;

pub(super) use bursts::{many_pods_are_served_soon, pods_start_and_end};
pub(super) use configuration::config_map_change_needs_no_other_pod;
pub(super) use families::pods_are_served_in_each_address_family;
pub(super) use missing::missing_part_is_named;
pub(super) use outages::warm_pods_see_no_error;
pub(super) use request_pod::PollingPod;
pub(super) use startup::pods_wait_until_awsvid_is_ready;
pub(super) use updates::{
    run_updates, successor_of_killed_daemon_listens, update_rejects_no_request,
};

/// Bounds steps that take seconds, on a machine that is busy with other tests.
const TIMEOUT: Duration = Duration::from_secs(90);

/// Returns the ids, in the node's namespace, of the processes that run a program.
fn processes(node: &Node, program: &str) -> Vec<u32> {
    let found = node.run(&["pgrep", "--exact", program]);
    found
        .stdout
        .lines()
        .map(|line| line.parse().expect("an id"))
        .collect()
}

/// Returns the id of the one process that runs a program, once earlier ones have ended.
pub(super) fn process(node: &Node, program: &str) -> u32 {
    await_some(
        &format!("one process of {program}"),
        TIMEOUT,
        || match processes(node, program)[..] {
            [one] => Some(one),
            _ => None,
        },
    )
}

fn signal(node: &Node, signal: &str, process: u32) {
    node.run(&["kill", "-s", signal, &process.to_string()])
        .success(signal);
}

/// Returns a field of the process's status, in KiB.
fn status(node: &Node, process: u32, field: &str) -> u64 {
    let text =
        fs::read_to_string(node.path(&format!("/proc/{process}/status"))).expect("its status");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .expect("the field");
    line.split_whitespace()
        .next()
        .expect("a number")
        .parse()
        .expect("a number")
}

/// Returns a field of the process's `stat` in hundredths of a second, by its number in `proc(5)`.
fn ticks(node: &Node, process: u32, field: usize) -> u64 {
    let text = fs::read_to_string(node.path(&format!("/proc/{process}/stat"))).expect("its times");
    let (_, fields) = text.rsplit_once(") ").expect("a name");
    fields
        .split(' ')
        .nth(field - 3)
        .expect("the field")
        .parse()
        .expect("a number")
}
