use super::*;

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn pattern(text: &str) -> SpiffeIdPattern {
    SpiffeIdPattern::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn template(text: &str) -> ArnTemplate {
    ArnTemplate::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn spiffe_ids_are_taken_apart() {
    let table: [(&str, &str, &[&str]); 4] = [
        ("spiffe://example.org/billing", "example.org", &["billing"]),
        ("spiffe://example.org/ns/shop/sa/billing", "example.org", &["ns", "shop", "sa", "billing"]),
        ("spiffe://a_b-1.c/A.b_c-9/..x/.../x.", "a_b-1.c", &["A.b_c-9", "..x", "...", "x."]),
        ("spiffe://1/2", "1", &["2"]),
    ];
    for (text, domain, segments) in table {
        let id = id(text);
        assert_eq!((id.as_str(), id.trust_domain()), (text, domain));
        assert_eq!(id.segments().collect::<Vec<_>>(), segments);
        assert_eq!((id.to_string(), format!("{id:?}")), (text.to_owned(), text.to_owned()));
    }
    let longest = format!("spiffe://example.org/{}", "x".repeat(2048 - 21));
    assert_eq!(id(&longest).as_str().len(), 2048);
    assert_eq!(id(&format!("spiffe://{}/x", "d".repeat(255))).trust_domain().len(), 255);
}

#[test]
fn what_is_no_spiffe_id() {
    let table = [
        ("", "begins with spiffe://"),
        ("example.org/billing", "begins with spiffe://"),
        ("SPIFFE://example.org/billing", "begins with spiffe://"),
        ("https://example.org/billing", "begins with spiffe://"),
        (" spiffe://example.org/billing", "begins with spiffe://"),
        ("spiffe:/example.org/billing", "begins with spiffe://"),
        ("spiffe://", "no trust domain name"),
        ("spiffe:///billing", "no trust domain name"),
        ("spiffe://Example.org/billing", "no trust domain name"),
        ("spiffe://example.org:8080/billing", "no trust domain name"),
        ("spiffe://user@example.org/billing", "no trust domain name"),
        ("spiffe://exämple.org/billing", "no trust domain name"),
        ("spiffe://exa%6dple.org/billing", "no trust domain name"),
        ("spiffe://example.org", "names a trust domain"),
        ("spiffe://example.org/", "names a trust domain"),
        ("spiffe://example.org/billing/", "`` is no path segment"),
        ("spiffe://example.org//billing", "`` is no path segment"),
        ("spiffe://example.org/a//b", "`` is no path segment"),
        ("spiffe://example.org/./billing", "`.` is no path segment"),
        ("spiffe://example.org/a/../billing", "`..` is no path segment"),
        ("spiffe://example.org/a=b", "`a=b` is no path segment"),
        ("spiffe://example.org/a%2Fb", "`a%2Fb` is no path segment"),
        ("spiffe://example.org/billing?x", "`billing?x` is no path segment"),
        ("spiffe://example.org/billing#x", "`billing#x` is no path segment"),
        ("spiffe://example.org/bill ing", "`bill ing` is no path segment"),
        ("spiffe://example.org/billing\n", "is no path segment"),
        ("spiffe://example.org/b\u{0}", "is no path segment"),
        ("spiffe://example.org/ä", "`ä` is no path segment"),
        ("spiffe://example.org/*", "`*` is no path segment"),
    ];
    for (text, words) in table {
        let error = SpiffeId::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    let too_long = format!("spiffe://example.org/{}", "x".repeat(2048 - 20));
    assert!(SpiffeId::parse(&too_long).unwrap_err().to_string().contains("at most 2048 bytes, this one 2049"));
    let domain = format!("spiffe://{}/x", "d".repeat(256));
    assert!(SpiffeId::parse(&domain).unwrap_err().to_string().contains("no trust domain name"));
}

#[test]
fn patterns_cover() {
    // (pattern, what it covers, what it doesn't)
    let table: [(&str, &[&str], &[&str]); 6] = [
        ("td/a/b", &["td/a/b"], &["td/a", "td/a/b/c", "td/a/B", "td/b/a", "other/a/b"]),
        ("td/a/*", &["td/a/b", "td/a/c"], &["td/a", "td/a/b/c", "td/b/b", "other/a/b"]),
        ("td/*/b", &["td/a/b", "td/b/b"], &["td/b", "td/a/c", "td/a/a/b"]),
        ("td/a/**", &["td/a/b", "td/a/b/c/d"], &["td/a", "td/b/b", "td/ab/c", "other/a/b"]),
        ("td/**", &["td/a", "td/a/b"], &["td2/a", "other/a"]),
        ("td/*/**", &["td/a/b", "td/a/b/c"], &["td/a", "other/a/b"]),
    ];
    for (text, covered, others) in table {
        let pattern = pattern(&format!("spiffe://{text}"));
        for other in covered {
            assert!(pattern.matches(&id(&format!("spiffe://{other}"))), "{text} {other}");
        }
        for other in others {
            assert!(!pattern.matches(&id(&format!("spiffe://{other}"))), "{text} {other}");
        }
    }
}

#[test]
fn what_is_told_of_a_pattern() {
    // (pattern, exact, wildcard before a fixed end, least segments)
    let table = [
        ("spiffe://td/ns/shop/sa/billing", true, false, 4),
        ("spiffe://td/ns/*/sa/billing", false, true, 4),
        ("spiffe://td/*/billing", false, true, 2),
        ("spiffe://td/ns/*/sa/*", false, false, 4),
        ("spiffe://td/ns/*/**", false, false, 3),
        ("spiffe://td/ns/**", false, false, 2),
        ("spiffe://td/*", false, false, 1),
    ];
    for (text, exact, before_end, least) in table {
        let pattern = pattern(text);
        assert_eq!(pattern.exact(), exact.then(|| id(text)), "{text}");
        assert_eq!((pattern.wildcard_before_fixed_end(), pattern.least_segments()), (before_end, least), "{text}");
        assert_eq!((pattern.trust_domain(), pattern.as_str()), ("td", text));
    }
}

#[test]
fn what_is_no_pattern() {
    let table = [
        ("billing", "begins with spiffe://"),
        ("spiffe://*/billing", "a pattern's trust domain has no wildcard"),
        ("spiffe://*.org/billing", "a pattern's trust domain has no wildcard"),
        ("spiffe://td", "needs a path"),
        ("spiffe://td/", "needs a path"),
        ("spiffe://td/**/billing", "it can only be the last segment"),
        ("spiffe://td/**/**", "it can only be the last segment"),
        ("spiffe://td/bill*", "`bill*` is no path segment"),
        ("spiffe://td/a/***", "`***` is no path segment"),
        ("spiffe://td/a//b", "`` is no path segment"),
        ("spiffe://td/a/", "`` is no path segment"),
        ("spiffe://td/../a", "`..` is no path segment"),
    ];
    for (text, words) in table {
        let error = SpiffeIdPattern::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    let too_long = format!("spiffe://td/{}", "x".repeat(2048));
    assert!(SpiffeIdPattern::parse(&too_long).unwrap_err().to_string().contains("at most 2048 bytes"));
}

#[test]
fn role_arns_of_any_partition() {
    // (ARN, account, whether it is at AWS)
    let table = [
        ("arn:aws:iam::123456789012:role/billing", Some("123456789012"), true),
        ("arn:aws:iam::123456789012:role/team/shop/billing_1+2=3,4.5@6-7", Some("123456789012"), true),
        ("arn:aws-cn:iam::123456789012:role/x", Some("123456789012"), true),
        ("arn:aws-us-gov:iam::123456789012:role/x", Some("123456789012"), true),
        ("arn:aws-iso-b:iam::000000000000:role/x", Some("000000000000"), true),
        ("arn:minio:iam:::role/x", None, false),
        ("arn:minio:iam:::role/idp-vault:x", None, false),
        ("arn:ceph:sts:eu:tenant:role/x", Some("tenant"), false),
    ];
    for (text, account, is_aws) in table {
        let arn = RoleArn::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!((arn.as_str(), arn.account(), arn.is_aws()), (text, account, is_aws));
        assert_eq!(arn.to_string(), text);
    }
    let role = |length: usize| RoleArn::parse(&format!("arn:aws:iam::123456789012:role/{}", "x".repeat(length)));
    assert!(role(64).is_ok() && role(65).is_err());
    let minio = |length: usize| RoleArn::parse(&format!("arn:minio:iam:::role/{}", "x".repeat(length - 21)));
    assert!(minio(2048).is_ok() && minio(2049).is_err());
}

#[test]
fn what_is_no_role_arn() {
    let table = [
        ("", "20 to 2048 characters, this one 0"),
        ("arn:x:y:::role/z", "20 to 2048 characters"),
        ("billing-role-in-production", "six parts"),
        ("arn:aws:iam::123456789012", "six parts"),
        ("nra:aws:iam::123456789012:role/billing", "not of the form"),
        ("arn::iam::123456789012:role/billing", "not of the form"),
        ("arn:aws:iam::123456789012:user/billing", "not of the form"),
        ("arn:aws:iam::123456789012:role/", "not of the form"),
        ("arn:aws:iam::123456789012:role", "not of the form"),
        ("arn:aws:iam::123456789012:roles/billing", "not of the form"),
        ("arn:minio::::role/billing1", "not of the form"),
        ("arn:aws:sts::123456789012:assumed-role/a/b", "not of the form"),
        ("arn:aws:s3::123456789012:role/billing", "arn:aws:iam::<12 digits>"),
        ("arn:aws:iam:eu-west-1:123456789012:role/billing", "arn:aws:iam::<12 digits>"),
        ("arn:aws:iam::12345678901:role/billing", "arn:aws:iam::<12 digits>"),
        ("arn:aws:iam::1234567890123:role/billing", "arn:aws:iam::<12 digits>"),
        ("arn:aws:iam::12345678901x:role/billing", "arn:aws:iam::<12 digits>"),
        ("arn:aws:iam:::role/billing", "arn:aws:iam::<12 digits>"),
        ("arn:aws-cn:iam::aws:role/billing", "arn:aws:iam::<12 digits>"),
        ("arn:aws:iam::123456789012:role/bill ing", "no spaces"),
        ("arn:aws:iam::123456789012:role/billing\n", "no spaces"),
        ("arn:aws:iam::123456789012:role/bílling", "outside ASCII"),
        ("arn:aws:iam::123456789012:role/shop/", "an AWS role's name"),
        ("arn:aws:iam::123456789012:role/a:b", "an AWS role's name"),
        ("arn:aws:iam::123456789012:role/app-*", "an AWS role's name"),
        ("arn:aws:iam::123456789012:role/app-{path[0]}", "an AWS role's name"),
    ];
    for (text, words) in table {
        let error = RoleArn::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn templates_are_filled_from_the_path() {
    let billing = id("spiffe://td/ns/shop/sa/billing");
    // (the role in the template, what it becomes, the highest segment)
    let table = [
        ("billing", Some("billing"), None),
        ("{path[3]}", Some("billing"), Some(3)),
        ("{path[1]}-{path[3]}", Some("shop-billing"), Some(3)),
        ("{path[3]}{path[1]}", Some("billingshop"), Some(3)),
        ("team/{path[1]}/{path[1]}", Some("team/shop/shop"), Some(1)),
        ("app-{path[0]}-x", Some("app-ns-x"), Some(0)),
        ("{path[4]}", None, Some(4)),
        ("{path[18446744073709551615]}", None, Some(usize::MAX)),
    ];
    for (role, becomes, highest) in table {
        let text = format!("arn:aws:iam::123456789012:role/{role}");
        let template = template(&text);
        let arn = becomes.map(|name| format!("arn:aws:iam::123456789012:role/{name}"));
        assert_eq!(template.render(&billing).map(|arn| arn.to_string()), arn, "{role}");
        assert_eq!((template.highest_segment(), template.as_str()), (highest, text.as_str()));
    }
    let minio = template("arn:minio:iam:::role/{path[1]}").render(&billing);
    assert_eq!(minio.unwrap().as_str(), "arn:minio:iam:::role/shop");
    // IAM has no role of so long a name.
    let long = id(&format!("spiffe://td/{}", "x".repeat(65)));
    assert_eq!(template("arn:aws:iam::123456789012:role/{path[0]}").render(&long), None);
}

#[test]
fn what_is_no_template() {
    let table = [
        ("{path[0]}", "20 to 2048 characters"),
        ("arn:aws:iam::123456789012:role/{path[0]", "`{` is not closed"),
        ("arn:aws:iam::123456789012:role/{", "`{` is not closed"),
        ("arn:aws:iam::123456789012:role/{}", "`{}` is not known"),
        ("arn:aws:iam::123456789012:role/{name}", "`{name}` is not known"),
        ("arn:aws:iam::123456789012:role/{path}", "`{path}` is not known"),
        ("arn:aws:iam::123456789012:role/{path[]}", "is not known"),
        ("arn:aws:iam::123456789012:role/{path[-1]}", "is not known"),
        ("arn:aws:iam::123456789012:role/{path[+1]}", "is not known"),
        ("arn:aws:iam::123456789012:role/{path[1] }", "is not known"),
        ("arn:aws:iam::123456789012:role/{path[99999999999999999999]}", "is not known"),
        ("arn:aws:iam::123456789012:role/{{path[0]}}", "`{{path[0]}` is not known"),
        ("arn:aws:iam::123456789012:role/x}", "an AWS role's name"),
        // The account decides whose role it is: nothing in a SPIFFE ID may.
        ("arn:aws:iam::{path[0]}:role/billing", "<12 digits>"),
        ("arn:aws:iam::123456789012:{path[0]}/billing", "not of the form"),
    ];
    for (text, words) in table {
        let error = ArnTemplate::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn a_fixed_template_is_the_arn_itself() {
    let arn = RoleArn::parse("arn:aws:iam::123456789012:role/{path[0]}/x").unwrap();
    let fixed = ArnTemplate::fixed(&arn);
    assert_eq!((fixed.render(&id("spiffe://td/admin")), fixed.highest_segment()), (Some(arn.clone()), None));
    assert_eq!(fixed.as_str(), arn.as_str());
}

#[test]
fn session_names() {
    let of = |text: &str| SessionName::of(&id(text)).as_str().to_owned();
    assert_eq!(of("spiffe://example.org/ns/shop/sa/billing"), "example.org=ns=shop=sa=billing");
    assert_eq!(of("spiffe://a/b"), "a=b");
    let longest = format!("spiffe://example.org/{}", "x".repeat(52));
    assert_eq!(of(&longest), format!("example.org={}", "x".repeat(52)));
    assert_eq!(of(&longest).len(), 64);

    // sha256 of the ID, by coreutils.
    let long = "spiffe://example.org/ns/a-namespace-of-some-length/sa/a-service-account-of-some-length";
    let name = of(long);
    assert_eq!(name, "example.org=ns=a-namespace-of-some-length=sa=a-=62d6b58507158e07");
    for text in [long, &longest, "spiffe://a/b"] {
        assert!(SessionName::parse(&of(text)).is_ok(), "{text}");
    }
}

#[test]
fn session_names_never_collide() {
    let head = "spiffe://example.org/ns/a-namespace-of-some-lengt";
    assert_eq!(head.len() - "spiffe://".len(), 40);
    // IDs that begin alike, around the length at which they are shortened.
    let mut ids: Vec<String> = (0..60).map(|length| format!("{head}/{}", "x".repeat(length + 1))).collect();
    ids.extend((0..60).map(|length| format!("{head}/{}y", "x".repeat(length))));
    ids.extend((0..30).map(|length| format!("{head}/{}/y", "x".repeat(length + 1))));
    // Whoever may choose his path could choose it to read as another's shortened name.
    let shortened: Vec<_> = ids.iter().map(|text| SessionName::of(&id(text))).collect();
    ids.extend(shortened.iter().map(|name| format!("spiffe://{}", name.as_str().replace('=', "/"))));
    ids.sort();
    ids.dedup();
    let mut names: Vec<_> = ids.iter().map(|text| SessionName::of(&id(text)).as_str().to_owned()).collect();
    assert!(names.iter().all(|name| SessionName::parse(name).is_ok()));
    names.sort();
    names.dedup();
    assert_eq!(names.len(), ids.len());
}

#[test]
fn configured_session_names() {
    for text in ["ab", "billing@node-1", "a_b+c=d,e.f@g-h", &"x".repeat(64)] {
        assert_eq!(SessionName::parse(text).unwrap().as_str(), text);
    }
    for text in ["", "a", "a b", "a/b", "a:b", "ä1", "a\n", &"x".repeat(65)] {
        assert!(SessionName::parse(text).is_err(), "{text:?}");
    }
}
