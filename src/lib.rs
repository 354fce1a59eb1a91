//! awsvid gives each workload on a Linux node its own AWS credentials, by the workload's SPIFFE ID.
//!
//! # Layout
//!
//! A module imports only modules above it among the `pub mod` lines below, and its own submodules.
//! `tests/it/layout.rs` checks that. This text has the order of a request.
//!
//! Values, without I/O: [`identity`] (SPIFFE IDs), [`socket_endpoint`] (addresses of agents),
//! [`cgroup`] (facts of a cgroup path), [`caller`] (the attested peer), [`workload_rule`] (the
//! SPIFFE ID of a caller), [`role`] (the roles of a SPIFFE ID), [`protocol`] (of a request),
//! [`credentials`], [`clock`], [`backoff`], [`exit_status`]. [`file_threads`] runs calls on files
//! that may block.
//!
//! Parts that all others need: [`config`], [`writer`] (lines, without blocking the callers),
//! [`telemetry`] (the log), [`metrics`], [`upstream_status`] (state of the upstreams), [`audit`]
//! (one record per request), [`accounts`] (uids and gids of names).
//!
//! A request passes these modules, in this order:
//!
//! | step | module | |
//! |---|---|---|
//! | connect | [`listen`] | accepts, with at most 64 connections per listener that are not attested yet |
//! | attest | [`attest`] | socket -> peer -> [`caller::Caller`], by facts that only the kernel sets |
//! | request | [`http`] | calls `attest`, with a permit between its two steps; then reads and validates the request; opens the audit record |
//! | decide | [`credential_service`] | **the request path**: identify, select the role, cache or exchange, verify the caller again; all by one [`policy`] |
//! | cache | [`cache`] | credentials by SPIFFE ID and role, refreshed before they expire |
//! | exchange | [`exchange`] | JWT-SVID from [`svid`], credentials from [`sts`]; or X.509-SVID and [`roles_anywhere`]; within [`limits`] that are fair between workloads |
//!
//! In functions: `listen::serve` calls `CredentialEndpoint::serve_connection` (http/connection.rs)
//! for each connection. That calls `serve_request` and `issue` (http/request.rs), and these call
//! `CredentialService::credentials_for`. deploy/docs/architecture.md describes the same steps.
//!
//! A request may come by either protocol: the container credential endpoint's, or that of [`imds`],
//! which has the tokens, paths and bodies of EC2's instance metadata service.
//!
//! Around the request path: [`pod_listeners`] listens in each pod's network namespace ([`netns`],
//! and [`netlink`] for its addresses),
//! [`admin`] serves health and metrics, [`readiness`] decides when the daemon is ready (by
//! [`http_client`]), [`hardening`] drops privileges, and [`watchdog`] reports to systemd that the
//! threads work. [`app`] wires all of it, and [`daemon`] runs it.
//!
//! Outside the daemon: [`commands`] for users and operators, [`sdk_environment`] (the SDK variables
//! that commands set for child processes), and [`dev`] (the servers that the `dev` command starts
//! around the daemon; a cargo feature, which packages and images leave out). Only main.rs imports
//! `commands` and `dev`.
#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        reason = "tests measure and wait in real time"
    )
)]

pub mod identity;

pub mod socket_endpoint;

pub mod cgroup;

pub mod caller;

pub mod clock;

pub mod file_threads;

pub mod workload_rule;

pub mod role;

pub mod protocol;

pub mod credentials;

pub mod backoff;

pub mod exit_status;

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

pub mod netlink;

pub mod listen;

pub mod attest;

pub mod svid;

pub mod sts;

pub mod roles_anywhere;

pub mod exchange;

pub mod policy;

pub mod cache;

pub mod credential_service;

pub mod imds;

pub mod http;

pub mod http_client;

pub mod pod_listeners;

pub mod admin;

pub mod readiness;

pub mod app;

pub mod watchdog;

pub mod daemon;

pub mod sdk_environment;

pub mod commands;

#[cfg(feature = "dev")]
pub mod dev;

#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;

#[cfg(test)]
#[path = "../tests/support/captured_log.rs"]
mod captured_log;

#[cfg(test)]
#[path = "../tests/support/random_cases.rs"]
mod random_cases;

#[cfg(test)]
#[path = "../tests/support/skip.rs"]
mod skip;
