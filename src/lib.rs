//! awsvid hands each workload on a Linux node its own AWS credentials, by its SPIFFE identity.
//!
//! # Layout
//!
//! A file imports only what stands above it in this list (and its own children); `tests/it/layout.rs` checks that.
//!
//! Values, without I/O: [`identity`] names, [`cgroup`] what a cgroup path says, [`caller`] who is asking, [`rule`] which
//! SPIFFE ID a caller has, [`role`] which role that may have, [`credentials`] what is handed out, [`clock`] what time it is.
//!
//! What every part needs: [`config`], [`writer`] of lines, which never blocks its callers, [`telemetry`] the log, [`metrics`],
//! [`health`] of the neighbours, [`audit`] one record per request, [`accounts`] the numbers of users and groups.
//!
//! A request, in its order:
//!
//! | step | module | |
//! |---|---|---|
//! | connect | [`listen`] | accepts, takes the peer's facts before a byte is read |
//! | attest | [`attest`] | peer -> [`caller::Caller`], by what the kernel fixed |
//! | ask | [`http`] | method, path, header rules; opens the audit record |
//! | decide | [`broker`] | identify, choose, cached or issued, still the same caller: **the request path** |
//! | remember | [`cache`] | credentials by SPIFFE ID and role, refreshed ahead |
//! | issue | [`issue`] | JWT-SVID from [`svid`], credentials from [`sts`], within [`limits`] that are fair between workloads |
//!
//! Around it: [`pods`] listens in each pod's network [`namespace`]; [`admin`] health and metrics, [`readiness`],
//! [`hardening`], [`app`] which wires all of it, and [`serve`] which runs that. Beside the daemon: [`commands`] for whoever
//! uses or operates it, the [`environment`] that they start others in, and [`dev`], what the command of that name puts around
//! the daemon. Nothing but main.rs imports commands and `dev`.

pub mod identity;

pub mod socket_endpoint;

pub mod cgroup;

pub mod caller;

pub mod workload_rule;

pub mod role;

pub mod credentials;

pub mod clock;

pub mod limits;

pub mod config;

pub mod writer;

pub mod telemetry;

pub mod upstream_status;

pub mod metrics;

pub mod audit;

pub mod accounts;

pub mod hardening;

pub mod netns;

pub mod listen;

pub mod attest;

pub mod svid;

pub mod sts;

pub mod exchange;

pub mod cache;

pub mod credential_service;

pub mod http;

pub mod pod_listeners;

pub mod admin;

pub mod readiness;

pub mod app;

pub mod daemon;

pub mod sdk_environment;

pub mod commands;

pub mod dev;

#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
