//! No command prints a secret, except the one that has this purpose.

use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::counterparts::process::{Output, run};
use crate::harness::counterparts::workload::Workload;
use crate::harness::counterparts::{folder, http_get, minio};
use crate::harness::daemon::PROGRAM;
use crate::harness::env::{Env, Setting};
use crate::harness::terminal::on_a_terminal;

const TIMEOUT: Duration = Duration::from_secs(120);
/// No output may have this many characters of a secret.
const PART: usize = 12;

/// The secrets that must not appear, with their names.
struct Secrets(Vec<(&'static str, String)>);

impl Secrets {
    /// Returns the names of those that are in a text: each piece of each part of a token counts.
    fn within(&self, text: &str) -> Vec<&'static str> {
        let is_in = |secret: &str| {
            let parts = secret.split(['.', '\n']).filter(|part| part.len() >= PART);
            parts
                .flat_map(|part| part.as_bytes().windows(PART))
                .any(|piece| text.as_bytes().windows(PART).any(|found| found == piece))
        };
        self.0
            .iter()
            .filter(|(_, secret)| is_in(secret))
            .map(|(what, _)| *what)
            .collect()
    }
}

#[test]
fn only_credential_process_prints_secrets() {
    let folder = folder();
    let Some(env) = Env::start(folder.path(), &[(1001, "reader")], &Setting::default()) else {
        return;
    };
    let token_output: Value = serde_json::from_str(&env.curl(1001).1).unwrap();
    let config = folder.path().join("awsvid.toml");
    let config = config.to_str().unwrap();
    let own = [
        "OwnKeyOfTheEnvironment0123456789",
        "OwnKeyOfTheProfile0123456789",
        "PasswordOfTheProxy0123456789",
    ];
    let mut secrets = Secrets(vec![
        (
            "secret key",
            token_output["SecretAccessKey"].as_str().unwrap().to_owned(),
        ),
        (
            "session token",
            token_output["Token"].as_str().unwrap().to_owned(),
        ),
        ("JWT-SVID", env.spire.fetch_jwt(minio::AUDIENCE)),
        (
            "token file",
            fs::read_to_string(folder.path().join("token")).unwrap(),
        ),
    ]);
    secrets.0.extend(
        ["key in the environment", "key in a profile", "password"]
            .into_iter()
            .zip(own.map(str::to_owned)),
    );

    let run_awsvid = |arguments: &[&str]| -> Output {
        let mut command = Command::new(PROGRAM);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .args(arguments);
        command
            .env("ALL_PROXY", format!("http://awsvid:{}@127.0.0.1:1", own[2]))
            .env("NO_PROXY", "127.0.0.1");
        run(command, b"", TIMEOUT)
    };
    let issuer = ["--issuer", "https://oidc.example.org"];
    let commands: [&[&str]; 10] = [
        &["status", "--config", config],
        &["status", "--config", config, "--socket", "/nonexistent"],
        &["check", "--config", config],
        &["check", "--config", config, "-o", "json"],
        &["check", "--config", config, "--url", issuer[1]],
        &["trust-policy", "--config", config],
        &["trust-policy", "--config", config, issuer[0], issuer[1]],
        &["config", "show", "--config", config],
        &["config", "validate", config],
        &["credential-process", "--config", config, "--role", "other"],
    ];
    for arguments in commands {
        let output = run_awsvid(arguments);
        assert!(
            !output.stdout.is_empty() || !output.stderr.is_empty(),
            "{arguments:?}"
        );
        let found_secrets = secrets.within(&format!("{}\n{}", output.stdout, output.stderr));
        assert!(
            found_secrets.is_empty(),
            "{arguments:?}: {found_secrets:?} in {output:?}"
        );
    }
    let mut table = Command::new(PROGRAM);
    table.env_clear().args(["status", "--config", config]);
    let shown = on_a_terminal(table);
    assert!(
        shown.contains("EXPIRES") && secrets.within(&shown).is_empty(),
        "{shown}"
    );

    // As the workload, which has other keys in its environment.
    let program = folder.path().join("awsvid");
    fs::copy(PROGRAM, &program).unwrap();
    let workload = Workload::new(1001)
        .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", &env.daemon.uri())
        .env(
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
            folder.path().join("token").to_str().unwrap(),
        )
        .env("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        .env("AWS_SECRET_ACCESS_KEY", own[0]);
    fs::create_dir(workload.home().join(".aws")).unwrap();
    fs::write(
        workload.home().join(".aws/credentials"),
        format!("[default]\naws_secret_access_key = {}\n", own[1]),
    )
    .unwrap();
    let checked = workload.run(&program, &["check", "--workload"]);
    assert!(
        checked.stdout.contains("gives this process")
            && checked.stdout.contains("aws_secret_access_key"),
        "{checked:?}"
    );
    let executed = workload.run(
        &program,
        &["exec", "--url", &env.daemon.uri(), "--", "/bin/true"],
    );
    assert!(
        executed.stderr.contains("AWS_SECRET_ACCESS_KEY"),
        "{executed:?}"
    );
    for output in [checked, executed] {
        let found_secrets = secrets.within(&format!("{}\n{}", output.stdout, output.stderr));
        assert!(found_secrets.is_empty(), "{found_secrets:?} in {output:?}");
    }

    // Nor does the daemon itself, wherever it writes.
    let (_, metrics) = http_get(env.daemon.admin(), "/metrics").unwrap();
    let audit = fs::read_to_string(folder.path().join("audit.log")).unwrap();
    for (what, text) in [
        ("log", env.daemon.log()),
        ("audit", audit),
        ("metrics", metrics),
    ] {
        assert!(
            !text.is_empty() && secrets.within(&text).is_empty(),
            "{what}: {:?}",
            secrets.within(&text)
        );
    }

    // The check would have found it. (MinIO's session token is a JWT itself, with the same claims
    // in part.)
    let printed = workload.run(
        &program,
        &[
            "credential-process",
            "--socket",
            env.daemon.unix().to_str().unwrap(),
        ],
    );
    let found_secrets = secrets.within(&printed.success("credential-process"));
    assert!(
        found_secrets.starts_with(&["secret key", "session token"]),
        "{found_secrets:?}"
    );
}
