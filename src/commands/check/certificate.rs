//! Checks of IAM Roles Anywhere: the certificate of a workload, the CAs, and a real exchange.

use std::sync::Arc;

use super::agent::TokenSource;
use super::exchange::{STEP, assume, compare_clocks, granted, identity, report_denied};
use super::report::CheckReport;
use super::{STEP_FIX, agent};
use crate::clock::Clock;
use crate::commands::https_probe::HttpProbe;
use crate::config::Config;
use crate::role::{Grant, Role, RolesAnywhereTarget};
use crate::roles_anywhere::certificate::CertificateFacts;
use crate::roles_anywhere::{CreateSession, RolesAnywhere};
use crate::sts::Sts;
use crate::svid::X509Svid;

pub(super) const CERTIFICATE: &str = "certificate";
/// AWS's limit for the value of a session tag, in characters. The SPIFFE ID becomes one.
const MAX_TAG_CHARS: usize = 256;
/// AWS's limit for the CAs of a trust anchor.
const MAX_CAS: usize = 2;

/// Checks the certificate for this role, and assumes the role with it, and those of its chain.
pub(super) async fn check(
    config: &Config,
    source: &TokenSource,
    (anywhere, sts): (&RolesAnywhere, &Sts),
    (role, at): (&Arc<Role>, &RolesAnywhereTarget),
    web: &HttpProbe,
    report: &mut CheckReport,
) {
    match anywhere.url(at) {
        Ok(url) => compare_clocks(&url, web, report).await,
        Err(error) => return report.failed(STEP, error.to_string(), STEP_FIX),
    }
    let Some(svid) = agent::certificate(config, source, role, report).await else {
        return;
    };
    let is_good = check_leaf(&svid, role, report);
    check_bundle(&svid, report);
    if !is_good {
        return;
    }
    report.show_progress(&format!("IAM Roles Anywhere, for role {:?}", role.name));
    let id = svid.spiffe_id();
    match granted(role, &[identity(id)]) {
        Ok(grant) => {
            let holder = format!("the certificate of {id}");
            let first = async |hop: &Grant| anywhere.create_session(hop, at, &svid).await;
            assume(sts, &grant, &holder, first, report).await;
        }
        Err(denied) => report_denied(role, id, &denied, report),
    }
}

/// Checks the certificate itself. Returns whether AWS could accept it.
fn check_leaf(svid: &X509Svid, role: &Role, report: &mut CheckReport) -> bool {
    let (id, now) = (svid.spiffe_id(), Clock::system().now());
    let leaf = svid.chain().first().map(CertificateFacts::read);
    let Some(Ok(facts)) = leaf else {
        report.failed(
            CERTIFICATE,
            format!("the certificate of {id} cannot be read"),
            "correct it at the SPIFFE provider",
        );
        return false;
    };
    let problems = facts.leaf_problems(now);
    for problem in &problems {
        report.failed(
            CERTIFICATE,
            format!("the certificate of {id} {problem}"),
            "correct the certificates of workloads at the SPIFFE provider, for example workload_x509_svid_key_type of SPIRE's agent",
        );
    }
    let is_tag = id.as_str().chars().count() <= MAX_TAG_CHARS;
    if !is_tag {
        report.failed(
            CERTIFICATE,
            format!("{id} has more than {MAX_TAG_CHARS} characters, so AWS cannot make a session tag of it"),
            "give the workload a shorter SPIFFE ID",
        );
    }
    if !problems.is_empty() || !is_tag {
        return false;
    }
    let left = svid.expires().duration_since(now).unwrap_or_default();
    report.ok(
        CERTIFICATE,
        format!(
            "{id} for role {:?}: a key of the kind {:?}, {} s left, serial number {}",
            role.name,
            facts.key,
            left.as_secs(),
            facts.serial
        ),
    );
    if facts.common_name.is_none() {
        report.info(
            CERTIFICATE,
            format!("the certificate of {id} has no common name, so its sessions have no source identity"),
            "if you need one, give the registration entry a DNS name: spire-server entry update -dns NAME",
        );
    }
    true
}

/// Checks the CAs that the trust anchor has to hold.
fn check_bundle(svid: &X509Svid, report: &mut CheckReport) {
    let now = Clock::system().now();
    if svid.bundle().is_empty() {
        return;
    }
    let read = svid.bundle().iter().map(CertificateFacts::read);
    let current: Vec<CertificateFacts> = read
        .flatten()
        .filter(|facts| facts.not_after > now)
        .collect();
    for (facts, problem) in current.iter().flat_map(|facts| {
        facts
            .ca_problems(now)
            .into_iter()
            .map(move |text| (facts, text))
    }) {
        report.failed(
            CERTIFICATE,
            format!("the CA with the serial number {} {problem}", facts.serial),
            "correct the CA of the SPIFFE provider",
        );
    }
    match current.len() > MAX_CAS {
        true => report.info(
            CERTIFICATE,
            format!(
                "the trust domain has {} CAs, and a trust anchor holds at most {MAX_CAS}",
                current.len()
            ),
            "give the SPIRE server an UpstreamAuthority, and put its root into the trust anchor",
        ),
        false => report.ok(
            CERTIFICATE,
            format!("the trust domain has {} CAs that are valid", current.len()),
        ),
    }
}
