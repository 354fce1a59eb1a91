//! The network between the daemon and its STS: late or missing certificates, variables, proxies,
//! and the host of the calls.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use nix::unistd::geteuid;
use serde_json::Value;

use crate::harness::client::{answer, fetch};
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::{await_some, behind, run};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::forward::Network;
use crate::harness::stub_http;
use crate::harness::tls::TlsFront;
use crate::harness::upstream::Upstream;

const TIMEOUT: Duration = Duration::from_secs(120);
const MISSING: &str = "[sts] CA certificates are missing: calls to STS fail until they are there";
/// No call gets further than the test's own proxy.
const AWS: &str = "[sts]\nregion = \"us-east-1\"\ntimeout = \"2s\"\n";

/// Returns a rule for this test's own user.
fn rule(upstream: &Upstream) -> String {
    let configuration = upstream.configuration();
    let id = "spiffe://example.org/user/self";
    assert!(
        configuration.contains("spiffe://example.org/user/"),
        "{configuration}"
    );
    format!("[[workload]]\nspiffe_id = \"{id}\"\nuid = {}\n", geteuid())
}

fn upstream() -> Upstream {
    Upstream::start(&[(geteuid().as_raw(), "self")])
}

/// Returns the configuration with this `[sts]`.
fn with_sts(upstream: &Upstream, sts: &str) -> String {
    let configuration = upstream.configuration();
    let from = configuration.find("[sts]").unwrap();
    let to = configuration.find("[[role]]").unwrap();
    format!(
        "{}{sts}\n{}\n{}",
        &configuration[..from],
        &configuration[to..],
        rule(upstream)
    )
}

/// Runs `awsvid check` with these variables and returns its findings.
fn check(folder: &Path, variables: &[&str], configuration: &str) -> Vec<Value> {
    let path = folder.join("check.toml");
    fs::write(&path, configuration).unwrap();
    let mut command = behind(&[&["env"], variables].concat(), Path::new(PROGRAM));
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .args(["check", "--output", "json", "--config"])
        .arg(path);
    let output = run(command, b"", TIMEOUT);
    let report: Value =
        serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    report["findings"].as_array().unwrap().clone()
}

#[track_caller]
fn assert_failed(findings: &[Value], step: &str, words: &[&str]) {
    let found = findings.iter().any(|finding| {
        let text = finding.to_string();
        finding["step"] == step
            && finding["verdict"] == "failed"
            && words.iter().all(|words| text.contains(words))
    });
    assert!(found, "no failed {step} with {words:?} in {findings:#?}");
}

#[test]
fn late_ca_file_fails_only_the_calls_that_need_it() {
    let folder = folder();
    let upstream = upstream();
    let behind = upstream
        .sts()
        .strip_prefix("http://")
        .unwrap()
        .parse()
        .unwrap();
    let front = TlsFront::start(Network::Own, (Ipv4Addr::LOCALHOST, 0).into(), behind);
    let file = folder.path().join("late/ca.pem");
    let sts = format!(
        "[sts]\nregion = \"us-east-1\"\nendpoint = \"{}\"\nca_file = {file:?}\n",
        front.url()
    );
    let text = with_sts(&upstream, &sts);
    let daemon = Daemon::start(folder.path(), "", &text);
    daemon.await_line(&[MISSING]);
    let request = || fetch(UnixStream::connect(daemon.unix()).unwrap());
    let (status, body) = request();
    assert_eq!(
        (status, &body["code"]),
        (503, &Value::from("sts_no_ca")),
        "{body}"
    );
    assert!(
        body["message"]
            .as_str()
            .unwrap()
            .contains(&file.display().to_string()),
        "{body}"
    );
    assert_failed(
        &check(folder.path(), &[], &text),
        "sts",
        &[&front.url(), "cannot be verified", "late/ca.pem"],
    );
    // The file was read more than once, and logged once.
    daemon.await_line(&["not ready", "STS: "]);
    assert_eq!(daemon.log().matches(MISSING).count(), 1, "{}", daemon.log());

    fs::create_dir(folder.path().join("late")).unwrap();
    fs::write(&file, front.certificate()).unwrap();
    let (status, body) = await_some("credentials", TIMEOUT, || {
        Some(request()).filter(|(status, _)| *status == 200)
    });
    assert!(status == 200 && body["AccessKeyId"].is_string(), "{body}");
    daemon.await_line(&["[sts] CA certificates were loaded"]);
    let daemon = daemon.ready();
    // A reload with a file that does not exist yet takes effect; one with a file that is wrong does
    // not.
    assert!(daemon.reload("", &text.replace("late/ca.pem", "later.pem")));
    fs::write(folder.path().join("wrong.pem"), "no certificate\n").unwrap();
    assert!(!daemon.reload("", &text.replace("late/ca.pem", "wrong.pem")));
}

#[test]
fn ca_file_without_certificates_is_a_configuration_error() {
    let folder = folder();
    let upstream = upstream();
    let file = folder.path().join("ca.pem");
    fs::write(&file, "-----BEGIN CERTIFICATE-----\n!\n").unwrap();
    let sts = format!(
        "[sts]\nregion = \"us-east-1\"\nendpoint = \"https://127.0.0.1:9\"\nca_file = {file:?}\n"
    );
    let text = with_sts(&upstream, &sts);
    let (status, log) = Daemon::run_to_exit(&[], folder.path(), &text);
    assert_eq!(status, Some(78), "{log}");
    assert!(
        log.contains("ca.pem: it is not a valid PEM file")
            || log.contains("ca.pem: it has no certificate"),
        "{log}"
    );
}

/// As in an image without certificates.
#[test]
fn empty_trust_store_is_logged_at_start_only_where_it_is_used() {
    let folder = folder();
    let upstream = upstream();
    let nowhere = [
        "env",
        "SSL_CERT_FILE=/nonexistent/ca.pem",
        "SSL_CERT_DIR=/nonexistent/certs",
    ];
    let other_sts = with_sts(
        &upstream,
        "[sts]\nendpoint = \"https://127.0.0.1:9\"\ntimeout = \"2s\"\n",
    );
    for (name, text) in [("aws", with_sts(&upstream, AWS)), ("elsewhere", other_sts)] {
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        let daemon = Daemon::start_behind(&nowhere, &folder, "", &text);
        daemon.await_line(&[MISSING]);
        let log = daemon.log();
        let locations = "/nonexistent/ca.pem (SSL_CERT_FILE), /nonexistent/certs (SSL_CERT_DIR)";
        assert!(
            log.contains(locations) && log.contains("install its CA package"),
            "{log}"
        );
        let findings = check(&folder, &nowhere[1..], &text);
        assert_failed(
            &findings,
            "sts",
            &["this system trusts no CA certificates", locations],
        );
    }
    let plain = folder.path().join("plain");
    fs::create_dir(&plain).unwrap();
    let daemon = Daemon::start_behind(
        &nowhere,
        &plain,
        "",
        &format!("{}\n{}", upstream.configuration(), rule(&upstream)),
    );
    assert!(!daemon.ready().log().contains(MISSING));
}

#[test]
fn proxy_variable_is_an_error_only_where_it_is_used() {
    let folder = folder();
    let upstream = upstream();
    let aws = with_sts(&upstream, AWS);
    for (number, (variables, name)) in [
        (&["ALL_PROXY=socks://127.0.0.1:1080"][..], "ALL_PROXY"),
        (
            &[
                "https_proxy=socks5h://127.0.0.1:1080",
                "ALL_PROXY=http://127.0.0.1:1",
            ],
            "https_proxy",
        ),
        (&["AWS_USE_FIPS_ENDPOINT=yes"], "AWS_USE_FIPS_ENDPOINT"),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = folder.path().join(number.to_string());
        fs::create_dir(&folder).unwrap();
        let (status, log) = Daemon::run_to_exit(&[&["env"], variables].concat(), &folder, &aws);
        assert!(
            status == Some(78) && log.contains(&format!("variable {name} ")),
            "{status:?} {log}"
        );
        assert_failed(&check(&folder, variables, &aws), "sts", &[name]);
    }
    let started = |name: &str, variables: &[&str], text: &str| {
        let folder = folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        Daemon::start_behind(&[&["env"], variables].concat(), &folder, "", text)
    };
    drop(started(
        "both",
        &[
            "ALL_PROXY=socks://127.0.0.1:1080",
            "HTTPS_PROXY=http://127.0.0.1:1",
        ],
        &aws,
    ));
    drop(started(
        "except",
        &[
            "ALL_PROXY=socks://127.0.0.1:1080",
            "NO_PROXY=*.amazonaws.com",
        ],
        &aws,
    ));
    // The test's own STS is on loopback.
    let plain = format!("{}\n{}", upstream.configuration(), rule(&upstream));
    drop(
        started(
            "plain",
            &[
                "ALL_PROXY=socks://127.0.0.1:1080",
                "AWS_USE_FIPS_ENDPOINT=yes",
            ],
            &plain,
        )
        .ready(),
    );
}

#[test]
fn check_calls_and_names_the_host_of_the_daemon() {
    let folder = folder();
    let upstream = upstream();
    let table = [
        (
            "us-east-1",
            &["AWS_USE_FIPS_ENDPOINT=true"][..],
            "sts-fips.us-east-1.amazonaws.com",
        ),
        (
            "us-east-1",
            &["AWS_USE_DUALSTACK_ENDPOINT=true"],
            "sts.us-east-1.api.aws",
        ),
        ("cn-north-1", &[], "sts.cn-north-1.amazonaws.com.cn"),
        ("us-iso-east-1", &[], "sts.us-iso-east-1.c2s.ic.gov"),
        ("eusc-de-east-1", &[], "sts.eusc-de-east-1.amazonaws.eu"),
    ];
    for (region, variables, host) in table {
        let (sender, requests) = channel();
        let proxy = stub_http::start(move |first, _| {
            // The test may have ended.
            let _ = sender.send(first.trim().to_owned());
            stub_http::http("403 Forbidden", "", "")
        });
        let https_proxy = format!("HTTPS_PROXY={proxy}");
        let variables = [&[https_proxy.as_str()], variables].concat();
        let text = with_sts(&upstream, &AWS.replace("us-east-1", region));
        let findings = check(folder.path(), &variables, &text);
        let called: Vec<String> = requests
            .try_iter()
            .filter(|first| !first.contains("oidc"))
            .collect();
        let connect = format!("CONNECT {host}:443 HTTP/1.1");
        assert!(
            called.len() >= 2 && called.iter().all(|first| *first == connect),
            "{host}: {called:?}"
        );
        let through = format!(
            "through the proxy {} (HTTPS_PROXY)",
            proxy.strip_prefix("http://").unwrap()
        );
        assert_failed(
            &findings,
            "sts",
            &[&format!("STS at https://{host} did not answer"), &through],
        );
        let clock = findings
            .iter()
            .find(|finding| finding["step"] == "clock")
            .unwrap();
        assert!(
            clock["saw"]
                .as_str()
                .unwrap()
                .contains(&format!("https://{host}")),
            "{clock}"
        );
    }
}

#[test]
fn daemon_and_check_give_the_same_advice() {
    let folder = folder();
    let upstream = upstream();
    let sts = stub_http::start(|_, _| {
        let body =
            "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message></Message></Error>";
        stub_http::http("403 Forbidden", "Content-Type: application/xml\r\n", body)
    });
    let text = with_sts(&upstream, &format!("[sts]\nendpoint = \"{sts}\"\n"));
    let findings = check(folder.path(), &[], &text);
    let found = findings
        .iter()
        .find(|finding| finding["step"] == "sts")
        .unwrap();
    let [saw, fix] = ["saw", "fix"].map(|name| found[name].as_str().unwrap());
    assert!(
        saw.contains("rejected")
            && saw.contains("AccessDenied")
            && fix.contains("the trust policy of"),
        "{found}"
    );
    let daemon = Daemon::start(folder.path(), "", &text);
    let (status, body) = fetch(UnixStream::connect(daemon.unix()).unwrap());
    assert_eq!(
        (status, &body["code"]),
        (403, &Value::from("sts_access_denied")),
        "{body}"
    );
    let message = body["message"].as_str().unwrap();
    assert!(
        message.contains(saw) && message.contains(fix),
        "{message}\n{saw}\n{fix}"
    );
}

#[test]
fn role_of_another_sts_is_assumed_by_its_own_name() {
    let folder = folder();
    let upstream = upstream();
    let (sender, requests) = channel();
    let sts = stub_http::start(move |_, body| {
        let _ = sender.send(body.to_owned());
        let body = "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>K</AccessKeyId>\
             <SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>"
            .to_owned()
            + &humantime::format_rfc3339_nanos(std::time::SystemTime::now() + Duration::from_secs(3600)).to_string()
            + "</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>";
        stub_http::http("200 OK", "", &body)
    });
    let text = with_sts(&upstream, &format!("[sts]\nendpoint = \"{sts}\"\n"));
    let line = text
        .lines()
        .find(|line| line.starts_with("role_arn"))
        .unwrap()
        .to_owned();
    let name = "urn:ecs:iam::ns1:role/shop";
    let daemon = Daemon::start(
        folder.path(),
        "",
        &text.replace(&line, &format!("role_arn = \"{name}\"")),
    );
    let (status, body) = fetch(UnixStream::connect(daemon.unix()).unwrap());
    assert_eq!(
        (status, &body["RoleArn"]),
        (200, &Value::from(name)),
        "{body}"
    );
    assert!(body.get("AccountId").is_none(), "{body}");
    let sent: Vec<String> = requests.try_iter().collect();
    let role = |body: &String| {
        form_urlencoded::parse(body.as_bytes())
            .any(|(key, value)| key == "RoleArn" && value == name)
    };
    assert!(sent.iter().any(role), "{sent:?}");
    let records = daemon.audit();
    assert!(
        records
            .iter()
            .any(|record| record["outcome"] == "issued" && record["role_arn"] == name),
        "{records:?}"
    );
    let mut status = Command::new(PROGRAM);
    status
        .env_clear()
        .args(["status", "--output", "json", "--config"])
        .arg(folder.path().join("awsvid.toml"));
    let status = run(status, b"", TIMEOUT).success("awsvid status");
    assert!(status.contains(name), "{status}");
    let mut policy = Command::new(PROGRAM);
    policy.env_clear().args([
        "trust-policy",
        "--issuer",
        "https://oidc.example.org",
        "--config",
    ]);
    let policy = run(
        {
            policy.arg(folder.path().join("awsvid.toml"));
            policy
        },
        b"",
        TIMEOUT,
    );
    assert!(
        policy.status.code() == Some(1)
            && policy
                .stderr
                .contains("is not AWS, and has policies of its own"),
        "{policy:?}"
    );
}

/// An unescaped `@` belongs to the password.
#[test]
fn proxy_gets_the_password_up_to_the_last_at_sign() {
    let (folder, proxy) = (folder(), TcpListener::bind("127.0.0.1:0").unwrap());
    let variable = format!("HTTPS_PROXY=http://u:p@ss@{}", proxy.local_addr().unwrap());
    let aws = with_sts(&upstream(), AWS);
    let _daemon = Daemon::start_behind(&["env", &variable], folder.path(), "", &aws);
    let (stream, _) = proxy.accept().unwrap();
    let head: Vec<String> = BufReader::new(stream)
        .lines()
        .map(Result::unwrap)
        .take_while(|line| !line.is_empty())
        .collect();
    assert!(
        head[0].starts_with("CONNECT sts.us-east-1.amazonaws.com:443 "),
        "{head:?}"
    );
    // `u:p@ss` in Base64.
    let expected = "proxy-authorization: Basic dTpwQHNz";
    let has = |line: &String| line.eq_ignore_ascii_case(expected);
    assert!(head.iter().any(has), "{head:?}");
}

/// The DNS name of the proxy may be there later. Roles at an STS that needs no proxy are served.
#[test]
fn proxy_that_does_not_resolve_stops_only_the_calls_through_it() {
    let (folder, upstream) = (folder(), upstream());
    let role = "[[role]]\nname = \"aws\"\nspiffe_id = \"spiffe://example.org/user/self\"\n\
                role_arn = \"arn:aws:iam::123456789012:role/aws\"\naudience = \"aws\"\n\
                sts_endpoint = \"https://sts.us-east-1.amazonaws.com\"\n";
    let text = format!("{}\n{}\n{role}", upstream.configuration(), rule(&upstream));
    let words = ["env", "HTTPS_PROXY=http://proxy.invalid:3128"];
    let daemon = Daemon::start_behind(&words, folder.path(), "", &text);
    let fetch_path = |path: &str| {
        let mut stream = UnixStream::connect(daemon.unix()).unwrap();
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: any\r\n\r\n"
        )
        .unwrap();
        answer(&mut stream)
    };
    await_some("the call through the proxy fails", TIMEOUT, || {
        let (status, body) = fetch_path("/v1/credentials/aws");
        (status == 503 && body["code"] == "sts_unreachable").then_some(())
    });
    assert_eq!(fetch_path("/v1/credentials").0, 200);
    daemon.await_line(&["exchange failed", "proxy.invalid:3128"]);
}
