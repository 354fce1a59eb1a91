//! An issuer that fails in each way, which no real counterpart does on demand.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::super::doc_tables::assert_documented;
use super::super::report::{CheckFinding, Verdict};
use super::*;
use crate::dev::keys::SigningKey;
use crate::identity::SpiffeId;

/// Serves complete HTTP responses by path. `{own}` in them is the server's URL.
async fn serve(answers: Vec<(&'static str, String)>) -> String {
    serve_by(move |path, own| {
        let answer = answers
            .iter()
            .find(|(known, _)| *known == path)
            .map(|(_, answer)| answer.replace("{own}", own));
        answer.unwrap_or_else(|| http("404 Not Found", ""))
    })
    .await
}

/// Serves the responses that `answer` makes of the path and the server's URL. An empty response
/// hangs.
async fn serve_by(mut answer: impl FnMut(&str, &str) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let own = url.clone();
    tokio::spawn(async move {
        let mut hanging = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let length = stream.read(&mut request).await.unwrap_or_default();
            let request = String::from_utf8_lossy(&request[..length]).into_owned();
            let answer = answer(request.split(' ').nth(1).unwrap_or_default(), &own);
            let _ = stream.write_all(answer.as_bytes()).await;
            hanging.extend(answer.is_empty().then_some(stream));
        }
    });
    url
}

/// Returns a response that ends with the connection.
fn http(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}")
}

fn token_by(key: &SigningKey, issuer: &str) -> JwtSvid {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let claims = json!({ "iss": issuer, "sub": "spiffe://t/a", "aud": "shop", "iat": now, "exp": now + 300 });
    let id = SpiffeId::parse("spiffe://t/a").unwrap();
    JwtSvid::check(key.sign(&claims).unwrap(), &id, "shop", SystemTime::now()).unwrap()
}

/// Returns the findings for an issuer with these responses, in which `{own}` is its URL.
async fn findings_of(key: &SigningKey, discovery: &str, keys: &str) -> Vec<CheckFinding> {
    let url = serve(vec![
        ("/.well-known/openid-configuration", discovery.to_owned()),
        ("/keys", keys.to_owned()),
    ])
    .await;
    let mut report = CheckReport::new(true);
    let web = HttpProbe {
        resolve: Vec::new(),
        network: None,
        deadline: Duration::from_secs(5),
    };
    check(&token_by(key, &url), None, false, &web, &mut report).await;
    report.findings().to_vec()
}

fn right() -> String {
    http("200 OK", r#"{"issuer":"{own}","jwks_uri":"{own}/keys"}"#)
}

fn assert_failed(findings: &[CheckFinding], step: &str, saw: &str, fix: &str) {
    let is = |finding: &CheckFinding| {
        let fix = finding
            .fix
            .as_deref()
            .is_some_and(|text| text.contains(fix));
        finding.step == step
            && finding.verdict == Verdict::Failed
            && finding.saw.contains(saw)
            && fix
    };
    assert!(
        findings.iter().any(is),
        "no failed {step} with {saw:?}, {fix:?} in {findings:?}"
    );
    assert_all_documented(findings);
}

fn assert_all_documented(findings: &[CheckFinding]) {
    for finding in findings {
        if let Some(fix) = &finding.fix {
            assert_documented(finding.step, &finding.saw, fix);
        }
    }
}

#[tokio::test]
async fn correct_issuer_passes() {
    let key = SigningKey::generate().unwrap();
    let findings = findings_of(&key, &right(), &http("200 OK", &key.jwks())).await;
    assert!(
        findings
            .iter()
            .all(|finding| finding.verdict == Verdict::Pass),
        "{findings:?}"
    );
    assert!(
        findings
            .iter()
            .any(|finding| finding.saw.contains("signature is right")),
        "{findings:?}"
    );
}

#[tokio::test]
async fn unavailable_documents_are_reported() {
    let key = SigningKey::generate().unwrap();
    let keys = http("200 OK", &key.jwks());
    let table = [
        (
            http("302 Found\r\nLocation: https://login.example.org/", ""),
            "https://login.example.org/",
            "own URL",
        ),
        (
            http("400 Bad Request", "domain not allowed"),
            "does not know this host name",
            "`domains`",
        ),
        (
            http("403 Forbidden", ""),
            "requires authentication",
            "no credentials",
        ),
        (
            http("404 Not Found", ""),
            "no such document",
            "server_path_prefix",
        ),
        (http("502 Bad Gateway", ""), "answers 502", "log"),
        (http("200 OK", "<html>"), "not a JSON object", "login page"),
        (http("200 OK", "[]"), "not a JSON object", "login page"),
        (http("200 OK", "{}"), "no `issuer`", "byte by byte"),
        (
            http("200 OK", r#"{"issuer":"{own}"}"#),
            "no `jwks_uri`",
            "`jwks_uri`",
        ),
        (
            http("200 OK", r#"{"issuer":"{own}/","jwks_uri":"{own}/keys"}"#),
            "a slash at the end",
            "byte by byte",
        ),
        (
            http(
                "200 OK",
                r#"{"issuer":"https://x","jwks_uri":"{own}/keys"}"#,
            ),
            "in the scheme",
            "byte by byte",
        ),
        (
            http("200 OK", r#"{"issuer":"http://x","jwks_uri":"{own}/keys"}"#),
            "in the host",
            "byte by byte",
        ),
        (
            http(
                "200 OK",
                r#"{"issuer":"http://127.0.0.1","jwks_uri":"{own}/keys"}"#,
            ),
            "in the port",
            "byte by byte",
        ),
        (
            http("200 OK", r#"{"issuer":"{own}/x","jwks_uri":"{own}/keys"}"#),
            "from byte",
            "byte by byte",
        ),
        ("SSH-2.0\r\n".to_owned(), "no HTTP", "--resolve"),
    ];
    for (discovery, saw, fix) in table {
        assert_failed(
            &findings_of(&key, &discovery, &keys).await,
            "discovery",
            saw,
            fix,
        );
    }
    let table = [
        (
            http("500 Internal Server Error", "document not available"),
            "not got the keys yet",
            "server_api",
        ),
        (http("501 Not Implemented", ""), "no JWT keys", "JWT keys"),
        (http("200 OK", "{}"), "no list `keys`", "JWK set"),
    ];
    for (keys, saw, fix) in table {
        assert_failed(&findings_of(&key, &right(), &keys).await, "keys", saw, fix);
    }
}

#[tokio::test]
async fn unusable_key_sets_are_reported() {
    let (key, other) = (
        SigningKey::generate().unwrap(),
        SigningKey::generate().unwrap(),
    );
    let one: Value = serde_json::from_str(&key.jwks()).unwrap();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut set = one.clone();
        change(&mut set);
        http("200 OK", &set.to_string())
    };
    let renamed = other.jwks().replace(other.kid(), key.kid());
    let table = [
        (
            http("200 OK", &other.jwks()),
            "a copy from before the last rotation",
            "publish the current keys",
        ),
        (
            http("200 OK", &renamed),
            "is not the one that signed",
            "two servers",
        ),
        (
            changed(&|set| set["keys"][0]["x"] = Value::Null),
            "lacks [\"x\"]",
            "correct",
        ),
        (
            changed(&|set| set["keys"][0]["kid"] = Value::Null),
            "lacks [\"kid\"]",
            "correct",
        ),
        (
            changed(&|set| set["keys"] = json!([set["keys"][0], set["keys"][0]])),
            "two keys",
            "correct",
        ),
        (
            changed(&|set| set["keys"][0]["use"] = json!("enc")),
            "for encryption",
            "signing keys",
        ),
        (
            changed(&|set| set["keys"] = json!(vec![set["keys"][0].clone(); 101])),
            "101 EC keys",
            "withdraw",
        ),
    ];
    for (keys, saw, fix) in table {
        assert_failed(&findings_of(&key, &right(), &keys).await, "keys", saw, fix);
    }
}

/// A single fetch succeeds, as that of an operator does, and concurrent ones fail.
#[tokio::test]
async fn rate_limited_keys_are_reported() {
    let key = SigningKey::generate().unwrap();
    let jwks = key.jwks();
    let after_five = |rejection: String| {
        let jwks = jwks.clone();
        let mut fetched = 0;
        move |path: &str, own: &str| {
            if path != "/keys" {
                return right().replace("{own}", own);
            }
            fetched += 1;
            if fetched > 5 {
                rejection.clone()
            } else {
                http("200 OK", &jwks)
            }
        }
    };
    let table = [
        (
            http("429 Too Many Requests", ""),
            "of 20 requests at once 16 fail: answers 429 (16 times)",
        ),
        (
            String::new(),
            "of 20 requests at once 16 fail: no answer within 1s (16 times)",
        ),
    ];
    for (rejection, saw) in table {
        let url = serve_by(after_five(rejection)).await;
        let mut report = CheckReport::new(true);
        let web = HttpProbe {
            resolve: Vec::new(),
            network: None,
            deadline: Duration::from_secs(1),
        };
        check(&token_by(&key, &url), None, false, &web, &mut report).await;
        assert_failed(report.findings(), "keys", saw, "rate limits");
        let others = report
            .findings()
            .iter()
            .filter(|finding| finding.verdict != Verdict::Pass)
            .count();
        assert_eq!(others, 1, "{:?}", report.findings());
    }
}

#[tokio::test]
async fn aws_has_further_requirements() {
    let key = SigningKey::generate().unwrap();
    let url = serve(vec![
        ("/.well-known/openid-configuration", right()),
        ("/keys", http("200 OK", &key.jwks())),
    ])
    .await;
    let mut report = CheckReport::new(true);
    let web = HttpProbe {
        resolve: Vec::new(),
        network: None,
        deadline: Duration::from_secs(5),
    };
    check(&token_by(&key, &url), None, true, &web, &mut report).await;
    assert_failed(report.findings(), "token", "is not https", "https URL");
    assert_failed(
        report.findings(),
        "discovery",
        "over https only",
        "X-Forwarded-Proto",
    );
}

/// The documents as seen from outside: the name leads to another address, which may serve another
/// issuer.
#[tokio::test]
async fn check_uses_the_configured_address_and_url() {
    let key = SigningKey::generate().unwrap();
    let answers = |issuer: &str| {
        let text = format!(r#"{{"issuer":"{issuer}","jwks_uri":"http://oidc.invalid:PORT/keys"}}"#);
        http("200 OK", &text)
    };
    let listener = serve(vec![("/keys", http("200 OK", &key.jwks()))]).await;
    let port: u16 = listener.rsplit(':').next().unwrap().parse().unwrap();
    let issuer = format!("http://oidc.invalid:{port}");
    let document = answers(&issuer).replace("PORT", &port.to_string());
    let other = serve(vec![("/.well-known/openid-configuration", document)]).await;
    let resolve = vec![format!("oidc.invalid:{port}:127.0.0.1").parse().unwrap()];
    let web = HttpProbe {
        resolve,
        network: None,
        deadline: Duration::from_secs(5),
    };
    let mut report = CheckReport::new(true);
    check(
        &token_by(&key, &issuer),
        Some(&other),
        false,
        &web,
        &mut report,
    )
    .await;
    assert!(
        report
            .findings()
            .iter()
            .all(|finding| finding.verdict == Verdict::Pass),
        "{:?}",
        report.findings()
    );
}
