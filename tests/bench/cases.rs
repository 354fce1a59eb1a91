//! The rows of the table.

mod cold;
mod processes;
mod ratio;
mod size;
mod slow;

use crate::table::Line;
use crate::{Bench, BenchError};

/// A row, which may give several lines.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// Its meaning for readers of the table.
    pub(crate) meaning: &'static str,
    pub(crate) run: fn(&Bench) -> Result<Vec<Line>, BenchError>,
}

/// All of them, in the order of the table.
pub(crate) const ROWS: [Row; 17] = [
    Row {
        name: "tcp-socket",
        meaning: "CPU time of the daemon per request over TCP, rules by uid and unit: the socket alone identifies the caller. Like the rows \
                  below, in multiples of `direct` on the same transport",
        run: |bench| ratio::own_cgroup(bench, &ratio::TCP_SOCKET),
    },
    Row {
        name: "tcp-pid",
        meaning: "over TCP, rules by uid: the daemon has to find a process that holds the socket among those of its cgroup",
        run: |bench| ratio::own_cgroup(bench, &ratio::TCP_PID),
    },
    Row {
        name: "tcp-pid-root",
        meaning: "`tcp-pid` with the load in the root cgroup, where the daemon searches all processes of its user",
        run: ratio::root_cgroup,
    },
    Row {
        name: "unix-uid",
        meaning: "over the unix socket, rules by uid",
        run: |bench| ratio::own_cgroup(bench, &ratio::UNIX_UID),
    },
    Row {
        name: "unix-facts",
        meaning: "over the unix socket, rules by uid, gid and executable",
        run: |bench| ratio::own_cgroup(bench, &ratio::UNIX_FACTS),
    },
    Row {
        name: "imds",
        meaning: "requests for metadata over TCP: one with a known token, in multiples of `tcp-socket`'s and of `direct`; and an SDK's three (token, name of \
                  the role, credentials), in multiples of three of `direct`",
        run: ratio::imds,
    },
    Row {
        name: "busy-node",
        meaning: "the four above with 10,000 processes outside the load's cgroup and 2,000 connections of other users, in \
                  multiples of the same row without them",
        run: ratio::busy_node,
    },
    Row {
        name: "paced",
        meaning: "latency at 1,500 requests a second, in multiples of `direct`'s",
        run: slow::paced,
    },
    Row {
        name: "descriptors",
        meaning: "tcp-pid with 20, 200 and 2,000 descriptors in the load, in multiples of `direct`",
        run: ratio::descriptors,
    },
    Row {
        name: "processes",
        meaning: "tcp-pid with 50, 127, 129 and 1,000 processes in units of 50 that send requests one after another: CPU time of the daemon per request",
        run: processes::processes,
    },
    Row {
        name: "concurrent-callers",
        meaning: "1,000 callers of one identity at once, nothing cached: from STS's response to that of the last caller",
        run: cold::concurrent_callers,
    },
    Row {
        name: "cold",
        meaning: "one caller, nothing cached, a source and an STS of 50 ms each: the time that the daemon adds to those two, by their \
                  own clocks",
        run: cold::cold,
    },
    Row {
        name: "hostile",
        meaning: "p99 of one user (rules by uid and gid, TCP) while another with 10,000 descriptors sends requests from 8 threads",
        run: slow::hostile,
    },
    Row {
        name: "imds-puts",
        meaning: "p99 of one user (rules by uid and gid, TCP) while another requests metadata tokens from 8 threads",
        run: slow::puts,
    },
    Row {
        name: "memory",
        meaning: "anonymous memory of the daemon: after one exchange over TLS, then after 20,000 requests on each transport, then after \
                  1,000 callers at once",
        run: size::memory,
    },
    Row {
        name: "entries-size",
        meaning: "anonymous memory of one cache entry with a session token of 1 KiB, of 100,000",
        run: size::entries,
    },
    Row {
        name: "start",
        meaning: "from the start of the program to the first connection, and to 200 from `/readyz`",
        run: size::start,
    },
];
