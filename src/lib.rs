//! awsvid hands each workload on a Linux node its own AWS credentials, by its SPIFFE identity.
//!
//! # Layout
//!
//! A file imports only what stands above it in this list (and its own children); `tests/it/layout.rs` checks that.
//!
//! Values, without I/O: [`identity`] names, [`cgroup`] what a cgroup path says, [`caller`] who is asking, [`rule`] which
//! SPIFFE ID a caller has, [`role`] which role that may have, [`credentials`] what is handed out, [`clock`] what time it is.
//!
//! What every part needs: [`config`], [`telemetry`] the log, [`metrics`], [`audit`] one record per request.
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
//! | issue | [`issue`] | JWT-SVID from [`svid`], credentials from [`sts`], in [`turns`] that are fair between workloads |
//!
//! Around it: [`admin`] health and metrics, [`readiness`], [`hardening`], [`app`] which wires all of it, and [`serve`] which
//! runs that. [`commands`] are the operator's other commands, and [`dev`] is what the command of that name puts around the
//! daemon; nothing but main.rs imports them.

pub mod identity;

pub mod endpoint;

pub mod cgroup;

pub mod caller;

pub mod rule;

pub mod role;

pub mod credentials;

pub mod clock;

pub mod config;

pub mod telemetry;

pub mod metrics;

pub mod audit;

pub mod hardening;

pub mod listen;

pub mod attest;

pub mod turns;

pub mod svid;

pub mod sts;

pub mod issue;

pub mod cache;

pub mod broker;

pub mod http;

pub mod admin;

pub mod readiness;

pub mod app;

pub mod serve;

pub mod commands;

pub mod dev;

#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
