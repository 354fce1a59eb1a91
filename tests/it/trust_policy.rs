//! `awsvid trust-policy` with the real SPIRE: its issuer is that of the live token, and the AWS CLI
//! accepts its commands.

mod chains;
#[path = "../../src/commands/trust_policy/tests/reading.rs"]
mod reading;

use std::collections::HashMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::spire::Spire;
use crate::harness::counterparts::{folder, root, tool};
use crate::harness::daemon::PROGRAM;
use crate::harness::forward::Network;
use crate::harness::stub_http;
use crate::harness::tls::TlsFront;

const TIMEOUT: Duration = Duration::from_secs(60);
/// Bounds a script, of which each command starts a Python that takes seconds on a busy machine.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(300);
const READER: &str = "spiffe://example.org/w/reader";
const FORMATS: [&str; 3] = ["aws-cli", "terraform", "cloudformation"];

fn trust_policy(config: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        .args(["trust-policy", "--config"])
        .arg(config)
        .args(arguments);
    run(command, b"", TIMEOUT)
}

fn form(body: &str) -> HashMap<String, String> {
    form_urlencoded::parse(body.as_bytes())
        .into_owned()
        .collect()
}

/// Runs a script with the real CLI, which checks its input and sends it: here to an account that
/// has no provider and accepts everything. Returns the forms that the account got.
fn sent_by_cli(aws: &Path, folder: &Path, script: &str) -> Vec<HashMap<String, String>> {
    let (sender, requests) = channel();
    let iam = stub_http::start(move |_, body| {
        // The test may have ended.
        let _ = sender.send(body.to_owned());
        let action = &form(body)["Action"];
        if action == "GetOpenIDConnectProvider" {
            let xml = "<ErrorResponse><Error><Code>NoSuchEntity</Code><Message>None</Message></Error></ErrorResponse>";
            return stub_http::http("404 Not Found", "Content-Type: text/xml\r\n", xml);
        }
        let xml = format!("<{action}Response><{action}Result></{action}Result></{action}Response>");
        stub_http::http("200 OK", "Content-Type: text/xml\r\n", &xml)
    });
    let stub = format!(
        "aws() {{ '{}' --endpoint-url {iam} \"$@\"; }}\n",
        aws.display()
    );
    let mut shell = Command::new("sh");
    shell
        .env("HOME", folder)
        .env("AWS_DEFAULT_REGION", "us-east-1")
        .env("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        .env("AWS_SECRET_ACCESS_KEY", "example")
        .arg("-euc")
        .arg(format!("{stub}{script}"));
    run(shell, b"", SCRIPT_TIMEOUT).success("the script");
    requests.try_iter().map(|body| form(&body)).collect()
}

#[test]
fn trust_policy_uses_live_issuer_and_cli_accepts_commands() {
    let folder = folder();
    let Some(aws) = tool("aws").filter(|_| root()) else {
        return;
    };
    let Some(spire) = Spire::start(folder.path()) else {
        return;
    };
    let config = folder.path().join("awsvid.toml");
    let text = format!(
        "[identity]\nworkload_api_socket = \"unix://{}\"\n[sts]\nregion = \"eu-central-1\"\n\
         [[workload]]\nspiffe_id = \"{READER}\"\nuid = 1001\n\
         [[role]]\nname = \"app\"\nspiffe_id = \"{READER}\"\nrole_arn = \"arn:aws:iam::123456789012:role/app\"\n",
        spire.agent_socket().display()
    );
    fs::write(&config, text).unwrap();
    let unknown = trust_policy(&config, &[]);
    assert_eq!(unknown.status.code(), Some(1), "{unknown:?}");
    assert!(
        unknown.stdout.is_empty() && unknown.stderr.contains("--issuer"),
        "{unknown:?}"
    );

    spire.register(READER, &["unix:uid:0"]);
    let script = trust_policy(&config, &[]).success("awsvid trust-policy");
    let issuer = spire.issuer_url();
    let key = issuer.strip_prefix("http://").unwrap();
    for words in [
        format!("\"Url\": \"{issuer}\""),
        format!("\"{key}:sub\": \"{READER}\""),
        format!("\"{key}:aud\": \"sts.amazonaws.com\""),
        format!("arn:aws:iam::123456789012:oidc-provider/{key}"),
    ] {
        assert!(script.contains(&words), "{words}: {script}");
    }
    let sent = sent_by_cli(&aws, folder.path(), &script);
    let [found, provider, audience, role] = &sent[..] else {
        panic!("four calls: {sent:?}")
    };
    let arn = format!("arn:aws:iam::123456789012:oidc-provider/{key}");
    assert_eq!(
        (&found["Action"][..], &found["OpenIDConnectProviderArn"]),
        ("GetOpenIDConnectProvider", &arn)
    );
    assert_eq!(
        (
            &audience["Action"][..],
            &audience["OpenIDConnectProviderArn"]
        ),
        ("AddClientIDToOpenIDConnectProvider", &arn)
    );
    assert_eq!(audience["ClientID"], "sts.amazonaws.com");
    assert_eq!(
        (&provider["Action"][..], &provider["Url"]),
        ("CreateOpenIDConnectProvider", &issuer)
    );
    assert_eq!(provider["ClientIDList.member.1"], "sts.amazonaws.com");
    assert_eq!(
        (&role["Action"][..], &role["RoleName"][..]),
        ("CreateRole", "app")
    );
    let policy: Value = serde_json::from_str(&role["AssumeRolePolicyDocument"]).unwrap();
    let condition = json!({ "StringEquals": {
        format!("{key}:aud"): "sts.amazonaws.com", format!("{key}:sub"): READER,
    } });
    assert_eq!(policy["Statement"][0]["Condition"], condition);

    let other = trust_policy(
        &config,
        &[
            "--issuer",
            "https://oidc.example.org",
            "--format",
            "terraform",
            "--new-provider",
        ],
    );
    assert!(
        other.stderr.contains("STS will reject them")
            && other.stdout.contains("oidc.example.org:sub"),
        "{other:?}"
    );
}

/// Evaluates the policies as STS does, for the live token of a workload and for tokens that differ
/// from it slightly.
#[test]
fn policies_accept_only_the_live_token() {
    let folder = folder();
    if !root() {
        return;
    }
    let Some(spire) = Spire::start(folder.path()) else {
        return;
    };
    spire.register(READER, &["unix:uid:0"]);
    let config = folder.path().join("awsvid.toml");
    let roles = [
        ("exact", READER),
        ("segment", "spiffe://example.org/w/*"),
        ("rest", "spiffe://example.org/w/**"),
    ];
    let text = roles.map(|(name, id)| {
        format!(
            "[[role]]\nname = \"{name}\"\nspiffe_id = \"{id}\"\nrole_arn = \"arn:aws:iam::123456789012:role/{name}\"\n"
        )
    });
    let head = format!(
        "[identity]\nworkload_api_socket = \"unix://{}\"\n[sts]\nregion = \"eu-central-1\"\n[[workload]]\nspiffe_id = \"{READER}\"\nuid = 1001\n",
        spire.agent_socket().display()
    );
    fs::write(&config, head + &text.concat()).unwrap();
    let outputs = FORMATS.map(|format| {
        trust_policy(&config, &["--format", format, "--new-provider"]).success(format)
    });

    let token = spire.fetch_jwt("sts.amazonaws.com");
    let claims = URL_SAFE_NO_PAD
        .decode(token.split('.').nth(1).unwrap())
        .unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    let text = |claim: &Value| claim.as_str().unwrap().to_owned();
    let (issuer, audience, subject) = (
        text(&claims["iss"]),
        text(&claims["aud"][0]),
        text(&claims["sub"]),
    );
    assert_eq!(subject, READER);

    let provider = format!(
        "arn:aws:iam::123456789012:oidc-provider/{}",
        issuer.split_once("://").unwrap().1
    );
    let read = reading::same(outputs.each_ref().map(String::as_str), &provider, "");
    // STS finds the provider by these, and the provider alone permits this.
    assert_eq!(
        read.provider,
        json!({ "Url": issuer, "ClientIDList": [audience], "ThumbprintList": null })
    );
    let lets_in = |role: &str, issuer: &str, audience: &str, subject: &str| {
        reading::allows(
            &read.roles[role].2,
            &reading::Token {
                issuer,
                audience,
                subject,
            },
            &provider,
        )
    };
    for (role, _) in roles {
        assert!(lets_in(role, &issuer, &audience, &subject), "{role}");
        for other in [
            "sts.amazonaws.com.cn",
            "sts.amazonaws.co",
            "STS.amazonaws.com",
            "*",
            "",
        ] {
            assert!(
                !lets_in(role, &issuer, other, &subject),
                "{role}: audience {other}"
            );
        }
        for other in [
            format!("{issuer}/"),
            format!("{issuer}0"),
            issuer.replace("127", "128"),
            "https://a".to_owned(),
        ] {
            assert!(
                !lets_in(role, &other, &audience, &subject),
                "{role}: issuer {other}"
            );
        }
        for other in [
            "spiffe://example.org/w",
            "spiffe://example.org/w/",
            "spiffe://example.org/reader",
            "spiffe://example.org/v/reader",
            "spiffe://example.org/wx/reader",
            "spiffe://example.org/x/w/reader",
            "spiffe://example.com/w/reader",
            "spiffe://example.orgx/w/reader",
            "xspiffe://example.org/w/reader",
            "/w/reader",
            "",
        ] {
            // IAM's `*` also matches an empty text, which no SPIFFE ID has between two slashes or
            // after the last.
            let is_no_id = other.ends_with("w/") && role != "exact";
            assert!(
                is_no_id || !lets_in(role, &issuer, &audience, other),
                "{role}: subject {other}"
            );
        }
    }
    // The roles that are for an identity which begins as the token's does.
    let table = [
        ("spiffe://example.org/w/reade", [false, true, true]),
        ("spiffe://example.org/w/readers", [false, true, true]),
        ("spiffe://example.org/w/Reader", [false, true, true]),
        ("spiffe://example.org/w/reader/x", [false, false, true]),
        ("spiffe://example.org/w/reader/x/y", [false, false, true]),
    ];
    for (other, expected) in table {
        let found = roles.map(|(role, _)| lets_in(role, &issuer, &audience, other));
        assert_eq!(found, expected, "{other}");
    }
}

/// AWS trusts roughly what this machine trusts. The issuer's certificate is the test's own, so the
/// test decides whether it is trusted. The command writes the thumbprint of an untrusted chain only
/// with the option for it (T35).
#[test]
fn thumbprint_of_untrusted_chain_needs_option() {
    let folder = folder();
    let config = folder.path().join("awsvid.toml");
    let role = "[[role]]\nname = \"app\"\nspiffe_id = \"{id}\"\nrole_arn = \"arn:aws:iam::123456789012:role/app\"\n";
    let text = format!(
        "[identity]\nworkload_api_socket = \"unix:///nonexistent/agent.sock\"\n[sts]\nregion = \"eu-central-1\"\n\
         [[workload]]\nspiffe_id = \"{READER}\"\nuid = 1001\n{}",
        role.replace("{id}", READER)
    );
    fs::write(&config, text).unwrap();
    let url = Arc::new(OnceLock::new());
    let own = url.clone();
    let issuer = stub_http::start(move |first, _| {
        let url: &String = own.get().expect("its URL");
        let document =
            json!({ "issuer": url, "jwks_uri": format!("{url}/keys"), "keys": [] }).to_string();
        stub_http::http(
            if first.contains(" /keys ") || first.contains("openid") {
                "200 OK"
            } else {
                "404 No"
            },
            "",
            &document,
        )
    });
    let behind = issuer.strip_prefix("http://").unwrap().parse().unwrap();
    let front = TlsFront::start(Network::Own, (Ipv4Addr::LOCALHOST, 0).into(), behind);
    url.set(front.url()).unwrap();
    let certificate = folder.path().join("certificate.pem");
    fs::write(&certificate, front.certificate()).unwrap();
    let written = |trusted: Option<&Path>, options: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command
            .env_clear()
            .args(["trust-policy", "--issuer", &front.url(), "--config"])
            .arg(&config)
            .args(options);
        command.envs(trusted.map(|path| ("SSL_CERT_FILE", path)));
        let output = run(command, b"", TIMEOUT);
        let warnings = output.stderr.clone();
        assert!(!warnings.contains("is not known"), "{output:?}");
        let script = output.success("awsvid trust-policy");
        (
            reading::by_a_shell(&script).provider["ThumbprintList"].clone(),
            warnings,
        )
    };
    let accept = "--accept-untrusted-issuer";
    let thumbprint = front.thumbprint();
    for options in [&[][..], &[accept]] {
        let (thumbprints, warnings) = written(Some(&certificate), options);
        assert_eq!(
            (thumbprints, warnings.contains("does not trust")),
            (Value::Null, false),
            "{warnings}"
        );
    }
    let (thumbprints, warnings) = written(None, &[]);
    assert_eq!(thumbprints, Value::Null);
    assert!(
        warnings.contains("this machine does not trust the certificate")
            && warnings.contains(accept),
        "{warnings}"
    );
    let (thumbprints, warnings) = written(None, &[accept]);
    assert_eq!(thumbprints, json!([thumbprint]));
    assert!(
        warnings.contains("this machine does not trust the certificate")
            && warnings.contains(&thumbprint),
        "{warnings}"
    );
}

/// CloudFormation's own schemas of these resources, and its rules for references between them.
#[test]
fn cloudformation_accepts_the_template() {
    let Some(lint) = tool("cfn-lint") else { return };
    let folder = folder();
    let config = folder.path().join("awsvid.toml");
    let role = |name: &str, id: &str| {
        format!(
            "[[role]]\nname = \"{name}\"\nspiffe_id = \"{id}\"\nrole_arn = \"arn:aws:iam::123456789012:role/team/{name}\"\n"
        )
    };
    let text = "[identity]\nworkload_api_socket = \"unix:///nonexistent/agent.sock\"\n[sts]\nregion = \"eu-central-1\"\n".to_owned()
        + &format!("[[workload]]\nspiffe_id = \"{READER}\"\nuid = 1001\n")
        + &role("app-1", READER)
        + &role("app_1", "spiffe://example.org/w/*")
        + &role("all", "spiffe://example.org/**");
    fs::write(&config, text).unwrap();
    let arguments = [
        "--issuer",
        "https://oidc.example.org/a",
        "--format",
        "cloudformation",
    ];
    let unchosen = trust_policy(&config, &arguments);
    assert!(
        unchosen.status.code() == Some(1)
            && unchosen.stdout.is_empty()
            && unchosen
                .stderr
                .contains("--existing-provider, or --new-provider"),
        "{unchosen:?}"
    );
    let arguments = [&arguments[..], &["--new-provider"]].concat();
    let template = trust_policy(&config, &arguments).success("awsvid trust-policy");
    let path = folder.path().join("template.json");
    let linted = |template: &str| {
        fs::write(&path, template).unwrap();
        let mut command = Command::new(&lint);
        command
            .env("HOME", folder.path())
            .args(["--regions", "eu-central-1", "--"])
            .arg(&path);
        run(command, b"", TIMEOUT)
    };
    linted(&template).success("cfn-lint");
    // The linter does detect faults.
    for (right, wrong) in [
        ("ClientIdList", "ClientIDList"),
        ("\"Ref\": \"Oidc", "\"Ref\": \"Other"),
        ("3600", "\"soon\""),
    ] {
        assert!(template.contains(right), "{right}: {template}");
        assert!(
            !linted(&template.replace(right, wrong)).status.success(),
            "{wrong}"
        );
    }
}
