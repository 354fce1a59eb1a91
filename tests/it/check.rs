//! `awsvid check` as an operator runs it: on a path where all is well, and on paths with one fault
//! each. The fault is a misconfigured real counterpart wherever that is possible.

#[path = "../../src/commands/check/doc_tables.rs"]
mod doc_tables;
mod ends;
mod tokens;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use awsvid::clock::Clock;
use awsvid::dev::sts::{DevAccount, DevProvider, DevSts, TrustedRole};
use awsvid::identity::{RoleArn, SpiffeIdPattern};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::harness::counterparts::minio::{self, Minio};
use crate::harness::counterparts::process::{Output, behind, run, spawn};
use crate::harness::counterparts::spire::{Spire, SpireSetting};
use crate::harness::counterparts::workload::Workload;
use crate::harness::counterparts::{folder, http_get, root};
use crate::harness::daemon::PROGRAM;
use crate::harness::env::{Env, Setting, Source, id};
use crate::harness::forward::Network;
use crate::harness::stub_http;
use crate::harness::tls::TlsFront;
use crate::harness::upstream::Upstream;

const TIMEOUT: Duration = Duration::from_secs(120);
const UNREACHABLE: &str = "http://127.0.0.1:1";

/// Returns a configuration with this STS and one workload of this name.
fn configuration(socket: &Path, sts: &str, arn: &str, audience: &str) -> String {
    format!(
        "[identity]\nworkload_api_socket = \"unix://{}\"\naudience = \"{audience}\"\n[sts]\nregion = \"us-east-1\"\nendpoint = \"{sts}\"\ntimeout = \"5s\"\n\
         [[workload]]\nspiffe_id = \"{}\"\nuid = 1001\n\
         [[role]]\nname = \"shop\"\nspiffe_id = \"{}\"\nrole_arn = \"{arn}\"\n",
        socket.display(),
        id("reader"),
        id("*"),
    )
}

fn check_with(
    words: &[&str],
    folder: &Path,
    configuration: &str,
    arguments: &[&str],
) -> (Output, Value) {
    let path = folder.join("check.toml");
    fs::write(&path, configuration).unwrap();
    let mut command = behind(words, Path::new(PROGRAM));
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .args(["check", "--output", "json", "--config"])
        .arg(path)
        .args(arguments);
    let output = run(command, b"", TIMEOUT);
    let report: Value =
        serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    for finding in report["findings"].as_array().unwrap() {
        let text = |name: &str| finding[name].as_str().unwrap_or_default();
        if finding["fix"].is_string() {
            doc_tables::assert_documented(text("step"), text("saw"), text("fix"));
        }
    }
    // Whatever has failed, no token is shown.
    assert!(
        !output.stdout.contains("eyJ") && !output.stderr.contains("eyJ"),
        "{output:?}"
    );
    (output, report)
}

fn check(folder: &Path, configuration: &str) -> (Output, Value) {
    check_with(&[], folder, configuration, &[])
}

/// Asserts that this step failed with these words, that its fix has those, and that the exit status
/// shows a failure.
fn assert_failed((output, report): &(Output, Value), step: &str, saw: &str, fix: &str) {
    assert_eq!(output.status.code(), Some(1), "{report:#}");
    let found = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .any(|finding| {
            let has = |name: &str, words: &str| {
                finding[name]
                    .as_str()
                    .is_some_and(|text| text.contains(words))
            };
            finding["step"] == step
                && finding["verdict"] == "failed"
                && has("saw", saw)
                && has("fix", fix)
        });
    assert!(
        found,
        "no failed {step} with {saw:?} and {fix:?} in {report:#}"
    );
}

fn spire(folder: &Path, setting: SpireSetting) -> Option<Spire> {
    if !root() {
        return None;
    }
    let spire = Spire::start_with(folder, setting)?;
    spire.register(&id("reader"), &["unix:uid:0"]);
    Some(spire)
}

#[test]
fn check_passes_with_running_daemon() {
    let folder = folder();
    let Some(env) = Env::start(folder.path(), &[(1001, "reader")], &Setting::default()) else {
        return;
    };
    let text = configuration(
        &env.spire.agent_socket(),
        &env.minio.endpoint(),
        &env.minio.role_arn(),
        minio::AUDIENCE,
    );
    let (output, report) = check(folder.path(), &text);
    assert_eq!(
        (output.status.code(), &report["result"]),
        (Some(0), &json!("pass")),
        "{report:#}"
    );
    let text_report = report.to_string();
    for words in [
        "byte by byte",
        "20 requests at once are answered",
        "signature is right",
        "assumed by spiffe://example.org/w/reader",
        "clock and STS's agree",
    ] {
        assert!(text_report.contains(words), "{words}: {report:#}");
    }
    // The report for people is the same, line by line.
    let mut command = Command::new(PROGRAM);
    command
        .args(["check", "--config"])
        .arg(folder.path().join("check.toml"));
    let output = run(command, b"", TIMEOUT);
    let issuer = env.spire.issuer_url();
    for waited in [
        format!("STS's clock, at {}", env.minio.endpoint()),
        "a token for the role \"shop\"".to_owned(),
        format!("{issuer}/.well-known/openid-configuration"),
        format!("{issuer}/keys"),
        format!("{issuer}/keys, 20 times at once"),
        "STS, for role \"shop\"".to_owned(),
    ] {
        let line = format!("  ...  {waited}");
        assert!(
            output.stderr.lines().any(|text_report| text_report == line),
            "{line}: {output:?}"
        );
    }
    let text = output.success("awsvid check");
    assert!(
        text.contains("  ok   sts") && text.ends_with("pass\n"),
        "{text}"
    );
    // The daemon keeps serving.
    assert!(env.curl(1001).1.contains("AccessKeyId"));

    // The workload itself, by the same daemon.
    let uri = env.daemon.uri();
    let arguments = ["check", "--workload"];
    let workload = || {
        Workload::new(1001)
            .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", &uri)
            .env("AWS_CONTAINER_AUTHORIZATION_TOKEN", "any")
    };
    let output = workload().run(PROGRAM, &arguments);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(
        output.stdout.contains("gives this process arn:minio:iam"),
        "{output:?}"
    );
    let output = workload()
        .env("AWS_PROFILE", "other")
        .env("http_proxy", UNREACHABLE)
        .run(PROGRAM, &arguments);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for words in ["AWS_PROFILE is set", "http_proxy is set"] {
        assert!(output.stdout.contains(words), "{words}: {output:?}");
    }
}

#[test]
fn check_reports_missing_issuer() {
    let folder = folder();
    let setting = SpireSetting {
        jwt_issuer: Some(|_| String::new()),
        ..SpireSetting::default()
    };
    let Some(spire) = spire(folder.path(), setting) else {
        return;
    };
    let found = check(
        folder.path(),
        &configuration(
            &spire.agent_socket(),
            UNREACHABLE,
            "arn:minio:iam:::role/r",
            "shop",
        ),
    );
    assert_failed(&found, "token", "no `iss`", "jwt_issuer");
}

#[test]
fn check_reports_trailing_slash_of_issuer() {
    let folder = folder();
    let setting = SpireSetting {
        jwt_issuer: Some(|right| format!("{right}/")),
        ..SpireSetting::default()
    };
    let Some(spire) = spire(folder.path(), setting) else {
        return;
    };
    let found = check(
        folder.path(),
        &configuration(
            &spire.agent_socket(),
            UNREACHABLE,
            "arn:minio:iam:::role/r",
            "shop",
        ),
    );
    assert_failed(&found, "discovery", "a slash at the end", "byte by byte");
}

#[test]
fn check_reports_unknown_discovery_domain() {
    let folder = folder();
    let setting = SpireSetting {
        domains: Some("oidc.example.org"),
        ..SpireSetting::default()
    };
    let Some(spire) = spire(folder.path(), setting) else {
        return;
    };
    let found = check(
        folder.path(),
        &configuration(
            &spire.agent_socket(),
            UNREACHABLE,
            "arn:minio:iam:::role/r",
            "shop",
        ),
    );
    assert_failed(&found, "discovery", "answers 400", "`domains`");
}

#[test]
fn check_reports_wrong_jwks_uri() {
    let folder = folder();
    let setting = SpireSetting {
        oidc: "jwks_uri = \"http://127.0.0.1:1/keys\"",
        ..SpireSetting::default()
    };
    let Some(spire) = spire(folder.path(), setting) else {
        return;
    };
    let found = check(
        folder.path(),
        &configuration(
            &spire.agent_socket(),
            UNREACHABLE,
            "arn:minio:iam:::role/r",
            "shop",
        ),
    );
    assert_failed(
        &found,
        "keys",
        "http://127.0.0.1:1/keys: no connection",
        "publish it",
    );
}

/// It can't list its keys, since it does not reach the server.
#[test]
fn check_reports_discovery_provider_without_server() {
    let folder = folder();
    let setting = SpireSetting {
        oidc_server: Some("/nonexistent/server.sock"),
        ..SpireSetting::default()
    };
    let Some(spire) = spire(folder.path(), setting) else {
        return;
    };
    let found = check(
        folder.path(),
        &configuration(
            &spire.agent_socket(),
            UNREACHABLE,
            "arn:minio:iam:::role/r",
            "shop",
        ),
    );
    assert_failed(&found, "keys", "has not got the keys yet", "server_api");
}

/// It has a certificate that no machine knows, as AWS may see it too.
#[test]
fn check_reports_private_certificate_of_issuer() {
    let folder = folder();
    let Some(spire) = spire(folder.path(), SpireSetting::default()) else {
        return;
    };
    let issuer = spire
        .issuer_url()
        .strip_prefix("http://")
        .unwrap()
        .parse()
        .unwrap();
    let front = TlsFront::start(Network::Own, (Ipv4Addr::LOCALHOST, 0).into(), issuer);
    let text = configuration(
        &spire.agent_socket(),
        UNREACHABLE,
        "arn:minio:iam:::role/r",
        "shop",
    );
    let (output, report) = check_with(&[], folder.path(), &text, &["--url", &front.url()]);
    let found = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .find(|finding| {
            finding["step"] == "discovery"
                && finding["saw"]
                    .as_str()
                    .unwrap()
                    .contains("does not trust its TLS chain")
        });
    let thumbprint = front.thumbprint();
    assert!(
        found.is_some_and(|finding| finding["fix"].as_str().unwrap().contains(&thumbprint)),
        "{thumbprint}: {report:#}"
    );
    // The steps behind it are checked all the same: here that a proxy which ends TLS must be named.
    assert!(
        report
            .to_string()
            .contains("/.well-known/openid-configuration answers in"),
        "{report:#}"
    );
    let found = (output, report);
    assert_failed(
        &found,
        "keys",
        "no HTTP",
        "STS fetches this over the internet",
    );
}

#[test]
fn check_reports_outdated_keys() {
    let folder = folder();
    let Some(spire) = spire(folder.path(), SpireSetting::default()) else {
        return;
    };
    let address = spire
        .issuer_url()
        .strip_prefix("http://")
        .unwrap()
        .parse()
        .unwrap();
    let (_, keys) = http_get(address, "/keys").unwrap();
    let keys = stub_http::start(move |_, _| stub_http::http("200 OK", "", &keys));
    let discovery =
        json!({ "issuer": spire.issuer_url(), "jwks_uri": format!("{keys}/keys") }).to_string();
    let copy = stub_http::start(move |_, _| stub_http::http("200 OK", "", &discovery));
    let text = configuration(
        &spire.agent_socket(),
        UNREACHABLE,
        "arn:minio:iam:::role/r",
        "shop",
    );
    let (_, report) = check_with(&[], folder.path(), &text, &["--url", &copy]);
    assert!(
        report.to_string().contains("signature is right"),
        "{report:#}"
    );

    let prepared = spire
        .server_command(&["localauthority", "jwt", "prepare", "-output", "json"])
        .success("prepare");
    let prepared: Value = serde_json::from_str(&prepared).unwrap();
    let authority = prepared["prepared_authority"]["authority_id"]
        .as_str()
        .unwrap();
    spire
        .server_command(&[
            "localauthority",
            "jwt",
            "activate",
            "-authorityID",
            authority,
        ])
        .success("activate");
    // Another audience: the agent has a token for the first one.
    let text = configuration(
        &spire.agent_socket(),
        UNREACHABLE,
        "arn:minio:iam:::role/r",
        "shop2",
    );
    let found = check_with(&[], folder.path(), &text, &["--url", &copy]);
    assert_failed(
        &found,
        "keys",
        "a copy from before the last rotation",
        "publish the current keys",
    );
}

#[test]
fn check_reports_rejections_of_minio() {
    let folder = folder();
    let Some(spire) = spire(folder.path(), SpireSetting::default()) else {
        return;
    };
    let policy = minio::readable_by(&id("reader"), "shop");
    let Some(minio) = Minio::start(folder.path(), &spire.issuer_url(), &policy) else {
        return;
    };
    let with = |arn: &str, audience: &str| {
        check(
            folder.path(),
            &configuration(&spire.agent_socket(), &minio.endpoint(), arn, audience),
        )
    };
    assert_failed(
        &with(&minio.role_arn(), "other"),
        "sts",
        "rejected",
        "audience",
    );
    assert_failed(
        &with("arn:minio:iam:::role/none", minio::AUDIENCE),
        "sts",
        "rejected",
        "the ARN that it prints",
    );
}

#[test]
fn check_reports_unusable_agent_socket() {
    if !root() {
        return;
    }
    let folder = folder();
    let socket = folder.path().join("agent.sock");
    let text = configuration(&socket, UNREACHABLE, "arn:minio:iam:::role/r", "shop");
    assert_failed(
        &check(folder.path(), &text),
        "agent",
        "no socket at",
        "start the SPIFFE agent",
    );
    // STS is tried all the same, and the steps that need a token are listed.
    let (_, report) = check(folder.path(), &text);
    let of = |verdict: &str| {
        let findings = report["findings"].as_array().unwrap().iter();
        let of = findings.filter(|finding| finding["verdict"] == verdict);
        let steps = of.map(|finding| finding["step"].as_str().unwrap());
        steps.collect::<Vec<_>>()
    };
    let skipped = ["identity", "token", "discovery", "keys", "sts"];
    assert_eq!(of("unchecked"), skipped, "{report:#}");
    assert!(of("note").contains(&"clock"), "{report:#}");
    drop(UnixListener::bind(&socket).unwrap());
    assert_failed(
        &check(folder.path(), &text),
        "agent",
        "nothing listens",
        "start the SPIFFE agent",
    );
    fs::remove_file(&socket).unwrap();
    let _listener = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o700)).unwrap();
    let user = [
        "setpriv",
        "--reuid",
        "51001",
        "--regid",
        "51001",
        "--clear-groups",
    ];
    let found = check_with(&user, folder.path(), &text, &[]);
    assert_failed(&found, "agent", "may not open", "write access");
    assert_failed(&found, "machine", "runs as uid 51001", "sudo awsvid check");
}

#[test]
fn check_reports_missing_entry_of_awsvid() {
    let folder = folder();
    if !root() {
        return;
    }
    let Some(spire) = Spire::start(folder.path()) else {
        return;
    };
    let found = check(
        folder.path(),
        &configuration(
            &spire.agent_socket(),
            UNREACHABLE,
            "arn:minio:iam:::role/r",
            "shop",
        ),
    );
    assert_failed(&found, "identity", "does not give", "entry create");
}

/// Returns an account as AWS has it, which trusts the tokens of one issuer with one audience for
/// one subject.
fn account(issuer: &str, audience: &str, provider_audience: &str, subject: &str) -> DevAccount {
    DevAccount {
        region: "us-east-1".to_owned(),
        providers: vec![DevProvider {
            issuer: issuer.to_owned(),
            client_ids: vec![provider_audience.to_owned()],
        }],
        trust_anchors: Vec::new(),
        roles: vec![TrustedRole {
            arn: RoleArn::parse("arn:aws:iam::123456789012:role/app").unwrap(),
            issuer: issuer.to_owned(),
            audience: audience.to_owned(),
            subjects: vec![SpiffeIdPattern::parse(subject).unwrap()],
            max_duration: Duration::from_secs(3600),
        }],
        chained: Vec::new(),
    }
}

/// In AWS's words, by the verifying STS of `awsvid dev`.
#[test]
fn check_reports_rejections_of_aws() {
    let folder = folder();
    let Some(spire) = spire(folder.path(), SpireSetting::default()) else {
        return;
    };
    let issuer = spire.issuer_url();
    let runtime = Runtime::new().unwrap();
    let reader = id("reader");
    let slash = format!("{issuer}/");
    let table = [
        (
            account(&slash, "shop", "shop", &reader),
            "No OpenIDConnect provider found",
            &format!("just this URL: {issuer} ")[..],
        ),
        (
            account(&issuer, "shop", "sts.amazonaws.com", &reader),
            "Incorrect token audience",
            "\"shop\": add it",
        ),
        (
            account(&issuer, "shop", "shop", &id("other")),
            "AccessDenied",
            "(without https://)",
        ),
        (
            account(&issuer, "other", "shop", &reader),
            "AccessDenied",
            ":aud\" with \"shop\"",
        ),
    ];
    for (account, saw, fix) in table {
        let sts = runtime
            .block_on(DevSts::start(account, Clock::system()))
            .unwrap();
        let text = configuration(
            &spire.agent_socket(),
            sts.url(),
            "arn:aws:iam::123456789012:role/app",
            "shop",
        );
        assert_failed(&check(folder.path(), &text), "sts", saw, fix);
    }
    let sts = runtime
        .block_on(DevSts::start(
            account(&issuer, "shop", "shop", &reader),
            Clock::system(),
        ))
        .unwrap();
    let text = configuration(
        &spire.agent_socket(),
        sts.url(),
        "arn:aws:iam::123456789012:role/app",
        "shop",
    );
    assert_eq!(check(folder.path(), &text).1["result"], "pass");
}

/// A test cannot set the clock, so STS's is off instead.
#[test]
fn check_reports_clock_skew() {
    let folder = folder();
    let upstream = Upstream::start(&[(0, "reader")]);
    let sts = stub_http::start(|_, _| {
        stub_http::http(
            "404 Not Found",
            "Date: Tue, 01 Jan 2019 00:00:00 GMT\r\n",
            "",
        )
    });
    let text = configuration(&upstream.socket(), &sts, "arn:minio:iam:::role/r", "shop");
    let text = text.replace("/w/", "/user/");
    let found = check(folder.path(), &text);
    assert_failed(&found, "clock", "ahead of STS's", "timedatectl");
}

#[test]
fn check_names_workload_if_agent_attests() {
    let folder = folder();
    for source in [Source::Delegated, Source::Broker] {
        let folder = folder.path().join(format!("{source:?}"));
        fs::create_dir(&folder).unwrap();
        let setting = Setting::of(source);
        let Some(env) = Env::start(&folder, &[(1001, "reader")], &setting) else {
            return;
        };
        let text = fs::read_to_string(folder.join("awsvid.toml")).unwrap();
        let (output, report) = check_with(&[], &folder, &text, &[]);
        assert_eq!(output.status.code(), Some(0), "{report:#}");
        let text_report = report.to_string();
        for words in [
            "spiffe://example.org/awsvid for role",
            "signature is right",
            "awsvid check --pid PID",
        ] {
            assert!(text_report.contains(words), "{words}: {report:#}");
        }
        let workload = Workload::new(1001);
        let mut command = workload.command("/bin/sleep");
        command.arg("1000");
        let sleeper = spawn(command).unwrap();
        let pid = sleeper.id().to_string();
        let check = |text: &str, arguments: &[&str], status: i32, words: &[&str]| {
            let arguments = [&["--pid", &pid], arguments].concat();
            let (output, report) = check_with(&[], &folder, text, &arguments);
            let found = report.to_string();
            assert_eq!(output.status.code(), Some(status), "{report:#}");
            for words in words {
                assert!(found.contains(words), "{words}: {report:#}");
            }
            found
        };
        let covers = [
            "has spiffe://example.org/w/reader",
            "covers spiffe://example.org/w/reader",
            "no role was assumed",
        ];
        let found = check(&text, &[], 0, &covers);
        assert!(!found.contains("assumed by"), "{found}");
        let assumed = "assumed by spiffe://example.org/w/reader";
        check(&text, &["--exchange"], 0, &[assumed]);
        // The first of two roles does not cover it. Without the second one, none does.
        let strangers = "[[role]]\nname = \"strangers\"\nspiffe_id = \"spiffe://example.org/stranger\"\n\
             role_arn = \"arn:minio:iam:::role/none\"\n";
        let both = text.replace("[[role]]", &format!("{strangers}[[role]]"));
        let found = check(&both, &["--exchange"], 0, &[assumed, "does not cover it"]);
        assert!(!found.contains("role/none"), "{found}");
        let none = format!("{}{strangers}", text.split("[[role]]").next().unwrap());
        check(&none, &["--exchange"], 1, &["no role covers it"]);
        drop(env);
    }
}

/// Errors that only AWS itself gives, in its words.
#[test]
fn check_explains_errors_of_aws_alone() {
    let folder = folder();
    let upstream = Upstream::start(&[(0, "reader")]);
    let table = [
        (
            "InvalidIdentityToken",
            "Couldn't retrieve verification key from your identity provider",
            "--resolve or --url",
        ),
        (
            "InvalidIdentityToken",
            "Invalid timestamp in token claims",
            "upgrade SPIRE to 1.9.5",
        ),
        (
            "RegionDisabledException",
            "STS is not activated in this region",
            "activate STS in us-east-1",
        ),
        ("ExpiredTokenException", "Token expired", "timedatectl"),
        (
            "ValidationError",
            "The requested DurationSeconds exceeds the MaxSessionDuration",
            "for 3600 s",
        ),
        (
            "InvalidIdentityToken",
            "Something new",
            "compare the IAM provider's URL",
        ),
    ];
    for (code, message, fix) in table {
        let sts = stub_http::start(move |_, _| {
            let error = format!(
                "<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>"
            );
            stub_http::http("400 Bad Request", "Content-Type: text/xml\r\n", &error)
        });
        let text = configuration(
            &upstream.socket(),
            &sts,
            "arn:aws:iam::123456789012:role/app",
            "shop",
        );
        assert_failed(
            &check(folder.path(), &text.replace("/w/", "/user/")),
            "sts",
            message,
            fix,
        );
    }
}
