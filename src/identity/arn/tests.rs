mod properties;

use super::*;

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn template(text: &str) -> ArnTemplate {
    ArnTemplate::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

const AWS: &str = "arn:aws:iam::123456789012:role/";

#[test]
fn arn_at_aws_has_account_and_partition() {
    let table = [
        (
            "arn:aws:iam::123456789012:role/billing",
            "123456789012",
            "aws",
        ),
        (
            "arn:aws:iam::123456789012:role/team/shop/billing_1+2=3,4.5@6-7",
            "123456789012",
            "aws",
        ),
        (
            "arn:aws-cn:iam::123456789012:role/x",
            "123456789012",
            "aws-cn",
        ),
        (
            "arn:aws-us-gov:iam::123456789012:role/x",
            "123456789012",
            "aws-us-gov",
        ),
        (
            "arn:aws-iso-b:iam::000000000000:role/x",
            "000000000000",
            "aws-iso-b",
        ),
    ];
    for (text, account, partition) in table {
        let arn = RoleArn::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(
            (arn.as_str(), arn.account(), arn.partition()),
            (text, Some(account), Some(partition))
        );
        assert_eq!((arn.to_string().as_str(), arn.is_aws()), (text, true));
        // Another STS may use AWS's form.
        assert_eq!(RoleArn::opaque(text), Ok(arn));
    }
    let role = |length: usize| RoleArn::parse(&format!("{AWS}{}", "x".repeat(length)));
    assert!(role(64).is_ok() && role(65).is_err());
}

/// Names of roles from the documents and code of other implementations.
#[test]
fn opaque_name_is_accepted_unchanged() {
    let table = [
        // minio/minio, docs/sts/web-identity.md. The name may be chosen
        // (MINIO_IDENTITY_OPENID_ROLE_POLICY_<name>).
        "arn:minio:iam:::role/nOybJqMNzNmroqEKq5D0EUsRZw0",
        "arn:minio:iam:::role/idp-vault:x",
        // ceph/ceph, doc/radosgw/role.rst: no account, or a tenant by its name.
        // doc/radosgw/account.rst: an account's ID.
        "arn:aws:iam:::role/application_abc/component_xyz/S3Access",
        "arn:aws:iam::tenant:role/S3Access",
        "arn:aws:iam::RGW33567154695143645:role/S3Access",
        // seaweedfs/seaweedfs, weed/iam/utils/arn_utils_test.go: without the account's colon.
        "arn:aws:iam::role/Division/Team/Role",
        // Dell ECS and ObjectScale, administration guides, "Accessing accounts using AssumeRole".
        "urn:ecs:iam::apj:role/upgradeJoe",
        "urn:osc:iam::ns1:role/assumeRoleSameAccount",
        // NetApp StorageGRID, "Policies and permissions": tenants have 20 digits, and groups
        // replace roles.
        "arn:aws:iam::27233906934684427525:group/tenant2group1",
        "urn:sgws:identity::87066461224079950546:group/x",
        // scality/vault: as AWS, with a path that is longer than a name may be.
        "arn:aws:iam::545393165945:role/scality-internal/storage-manager-role",
        // rustfs/rustfs, rustfs/src/admin/handlers/sts.rs: the parameter is ignored.
        "x",
        "consoleAdmin",
    ];
    for text in table {
        let arn = RoleArn::opaque(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!((arn.as_str(), arn.to_string().as_str()), (text, text));
        let is_aws = text.contains("::545393165945:role/");
        assert_eq!(
            (
                arn.is_aws(),
                arn.account().is_some(),
                arn.partition().is_some()
            ),
            (is_aws, is_aws, is_aws),
            "{text}"
        );
        assert_eq!(
            ArnTemplate::opaque(text)
                .unwrap()
                .render(&id("spiffe://td/x")),
            Some(arn),
            "{text}"
        );
    }
    let name = |length: usize| RoleArn::opaque(&"x".repeat(length));
    assert!(name(2048).is_ok() && name(2049).is_err() && name(0).is_err());
    for text in [
        "a b",
        "a\tb",
        "a\n",
        "a\0b",
        "a\u{7f}",
        "bílling",
        "a\u{202e}b",
    ] {
        assert!(RoleArn::opaque(text).is_err(), "{text:?}");
        assert!(ArnTemplate::opaque(text).is_err(), "{text:?}");
    }
}

#[test]
fn arn_that_is_invalid_at_aws_is_an_error() {
    let table = [
        ("", "20 to 2048 characters, this one 0"),
        ("arn:x:y:::role/z", "20 to 2048 characters"),
        ("billing-role-in-production", "six parts"),
        ("arn:aws:iam::123456789012", "six parts"),
        ("arn:aws:iam::role/billing", "six parts"),
        ("nra:aws:iam::123456789012:role/billing", "not of the form"),
        ("urn:ecs:iam::ns:role/billing", "not of the form"),
        ("arn::iam::123456789012:role/billing", "not of the form"),
        ("arn:aws:iam::123456789012:user/billing", "not of the form"),
        ("arn:aws:iam::123456789012:role/", "not of the form"),
        ("arn:aws:iam::123456789012:role", "not of the form"),
        ("arn:aws:iam::123456789012:roles/billing", "not of the form"),
        ("arn:minio::::role/billing1", "not of the form"),
        (
            "arn:minio:iam:::role/billing",
            "AWS has no roles in a partition `minio`",
        ),
        (
            "arn:aws:sts::123456789012:assumed-role/a/b",
            "not of the form",
        ),
        (
            "arn:aws:s3::123456789012:role/billing",
            "arn:aws:iam::<12 digits>",
        ),
        (
            "arn:aws:iam:eu-west-1:123456789012:role/billing",
            "arn:aws:iam::<12 digits>",
        ),
        (
            "arn:aws:iam::12345678901:role/billing",
            "arn:aws:iam::<12 digits>",
        ),
        (
            "arn:aws:iam::1234567890123:role/billing",
            "arn:aws:iam::<12 digits>",
        ),
        (
            "arn:aws:iam::12345678901x:role/billing",
            "arn:aws:iam::<12 digits>",
        ),
        ("arn:aws:iam:::role/billing", "arn:aws:iam::<12 digits>"),
        (
            "arn:aws-cn:iam::aws:role/billing",
            "arn:aws:iam::<12 digits>",
        ),
        ("arn:aws:iam::123456789012:role/bill ing", "no spaces"),
        ("arn:aws:iam::123456789012:role/billing\n", "no spaces"),
        ("arn:aws:iam::123456789012:role/bílling", "outside ASCII"),
        ("arn:aws:iam::123456789012:role/shop/", "an AWS role's name"),
        ("arn:aws:iam::123456789012:role/a:b", "an AWS role's name"),
        ("arn:aws:iam::123456789012:role/app-*", "an AWS role's name"),
        (
            "arn:aws:iam::123456789012:role/app-{path[0]}",
            "an AWS role's name",
        ),
    ];
    for (text, words) in table {
        let error = RoleArn::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn template_renders_segments_of_the_path() {
    let billing = id("spiffe://td/ns/shop/sa/billing");
    // (the role in the template, what it becomes, the segments)
    let table: [(&str, Option<&str>, &[usize]); 9] = [
        ("billing", Some("billing"), &[]),
        ("{path[3]}", Some("billing"), &[3]),
        ("{path[1]}={path[3]}", Some("shop=billing"), &[1, 3]),
        ("{path[3]}-x@{path[1]}", Some("billing-x@shop"), &[3, 1]),
        ("team/{path[1]}/{path[1]}", Some("team/shop/shop"), &[1, 1]),
        ("app-{path[0]}-x", Some("app-ns-x"), &[0]),
        ("{path[4]}", None, &[4]),
        ("{path[18446744073709551615]}", None, &[usize::MAX]),
        (
            "{path[1]}+{path[2]},{path[3]}",
            Some("shop+sa,billing"),
            &[1, 2, 3],
        ),
    ];
    for (role, becomes, segments) in table {
        let text = format!("{AWS}{role}");
        let template = template(&text);
        let arn = becomes.map(|name| format!("{AWS}{name}"));
        assert_eq!(
            template.render(&billing).map(|arn| arn.to_string()),
            arn,
            "{role}"
        );
        assert_eq!(
            (template.segments().as_slice(), template.as_str()),
            (segments, text.as_str())
        );
        assert_eq!(template.highest_segment(), segments.iter().copied().max());
    }
    // The account of another STS is not checked.
    let opaque = |text: &str| {
        ArnTemplate::opaque(text)
            .unwrap()
            .render(&billing)
            .unwrap()
            .to_string()
    };
    assert_eq!(
        opaque("arn:minio:iam:::role/{path[1]}"),
        "arn:minio:iam:::role/shop"
    );
    assert_eq!(
        opaque("urn:ecs:iam::{path[1]}:role/{path[3]}"),
        "urn:ecs:iam::shop:role/billing"
    );
    assert_eq!(opaque("{path[3]}"), "billing");
    // IAM's role names are not this long, and STS rejects longer ones.
    let long = id(&format!("spiffe://td/{}", "x".repeat(65)));
    assert_eq!(template(&format!("{AWS}{{path[0]}}")).render(&long), None);
    let longest = ArnTemplate::opaque(&format!("{}{{path[0]}}", "x".repeat(2040))).unwrap();
    assert_eq!(longest.render(&long), None);
}

#[test]
fn template_parser_rejects_invalid_templates() {
    let table = [
        ("{path[0]}", "20 to 2048 characters"),
        (
            "arn:aws:iam::123456789012:role/{path[0]",
            "`{` is not closed",
        ),
        ("arn:aws:iam::123456789012:role/{", "`{` is not closed"),
        ("arn:aws:iam::123456789012:role/{}", "`{}` is not known"),
        (
            "arn:aws:iam::123456789012:role/{name}",
            "`{name}` is not known",
        ),
        (
            "arn:aws:iam::123456789012:role/{path}",
            "`{path}` is not known",
        ),
        ("arn:aws:iam::123456789012:role/{path[]}", "is not known"),
        ("arn:aws:iam::123456789012:role/{path[-1]}", "is not known"),
        ("arn:aws:iam::123456789012:role/{path[+1]}", "is not known"),
        ("arn:aws:iam::123456789012:role/{path[1] }", "is not known"),
        (
            "arn:aws:iam::123456789012:role/{path[99999999999999999999]}",
            "is not known",
        ),
        (
            "arn:aws:iam::123456789012:role/{{path[0]}}",
            "`{{path[0]}` is not known",
        ),
        ("arn:aws:iam::123456789012:role/x}", "an AWS role's name"),
        // The account decides on the owner of the role, so a SPIFFE ID must not choose it.
        ("arn:aws:iam::{path[0]}:role/billing", "<12 digits>"),
        (
            "arn:aws:iam::123456789012:{path[0]}/billing",
            "not of the form",
        ),
        (
            "arn:aws-{path[0]}:iam::123456789012:role/billing",
            "can only follow `role/`",
        ),
    ];
    for (text, words) in table {
        let error = ArnTemplate::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}

/// Placeholders need a separator, so that two SPIFFE IDs cannot render one role (T36).
#[test]
fn template_needs_a_separator_between_placeholders() {
    for between in ["", "-", ".", "_", "-role-", "x"] {
        let text = format!("{AWS}{{path[1]}}{between}{{path[3]}}");
        for error in [
            ArnTemplate::parse(&text).expect_err(&text),
            ArnTemplate::opaque(&text).expect_err(&text),
        ] {
            assert!(
                error
                    .to_string()
                    .contains("two SPIFFE IDs could give one role"),
                "{text}: {error}"
            );
        }
        let third = format!("{AWS}{{path[1]}}={{path[2]}}{between}{{path[3]}}");
        assert!(ArnTemplate::parse(&third).is_err(), "{third}");
    }
    // Different segments render different ARNs.
    let parts = ["a", "b", "a-b", "b-a", "a-", "-b", "a.b", "_"];
    for between in ["=", "+", ",", "@", "/", "-=-", "a=b"] {
        let template = template(&format!("{AWS}x{{path[0]}}{between}{{path[1]}}a"));
        let mut values = std::collections::BTreeSet::new();
        for (one, other) in parts
            .iter()
            .flat_map(|one| parts.iter().map(move |other| (one, other)))
        {
            let arn = template
                .render(&id(&format!("spiffe://td/{one}/{other}")))
                .unwrap();
            assert!(
                values.insert(arn.to_string()),
                "{between}: {arn} for {one} and {other}, too"
            );
        }
    }
}

#[test]
fn fixed_template_renders_the_arn_itself() {
    let arn = RoleArn::opaque("arn:aws:iam::123456789012:role/{path[0]}/x").unwrap();
    let fixed = ArnTemplate::fixed(&arn);
    assert_eq!(
        (
            fixed.render(&id("spiffe://td/admin")),
            fixed.highest_segment()
        ),
        (Some(arn.clone()), None)
    );
    assert_eq!(fixed.as_str(), arn.as_str());
}
