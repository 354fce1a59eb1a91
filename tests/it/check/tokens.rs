//! Tokens that no current SPIRE issues, and networks that no test machine has.

use std::sync::mpsc::channel;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::*;
use crate::harness::tokens::Tokens;

const HEADER: &str = r#"{"alg":"ES256","kid":"k1"}"#;
const CLAIMS: &str =
    r#"{"iss":"http://127.0.0.1:1","sub":"{sub}","aud":"shop","iat":{now},"exp":{end}}"#;

/// Returns a configuration for an STS other than AWS's.
fn text(tokens: &Tokens) -> String {
    configuration(
        tokens.socket(),
        UNREACHABLE,
        "arn:minio:iam:::role/r",
        "shop",
    )
}

fn requests(report: &Value, step: &str, saw: &str) -> bool {
    report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .any(|finding| {
            let message = finding["saw"]
                .as_str()
                .is_some_and(|text| text.contains(saw));
            finding["step"] == step
                && finding["verdict"] == "note"
                && message
                && finding["fix"].is_string()
        })
}

/// awsvid itself exchanges none of those.
#[test]
fn invalid_tokens_are_reported() {
    let folder = folder();
    let right = check(
        folder.path(),
        &text(&Tokens::start(folder.path(), HEADER, CLAIMS)),
    )
    .1;
    assert!(
        !right
            .to_string()
            .contains("STS would reject the token: correct it at the SPIFFE provider"),
        "{right:#}"
    );
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let table = [
        (
            CLAIMS.replace(r#""shop""#, r#"["shop","sts.amazonaws.com"]"#),
            "not exactly `shop`",
        ),
        (
            CLAIMS.replace("{now}", "{now}.0"),
            "`iat` is not written as a whole number",
        ),
        (
            CLAIMS.replace("{end}", "1.9e9"),
            "`exp` is not written as a whole number",
        ),
        (
            CLAIMS
                .replace("{now}", &(now + 4000).to_string())
                .replace("{end}", &(now + 9000).to_string()),
            "in the future",
        ),
        (
            CLAIMS
                .replace("{end}", &(now - 10).to_string())
                .replace("{now}", &(now - 99).to_string()),
            "has expired",
        ),
    ];
    for (claims, saw) in table {
        let tokens = Tokens::start(folder.path(), HEADER, &claims);
        assert_failed(
            &check(folder.path(), &text(&tokens)),
            "identity",
            saw,
            "correct it at the SPIFFE provider",
        );
    }
    let tokens = Tokens::start(folder.path(), r#"{"alg":"EdDSA","kid":"k1"}"#, CLAIMS);
    assert_failed(
        &check(folder.path(), &text(&tokens)),
        "identity",
        "its signature's algorithm",
        "correct it",
    );
}

#[test]
fn short_lived_tokens_are_reported() {
    let folder = folder();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let lasting = |from: u64, to: u64| {
        let claims = CLAIMS
            .replace("{now}", &from.to_string())
            .replace("{end}", &to.to_string());
        check(
            folder.path(),
            &text(&Tokens::start(folder.path(), HEADER, &claims)),
        )
    };
    // They are used as long as they are valid.
    let short = lasting(now, now + 60).1;
    assert!(
        requests(&short, "identity", "are good for only 60 s from the start"),
        "{short:#}"
    );
    assert!(
        !lasting(now, now + 300)
            .1
            .to_string()
            .contains("good for only")
    );
    assert_failed(
        &lasting(now - 85, now + 5),
        "identity",
        "and was good for only 90 s",
        "correct it",
    );
}

#[test]
fn long_subject_is_reported() {
    let folder = folder();
    let tokens = Tokens::start(folder.path(), HEADER, CLAIMS);
    let with = |length: usize| {
        let id = id("");
        let id = format!("{id}{}", "a".repeat(length - id.len()));
        check(
            folder.path(),
            &text(&tokens).replace(&super::id("reader"), &id),
        )
        .1
    };
    let long = with(256);
    assert!(requests(&long, "token", "256 characters"), "{long:#}");
    assert!(!with(255).to_string().contains("255 characters"));
}

/// AWS's STS and an issuer on the internet, which only a proxy can reach: here it reaches nothing.
#[test]
fn all_steps_use_the_proxy_of_the_exchange() {
    let folder = folder();
    let claims = CLAIMS.replace("http://127.0.0.1:1", "https://oidc.example.org");
    let tokens = Tokens::start(folder.path(), r#"{"alg":"PS256","kid":"k1"}"#, &claims);
    let (sender, requested) = channel();
    let proxy = stub_http::start(move |first, _| {
        // The test may have ended.
        let _ = sender.send(first.to_owned());
        stub_http::http("403 Forbidden", "", "")
    });
    let text = configuration(
        tokens.socket(),
        UNREACHABLE,
        "arn:aws:iam::123456789012:role/app",
        "shop",
    );
    let text = text.replace(&format!("endpoint = \"{UNREACHABLE}\"\n"), "");
    let found = check_with(
        &["env", &format!("HTTPS_PROXY={proxy}")],
        folder.path(),
        &text,
        &[],
    );
    // An account shows no more than this, and this much of the token.
    assert_failed(&found, "token", "PS256, which AWS does not take", "RS256");
    let rejected = "does not let through to oidc.example.org:443: tunnel error: unsuccessful";
    assert_failed(&found, "discovery", rejected, "--resolve or --url");
    assert!(
        requests(
            &found.1,
            "clock",
            "does not let through to sts.us-east-1.amazonaws.com:443"
        ),
        "{:#}",
        found.1
    );
    assert_failed(&found, "sts", "", "HTTPS_PROXY");
    let requested: Vec<String> = requested.try_iter().collect();
    for host in ["sts.us-east-1.amazonaws.com", "oidc.example.org"] {
        assert!(
            requested
                .iter()
                .any(|line| line.starts_with(&format!("CONNECT {host}:443 "))),
            "{host}: {requested:?}"
        );
    }
    let excepted = [
        &format!("HTTPS_PROXY={proxy}")[..],
        "NO_PROXY=oidc.example.org,.amazonaws.com",
    ];
    let (_, report) = check_with(
        &["env", excepted[0], excepted[1]],
        folder.path(),
        &text,
        &["--url", UNREACHABLE],
    );
    assert!(!report.to_string().contains("the proxy 127"), "{report:#}");
}

/// Each document takes more than half of AWS's five seconds.
#[test]
fn slow_issuer_is_reported() {
    let folder = folder();
    let late = |body: String| {
        stub_http::start(move |_, _| {
            std::thread::sleep(Duration::from_millis(2600));
            stub_http::http("200 OK", "", &body)
        })
    };
    let keys = late(r#"{"keys":[]}"#.to_owned());
    let issuer = late(json!({ "issuer": UNREACHABLE, "jwks_uri": keys }).to_string());
    let tokens = Tokens::start(folder.path(), HEADER, CLAIMS);
    let found = check_with(&[], folder.path(), &text(&tokens), &["--url", &issuer]);
    assert_failed(
        &found,
        "keys",
        "for both documents, and AWS waits about 5s",
        "a cache",
    );
}
