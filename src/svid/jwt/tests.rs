use super::*;

#[path = "../../../tests/support/unsigned_token.rs"]
mod unsigned_token;

pub(crate) use unsigned_token::{raw_token, token_of};

pub(crate) const AUDIENCE: &str = "sts.amazonaws.com";
/// 2026-01-01, the current time in these tests.
pub(crate) const NOW: u64 = 1_767_225_600;

pub(crate) fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW)
}

pub(crate) fn billing() -> SpiffeId {
    SpiffeId::parse("spiffe://example.org/billing").unwrap()
}

/// Returns a valid token for `id` and [`AUDIENCE`] that expires `life` seconds after [`NOW`].
/// `serial` makes it unique.
pub(crate) fn token_for(id: &SpiffeId, life: u64, serial: u32) -> String {
    token_of(id.as_str(), AUDIENCE, now(), life, serial)
}

/// Returns such a token after the check.
pub(crate) fn svid_for(id: &SpiffeId, life: u64, serial: u32) -> JwtSvid {
    JwtSvid::check(token_for(id, life, serial), id, AUDIENCE, now()).unwrap()
}

fn check(header: &str, claims: &str) -> Result<JwtSvid, BadToken> {
    // Short names emphasize the unusual part of a row.
    let claims = claims
        .replace("NOW", &NOW.to_string())
        .replace("LATER", &(NOW + 300).to_string());
    JwtSvid::check(raw_token(header, &claims), &billing(), AUDIENCE, now())
}

const HEADER: &str = r#"{"alg":"ES256","typ":"JWT"}"#;
const CLAIMS: &str =
    r#"{"sub":"spiffe://example.org/billing","aud":["sts.amazonaws.com"],"iat":NOW,"exp":LATER}"#;

#[test]
fn check_accepts_valid_tokens() {
    let headers = [
        HEADER,
        r#"{"alg":"RS256"}"#,
        r#"{"alg":"RS384","typ":"JOSE"}"#,
        r#"{"alg":"RS512","kid":"k1","typ":"JWT"}"#,
        r#"{"alg":"ES384"}"#,
        r#"{"alg":"ES512"}"#,
        r#"{"alg":"PS256"}"#,
        r#"{"alg":"PS384"}"#,
        r#"{"alg":"PS512","other":[1,{"a":null}]}"#,
    ];
    for header in headers {
        check(header, CLAIMS).unwrap_or_else(|error| panic!("{header}: {error}"));
    }
    let claims = [
        r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER}"#,
        r#"{ "exp" : LATER , "aud":["sts.amazonaws.com"], "sub":"spiffe:\/\/example.org/billing" }"#,
        r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER,"iat":NOW,"nbf":NOW}"#,
        r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER,"x":1.5,"x":1e9,"iss":"i"}"#,
        r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":253402300799,"iat":0}"#,
    ];
    for claims in claims {
        check(HEADER, claims).unwrap_or_else(|error| panic!("{claims}: {error}"));
    }
}

#[test]
fn token_keeps_its_checked_claims() {
    let raw = token_for(&billing(), 300, 1);
    let svid = JwtSvid::check(raw.clone(), &billing(), AUDIENCE, now()).unwrap();
    assert_eq!(svid.secret(), raw);
    assert_eq!(svid.spiffe_id(), &billing());
    assert_eq!(svid.audience(), AUDIENCE);
    assert_eq!(svid.algorithm(), "ES256");
    assert_eq!(svid.expires(), now() + Duration::from_secs(300));
    assert!(svid.is_same(&svid_for(&billing(), 300, 1)));
    assert!(!svid.is_same(&svid_for(&billing(), 300, 2)));
}

#[test]
fn issuer_and_key_id_are_texts_or_missing() {
    let of = |header: &str, claims: &str| {
        let claims = CLAIMS.replacen('{', &format!("{{{claims}"), 1);
        let svid = check(&HEADER.replacen('{', &format!("{{{header}"), 1), &claims).unwrap();
        (svid.key_id(), svid.issuer())
    };
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(of("", ""), (None, None));
    let both = of(r#""kid":"k1","#, r#""iss":"https://oidc.example.org","#);
    assert_eq!(both, (text("k1"), text("https://oidc.example.org")));
    assert_eq!(of(r#""kid":"","#, r#""iss":"","#), (None, None));
    assert_eq!(of(r#""kid":1,"#, r#""iss":["a"],"#), (None, None));
}

#[test]
fn check_rejects_invalid_headers() {
    let table = [
        (r#"{"alg":"none"}"#, "algorithm"),
        (r#"{"alg":"HS256"}"#, "algorithm"),
        (r#"{"alg":"EdDSA"}"#, "algorithm"),
        (r#"{"alg":"es256"}"#, "algorithm"),
        (r#"{"alg":""}"#, "algorithm"),
        (r#"{"typ":"JWT"}"#, "lack"),
        (r#"{"alg":1}"#, "lack"),
        (r#"{"alg":"RS256","alg":"none"}"#, "twice"),
        (r#"{"alg":"RS256","typ":"at+jwt"}"#, "type"),
        (r#"{"alg":"RS256","typ":"jwt"}"#, "type"),
        (r#"{"alg":"RS256","typ":""}"#, "type"),
        (r#"["RS256","JWT"]"#, "objects"),
        ("null", "objects"),
        ("", "base64url"),
        ("{", "not valid JSON"),
    ];
    for (header, reason) in table {
        let error = check(header, CLAIMS).expect_err(header);
        assert!(
            matches!(&error, BadToken::Wrong(text) if text.contains(reason)),
            "{header}: {error}"
        );
    }
}

#[test]
fn check_rejects_invalid_claims() {
    let table = [
        // The subject.
        (r#"{"aud":"sts.amazonaws.com","exp":LATER}"#, "lack"),
        (
            r#"{"sub":"","aud":"sts.amazonaws.com","exp":LATER}"#,
            "its subject is not spiffe://example.org/billing",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing2","aud":"sts.amazonaws.com","exp":LATER}"#,
            "subject",
        ),
        (
            r#"{"sub":"spiffe://example.org/Billing","aud":"sts.amazonaws.com","exp":LATER}"#,
            "subject",
        ),
        (
            r#"{"sub":"spiffe://other.org/billing","aud":"sts.amazonaws.com","exp":LATER}"#,
            "subject",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing\u0000","aud":"sts.amazonaws.com","exp":LATER}"#,
            "subject",
        ),
        (
            r#"{"sub":["spiffe://example.org/billing"],"aud":"sts.amazonaws.com","exp":LATER}"#,
            "lack",
        ),
        // Claims that appear twice: one reader takes the first, another the last. An escaped name
        // is the same name.
        (
            r#"{"sub":"spiffe://example.org/billing","sub":"a","aud":"sts.amazonaws.com","exp":LATER}"#,
            "twice",
        ),
        (
            r#"{"sub":"a","s\u0075b":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER}"#,
            "twice",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER,"exp":LATER}"#,
            "twice",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","aud":"b","exp":LATER}"#,
            "twice",
        ),
        // The audience.
        (
            r#"{"sub":"spiffe://example.org/billing","exp":LATER}"#,
            "lack",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":[],"exp":LATER}"#,
            "audience",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"","exp":LATER}"#,
            "audience",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"STS.amazonaws.com","exp":LATER}"#,
            "audience",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":["other"],"exp":LATER}"#,
            "audience",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":["sts.amazonaws.com","other"],"exp":LATER}"#,
            "audience",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":["sts.amazonaws.com","sts.amazonaws.com"],"exp":LATER}"#,
            "aud",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":[["sts.amazonaws.com"]],"exp":LATER}"#,
            "lack",
        ),
        // The form of the timestamps.
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com"}"#,
            "lack",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":null}"#,
            "`exp`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":"LATER"}"#,
            "`exp`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER.0}"#,
            "`exp`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":1.8e9}"#,
            "`exp`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":18E8}"#,
            "`exp`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":-LATER}"#,
            "`exp`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER000}"#,
            "`exp`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":99999999999999999999999}"#,
            "`exp`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER,"iat":1.767e9}"#,
            "`iat`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER,"iat":NOW.0}"#,
            "`iat`",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER,"nbf":1.7e9}"#,
            "`nbf`",
        ),
        // The values of the timestamps.
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER,"iat":LATER}"#,
            "not before",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":1867225600,"iat":1767225901}"#,
            "future",
        ),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":1867225600,"nbf":1767225901}"#,
            "future",
        ),
        // Claims that are not an object.
        (
            r#"["spiffe://example.org/billing","sts.amazonaws.com",LATER,NOW,NOW]"#,
            "objects",
        ),
        ("7", "objects"),
        ("", "base64url"),
        (
            r#"{"sub":"spiffe://example.org/billing","aud":"sts.amazonaws.com","exp":LATER} x"#,
            "not valid JSON",
        ),
    ];
    for (claims, reason) in table {
        let error = check(HEADER, claims).expect_err(claims);
        assert!(
            matches!(&error, BadToken::Wrong(text) if text.contains(reason)),
            "{claims}: {error}"
        );
    }
}

/// Checks a token of this age (or without `iat`) and this total life, in seconds.
fn aged(id: &SpiffeId, age: Option<u64>, life: u64) -> Result<JwtSvid, BadToken> {
    let (iat, exp) = match age {
        Some(age) => (format!(r#""iat":{},"#, NOW - age), NOW - age + life),
        None => (String::new(), NOW + life),
    };
    let claims = format!(r#"{{"sub":"{id}","aud":["{AUDIENCE}"],{iat}"exp":{exp}}}"#);
    JwtSvid::check(raw_token(HEADER, &claims), id, AUDIENCE, now())
}

#[test]
fn token_needs_thirty_seconds_or_a_third_of_its_life() {
    let id = billing();
    for (life, least) in [(300, 30), (90, 30), (60, 20), (30, 10), (9, 3), (3, 1)] {
        aged(&id, Some(life - least), life).unwrap();
        let error = aged(&id, Some(life - least + 1), life).unwrap_err();
        assert!(
            matches!(error, BadToken::Expiring(_)),
            "{error}: a new one may follow"
        );
    }
    // Without `iat` the total life is unknown.
    aged(&id, None, 30).unwrap();
    aged(&id, None, 29).unwrap_err();
}

#[test]
fn short_life_error_names_the_life_and_the_fix() {
    let id = billing();
    let text = |age, life| aged(&id, Some(age), life).unwrap_err().to_string();
    for (age, life, state, whole) in [
        (25, 30, "it expires in 5 s", "only 30 s"),
        (30, 30, "it has expired", "only 30 s"),
        (90, 30, "it has expired", "only 30 s"),
        (2, 2, "it has expired", "only 2 s"),
    ] {
        let text = text(age, life);
        for part in [
            state,
            whole,
            "`default_jwt_svid_ttl`",
            "-jwtSVIDTTL",
            "clock",
        ] {
            assert!(text.contains(part), "{part:?} is missing: {text}");
        }
    }
    for text in [
        text(290, 300),
        text(600, 300),
        aged(&id, None, 10).unwrap_err().to_string(),
    ] {
        assert!(
            text.contains("the agent's connection to its server") && !text.contains("ttl"),
            "{text}"
        );
    }
}

#[test]
fn check_any_returns_the_last_to_expire() {
    let (id, other) = (
        billing(),
        SpiffeId::parse("spiffe://example.org/other").unwrap(),
    );
    let any = |tokens: &[String]| JwtSvid::check_any(tokens.to_vec(), &id, AUDIENCE, now());
    let [foreign, short, long] = [
        token_for(&other, 300, 0),
        token_for(&id, 100, 1),
        token_for(&id, 200, 2),
    ];
    assert!(any(&[]).unwrap().is_none());
    for order in [
        [&foreign, &short, &long],
        [&long, &foreign, &short],
        [&short, &long, &foreign],
    ] {
        assert_eq!(
            any(&order.map(String::clone)).unwrap().unwrap().secret(),
            long
        );
    }
    let error = any(&[foreign.clone(), token_for(&id, 0, 3)]).unwrap_err();
    assert!(
        error.to_string().contains("its subject is not"),
        "{error}: that of the first"
    );
    assert_eq!(JwtSvid::check_subject(&long, &id), Ok(()));
    for wrong in [&*foreign, "", "a.b.c", &long[1..]] {
        assert!(
            matches!(JwtSvid::check_subject(wrong, &id), Err(BadToken::Wrong(_))),
            "{wrong}"
        );
    }
}

#[test]
fn check_rejects_text_that_is_not_a_jwt() {
    let good = token_for(&billing(), 300, 0);
    let (rest, _) = good.rsplit_once('.').unwrap();
    let table = [
        String::new(),
        "abc".to_owned(),
        rest.to_owned(),
        format!("{rest}."),
        format!("{good}.AAAA"),
        format!("{good}="),
        format!("{rest}.a+b/"),
        format!(" {good}"),
        format!("{good}\n"),
        good.replace('.', ".."),
        // JWS in JSON form, which AWS does not accept either.
        format!(r#"{{"payload":"{rest}"}}"#),
    ];
    for token in table {
        let result = JwtSvid::check(token.clone(), &billing(), AUDIENCE, now());
        assert!(matches!(result, Err(BadToken::Wrong(_))), "{token}");
    }
}

#[test]
fn check_limits_the_length() {
    let of_length = |length: usize| {
        let head = token_for(&billing(), 300, 0);
        let head = head.rsplit_once('.').unwrap().0;
        format!("{head}.{}", "A".repeat(length - head.len() - 1))
    };
    // Base64 never has a length of 4n + 1, so these are the nearest lengths on both sides of the
    // limit.
    let lengths: Vec<usize> = (19_990..=20_010)
        .filter(|l| (l - of_length(1000).rfind('.').unwrap() - 1) % 4 != 1)
        .collect();
    for length in lengths {
        let result = JwtSvid::check(of_length(length), &billing(), AUDIENCE, now());
        match result {
            Ok(_) => assert!(length <= 20_000, "{length} passed"),
            Err(error) => assert!(
                length > 20_000 && error.to_string().contains("20000"),
                "{length}: {error}"
            ),
        }
    }
}

#[test]
fn debug_and_errors_do_not_show_the_token() {
    let svid = svid_for(&billing(), 300, 7);
    let shown = format!("{svid:?} {svid:#?}");
    assert!(shown.contains("spiffe://example.org/billing"));
    for part in svid.secret().split('.') {
        assert!(!shown.contains(part), "{shown}");
    }
    // serde's messages quote the invalid value. The error must not.
    let claims = r#"{"sub":{"secret":1},"aud":"a-secret-audience","exp":"secret"}"#;
    let error = JwtSvid::check(
        raw_token(r#"{"alg":"secret"}"#, claims),
        &billing(),
        AUDIENCE,
        now(),
    )
    .unwrap_err();
    assert!(!error.to_string().contains("secret"), "{error}");
    let error = JwtSvid::check(raw_token(HEADER, claims), &billing(), AUDIENCE, now()).unwrap_err();
    assert!(!error.to_string().contains("secret"), "{error}");
}
