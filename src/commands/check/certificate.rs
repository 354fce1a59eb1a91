//! Checks of IAM Roles Anywhere: the certificate of a workload, the CAs, and a real exchange.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;

use super::agent::TokenSource;
use super::exchange::{STEP, assume, compare_clocks, granted, identity, report_denied};
use super::report::CheckReport;
use super::{STEP_FIX, agent};
use crate::clock::Clock;
use crate::commands::https_probe::HttpProbe;
use crate::commands::live_token;
use crate::config::Config;
use crate::identity::SpiffeId;
use crate::role::parameters::{MAX_TAG_VALUE_CHARS, check_tag_value};
use crate::role::{Grant, Role, RolesAnywhereTarget};
use crate::roles_anywhere::certificate::{CertificateFacts, MAX_ANCHOR_CAS};
use crate::roles_anywhere::{CreateSession, RolesAnywhere};
use crate::sts::Sts;
use crate::svid::X509Svid;

pub(super) const CERTIFICATE: &str = "certificate";
/// Time limit of the CAs, where they do not come with the certificate.
const BUNDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Checks the certificate for this role. If AWS could accept it, assumes the role with it, and
/// those of its chain.
pub(super) async fn check(
    config: &Config,
    source: &TokenSource,
    (anywhere, sts): (&RolesAnywhere, &Sts),
    (role, at): (&Arc<Role>, &RolesAnywhereTarget),
    web: &HttpProbe,
    report: &mut CheckReport,
) {
    match anywhere.url(at) {
        Ok(url) => compare_clocks("IAM Roles Anywhere", &url, web, report).await,
        Err(error) => return report.failed(STEP, error.to_string(), STEP_FIX),
    }
    let Some(svid) = agent::certificate(config, source, role, report).await else {
        return;
    };
    let (id, now) = (svid.spiffe_id(), Clock::system().now());
    let leaf = check_leaf(svid.chain(), id, role, now, report);
    let has_good_cas = check_cas(config, &svid, now, report).await;
    let (Some(leaf), true) = (leaf, has_good_cas) else {
        return;
    };
    report.show_progress(&format!("IAM Roles Anywhere, for role {:?}", role.name));
    match granted(role, &[identity(id)]) {
        Ok(grant) if keeps_source_identity(&grant, &leaf, report) => {
            let holder = format!("the certificate of {id}");
            let first = async |hop: &Grant| anywhere.create_session(hop, at, &svid).await;
            assume(sts, &grant, &holder, first, report).await;
        }
        Ok(_) => {}
        Err(denied) => report_denied(role, id, &denied, report),
    }
}

/// Checks the certificate itself, which is the first of its chain. Returns its facts if AWS could
/// accept it.
fn check_leaf(
    chain: &[CertificateDer<'_>],
    id: &SpiffeId,
    role: &Role,
    now: SystemTime,
    report: &mut CheckReport,
) -> Option<CertificateFacts> {
    let Some(Ok(facts)) = chain.first().map(CertificateFacts::read) else {
        report.failed(
            CERTIFICATE,
            format!("the certificate of {id} cannot be read"),
            "correct it at the SPIFFE provider",
        );
        return None;
    };
    let problems = facts.leaf_problems(now);
    for problem in &problems {
        report.failed(
            CERTIFICATE,
            format!("the certificate of {id} {problem}"),
            "correct the certificates of workloads at the SPIFFE provider, for example workload_x509_svid_key_type of SPIRE's agent",
        );
    }
    let is_tag = check_tag_value(id.as_str()).is_ok();
    if !is_tag {
        report.failed(
            CERTIFICATE,
            format!("{id} has more than {MAX_TAG_VALUE_CHARS} characters, so AWS cannot make a session tag of it"),
            "give the workload a shorter SPIFFE ID",
        );
    }
    if !problems.is_empty() || !is_tag {
        return None;
    }
    let left = facts.not_after.duration_since(now).unwrap_or_default();
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
    Some(facts)
}

/// Checks the CAs that the trust anchor has to hold, and those between them and the certificate.
/// Returns false if AWS would reject one.
async fn check_cas(
    config: &Config,
    svid: &X509Svid,
    now: SystemTime,
    report: &mut CheckReport,
) -> bool {
    let intermediates = svid.chain().get(1..).unwrap_or_default();
    let has_good_intermediates = check_each_ca(intermediates, now, report);
    let bundle = match svid.bundle() {
        // Some agents send none along.
        [] => live_token::bundle(config, BUNDLE_TIMEOUT).await,
        bundle => Ok(bundle.to_vec()),
    };
    match bundle {
        Ok(bundle) => check_bundle(&bundle, now, report) && has_good_intermediates,
        Err(error) => {
            let saw = format!("the CAs of the trust domain are not known: {error}");
            report.unchecked(CERTIFICATE, saw);
            has_good_intermediates
        }
    }
}

/// Checks the CAs of the trust domain. Those that have expired do not count: SPIRE keeps them for a
/// day.
fn check_bundle(bundle: &[CertificateDer<'_>], now: SystemTime, report: &mut CheckReport) -> bool {
    let has_expired = |ca: &CertificateDer<'_>| {
        CertificateFacts::read(ca).is_ok_and(|facts| facts.not_after <= now)
    };
    let current: Vec<_> = bundle
        .iter()
        .filter(|ca| !has_expired(ca))
        .cloned()
        .collect();
    if current.is_empty() {
        report.failed(
            CERTIFICATE,
            "the trust domain has no CA that is valid",
            "check the SPIFFE provider, and this node's clock",
        );
        return false;
    }
    if !check_each_ca(&current, now, report) {
        return false;
    }
    match current.len() > MAX_ANCHOR_CAS {
        // The trust anchor may hold the one that counts.
        true => report.info(
            CERTIFICATE,
            format!(
                "the trust domain has {} CAs, and a trust anchor holds at most {MAX_ANCHOR_CAS}",
                current.len()
            ),
            "give the SPIRE server an UpstreamAuthority, and put its root into the trust anchor",
        ),
        false => report.ok(
            CERTIFICATE,
            format!("the trust domain has {} CAs that are valid", current.len()),
        ),
    }
    true
}

/// Checks each of these CAs by AWS's rules. Returns false if one breaks a rule.
fn check_each_ca(cas: &[CertificateDer<'_>], now: SystemTime, report: &mut CheckReport) -> bool {
    let mut is_good = true;
    for ca in cas {
        let problems: Vec<String> = match CertificateFacts::read(ca) {
            Ok(facts) => facts
                .ca_problems(now)
                .iter()
                .map(|problem| format!("the CA with the serial number {} {problem}", facts.serial))
                .collect(),
            Err(error) => vec![format!("a CA of the trust domain: {error}")],
        };
        is_good &= problems.is_empty();
        for problem in problems {
            report.failed(
                CERTIFICATE,
                problem,
                "correct the CA of the SPIFFE provider",
            );
        }
    }
    is_good
}

/// Reports a later role that sets another source identity than the certificate's, which no session
/// can change. Returns false if there is one.
fn keeps_source_identity(grant: &Grant, leaf: &CertificateFacts, report: &mut CheckReport) -> bool {
    let Some(name) = &leaf.common_name else {
        return true;
    };
    let mut sessions = grant.chain().iter();
    let changed = sessions.find_map(|session| {
        let other = session.source_identity.as_ref();
        other.filter(|other| *other != name)
    });
    if let Some(other) = changed {
        report.failed(
            CERTIFICATE,
            format!(
                "the common name {name:?} of the certificate is the source identity of its sessions, which `source_identity` of a \
                 [[role.chain]] cannot change to {other:?}"
            ),
            "remove `source_identity` from the chain, or the DNS names from the registration entry",
        );
    }
    changed.is_none()
}

#[cfg(test)]
mod tests;
