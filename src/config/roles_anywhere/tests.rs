use super::super::{Config, LoadedConfig, Problem};
use crate::role::FirstExchange;

const ANCHOR: &str = "arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/9f084b8b-2e5c";
const PROFILE: &str = "arn:aws:rolesanywhere:eu-central-1:123456789012:profile/1b2c3d4e";

/// Returns a configuration with these keys in `[roles_anywhere]`, and these in the role.
fn text(table: &[(&str, &str)], role: &str) -> String {
    let keys: String = table
        .iter()
        .map(|(key, value)| format!("{key} = \"{value}\"\n"))
        .collect();
    format!(
        "[roles_anywhere]\n{keys}\
         [[workload]]\nspiffe_id = \"spiffe://example.org/billing\"\nuid = 1001\n\
         [[role]]\nname = \"billing\"\nspiffe_id = \"spiffe://example.org/billing\"\n\
         role_arn = \"arn:aws:iam::123456789012:role/billing\"\n{role}"
    )
}

fn parse(table: &[(&str, &str)], role: &str) -> Result<LoadedConfig, Vec<Problem>> {
    Config::parse(&text(table, role), &|_| None)
}

fn good() -> [(&'static str, &'static str); 2] {
    [("trust_anchor_arn", ANCHOR), ("profile_arn", PROFILE)]
}

#[track_caller]
fn expect_error(result: Result<LoadedConfig, Vec<Problem>>, key: &str, what: &str) {
    let problems = result.expect_err(what);
    let found = problems
        .iter()
        .any(|problem| problem.key.ends_with(&format!(".{key}")) && problem.what.contains(what));
    assert!(found, "{problems:?}");
}

#[test]
fn role_by_certificate_alone_needs_no_sts() {
    let loaded = parse(&good(), "exchange = \"roles-anywhere\"\n").unwrap();
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    let role = &loaded.config.roles.defined[0];
    let FirstExchange::RolesAnywhere(target) = &role.exchange else {
        panic!("{role:?}")
    };
    assert_eq!(
        (
            target.trust_anchor_arn.as_str(),
            target.profile_arn.as_str()
        ),
        (ANCHOR, PROFILE)
    );
    assert_eq!(
        (target.region.as_str(), &target.endpoint),
        ("eu-central-1", &None)
    );
    assert_eq!(role.sts.region, "eu-central-1");
    assert!(loaded.config.roles.sts_targets().is_empty());
    assert_eq!(loaded.config.roles.roles_anywhere_targets(), [&**target]);
}

/// The roles of a chain are assumed with the credentials before them, so an STS of its own gets no
/// token that it could use at AWS.
#[test]
fn audience_matters_only_where_a_token_is_sent() {
    let role = |exchange: &str| {
        format!(
            "exchange = \"{exchange}\"\nsts_endpoint = \"https://sts.internal\"\n\
             [[role.chain]]\nrole_arn = \"arn:aws:iam::123456789012:role/last\"\n"
        )
    };
    let loaded = parse(&good(), &role("roles-anywhere")).unwrap();
    let targets = loaded.config.roles.sts_targets();
    assert_eq!(targets[0].endpoint.as_deref(), Some("https://sts.internal"));
    expect_error(
        parse(&good(), &role("both")),
        "audience",
        "its operator could use them at AWS",
    );
}

#[test]
fn role_by_either_needs_both() {
    expect_error(
        parse(&good(), "exchange = \"both\"\n"),
        "region",
        "no AWS region is set",
    );
    let loaded = parse(&good(), "exchange = \"both\"\nregion = \"eu-west-1\"\n").unwrap();
    let roles = &loaded.config.roles;
    assert!(matches!(roles.defined[0].exchange, FirstExchange::Both(_)));
    assert_eq!(roles.sts_targets()[0].region, "eu-west-1");
    assert_eq!(roles.roles_anywhere_targets()[0].region, "eu-central-1");
}

#[test]
fn table_without_use_is_a_warning() {
    let loaded = parse(&good(), "region = \"eu-west-1\"\n").unwrap();
    let [warning] = &loaded.warnings[..] else {
        panic!("{:?}", loaded.warnings)
    };
    assert_eq!(warning.what, "no role uses IAM Roles Anywhere");
    assert_eq!(
        loaded.config.roles.defined[0].exchange,
        FirstExchange::WebIdentity
    );
}

#[test]
fn wrong_table_is_an_error() {
    const BY_CERTIFICATE: &str = "exchange = \"roles-anywhere\"\n";
    let with = |key: &'static str, value: &'static str| {
        let mut table = good().to_vec();
        table.retain(|(known, _)| *known != key);
        table.push((key, value));
        parse(&table, BY_CERTIFICATE)
    };
    let table = [
        (
            "profile_arn",
            "arn:aws:rolesanywhere:us-east-1:123456789012:profile/1",
            "the profile is in us-east-1, and the trust anchor in eu-central-1",
        ),
        (
            "trust_anchor_arn",
            PROFILE,
            "it is not the ARN of a trust-anchor",
        ),
        ("profile_arn", ANCHOR, "it is not the ARN of a profile"),
        (
            "profile_arn",
            "arn:aws:iam::123456789012:role/x",
            "it is not an ARN of IAM Roles Anywhere",
        ),
        (
            "profile_arn",
            "arn:aws:rolesanywhere:eu-central-1:1234:profile/1",
            "12 digits",
        ),
        (
            "profile_arn",
            "arn:aws-cn:rolesanywhere:eu-central-1:123456789012:profile/1",
            "AWS has no region",
        ),
        (
            "profile_arn",
            "arn:aws:rolesanywhere:x.y:123456789012:profile/1",
            "a region's name",
        ),
        (
            "profile_arn",
            "arn:aws:rolesanywhere:eu-central-1:123456789012:profile/",
            "it is not the ARN",
        ),
        ("endpoint", "http://example.org", "without TLS"),
        ("endpoint", "https://example.org/x", "it has a path"),
        ("ca_file", "/etc/ca.pem", "system's certificates alone"),
    ];
    for (key, value, what) in table {
        expect_error(with(key, value), key, what);
    }
    for (key, _) in good() {
        let only: Vec<_> = good()
            .into_iter()
            .filter(|(other, _)| *other != key)
            .collect();
        let problems = parse(&only, BY_CERTIFICATE).unwrap_err();
        assert!(
            problems.iter().any(|problem| problem.key.ends_with(key)),
            "{problems:?}"
        );
    }
    let own = [
        ("endpoint", "https://ra.example.org"),
        ("ca_file", "/etc/ca.pem"),
    ];
    let table = [&good()[..], &own].concat();
    let loaded = parse(&table, BY_CERTIFICATE).unwrap();
    let target = loaded.config.roles_anywhere.target.unwrap();
    assert_eq!(target.endpoint.as_deref(), Some("https://ra.example.org"));
    let aws = [
        (
            "endpoint",
            "https://rolesanywhere.eu-central-1.amazonaws.com",
        ),
        own[1],
    ];
    let table = [&good()[..], &aws].concat();
    expect_error(
        parse(&table, BY_CERTIFICATE),
        "ca_file",
        "system's certificates",
    );
}

#[test]
fn role_has_nothing_that_a_certificate_does_not_take() {
    expect_error(
        parse(&[], "exchange = \"both\"\n"),
        "exchange",
        "no trust anchor is set",
    );
    expect_error(
        parse(&good(), "exchange = \"x509\"\n"),
        "exchange",
        "it is not known",
    );
    // After an outage of tokens, a session would be wider than the one before.
    for exchange in ["both", "roles-anywhere"] {
        let role =
            format!("exchange = \"{exchange}\"\nregion = \"eu-west-1\"\npolicy = \"{{}}\"\n");
        expect_error(parse(&good(), &role), "policy", "takes no session policy");
        let arns = "policy_arns = [\"arn:aws:iam::aws:policy/ReadOnlyAccess\"]";
        let role = format!("exchange = \"{exchange}\"\nregion = \"eu-west-1\"\n{arns}\n");
        expect_error(
            parse(&good(), &role),
            "policy_arns",
            "takes no session policy",
        );
    }
    expect_error(
        parse(&good(), "exchange = \"roles-anywhere\"\naudience = \"x\"\n"),
        "audience",
        "no JWT-SVID is fetched",
    );
    let endpoint = "exchange = \"roles-anywhere\"\nsts_endpoint = \"https://sts.internal\"\n";
    expect_error(parse(&good(), endpoint), "sts_endpoint", "no STS is called");
}
