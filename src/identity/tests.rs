mod properties;

use super::*;

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn pattern(text: &str) -> SpiffeIdPattern {
    SpiffeIdPattern::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn spiffe_id_has_trust_domain_and_segments() {
    let table: [(&str, &str, &[&str]); 4] = [
        ("spiffe://example.org/billing", "example.org", &["billing"]),
        (
            "spiffe://example.org/ns/shop/sa/billing",
            "example.org",
            &["ns", "shop", "sa", "billing"],
        ),
        (
            "spiffe://a_b-1.c/A.b_c-9/..x/.../x.",
            "a_b-1.c",
            &["A.b_c-9", "..x", "...", "x."],
        ),
        ("spiffe://1/2", "1", &["2"]),
    ];
    for (text, domain, segments) in table {
        let id = id(text);
        assert_eq!((id.as_str(), id.trust_domain()), (text, domain));
        assert_eq!(id.segments().collect::<Vec<_>>(), segments);
        assert_eq!(
            (id.to_string(), format!("{id:?}")),
            (text.to_owned(), text.to_owned())
        );
    }
    let longest = format!("spiffe://example.org/{}", "x".repeat(2048 - 21));
    assert_eq!(id(&longest).as_str().len(), 2048);
    assert_eq!(
        id(&format!("spiffe://{}/x", "d".repeat(255)))
            .trust_domain()
            .len(),
        255
    );
}

#[test]
fn spiffe_id_parser_rejects_invalid_ids() {
    let table = [
        ("", "begins with spiffe://"),
        ("example.org/billing", "begins with spiffe://"),
        ("SPIFFE://example.org/billing", "begins with spiffe://"),
        ("https://example.org/billing", "begins with spiffe://"),
        (" spiffe://example.org/billing", "begins with spiffe://"),
        ("spiffe:/example.org/billing", "begins with spiffe://"),
        ("spiffe://", "not a trust domain name"),
        ("spiffe:///billing", "not a trust domain name"),
        ("spiffe://Example.org/billing", "not a trust domain name"),
        (
            "spiffe://example.org:8080/billing",
            "not a trust domain name",
        ),
        (
            "spiffe://user@example.org/billing",
            "not a trust domain name",
        ),
        ("spiffe://exämple.org/billing", "not a trust domain name"),
        ("spiffe://exa%6dple.org/billing", "not a trust domain name"),
        ("spiffe://example.org", "names a trust domain"),
        ("spiffe://example.org/", "names a trust domain"),
        ("spiffe://example.org/billing/", "`` is not a path segment"),
        ("spiffe://example.org//billing", "`` is not a path segment"),
        ("spiffe://example.org/a//b", "`` is not a path segment"),
        (
            "spiffe://example.org/./billing",
            "`.` is not a path segment",
        ),
        (
            "spiffe://example.org/a/../billing",
            "`..` is not a path segment",
        ),
        ("spiffe://example.org/a=b", "`a=b` is not a path segment"),
        (
            "spiffe://example.org/a%2Fb",
            "`a%2Fb` is not a path segment",
        ),
        (
            "spiffe://example.org/billing?x",
            "`billing?x` is not a path segment",
        ),
        (
            "spiffe://example.org/billing#x",
            "`billing#x` is not a path segment",
        ),
        (
            "spiffe://example.org/bill ing",
            "`bill ing` is not a path segment",
        ),
        ("spiffe://example.org/billing\n", "is not a path segment"),
        ("spiffe://example.org/b\u{0}", "is not a path segment"),
        ("spiffe://example.org/ä", "`ä` is not a path segment"),
        ("spiffe://example.org/*", "`*` is not a path segment"),
    ];
    for (text, words) in table {
        let error = SpiffeId::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    let too_long = format!("spiffe://example.org/{}", "x".repeat(2048 - 20));
    assert!(
        SpiffeId::parse(&too_long)
            .unwrap_err()
            .to_string()
            .contains("at most 2048 bytes, this one 2049")
    );
    let domain = format!("spiffe://{}/x", "d".repeat(256));
    assert!(
        SpiffeId::parse(&domain)
            .unwrap_err()
            .to_string()
            .contains("not a trust domain name")
    );
}

#[test]
fn pattern_matches_ids() {
    // (pattern, IDs that match, IDs that do not)
    let table: [(&str, &[&str], &[&str]); 6] = [
        (
            "td/a/b",
            &["td/a/b"],
            &["td/a", "td/a/b/c", "td/a/B", "td/b/a", "other/a/b"],
        ),
        (
            "td/a/*",
            &["td/a/b", "td/a/c"],
            &["td/a", "td/a/b/c", "td/b/b", "other/a/b"],
        ),
        (
            "td/*/b",
            &["td/a/b", "td/b/b"],
            &["td/b", "td/a/c", "td/a/a/b"],
        ),
        (
            "td/a/**",
            &["td/a/b", "td/a/b/c/d"],
            &["td/a", "td/b/b", "td/ab/c", "other/a/b"],
        ),
        ("td/**", &["td/a", "td/a/b"], &["td2/a", "other/a"]),
        ("td/*/**", &["td/a/b", "td/a/b/c"], &["td/a", "other/a/b"]),
    ];
    for (text, covered, others) in table {
        let pattern = pattern(&format!("spiffe://{text}"));
        for other in covered {
            assert!(
                pattern.matches(&id(&format!("spiffe://{other}"))),
                "{text} {other}"
            );
        }
        for other in others {
            assert!(
                !pattern.matches(&id(&format!("spiffe://{other}"))),
                "{text} {other}"
            );
        }
    }
}

#[test]
fn pattern_has_exact_wildcards_and_least_segments() {
    // (pattern, exact, all wildcards, minimum of segments)
    let table = [
        ("spiffe://td/ns/shop/sa/billing", true, false, 4),
        ("spiffe://td/ns/*/sa/billing", false, false, 4),
        ("spiffe://td/ns/*/**", false, false, 3),
        ("spiffe://td/*", false, true, 1),
        ("spiffe://td/**", false, true, 1),
        ("spiffe://td/*/*/**", false, true, 3),
    ];
    for (text, exact, all, least) in table {
        let pattern = pattern(text);
        assert_eq!(pattern.exact(), exact.then(|| id(text)), "{text}");
        assert_eq!(
            (pattern.is_all_wildcards(), pattern.least_segments()),
            (all, least),
            "{text}"
        );
        assert_eq!((pattern.trust_domain(), pattern.as_str()), ("td", text));
    }
}

#[test]
fn open_wildcard_precedes_a_deciding_segment() {
    let table: [(&str, &[usize], bool); 16] = [
        ("ns/shop/sa/billing", &[], false),
        ("ns/*/sa/billing", &[], true),
        ("ns/*/sa/billing", &[1], false),
        // That segment is always the same.
        ("ns/*/sa/billing", &[3], true),
        ("*/billing", &[], true),
        ("ns/*/sa/*", &[], false),
        ("ns/*/sa/*", &[1], false),
        ("ns/*/sa/*", &[3], true),
        ("ns/*/sa/*", &[1, 3], false),
        ("*/*/x", &[0], true),
        ("*/*/x", &[0, 1], false),
        ("ns/*/**", &[], false),
        ("ns/*/**", &[2], true),
        ("ns/*/**", &[1, 7], false),
        ("ns/**", &[3], false),
        ("*", &[0], false),
    ];
    for (path, used, open) in table {
        assert_eq!(
            pattern(&format!("spiffe://td/{path}")).has_open_wildcard(used),
            open,
            "{path} with {used:?}"
        );
    }
}

/// Compares with all IDs of up to four segments.
#[test]
fn pattern_covers_another_if_it_matches_all_of_its_ids() {
    let mut ids = Vec::new();
    let mut paths = vec![String::new()];
    for _ in 0..4 {
        paths = paths
            .iter()
            .flat_map(|path| ["a", "b"].map(|segment| format!("{path}/{segment}")))
            .collect();
        ids.extend(paths.iter().map(|path| id(&format!("spiffe://t{path}"))));
    }
    let paths = [
        "a", "b", "*", "**", "a/b", "a/*", "*/b", "*/*", "a/**", "*/**", "*/a/**", "a/b/**",
        "a/*/b", "*/*/*",
    ];
    let patterns = paths.map(|path| pattern(&format!("spiffe://t/{path}")));
    for (one, other) in patterns
        .iter()
        .flat_map(|one| patterns.iter().map(move |other| (one, other)))
    {
        let covers = ids
            .iter()
            .filter(|id| other.matches(id))
            .all(|id| one.matches(id));
        assert_eq!(
            one.covers(other),
            covers,
            "{} and {}",
            one.as_str(),
            other.as_str()
        );
    }
    assert!(!pattern("spiffe://t/**").covers(&pattern("spiffe://u/a")));
}

#[test]
fn pattern_parser_rejects_invalid_patterns() {
    let table = [
        ("billing", "begins with spiffe://"),
        (
            "spiffe://*/billing",
            "a pattern's trust domain has no wildcard",
        ),
        (
            "spiffe://*.org/billing",
            "a pattern's trust domain has no wildcard",
        ),
        ("spiffe://td", "needs a path"),
        ("spiffe://td/", "needs a path"),
        ("spiffe://td/**/billing", "it can only be the last segment"),
        ("spiffe://td/**/**", "it can only be the last segment"),
        ("spiffe://td/bill*", "`bill*` is not a path segment"),
        ("spiffe://td/a/***", "`***` is not a path segment"),
        ("spiffe://td/a//b", "`` is not a path segment"),
        ("spiffe://td/a/", "`` is not a path segment"),
        ("spiffe://td/../a", "`..` is not a path segment"),
    ];
    for (text, words) in table {
        let error = SpiffeIdPattern::parse(text).expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    let too_long = format!("spiffe://td/{}", "x".repeat(2048));
    assert!(
        SpiffeIdPattern::parse(&too_long)
            .unwrap_err()
            .to_string()
            .contains("at most 2048 bytes")
    );
}

#[test]
fn session_name_follows_from_the_id() {
    let of = |text: &str| SessionName::of(&id(text)).as_str().to_owned();
    assert_eq!(
        of("spiffe://example.org/ns/shop/sa/billing"),
        "example.org=ns=shop=sa=billing"
    );
    assert_eq!(of("spiffe://a/b"), "a=b");
    let longest = format!("spiffe://example.org/{}", "x".repeat(52));
    assert_eq!(of(&longest), format!("example.org={}", "x".repeat(52)));
    assert_eq!(of(&longest).len(), 64);

    // The SHA-256 of the ID, by coreutils.
    let long =
        "spiffe://example.org/ns/a-namespace-of-some-length/sa/a-service-account-of-some-length";
    let name = of(long);
    assert_eq!(
        name,
        "example.org=ns=a-namespace-of-some-length=sa=a-=62d6b58507158e07"
    );
    for text in [long, &longest, "spiffe://a/b"] {
        assert!(SessionName::parse(&of(text)).is_ok(), "{text}");
    }
}

#[test]
fn session_name_is_unique() {
    let head = "spiffe://example.org/ns/a-namespace-of-some-lengt";
    assert_eq!(head.len() - "spiffe://".len(), 40);
    // IDs with equal starts, around the length at which names are shortened.
    let mut ids: Vec<String> = (0..60)
        .map(|length| format!("{head}/{}", "x".repeat(length + 1)))
        .collect();
    ids.extend((0..60).map(|length| format!("{head}/{}y", "x".repeat(length))));
    ids.extend((0..30).map(|length| format!("{head}/{}/y", "x".repeat(length + 1))));
    // A workload that chooses its path could choose it to be like another's shortened name.
    let shortened: Vec<_> = ids.iter().map(|text| SessionName::of(&id(text))).collect();
    ids.extend(
        shortened
            .iter()
            .map(|name| format!("spiffe://{}", name.as_str().replace('=', "/"))),
    );
    ids.sort();
    ids.dedup();
    let mut names: Vec<_> = ids
        .iter()
        .map(|text| SessionName::of(&id(text)).as_str().to_owned())
        .collect();
    assert!(names.iter().all(|name| SessionName::parse(name).is_ok()));
    names.sort();
    names.dedup();
    assert_eq!(names.len(), ids.len());
}

#[test]
fn session_name_parser_checks_length_and_characters() {
    for text in ["ab", "billing@node-1", "a_b+c=d,e.f@g-h", &"x".repeat(64)] {
        assert_eq!(SessionName::parse(text).unwrap().as_str(), text);
    }
    for text in ["", "a", "a b", "a/b", "a:b", "ä1", "a\n", &"x".repeat(65)] {
        assert!(SessionName::parse(text).is_err(), "{text:?}");
    }
}
