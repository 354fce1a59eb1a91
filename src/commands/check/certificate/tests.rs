//! Certificates that break each rule of AWS, which no SPIFFE provider issues on demand.

use rcgen::{
    BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519,
    SanType, date_time_ymd,
};

use super::super::doc_tables::assert_documented;
use super::super::report::Verdict;
use super::*;
use crate::identity::{ArnTemplate, Template};
use crate::role::ChainedRole;

const ID: &str = "spiffe://example.org/billing";

/// Within the validity of certificates without dates of their own.
fn now() -> SystemTime {
    SystemTime::from(date_time_ymd(2026, 6, 30))
}

fn id() -> SpiffeId {
    SpiffeId::parse(ID).unwrap()
}

/// Returns the parameters of a good CA.
fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// Creates a CA, after `change` has changed it.
fn ca(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
    let mut params = ca_params();
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    params.self_signed(&key).unwrap().der().clone()
}

/// Creates the certificate of a workload with this key, after `change` has changed it.
fn leaf_with(
    key: &KeyPair,
    change: impl FnOnce(&mut CertificateParams),
) -> CertificateDer<'static> {
    let issuer = Issuer::new(ca_params(), KeyPair::generate().unwrap());
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.subject_alt_names = vec![SanType::URI(ID.try_into().unwrap())];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.distinguished_name = rcgen::DistinguishedName::new();
    change(&mut params);
    params.signed_by(key, &issuer).unwrap().der().clone()
}

fn leaf(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
    leaf_with(&KeyPair::generate().unwrap(), change)
}

fn unreadable() -> CertificateDer<'static> {
    CertificateDer::from(vec![0x30, 0])
}

/// Runs a check. Returns its result, and the text of its findings of this kind, which are all
/// documented.
fn run<T>(verdict: Verdict, check: impl FnOnce(&mut CheckReport) -> T) -> (T, Vec<String>) {
    let mut report = CheckReport::new(true);
    let result = check(&mut report);
    let found = report.findings().iter();
    let found = found.filter(|finding| finding.verdict == verdict);
    let texts = found.map(|finding| {
        if verdict != Verdict::Pass {
            let fix = finding.fix.as_deref().unwrap_or_default();
            assert_documented(finding.step, &finding.saw, fix);
        }
        finding.saw.clone()
    });
    let texts = texts.collect();
    (result, texts)
}

#[test]
fn certificate_that_aws_would_reject_is_not_tried() {
    let ed25519 = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let long = format!("spiffe://example.org/{}", "a".repeat(236));
    for (id, leaf, expected) in [
        (
            ID,
            leaf(|leaf| leaf.is_ca = ca_params().is_ca),
            "is that of a CA",
        ),
        (
            ID,
            leaf(|leaf| leaf.key_usages = vec![KeyUsagePurpose::KeyEncipherment]),
            "lacks the key usage digitalSignature",
        ),
        (
            ID,
            leaf_with(&ed25519, |_| {}),
            "is neither RSA nor of the curves",
        ),
        (
            ID,
            leaf(|leaf| leaf.not_after = date_time_ymd(2026, 6, 30)),
            "has expired",
        ),
        (
            ID,
            leaf(|leaf| leaf.not_before = date_time_ymd(2026, 7, 1)),
            "is not valid yet",
        ),
        (ID, unreadable(), "cannot be read"),
        (&long, leaf(|_| {}), "has more than 256 characters"),
    ] {
        let id = SpiffeId::parse(id).unwrap();
        let check =
            |report: &mut CheckReport| check_leaf(&[leaf], &id, &Role::example(), now(), report);
        let (facts, failures) = run(Verdict::Failed, check);
        assert!(facts.is_none(), "{expected}: {facts:?}");
        assert!(
            failures.len() == 1 && failures[0].contains(expected),
            "{expected}: {failures:?}"
        );
    }
    let longest = SpiffeId::parse(&long[..256]).unwrap();
    let leaf = [leaf(|_| {})];
    let check =
        |report: &mut CheckReport| check_leaf(&leaf, &longest, &Role::example(), now(), report);
    let (facts, notes) = run(Verdict::Note, check);
    assert!(facts.is_some());
    assert!(notes[0].contains("has no common name"), "{notes:?}");
}

#[test]
fn ca_that_aws_would_reject_ends_the_check() {
    let good = || ca(|_| {});
    let expired = || ca(|ca| ca.not_after = date_time_ymd(2026, 6, 29));
    for (bundle, expected) in [
        (vec![good(), leaf(|_| {})], "is not that of a CA"),
        (
            vec![ca(|ca| ca.key_usages = vec![KeyUsagePurpose::CrlSign])],
            "lacks the key usage keyCertSign",
        ),
        (
            vec![ca(|ca| ca.not_before = date_time_ymd(2026, 7, 1))],
            "is not valid yet",
        ),
        (vec![good(), unreadable()], "cannot be read"),
        (vec![expired()], "has no CA that is valid"),
        (vec![], "has no CA that is valid"),
    ] {
        let check = |report: &mut CheckReport| check_bundle(&bundle, now(), report);
        let (is_good, failures) = run(Verdict::Failed, check);
        assert!(!is_good, "{expected}");
        assert!(
            failures.iter().any(|text| text.contains(expected)),
            "{expected}: {failures:?}"
        );
    }
    // SPIRE keeps expired CAs for a day.
    let check =
        |report: &mut CheckReport| check_bundle(&[good(), expired(), good()], now(), report);
    let (is_good, passed) = run(Verdict::Pass, check);
    assert!(is_good);
    assert_eq!(passed, ["the trust domain has 2 CAs that are valid"]);
    let check = |report: &mut CheckReport| check_bundle(&[good(), good(), good()], now(), report);
    let (is_good, notes) = run(Verdict::Note, check);
    assert!(is_good);
    assert!(notes[0].contains("has 3 CAs"), "{notes:?}");
}

#[test]
fn later_role_cannot_change_the_source_identity() {
    let named = leaf(|leaf| {
        let name = rcgen::DnType::CommonName;
        leaf.distinguished_name.push(name, "billing.example.org");
    });
    let facts = [named, leaf(|_| {})].map(|leaf| CertificateFacts::read(&leaf).unwrap());
    let [named, unnamed] = &facts;
    let role = |source_identity: Option<&str>| {
        let role_arn = ArnTemplate::parse("arn:aws:iam::123456789012:role/next");
        let next = ChainedRole {
            role_arn: role_arn.unwrap(),
            external_id: None,
            session_name: Template::parse("{session_name}").unwrap(),
            source_identity: source_identity.map(|text| Template::parse(text).unwrap()),
            tags: Vec::new(),
            transitive_tags: Vec::new(),
            policy: None,
            policy_arns: Vec::new(),
            duration: Duration::from_secs(3600),
        };
        Arc::new(Role {
            chain: vec![next],
            ..Role::example()
        })
    };
    for (source_identity, leaf, is_kept) in [
        (Some("{path[0]}"), named, false),
        (Some("billing.example.org"), named, true),
        (None, named, true),
        (Some("{path[0]}"), unnamed, true),
    ] {
        let grant = granted(&role(source_identity), &[identity(&id())]).unwrap();
        let check = |report: &mut CheckReport| keeps_source_identity(&grant, leaf, report);
        let (result, failures) = run(Verdict::Failed, check);
        assert_eq!(result, is_kept, "{source_identity:?} {leaf:?}");
        assert_eq!(failures.is_empty(), is_kept, "{failures:?}");
    }
}
