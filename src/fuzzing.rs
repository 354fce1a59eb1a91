//! All parsers of awsvid's own, as functions of bytes that panic where a property does not hold.
//! Each returns whether the parser accepts the bytes.
//!
//! `tests/fuzz` has a target of a fuzzer for each. A unit test runs them over the seeds in
//! `tests/fuzz/seeds` and over randomly damaged seeds.

use std::borrow::Cow;

use crate::accounts;
use crate::admin;
use crate::attest;
use crate::commands;
use crate::hardening;
use crate::http;
use crate::imds;
use crate::metrics;
use crate::pod_listeners;
use crate::roles_anywhere;
use crate::sdk_environment::profiles;
use crate::sts;
use crate::svid;

mod values;

/// Parses a reply of `sock_diag`.
pub fn sock_diag(bytes: &[u8]) -> bool {
    attest::fuzzing::sock_diag(bytes)
}

/// Parses a file of `/proc/<pid>`.
pub fn proc(bytes: &[u8]) -> bool {
    let text = text(bytes);
    let is_process = attest::fuzzing::proc(&text);
    let is_own = hardening::fuzzing::status(&text);
    metrics::fuzzing::stat(&text) || is_process || is_own
}

/// Parses the mounts in `/proc/self/mountinfo`.
pub fn mountinfo(bytes: &[u8]) -> bool {
    let text = text(bytes);
    let hides_processes = hardening::fuzzing::mountinfo(&text);
    let stays_private = pod_listeners::fuzzing::mountinfo(&text);
    attest::fuzzing::mountinfo(&text) || hides_processes || stays_private
}

/// Parses the path of a cgroup.
pub fn cgroup(bytes: &[u8]) -> bool {
    attest::fuzzing::cgroup(&text(bytes))
}

/// Parses `/etc/passwd` or `/etc/group`.
pub fn accounts(bytes: &[u8]) -> bool {
    accounts::fuzzing::accounts(bytes)
}

/// Parses an HTTP request of a caller.
pub fn request(bytes: &[u8]) -> bool {
    http::fuzzing::request(bytes)
}

/// Parses and checks a JWT-SVID.
pub fn token(bytes: &[u8]) -> bool {
    values::token(bytes)
}

/// Parses the daemon's X.509-SVID.
pub fn certificates(bytes: &[u8]) -> bool {
    svid::fuzzing::certificates(bytes)
}

/// Parses a certificate, as IAM Roles Anywhere judges it.
pub fn certificate_facts(bytes: &[u8]) -> bool {
    roles_anywhere::fuzzing::certificate_facts(bytes)
}

/// Parses the text of a configuration file.
pub fn configuration(bytes: &[u8]) -> bool {
    values::configuration(&text(bytes))
}

/// Parses a SPIFFE ID, or a pattern of them.
pub fn spiffe_id(bytes: &[u8]) -> bool {
    values::spiffe_id(&text(bytes))
}

/// Parses the name of a role, or a template of it.
pub fn arn(bytes: &[u8]) -> bool {
    values::arn(&text(bytes))
}

/// Parses the address of an agent.
pub fn endpoint(bytes: &[u8]) -> bool {
    values::endpoint(&text(bytes))
}

/// Parses a message of a handover.
pub fn handover(bytes: &[u8]) -> bool {
    pod_listeners::fuzzing::handover(bytes)
}

/// Parses an HTTP response of the daemon.
pub fn client(bytes: &[u8]) -> bool {
    commands::fuzzing::client(bytes)
}

/// Parses the rejection of an STS.
pub fn sts_error(bytes: &[u8]) -> bool {
    sts::fuzzing::sts_error(bytes)
}

/// Parses the URL of a proxy, and the hosts that are exempt from it.
pub fn proxy(bytes: &[u8]) -> bool {
    sts::fuzzing::proxy(&text(bytes))
}

/// Parses the header `Accept` of a client of `/metrics`.
pub fn accept(bytes: &[u8]) -> bool {
    admin::fuzzing::accept(bytes)
}

/// Parses the URL of an issuer or of another server, or a value of `--resolve`.
pub fn url(bytes: &[u8]) -> bool {
    commands::fuzzing::url(&text(bytes))
}

/// Parses the documents of an issuer.
pub fn documents(bytes: &[u8]) -> bool {
    commands::fuzzing::documents(&text(bytes))
}

/// Parses a socket unit of systemd.
pub fn socket_unit(bytes: &[u8]) -> bool {
    commands::fuzzing::socket_unit(&text(bytes))
}

/// Parses the files of SDKs with their profiles.
pub fn profiles(bytes: &[u8]) -> bool {
    profiles::fuzzing::profiles(&text(bytes))
}

/// Parses a path of the instance metadata service.
pub fn metadata_path(bytes: &[u8]) -> bool {
    imds::fuzzing::path(&text(bytes))
}

/// Verifies a metadata token.
pub fn metadata_token(bytes: &[u8]) -> bool {
    imds::fuzzing::token(bytes)
}

fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

#[cfg(test)]
mod tests;
