//! The trust anchor, the profile and the roles of IAM Roles Anywhere, in each format.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, date_time_ymd};
use rustls::pki_types::CertificateDer;

use super::reading::{ReadProfile, holds, statements};
use super::*;
use crate::sts::to_pem;

const TABLE: &str = "[roles_anywhere]\n\
    trust_anchor_arn = \"arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/1\"\n\
    profile_arn = \"arn:aws:rolesanywhere:eu-central-1:123456789012:profile/2\"\n";
const OTHER_ANCHOR: &str = "arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/2";

/// Within the validity of CAs without dates of their own.
fn now() -> SystemTime {
    SystemTime::from(date_time_ymd(2026, 6, 30))
}

fn ca(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    params.self_signed(&key).unwrap().der().clone()
}

/// Returns a role that is assumed by a certificate, with this key `exchange`.
fn certified(name: &str, id: &str, exchange: &str) -> String {
    let arn = format!("arn:aws:iam::123456789012:role/team/{name}");
    role(name, id, &arn) + &format!("exchange = \"{exchange}\"\n")
}

/// Returns the plan for these roles and these CAs.
fn plan_with(text: &str, bundle: &[CertificateDer<'static>]) -> Plan {
    let config = config(&format!("{TABLE}{text}"));
    let target = config.roles_anywhere.target.unwrap();
    let (anywhere, warnings) = PlannedAnywhere::new(target, bundle, now());
    let provider = PlannedProvider::New { thumbprint: None };
    let issuer = PlannedIssuer::parse(ISSUER).unwrap();
    let mut plan = Plan::new(&config.roles, &[], issuer, provider, Some(anywhere));
    plan.warnings.extend(warnings);
    plan
}

/// Evaluates whether a trust policy admits a certificate with this SPIFFE ID, which the trust
/// anchor `anchor` has accepted.
fn allows_certificate(policy: &Value, anchor: &str, spiffe_id: &str) -> bool {
    let claims = BTreeMap::from([
        ("aws:SourceArn".to_owned(), anchor),
        ("aws:PrincipalTag/x509SAN/URI".to_owned(), spiffe_id),
    ]);
    statements(policy, "Service").any(|statement| {
        let actions = ["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"];
        assert_eq!(statement["Action"], json!(actions));
        let principal = json!({ "Service": "rolesanywhere.amazonaws.com" });
        assert_eq!(statement["Principal"], principal);
        assert!(statement["Condition"]["ArnEquals"]["aws:SourceArn"].is_string());
        holds(statement, &claims)
    })
}

#[test]
fn formats_agree_and_admit_only_matching_certificates() {
    let text = certified("both", "spiffe://t/both", "both")
        + "duration = \"2h\"\n"
        + &certified("all.1", "spiffe://t/w/*", "roles-anywhere")
        + &role(
            "token",
            "spiffe://t/w/a",
            "arn:aws:iam::123456789012:role/token",
        )
        + &certified("first", "spiffe://t/w/first", "roles-anywhere")
        + "[[role.chain]]\nrole_arn = \"arn:aws:iam::123456789012:role/last\"\n";
    let good = [ca(|_| {}), ca(|_| {})];
    let expired = ca(|ca| ca.not_after = date_time_ymd(2026, 6, 29));
    let [first, second] = good.clone();
    let plan = plan_with(&text, &[first, expired, second]);
    assert_eq!(plan.warnings, [""; 0]);
    let read = read_all(&plan);
    assert_eq!(read.anchor, Some(good.iter().map(to_pem).collect()));
    let profile = ReadProfile {
        accepts_session_names: true,
        seconds: 7200,
        roles: ["both", "all.1", "first"].map(str::to_owned).into(),
    };
    assert_eq!(read.profile, Some(profile));
    let policy = |role: &str| &read.roles[role].2;
    for (role, id, is_admitted) in [
        ("both", "spiffe://t/both", true),
        ("both", "spiffe://t/both/x", false),
        ("both", "spiffe://u/both", false),
        ("all.1", "spiffe://t/w/a", true),
        ("all.1", "spiffe://t/w/a/b", false),
        ("all.1", "spiffe://t/w", false),
        ("token", "spiffe://t/w/a", false),
        ("last", "spiffe://t/w/first", false),
    ] {
        let policy = policy(role);
        let admits = |anchor: &str| allows_certificate(policy, anchor, id);
        assert_eq!(admits(ANCHOR), is_admitted, "{role} {id}");
        assert!(!admits(OTHER_ANCHOR), "{role} {id}");
    }
    // A token is admitted only where one is used.
    let audience = "sts.amazonaws.com";
    assert!(allows(policy("both"), audience, "spiffe://t/both"));
    assert!(!allows(policy("all.1"), audience, "spiffe://t/w/a"));
    // The next role of a chain keeps the source identity of the certificate.
    let actions = json!(["sts:AssumeRole", "sts:SetSourceIdentity"]);
    assert_eq!(policy("last")["Statement"][0]["Action"], actions);
    assert_eq!(read.permissions["first"]["Statement"][0]["Action"], actions);
}

#[test]
fn trust_anchor_of_the_configuration_is_used_without_cas() {
    let plan = plan_with(&certified("r", "spiffe://t/r", "roles-anywhere"), &[]);
    for format in [Format::AwsCli, Format::Terraform, Format::Cloudformation] {
        let text = render(&plan, format).unwrap();
        assert!(text.contains(ANCHOR), "{text}");
        for created in ["create-trust-anchor", "_trust_anchor\" \"", "::TrustAnchor"] {
            assert!(!text.contains(created), "{text}");
        }
    }
}

#[test]
fn bundle_that_a_trust_anchor_rejects_is_a_warning() {
    let text = certified("r", "spiffe://t/r", "roles-anywhere");
    let three = [ca(|_| {}), ca(|_| {}), ca(|_| {})];
    let no_ca = ca(|ca| ca.is_ca = IsCa::NoCa);
    for (bundle, expected) in [
        (&three[..], "takes at most 2"),
        (&[no_ca], "is not that of a CA"),
        (&[CertificateDer::from(vec![0x30, 0])], "cannot be read"),
    ] {
        let warnings: BTreeSet<String> = plan_with(&text, bundle).warnings.into_iter().collect();
        assert!(
            warnings.iter().any(|warning| warning.contains(expected)),
            "{expected}: {warnings:?}"
        );
    }
}
