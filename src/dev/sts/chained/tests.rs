use super::*;

use aws_credential_types::Credentials as SigningCredentials;
use aws_sdk_sts::error::ProvideErrorMetadata;
use aws_sdk_sts::operation::assume_role::builders::AssumeRoleFluentBuilder;
use aws_sdk_sts::types::Tag;

use crate::dev::sts::tests::{DevStsEnv, ROLE, env};

const NEXT: &str = "arn:aws:iam::000000000000:role/next";
const LAST: &str = "arn:aws:iam::000000000000:role/last";

/// The roles that the tests chain: `dev`, `next`, `last`, and others with stricter policies.
pub(in crate::dev::sts) fn trusts() -> Vec<ChainedTrust> {
    let arn = |arn: &str| RoleArn::parse(arn).unwrap();
    let trust = |name: &str, principal: &str| ChainedTrust {
        arn: arn(name),
        principal: arn(principal),
        external_id: None,
        tag_session: true,
        set_source_identity: true,
    };
    vec![
        trust(NEXT, ROLE),
        trust(LAST, NEXT),
        ChainedTrust {
            external_id: Some("shared-id".to_owned()),
            ..trust("arn:aws:iam::000000000000:role/foreign", ROLE)
        },
        ChainedTrust {
            tag_session: false,
            set_source_identity: false,
            ..trust("arn:aws:iam::000000000000:role/plain", NEXT)
        },
    ]
}

fn call(env: &DevStsEnv, by: &SigningCredentials, role: &str) -> AssumeRoleFluentBuilder {
    let role = match role.starts_with("arn:") {
        true => role.to_owned(),
        false => format!("arn:aws:iam::000000000000:role/{role}"),
    };
    let client = env.client(Some(by.clone()));
    client
        .assume_role()
        .role_arn(role)
        .role_session_name("alice")
}

fn tag(key: &str, value: &str) -> Tag {
    Tag::builder().key(key).value(value).build().unwrap()
}

/// Assumes a role, and returns its credentials.
async fn assumed(call: AssumeRoleFluentBuilder) -> SigningCredentials {
    let output = call.send().await.unwrap();
    let issued = output.credentials().unwrap();
    let token = Some(issued.session_token().to_owned());
    SigningCredentials::new(
        issued.access_key_id(),
        issued.secret_access_key(),
        token,
        None,
        "test",
    )
}

#[track_caller]
fn check(error: impl ProvideErrorMetadata, code: &str, message: &str) {
    let text = error.message().unwrap_or_default();
    assert_eq!(error.code(), Some(code), "{text}");
    assert!(text.contains(message), "{text}");
}

/// Sends the call, which has to fail.
async fn rejected(call: AssumeRoleFluentBuilder, code: &str, message: &str) {
    check(call.send().await.unwrap_err(), code, message);
}

#[tokio::test]
async fn chain_of_three_keeps_transitive_tags_and_the_source_identity() {
    let env = env().await;
    let first = env.session(900);
    let next = call(&env, &first, NEXT)
        .tags(tag("team", "shop"))
        .tags(tag("pod", "1"))
        .transitive_tag_keys("team")
        .source_identity("shop=billing");
    let next = assumed(next).await;
    let last = assumed(call(&env, &next, LAST).tags(tag("pod", "2"))).await;
    let client = env.client(Some(last.clone()));
    let identity = client.get_caller_identity().send().await.unwrap();
    let arn = "arn:aws:sts::000000000000:assumed-role/last/alice";
    assert_eq!(identity.arn(), Some(arn));
    let facts = env.sts_session(last.access_key_id()).facts;
    let tags = [("pod", "2"), ("team", "shop")].map(|(key, value)| (key.into(), value.into()));
    assert_eq!(facts.tags, BTreeMap::from(tags));
    assert_eq!(facts.source_identity.as_deref(), Some("shop=billing"));
    // A transitive tag and the source identity stay what they are.
    let other = call(&env, &next, LAST).tags(tag("TEAM", "other"));
    rejected(
        other,
        "InvalidParameterValue",
        "conflicts with a transitive tag key",
    )
    .await;
    let other = call(&env, &next, LAST).source_identity("other");
    rejected(other, "InvalidParameterValue", "cannot be changed").await;
    assumed(call(&env, &next, LAST).source_identity("shop=billing")).await;
    // They need their actions in the trust policy, also where they are inherited.
    let plain = call(&env, &next, "plain");
    rejected(plain, "AccessDenied", "perform: sts:TagSession on resource").await;
    let next = assumed(call(&env, &first, NEXT).source_identity("shop")).await;
    let plain = call(&env, &next, "plain");
    rejected(plain, "AccessDenied", "perform: sts:SetSourceIdentity").await;
    assumed(call(
        &env,
        &assumed(call(&env, &first, NEXT)).await,
        "plain",
    ))
    .await;
}

#[tokio::test]
async fn trust_policy_and_signature_decide() {
    let env = env().await;
    let first = env.session(900);
    let denied = "is not authorized to perform: sts:AssumeRole on resource";
    for role in [LAST, "missing", ROLE] {
        rejected(call(&env, &first, role), "AccessDenied", denied).await;
    }
    rejected(call(&env, &first, "foreign"), "AccessDenied", denied).await;
    let wrong = call(&env, &first, "foreign").external_id("shared-ID");
    rejected(wrong, "AccessDenied", denied).await;
    assumed(call(&env, &first, "foreign").external_id("shared-id")).await;
    let forged = SigningCredentials::new(
        first.access_key_id(),
        "another key",
        first.session_token().map(str::to_owned),
        None,
        "test",
    );
    rejected(
        call(&env, &forged, NEXT),
        "SignatureDoesNotMatch",
        "does not match",
    )
    .await;
    rejected(
        call(&env, &env.session(-1), NEXT),
        "ExpiredToken",
        "is expired",
    )
    .await;
}

#[tokio::test]
async fn parameters_have_the_limits_of_sts() {
    let env = env().await;
    let first = env.session(900);
    let next = || call(&env, &first, NEXT);
    rejected(
        next().duration_seconds(3601),
        "ValidationError",
        "exceeds the 1 hour session limit for roles assumed by role chaining",
    )
    .await;
    assumed(next().duration_seconds(3600)).await;
    let same = next().tags(tag("a", "1")).tags(tag("A", "2"));
    rejected(same, "InvalidParameterValue", "Duplicate tag keys").await;
    let missing = next().tags(tag("a", "1")).transitive_tag_keys("b");
    rejected(missing, "InvalidParameterValue", "must be included").await;
    let many = (0..51)
        .map(|number| tag(&number.to_string(), "x"))
        .collect();
    rejected(
        next().set_tags(Some(many)),
        "ValidationError",
        "equal to 50",
    )
    .await;
    for (key, value) in [
        ("a*", "x"),
        ("a", "%"),
        ("aws:a", "x"),
        ("a", &*"x".repeat(257)),
    ] {
        rejected(
            next().tags(tag(key, value)),
            "ValidationError",
            "tags.member",
        )
        .await;
    }
    rejected(
        next().source_identity("a b"),
        "ValidationError",
        "sourceIdentity",
    )
    .await;
    rejected(next().external_id("a b"), "ValidationError", "externalId").await;
    rejected(next().policy("{}"), "MalformedPolicyDocument", "JSON").await;
    let large = (0..20)
        .map(|number| tag(&number.to_string(), &"x".repeat(250)))
        .collect();
    rejected(
        next().set_tags(Some(large)),
        "PackedPolicyTooLarge",
        "of the limit",
    )
    .await;
}
