//! The integration and end-to-end tests: the real `awsvid` as a process, with the real SPIRE,
//! MinIO, AWS CLI and systemd.
#![allow(
    clippy::disallowed_methods,
    reason = "it measures and waits in real time"
)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "in a test a panic is the report"
)]

mod accounts;
mod agent_sources;
mod agents;
mod attacks;
mod bench;
mod blocked;
mod browsers;
mod buffers;
mod caller_facts;
mod chains;
mod check;
mod clients;
mod config;
mod contract;
mod credential_process;
mod dev;
mod documented_commands;
mod documents;
mod drain;
mod e2e;
mod exec;
mod exit_status;
mod exposure;
mod full_queues;
mod groups;
mod harness;
mod helm;
mod help;
mod hostile_http;
mod imds;
mod kubernetes;
mod layout;
mod listeners;
mod load_limits;
mod machines;
mod manifests;
mod operators;
mod outages;
mod packages;
mod pod_callers;
mod pods;
mod prose;
mod records;
mod reload;
mod roles_anywhere;
mod secrets;
mod soak;
mod status;
mod sts_network;
mod stuck_calls;
mod syscalls;
mod systemd;
mod trust_policy;
mod unsupported;
mod workflows;
