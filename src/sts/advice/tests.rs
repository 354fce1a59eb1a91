use std::sync::Arc;

use super::*;
use crate::identity::RoleArn;
use crate::role::{Role, StsTarget};
use crate::svid::jwt::tests::{billing, now, raw_token};

const ISSUER: &str = "https://oidc.example.org";

fn advice(reason: StsReason, answer: &str, is_aws: bool, arn: &str, algorithm: &str) -> String {
    let at = StsDestination {
        name: "STS at https://sts".to_owned(),
        is_aws,
        proxy: None,
    };
    let claims = format!(
        r#"{{"iss":"{ISSUER}","sub":"{}","aud":"shop","exp":1867225600}}"#,
        billing()
    );
    let token = raw_token(&format!(r#"{{"alg":"{algorithm}"}}"#), &claims);
    let token = JwtSvid::check(token, &billing(), "shop", now()).unwrap();
    let target = StsTarget {
        region: "eu-central-1".to_owned(),
        endpoint: None,
    };
    let grant = super::super::tests::grant(&target);
    let role = Role {
        name: "shop".to_owned(),
        ..(*grant.role).clone()
    };
    let grant = Grant {
        role: Arc::new(role),
        role_arn: RoleArn::opaque(arn).unwrap(),
        ..grant
    };
    of(
        reason,
        answer,
        &at,
        Some(FailedCall::with_token(&grant, &token)),
    )
    .unwrap_or_default()
}

#[test]
fn advice_names_the_setting_to_change() {
    const AWS: &str = "arn:aws:iam::123456789012:role/shop";
    const MINIO: &str = "arn:minio:iam:::role/x";
    // (reason, STS's answer, at AWS, the role, words of the advice)
    let table: [(StsReason, &str, bool, &str, &[&str]); 20] = [
        (
            StsReason::AccessDenied,
            "AccessDenied Not authorized to perform sts:AssumeRoleWithWebIdentity",
            true,
            AWS,
            &[
                "oidc.example.org:aud\" with \"shop\"",
                "(without https://); awsvid trust-policy writes it",
            ],
        ),
        (
            StsReason::AccessDenied,
            "AccessDenied",
            false,
            AWS,
            &["the trust policy of arn:aws", "(without https://)"],
        ),
        (
            StsReason::AccessDenied,
            "AccessDenied",
            false,
            "urn:ecs:iam::ns:role/x",
            &["the role urn:ecs:iam::ns:role/x", ISSUER],
        ),
        (
            StsReason::AccessDenied,
            "AccessDenied token verification failed: bad audience",
            false,
            "x",
            &["audience is \"shop\""],
        ),
        (
            StsReason::InvalidToken,
            "InvalidIdentityToken No OpenIDConnect provider found in your account for x",
            true,
            AWS,
            &[
                "in account 123456789012",
                "just this URL: https://oidc.example.org ",
            ],
        ),
        (
            StsReason::InvalidToken,
            "InvalidIdentityToken Incorrect token audience",
            true,
            AWS,
            &["add-client-id-to-open-id"],
        ),
        (
            StsReason::InvalidToken,
            "InvalidIdentityToken Invalid timestamp in token claims",
            true,
            AWS,
            &["SPIRE to 1.9.5"],
        ),
        (
            StsReason::InvalidToken,
            "InvalidIdentityToken Something new",
            true,
            AWS,
            &["compare the IAM provider's URL with"],
        ),
        (
            StsReason::InvalidToken,
            "InvalidToken",
            false,
            MINIO,
            &["MINIO_IDENTITY_OPENID_CONFIG_URL"],
        ),
        (
            StsReason::IssuerUnreachable,
            "",
            true,
            AWS,
            &["STS cannot read the keys of https://oidc.example.org"],
        ),
        (
            StsReason::IssuerUnreachable,
            "",
            false,
            MINIO,
            &["STS cannot read the keys of"],
        ),
        (
            StsReason::RegionDisabled,
            "",
            true,
            AWS,
            &["activate STS in eu-central-1"],
        ),
        (
            StsReason::BadRequest,
            "ValidationError too long",
            true,
            AWS,
            &["of role \"shop\"", "example.org=billing, for 3600 s"],
        ),
        (
            StsReason::BadRequest,
            "InvalidParameterValue",
            false,
            MINIO,
            &["the ARN that it prints at its start"],
        ),
        (
            StsReason::ExpiredToken,
            "ExpiredToken",
            true,
            AWS,
            &["timedatectl"],
        ),
        (
            StsReason::Misconfigured,
            "NotImplemented",
            false,
            MINIO,
            &["an STS that takes AssumeRoleWithWebIdentity"],
        ),
        (StsReason::Refused, "", true, AWS, &["what answers there"]),
        (
            StsReason::Unreachable,
            "",
            true,
            AWS,
            &["DNS, the firewall, HTTPS_PROXY and NO_PROXY"],
        ),
        (StsReason::Throttled, "Throttling", true, AWS, &[]),
        (
            StsReason::Unavailable,
            "the audience is unavailable",
            true,
            AWS,
            &[],
        ),
    ];
    for (reason, answer, is_aws, arn, fragments) in table {
        let advice = advice(reason, answer, is_aws, arn, "ES256");
        assert_eq!(
            advice.is_empty(),
            fragments.is_empty(),
            "{reason:?} {answer}: {advice}"
        );
        for word in fragments {
            assert!(advice.contains(word), "{reason:?} {answer} {arn}: {advice}");
        }
        assert!(
            is_aws || !advice.contains("awsvid trust-policy writes"),
            "{advice}"
        );
    }
}

#[test]
fn advice_names_an_unsupported_signature() {
    const ARN: &str = "arn:aws:iam::123456789012:role/shop";
    for (algorithm, reason, is_aws, named) in [
        ("PS256", StsReason::InvalidToken, true, true),
        ("PS256", StsReason::InvalidToken, false, false),
        ("PS256", StsReason::AccessDenied, true, false),
        ("RS256", StsReason::InvalidToken, true, false),
    ] {
        let advice = advice(reason, "InvalidIdentityToken", is_aws, ARN, algorithm);
        assert_eq!(
            advice.contains("PS family"),
            named,
            "{algorithm} {reason:?}: {advice}"
        );
    }
}
