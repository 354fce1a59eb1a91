//! Names of roles and policies, at AWS and elsewhere.

use super::errors::rejected;
use super::*;

/// Only that STS knows what its roles and policies are called.
#[test]
fn names_at_another_sts_are_not_checked() {
    let elsewhere = |names: &str| {
        let text = with(
            "role_arn = \"arn:aws:iam::123456789012:role/billing\"",
            names,
        );
        [
            format!("{text}sts_endpoint = \"https://sts.example.org\"\naudience = \"other\"\n"),
            format!(
                "{}[identity]\naudience = \"other\"\n",
                text.replace(
                    "region = \"eu-central-1\"",
                    "endpoint = \"https://sts.example.org\""
                )
            ),
        ]
    };
    for name in [
        "urn:ecs:iam::ns1:role/billing",
        "arn:aws:iam:::role/app/billing",
        "arn:aws:iam::role/billing",
        "arn:aws:iam::RGW33567154695143645:role/billing",
        "arn:aws:iam::000000000000:role/billing",
        "billing",
    ] {
        let policies = "policy_arns = [\"urn:ecs:iam:::policy/ECSS3FullAccess\", \"readonly\"]";
        for text in elsewhere(&format!("role_arn = \"{name}\"\n{policies}")) {
            let role = loaded(&text).config.roles.defined[0].clone();
            assert_eq!((role.role_arn.as_str(), role.policy_arns.len()), (name, 2));
        }
        // At AWS its rules stay.
        let at_aws = with("arn:aws:iam::123456789012:role/billing", name);
        assert!(Config::parse(&at_aws, &no_env).is_err(), "{name}");
    }
    for text in elsewhere("role_arn = \"a b\"") {
        rejected(&text, &[(9, "role.role_arn", "has no spaces")]);
    }
    for text in elsewhere("role_arn = \"x\"\npolicy_arns = [\"a b\"]") {
        rejected(
            &text,
            &[(10, "role.policy_arns", "is not the ARN of a policy")],
        );
    }
    for text in elsewhere("role_arn = \"urn:ecs:iam::ns:role/{path[0]}-{path[1]}\"") {
        rejected(
            &text,
            &[(9, "role.role_arn", "two SPIFFE IDs could give one role")],
        );
    }
    // With a wrong endpoint the rules for names are unknown.
    let unknown = with(
        "role_arn = \"arn:aws:iam::123456789012:role/billing\"",
        "role_arn = \"x\"\nsts_endpoint = \"minio\"",
    );
    rejected(&unknown, &[(10, "role.sts_endpoint", "it is not a URL")]);
    // A host below AWS's suffix is not always AWS's (T38).
    let bucket = with(
        "region = \"eu-central-1\"",
        "endpoint = \"https://sts.s3.amazonaws.com\"",
    );
    rejected(
        &bucket,
        &[(
            6,
            "role.audience",
            "tokens for \"sts.amazonaws.com\" go to https://sts.s3.amazonaws.com, and its operator could use them at AWS",
        )],
    );
    rejected(
        &format!(
            "requested_roles.allow = [\"arn:aws:iam::123456789012:role/*\"]\n{bucket}[identity]\naudience = \"other\"\n"
        ),
        &[
            (1, "requested_roles.allow", "[sts] endpoint is not AWS's"),
            (7, "role.audience", "could use them at AWS"),
        ],
    );
}
