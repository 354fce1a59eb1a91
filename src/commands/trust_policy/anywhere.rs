//! The resources of IAM Roles Anywhere: the trust anchor, the profile, and the roles' part of it.

use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};

use super::plan::{
    Condition, PlannedAccount, PlannedAccountName, condition_json, subject_condition,
};
use crate::identity::SpiffeIdPattern;
use crate::role::RolesAnywhereTarget;
use crate::roles_anywhere::certificate::{CertificateFacts, MAX_ANCHOR_CAS};
use crate::sts::to_pem;

/// Name of the trust anchor and of the profile that are created.
pub(super) const NAME: &str = "awsvid";
/// The session tag that AWS makes of the SPIFFE ID.
const SPIFFE_ID_TAG: &str = "aws:PrincipalTag/x509SAN/URI";

/// The trust anchor and the profile of the configuration, and the CAs of this node.
#[derive(Debug)]
pub(super) struct PlannedAnywhere {
    pub(super) target: Arc<RolesAnywhereTarget>,
    /// CAs that have not expired. Empty if they are not known.
    certificates: Vec<CertificateDer<'static>>,
}

impl PlannedAnywhere {
    /// Returns the resources with these CAs, and warnings. Expired CAs are left out: SPIRE keeps
    /// them for a day.
    pub(super) fn new(
        target: Arc<RolesAnywhereTarget>,
        bundle: &[CertificateDer<'static>],
        now: SystemTime,
    ) -> (Self, Vec<String>) {
        let mut warnings = Vec::new();
        let mut certificates = Vec::new();
        for certificate in bundle {
            let Ok(facts) = CertificateFacts::read(certificate) else {
                warnings.push("trust anchor: a CA of the bundle cannot be read".to_owned());
                continue;
            };
            if facts.not_after <= now {
                continue;
            }
            for problem in facts.ca_problems(now) {
                warnings.push(format!(
                    "trust anchor: the CA with the serial number {} {problem}, so AWS does not accept it",
                    facts.serial
                ));
            }
            certificates.push(certificate.clone());
        }
        if certificates.len() > MAX_ANCHOR_CAS {
            warnings.push(format!(
                "trust anchor: the trust domain has {} CAs, and a trust anchor takes at most {MAX_ANCHOR_CAS}; give the SPIRE server an \
                 UpstreamAuthority, and put its root into the trust anchor",
                certificates.len()
            ));
        }
        let planned = Self {
            target,
            certificates,
        };
        (planned, warnings)
    }

    /// Returns whether trust anchor and profile are in this account.
    pub(super) fn is_in(&self, account: &PlannedAccountName) -> bool {
        let mut parts = self.target.trust_anchor_arn.split(':').skip(1);
        let (partition, number) = (parts.next(), parts.nth(2));
        partition == Some(&account.partition) && number == Some(&account.number)
    }

    /// Returns the CAs as PEM. `None` if they are not known.
    pub(super) fn pem(&self) -> Option<String> {
        let pem = self.certificates.iter().map(to_pem).collect::<String>();
        Some(pem).filter(|pem| !pem.is_empty())
    }

    /// Returns the id of the configured trust anchor, then that of the profile.
    pub(super) fn ids(&self) -> [&str; 2] {
        let target = &self.target;
        [&target.trust_anchor_arn, &target.profile_arn]
            .map(|arn| arn.rsplit('/').next().unwrap_or_default())
    }
}

/// Returns the ARNs of the roles that are assumed by a certificate, and their longest session in
/// seconds.
pub(super) fn certified_roles(account: &PlannedAccount) -> (Vec<&str>, u64) {
    let certified = account
        .roles
        .iter()
        .filter(|(_, role)| !role.certified.is_empty());
    let longest = certified
        .clone()
        .map(|(_, role)| role.max_session.as_secs());
    let longest = longest.max().unwrap_or_default();
    (certified.map(|(arn, _)| arn.as_str()).collect(), longest)
}

/// Returns the condition on the subject of a certificate, without that on the trust anchor.
pub(super) fn condition(subject: &SpiffeIdPattern) -> Condition {
    subject_condition(subject, SPIFFE_ID_TAG)
}

/// Returns the statement of a trust policy for certificates of this subject. `anchor` is the ARN of
/// the trust anchor, or an expression for it.
pub(super) fn statement(subject: &SpiffeIdPattern, anchor: &Value) -> Value {
    let mut conditions = condition_json(condition(subject));
    conditions.insert("ArnEquals".to_owned(), json!({ "aws:SourceArn": anchor }));
    json!({
        "Effect": "Allow",
        "Principal": { "Service": "rolesanywhere.amazonaws.com" },
        "Action": ["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"],
        "Condition": conditions,
    })
}
