//! The requests of SDKs, and the statuses that they understand.

use std::net::TcpListener;
use std::time::Instant;

use super::*;
use crate::harness::counterparts::folder as new_folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::upstream::ME;

/// A role that the test's STS rejects.
const DENIED: &str = "[[role]]\nname = \"denied\"\nspiffe_id = \"spiffe://example.org/user/*\"\n\
                      role_arn = \"arn:aws:iam::123456789012:role/denied\"\naudience = \"AUDIENCE\"\n";
/// A role of another identity.
const OTHER: &str = "[[role]]\nname = \"other\"\nspiffe_id = \"spiffe://example.org/other\"\n\
                     role_arn = \"arn:aws:iam::123456789012:role/other\"\naudience = \"AUDIENCE\"\n";
/// A second role of this test's user, whose sessions have a name of their own.
const SECOND: &str = "[[role]]\nname = \"second\"\nspiffe_id = \"spiffe://example.org/user/*\"\n\
                      role_arn = \"arn:aws:iam::123456789012:role/dev\"\naudience = \"AUDIENCE\"\n\
                      session_name = \"second\"\n";

/// Returns these roles with the audience of the upstream's role.
fn roles(upstream: &Upstream, roles: &[&str]) -> String {
    let configuration = upstream.configuration();
    let (_, rest) = configuration.split_once("audience = \"").unwrap();
    let (audience, _) = rest.split_once('"').unwrap();
    roles.concat().replace("AUDIENCE", audience)
}

#[test]
fn sdk_gets_its_role_and_credentials_with_a_token() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    for address in [daemon.tcp(), daemon.tcp6()] {
        let answer = put(address, 300);
        assert_eq!((answer.status, answer.body.len()), (200, 56), "{answer:?}");
        assert_eq!(
            answer.header("x-aws-ec2-metadata-token-ttl-seconds"),
            Some("300")
        );
        let token = answer.body;
        for path in [ROLES, ROLES.trim_end_matches('/')] {
            let listed = get(address, path, &token);
            assert_eq!((listed.status, &*listed.body), (200, "dev"), "{listed:?}");
            assert_eq!(listed.header("content-type"), Some("text/plain"));
            let left = listed.header("x-aws-ec2-metadata-token-ttl-seconds");
            assert!((200..=300).contains(&left.unwrap().parse::<u32>().unwrap()));
        }
        let answer = get(address, &format!("{ROLES}dev"), &token);
        assert_eq!(answer.status, 200, "{answer:?}");
        for (header, value) in [
            ("content-type", "application/json"),
            ("cache-control", "no-store"),
            ("connection", "close"),
        ] {
            assert_eq!(answer.header(header), Some(value), "{answer:?}");
        }
        let body = answer.json();
        let keys: Vec<&String> = body.as_object().unwrap().keys().collect();
        let expected = [
            "AccessKeyId",
            "Code",
            "Expiration",
            "LastUpdated",
            "SecretAccessKey",
            "Token",
            "Type",
        ];
        assert_eq!(keys, expected);
        assert_eq!(
            (&body["Code"], &body["Type"]),
            (&"Success".into(), &"AWS-HMAC".into())
        );
        for time in ["Expiration", "LastUpdated"] {
            let time = body[time].as_str().unwrap();
            assert!(time.len() == 20 && time.ends_with('Z'), "{time}");
        }
        let extended = ROLES.replace("credentials/", "credentials-extended/");
        assert_eq!(get(address, &extended, &token).body, "dev");
        let extended = get(address, &format!("{extended}dev"), &token).json();
        assert_eq!(extended["AccountId"], "123456789012");
        assert_eq!(extended["SecretAccessKey"], body["SecretAccessKey"]);
    }
    assert_records(&daemon);
}

/// The list has the first role alone. Programs request others by `AWS_EC2_INSTANCE_PROFILE_NAME`.
#[test]
fn other_role_of_a_caller_is_served_by_its_name() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, &roles(&upstream, &[SECOND]));
    let (address, valid) = (daemon.tcp(), token(daemon.tcp()));
    assert_eq!(get(address, ROLES, &valid).body, "dev");
    let extended = ROLES.replace("credentials/", "credentials-extended/");
    let mut keys = Vec::new();
    for (name, session) in [("dev", "example.org=user=me"), ("second", "second")] {
        for list in [ROLES, &extended] {
            let answer = await_some("the credentials are there", TIMEOUT, || {
                let answer = get(address, &format!("{list}{name}"), &valid);
                (answer.status != 503).then_some(answer)
            });
            assert_eq!(answer.status, 200, "{answer:?}");
            keys.push(answer.json()["AccessKeyId"].clone());
            let records = daemon.audit_after(0);
            let issued = records.iter().rfind(|one| one["outcome"] == "issued");
            assert_eq!(issued.unwrap()["session_name"], session, "{records:#?}");
        }
    }
    assert!(keys[0] == keys[1] && keys[2] == keys[3] && keys[1] != keys[2]);
}

/// Asserts that each request has a record of its protocol, and is counted.
fn assert_records(daemon: &Daemon) {
    let records = daemon.audit_after(0);
    assert!(records.iter().all(|record| record["protocol"] == "imds"));
    let of = |reason: &str| {
        let found = records.iter().find(|record| record["reason"] == reason);
        found.unwrap_or_else(|| panic!("{reason}: {records:#?}"))
    };
    assert_eq!(of("token")["outcome"], "answered");
    assert_eq!(of("role_name")["outcome"], "answered");
    assert_eq!(of("role_name")["spiffe_id"], ME);
    assert_eq!(of("role_name")["access_key_id"], serde_json::Value::Null);
    assert_eq!(
        (&of("ok")["outcome"], &of("ok")["spiffe_id"]),
        (&"issued".into(), &ME.into())
    );
    let series = |outcome: &str, reason: &str| {
        format!(
            "awsvid_requests_total{{listener=\"tcp\",protocol=\"imds\",outcome=\"{outcome}\",reason=\"{reason}\"}}"
        )
    };
    assert_eq!(daemon.metric(&series("answered", "token")), 2);
    assert_eq!(daemon.metric(&series("answered", "role_name")), 6);
    assert_eq!(daemon.metric(&series("issued", "ok")), 4);
}

#[test]
fn region_is_that_of_the_first_role() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    let (address, token) = (daemon.tcp(), token(daemon.tcp()));
    let configuration = upstream.configuration();
    let (_, rest) = configuration.split_once("region = \"").unwrap();
    let region = rest.split('"').next().unwrap();
    let zone = "/latest/meta-data/placement/availability-zone";
    for (path, expected) in [
        ("/latest/meta-data/placement/region", region.to_owned()),
        (zone, format!("{region}a")),
        (&format!("{zone}/"), format!("{region}a")),
    ] {
        let answer = get(address, path, &token);
        assert_eq!((answer.status, answer.body), (200, expected), "{path}");
    }
    let document = "/latest/dynamic/instance-identity/document";
    assert_eq!(get(address, document, &token).json()["region"], region);
    let other = new_folder();
    let table = imds_table(folder.path()) + "region = false\n";
    let configuration = [table, configuration, my_rule()].join("\n");
    let daemon = Daemon::start(other.path(), "", &configuration).ready();
    for path in [zone, document, "/latest/meta-data/placement/region"] {
        let answer = get(daemon.tcp(), path, &token);
        assert_eq!(answer.status, 404, "{path}: {answer:?}");
    }
    assert_eq!(get(daemon.tcp(), ROLES, &token).body, "dev");
}

#[test]
fn caller_without_a_role_gets_a_token_and_404() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, &roles(&upstream, &[OTHER]));
    let (address, valid) = (daemon.tcp(), token(daemon.tcp()));
    // The role of another, and one that does not exist, get the same answer.
    let without_id = |answer: &Metadata| answer.body.split(" (request").next().unwrap().to_owned();
    let [other, unknown] = ["other", "unknown"].map(|role| {
        let answer = get(address, &format!("{ROLES}{role}"), &valid);
        assert_eq!(answer.status, 404, "{answer:?}");
        without_id(&answer).replace(role, "")
    });
    assert_eq!(other, unknown);
    let second = new_folder();
    let without_rule = [imds_table(folder.path()), upstream.configuration()].join("\n")
        + "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/me\"\nuid = 54321\n";
    let daemon = Daemon::start(second.path(), "", &without_rule).ready();
    let (address, valid) = (daemon.tcp(), token(daemon.tcp()));
    for path in [
        ROLES.to_owned(),
        format!("{ROLES}dev"),
        "/latest/meta-data/placement/region".to_owned(),
    ] {
        let answer = get(address, &path, &valid);
        assert_eq!(answer.status, 404, "{path}: {answer:?}");
        assert!(answer.body.contains("no SPIFFE identity"), "{answer:?}");
    }
}

#[test]
fn rejection_by_sts_is_200_with_a_code() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, &roles(&upstream, &[DENIED]));
    let address = daemon.tcp();
    let token = token(address);
    let answer = await_some("the exchange ends", TIMEOUT, || {
        let answer = get(address, &format!("{ROLES}denied"), &token);
        (answer.status != 503).then_some(answer)
    });
    assert_eq!(answer.status, 200, "{answer:?}");
    let body = answer.json();
    assert_eq!(body["Code"], "AssumeRoleUnauthorizedAccess");
    let message = body["Message"].as_str().unwrap();
    assert!(
        message.starts_with("awsvid: ") && message.contains("(request "),
        "{message}"
    );
    assert_eq!(body.get("AccessKeyId"), None);
    let records = daemon.audit_after(0);
    let last = records.last().unwrap();
    assert_eq!(
        (&last["outcome"], &last["requested_role"]),
        (&"refused".into(), &"denied".into())
    );
}

#[test]
fn put_starts_the_exchange() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    let valid = token(daemon.tcp());
    await_some("the credentials are cached", TIMEOUT, || {
        daemon.status(ME)["access_key_id"].is_string().then_some(())
    });
    let answer = get(daemon.tcp(), &format!("{ROLES}dev"), &valid);
    assert_eq!(answer.status, 200, "{answer:?}");
    let records = daemon.audit_after(0);
    assert_eq!(records.last().unwrap()["cache"], "hit");
}

/// Also: the role's name needs no exchange.
#[test]
fn request_is_held_as_long_as_its_sdk_waits() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    // It accepts connections, and answers none.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let configuration = [
        imds_table(folder.path()),
        upstream.configuration(),
        my_rule(),
    ]
    .join("\n");
    let configuration = configuration.replace(upstream.sts(), &url);
    let daemon = Daemon::start(folder.path(), "", &configuration);
    let (address, valid) = (daemon.tcp(), token(daemon.tcp()));
    assert_eq!(get(address, ROLES, &valid).body, "dev");
    for (agent, least) in [
        ("User-Agent: aws-sdk-go-v2/1.30\r\n", 400),
        ("User-Agent: Boto3/1.44.8 md/x\r\n", 900),
        ("", 900),
    ] {
        let headers = format!("{agent}X-aws-ec2-metadata-token: {valid}\r\n");
        let begun = Instant::now();
        let answer = send(address, &format!("GET {ROLES}dev"), &headers);
        assert_eq!(answer.status, 503, "{answer:?}");
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert!(begun.elapsed() >= Duration::from_millis(least), "{agent}");
    }
    let records = daemon.audit_after(0);
    assert_eq!(records.last().unwrap()["reason"], "pending");
}

/// As s3fs sends it: 1.90 waits for the answer to its expectation, 1.91 does not have it.
#[test]
fn token_is_issued_for_a_request_in_chunks() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    let address = daemon.tcp();
    for more in ["\r\n0\r\n", "Expect: 100-continue\r\n"] {
        let headers = format!(
            "X-aws-ec2-metadata-token-ttl-seconds: 60\r\nTransfer-Encoding: chunked\r\n{more}"
        );
        let answer = send(address, "PUT /latest/api/token", &headers);
        assert_eq!(answer.status, 200, "{more}: {answer:?}");
        assert_eq!(get(address, ROLES, &answer.body).body, "dev", "{more}");
    }
}

#[test]
fn request_of_a_deputy_or_without_form_is_rejected() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    let (address, valid) = (daemon.tcp(), token(daemon.tcp()));
    let ttl = |value: &str| format!("X-aws-ec2-metadata-token-ttl-seconds: {value}\r\n");
    let with_token = format!("X-aws-ec2-metadata-token: {valid}\r\n");
    const PUT: &str = "PUT /latest/api/token";
    let list = format!("GET {ROLES}");
    for (line, headers, status, reason) in [
        (PUT, String::new(), 400, "imds_ttl"),
        (PUT, ttl("0"), 400, "imds_ttl"),
        (PUT, ttl("21601"), 400, "imds_ttl"),
        (PUT, ttl("1h"), 400, "imds_ttl"),
        (PUT, ttl("60").repeat(2), 400, "imds_ttl"),
        (
            PUT,
            ttl("60") + "X-Forwarded-For: 10.0.0.1\r\n",
            403,
            "proxied",
        ),
        (PUT, ttl("60") + "Via: 1.1 proxy\r\n", 403, "proxied"),
        (
            PUT,
            ttl("60") + "Origin: http://a.example\r\n",
            403,
            "browser",
        ),
        (PUT, ttl("60") + "Host: a.example\r\n", 400, "host"),
        (PUT, ttl("60") + "Content-Length: 1\r\n\r\nx", 400, "body"),
        (
            &list,
            with_token.clone() + "Transfer-Encoding: chunked\r\n\r\n0\r\n",
            400,
            "body",
        ),
        ("POST /latest/api/token", ttl("60"), 405, "method"),
        ("GET /latest/api/token", with_token.clone(), 405, "method"),
        (
            "PUT /latest/meta-data/iam/security-credentials/",
            with_token.clone(),
            405,
            "method",
        ),
        (
            "HEAD /latest/meta-data/iam/security-credentials/",
            with_token.clone(),
            405,
            "method",
        ),
        (
            "OPTIONS /latest/meta-data/iam/security-credentials/",
            with_token.clone(),
            405,
            "method",
        ),
        (&list, String::new(), 401, "imds_token"),
        (&list, with_token.repeat(2), 401, "imds_token"),
        (
            &list,
            with_token.clone() + "X-Forwarded-For: 10.0.0.1\r\n",
            403,
            "proxied",
        ),
        (
            &format!("GET http://{address}{ROLES}"),
            with_token.clone(),
            403,
            "proxied",
        ),
        ("GET /latest/meta-data/", with_token.clone(), 404, "path"),
        (
            "GET /latest/meta-data/instance-id",
            with_token.clone(),
            404,
            "path",
        ),
        ("GET /latest/user-data", with_token.clone(), 404, "path"),
        (
            "GET /latest/meta-data/instance-id",
            String::new(),
            401,
            "imds_token",
        ),
    ] {
        let known = daemon.audit().len();
        let answer = send(address, line, &headers);
        assert_eq!(answer.status, status, "{line} {headers}: {answer:?}");
        if status == 405 {
            let method = if line.contains("api/token") {
                "put"
            } else {
                "get"
            };
            assert_eq!(answer.header("allow"), Some(method), "{line}");
        }
        let records = daemon.audit_after(known);
        assert_eq!(records[0]["reason"], reason, "{line} {headers}");
    }
    // The SDKs that double slashes get what they want.
    let doubled = get(address, &ROLES.replace('/', "//"), &valid);
    assert_eq!((doubled.status, &*doubled.body), (200, "dev"));
}

#[test]
fn metadata_is_served_only_where_it_is_on() {
    let (folder, upstream) = (new_folder(), Upstream::start_for_me());
    let configuration = upstream.configuration() + &my_rule();
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    let answer = put(daemon.tcp(), 60);
    assert_ne!(answer.status, 200, "{answer:?}");
    assert!(!folder.path().join("imds-key").exists());
    let records = daemon.audit_after(0);
    assert_eq!(records[0]["protocol"], "container");
    // The unix socket has the container credential endpoint alone.
    let second = new_folder();
    let daemon = serve(second.path(), &upstream, "");
    let mut stream = std::os::unix::net::UnixStream::connect(daemon.unix()).unwrap();
    let request = "PUT /latest/api/token HTTP/1.1\r\nHost: localhost\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let answer = std::io::read_to_string(stream).unwrap();
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    let (status, body) = crate::harness::client::fetch(connect(daemon.tcp()));
    assert_eq!((status, &body["Code"]), (200, &"Success".into()));
}
