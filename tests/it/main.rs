//! The integration and end-to-end tests: the real `awsvid` as a process, beside the real SPIRE, MinIO, AWS CLI and systemd.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "in a test a panic is the report"
)]

mod accounts;
mod agents;
mod attacks;
mod attested;
mod blocked;
mod browsers;
mod buffers;
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
mod floods;
mod groups;
mod harness;
mod helm;
mod help;
mod hostile;
mod kubernetes;
mod layout;
mod listeners;
mod manifests;
mod operators;
mod outages;
mod pod_callers;
mod pods;
mod prose;
mod recognition;
mod records;
mod reload;
mod secrets;
mod soak;
mod status;
mod sts_network;
mod syscalls;
mod systemd;
mod trust_policy;
mod unsupported;
