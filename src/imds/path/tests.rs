use super::*;
use crate::random_cases::for_random_cases;

#[test]
fn path_is_served_by_any_spelling_of_its_slashes() {
    let role = |name, extended| MetadataPath::Role { name, extended };
    let iam = "/latest/meta-data/iam";
    for (path, expected) in [
        ("/latest/api/token".to_owned(), MetadataPath::Token),
        ("//latest//api/token/".to_owned(), MetadataPath::Token),
        (
            format!("{iam}/security-credentials"),
            MetadataPath::RoleName,
        ),
        (
            format!("{iam}/security-credentials/"),
            MetadataPath::RoleName,
        ),
        (
            format!("{iam}/security-credentials-extended/"),
            MetadataPath::RoleName,
        ),
        (format!("{iam}/security-credentials/a"), role("a", false)),
        (
            format!("{iam}/security-credentials/a.B_-~9/"),
            role("a.B_-~9", false),
        ),
        (
            format!("{iam}/security-credentials-extended/a"),
            role("a", true),
        ),
        (
            "/latest/meta-data/placement/region".to_owned(),
            MetadataPath::Region,
        ),
        (
            "/latest/meta-data/placement/availability-zone/".to_owned(),
            MetadataPath::Zone,
        ),
        (
            "/latest/dynamic/instance-identity/document".to_owned(),
            MetadataPath::Document,
        ),
    ] {
        assert_eq!(MetadataPath::parse(&path, None), expected, "{path}");
        assert_eq!(MetadataPath::parse(&path, Some("")), expected, "{path}");
        let query = MetadataPath::parse(&path, Some("a=b"));
        assert_eq!(query, MetadataPath::Unknown, "{path}");
        assert!(is_metadata(&path));
    }
}

#[test]
fn other_path_is_unknown() {
    let long = format!(
        "/latest/meta-data/iam/security-credentials/{}",
        "a".repeat(65)
    );
    for path in [
        "",
        "/",
        "latest/api/token",
        "/latest",
        "/latest/api",
        "/latest/api/token/x",
        "/Latest/api/token",
        "/latest/%61pi/token",
        "/latest/meta-data/",
        "/latest/meta-data/instance-id",
        "/latest/meta-data/iam/info",
        "/latest/user-data",
        "/2021-03-23/meta-data/iam/security-credentials",
        "/latest/meta-data/iam/security-credentials/a/b",
        "/latest/meta-data/iam/security-credentials/..",
        "/latest/meta-data/iam/security-credentials/%61",
        "/latest/meta-data/iam/security-credentials/arn:aws:iam::123456789012:role/a",
        "/latest/meta-data/iam/security-credentials/a b",
        "/latest/./api/token",
        "*",
        &long,
    ] {
        let parsed = MetadataPath::parse(path, None);
        assert_eq!(parsed, MetadataPath::Unknown, "{path}");
    }
}

#[test]
fn path_below_latest_is_metadata() {
    for path in [
        "/latest",
        "/latest/",
        "//latest/x",
        "/latest/../v1/credentials",
    ] {
        assert!(is_metadata(path), "{path}");
    }
    for path in [
        "",
        "/",
        "latest",
        "/latestx",
        "/v1/credentials",
        "/v1/latest",
    ] {
        assert!(!is_metadata(path), "{path}");
    }
}

#[test]
fn random_path_is_unknown_or_has_one_spelling() {
    const PARTS: [&str; 14] = [
        "latest",
        "api",
        "token",
        "meta-data",
        "iam",
        "security-credentials",
        "security-credentials-extended",
        "placement",
        "region",
        "availability-zone",
        "a",
        "..",
        "%2f",
        "\u{e9}",
    ];
    for_random_cases(5000, |random| {
        let mut path = String::new();
        for _ in 0..random.usize(..8) {
            path.push_str(["/", "//", ""][random.usize(..3)]);
            path.push_str(PARTS[random.usize(..PARTS.len())]);
        }
        crate::imds::fuzzing::path(&path);
    });
}
