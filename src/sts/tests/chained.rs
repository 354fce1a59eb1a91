//! Calls for the next role of a chain, which the credentials of the session before it sign.

use super::*;
use crate::role::ChainedSession;

const NEXT: &str = "arn:aws:iam::222222222222:role/next";
const EXTERNAL_ID: &str = "external-id-of-shop";

/// A session with each parameter.
fn session() -> ChainedSession {
    ChainedSession {
        role_arn: RoleArn::parse(NEXT).unwrap(),
        external_id: Some(EXTERNAL_ID.to_owned()),
        session_name: SessionName::parse("example.org=billing").unwrap(),
        source_identity: Some("billing".to_owned()),
        tags: vec![
            ("a b/\u{fc}".to_owned(), "+=@ :\u{fc}".to_owned()),
            ("empty".to_owned(), String::new()),
        ],
        transitive_tags: vec!["empty".to_owned()],
        policy: Some(r#"{"Version":"2012-10-17","Statement":[]}"#.to_owned()),
        policy_arns: vec!["arn:aws:iam::aws:policy/A".to_owned()],
        duration: Duration::from_secs(900),
    }
}

/// A session with the required parameters.
fn bare_session(role_arn: &str) -> ChainedSession {
    ChainedSession {
        role_arn: RoleArn::parse(role_arn).unwrap(),
        external_id: None,
        source_identity: None,
        tags: Vec::new(),
        transitive_tags: Vec::new(),
        policy: None,
        policy_arns: Vec::new(),
        ..session()
    }
}

fn chained_grant(server: &FakeSts, session: ChainedSession) -> Grant {
    let details = GrantDetails {
        chain: vec![Arc::new(session)],
        ..GrantDetails::default()
    };
    Grant {
        details: Some(Arc::new(details)),
        ..grant(&plain(server))
    }
}

fn previous() -> Credentials {
    Credentials {
        access_key_id: "ASIAPREVIOUS".to_owned(),
        secret_access_key: Zeroizing::new("previous/secret+0123456789abcdefghij".to_owned()),
        session_token: Zeroizing::new("previous//token==0123456789abcdefghijklmn".to_owned()),
        expiration: now() + Duration::from_secs(3600),
        first_session_name: None,
    }
}

/// Returns a response of `AssumeRole` with this share of the space for policies and tags.
fn assumed(percent: &str) -> StsReply {
    let result = format!(
        "<Credentials>{CREDENTIALS}</Credentials><PackedPolicySize>{percent}</PackedPolicySize>"
    );
    let text = format!(
        "<AssumeRoleResponse{NAMESPACE}><AssumeRoleResult>{result}</AssumeRoleResult></AssumeRoleResponse>"
    );
    StsReply::Body(200, "text/xml", text)
}

#[tokio::test]
async fn request_has_each_parameter_and_is_signed_by_the_session_before() {
    let server = FakeSts::start(|_, _| assumed("6")).await;
    let sts = sts(settings());
    let grant = chained_grant(&server, session());
    let credentials = sts.assume_chained(&grant, &previous()).await.unwrap();
    assert_eq!(credentials.access_key_id, "ASIAEXAMPLE");
    let bare = chained_grant(&server, bare_session(NEXT));
    sts.assume_chained(&bare, &previous()).await.unwrap();
    let [full, bare] = &server.received()[..] else {
        panic!("not exactly two requests")
    };
    let required = [
        ("Action", "AssumeRole"),
        ("Version", "2011-06-15"),
        ("RoleArn", NEXT),
        ("RoleSessionName", "example.org=billing"),
        ("DurationSeconds", "900"),
    ];
    let optional = [
        ("ExternalId", EXTERNAL_ID),
        ("SourceIdentity", "billing"),
        ("Tags.member.1.Key", "a b/\u{fc}"),
        ("Tags.member.1.Value", "+=@ :\u{fc}"),
        ("Tags.member.2.Key", "empty"),
        ("Tags.member.2.Value", ""),
        ("TransitiveTagKeys.member.1", "empty"),
        ("Policy", r#"{"Version":"2012-10-17","Statement":[]}"#),
        ("PolicyArns.member.1.arn", "arn:aws:iam::aws:policy/A"),
    ];
    let form = |parts: &[(&str, &str)]| -> HashMap<String, String> {
        let parts = parts.iter();
        parts
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    };
    assert_eq!(bare.form, form(&required));
    assert_eq!(full.form, form(&[&required[..], &optional[..]].concat()));
    for request in [full, bare] {
        let header = |name: &str| request.headers[name].to_str().unwrap();
        let authorization = header("authorization");
        assert!(
            authorization.starts_with("AWS4-HMAC-SHA256 Credential=ASIAPREVIOUS/")
                && authorization.contains("/eu-central-1/sts/aws4_request"),
            "{authorization}"
        );
        assert_eq!(
            header("x-amz-security-token"),
            *previous().session_token,
            "{:?}",
            request.headers
        );
        assert_eq!(request.uri, "/");
    }
}

#[tokio::test]
async fn space_for_policies_and_tags_is_logged_over_80_percent() {
    const EVENT: &str = "session policies and tags nearly reach the limit of STS";
    let log = CapturedLog::start();
    let lines = || -> Vec<String> {
        let text = log.text();
        let lines = text.lines().filter(|line| line.contains(EVENT));
        lines.map(str::to_owned).collect()
    };
    let server = FakeSts::start(|number, _| {
        assumed(["0", "80", "81", "99", "100"].get(number).unwrap_or(&"82"))
    })
    .await;
    let sts = sts(settings());
    let grants = [NEXT, "arn:aws:iam::222222222222:role/other"]
        .map(|role_arn| chained_grant(&server, bare_session(role_arn)));
    for _ in 0..2 {
        sts.assume_chained(&grants[0], &previous()).await.unwrap();
    }
    assert_eq!(lines(), [""; 0]);
    for _ in 0..2 {
        sts.assume_chained(&grants[0], &previous()).await.unwrap();
    }
    let [line] = &lines()[..] else {
        panic!("{:?}", lines())
    };
    for part in ["WARN", "percent=81", NEXT, "spiffe://example.org/billing"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    // Another role has a line of its own.
    sts.assume_chained(&grants[1], &previous()).await.unwrap();
    assert!(lines().last().unwrap().contains("percent=100"));
    assert_eq!(lines().len(), 2);
}

#[tokio::test]
async fn error_shows_neither_the_session_before_nor_the_external_id() {
    let log = CapturedLog::start();
    let server = FakeSts::start(|_, request| {
        let token = request.headers["x-amz-security-token"].to_str().unwrap();
        let id = &request.form["ExternalId"];
        let message = format!(
            "Value '{id}' at 'externalId', token={token}, {}...",
            &token[..36]
        );
        rejection(403, "AccessDenied", &message)
    })
    .await;
    let grant = chained_grant(&server, session());
    let error = sts(settings()).assume_chained(&grant, &previous()).await;
    let error = error.unwrap_err();
    let shown = format!("{error} {error:?}");
    assert!(
        shown.contains("Value '[external_id]' at 'externalId'") && shown.contains("[token]"),
        "{shown}"
    );
    assert_kind(&error, RetryPolicy::Never, "sts_access_denied");
    let text = log.text() + &shown;
    let previous = previous();
    for secret in [
        &previous.session_token[..36],
        &previous.secret_access_key,
        EXTERNAL_ID,
    ] {
        let lines: Vec<&str> = text.lines().filter(|line| line.contains(secret)).collect();
        assert_eq!(lines, [""; 0]);
    }
}
