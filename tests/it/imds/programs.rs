//! Real SDKs that know the metadata service alone, and `awsvid exec`.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use super::*;
use crate::harness::client::TCP_USER;
use crate::harness::counterparts::process::{Output, await_some, run};
use crate::harness::counterparts::{folder, python, tool};
use crate::harness::daemon::PROGRAM;
use crate::harness::is_slow;

const ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
const ARN: &str = "arn:aws:sts::123456789012:assumed-role/dev/example.org=user=me";
/// Signs a request with the credentials of boto3's default chain.
const BOTO3: &str = "import boto3, sys; print(boto3.client('sts', endpoint_url=sys.argv[1]).get_caller_identity()['Arn'])";
/// Sends requests by botocore's own classes, which have one attempt each.
const BOTOCORE: &str = "
import sys
from botocore.utils import IMDSRegionProvider, InstanceMetadataFetcher
from botocore.session import Session
# Half of a round's time would be its start. It fetches nothing.
session = Session()
for i in range(int(sys.argv[1])):
    fetcher = InstanceMetadataFetcher(timeout=10, num_attempts=1, base_url=sys.argv[2])
    found = fetcher.retrieve_iam_role_credentials()
    assert found['role_name'] == 'dev' and found['token'], found
    assert IMDSRegionProvider(session).provide() == 'us-east-1'
print('done')
";

/// Fetches credentials by a new chain of the CRT each time, which ends with its IMDS provider.
const CRT: &str = "
import sys
from awscrt import auth, io
bootstrap = io.ClientBootstrap.get_or_create_static_default()
for i in range(int(sys.argv[1])):
    provider = auth.AwsCredentialsProvider.new_default_chain(bootstrap)
    found = provider.get_credentials().result(60)
    assert found.access_key_id and found.session_token, found
print('done')
";
/// Bounds one round, on a machine that is busy with others.
const EACH_ROUND: Duration = Duration::from_secs(1);

/// A program, with nothing else in its environment than these variables.
fn program(words: &[&str], home: &Path, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(words[0]);
    command
        .args(&words[1..])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", home)
        .env("AWS_DEFAULT_REGION", "us-east-1")
        .envs(variables.iter().copied());
    command
}

fn output(command: Command) -> Output {
    run(command, b"", TIMEOUT)
}

fn boto3() -> Option<PathBuf> {
    python("client-boto3")
}

/// Asserts that the daemon was reached by metadata alone.
fn assert_protocol(daemon: &Daemon) {
    let records = daemon.audit_after(0);
    let is_imds = |record: &serde_json::Value| record["protocol"] == "imds";
    assert!(records.iter().all(is_imds), "{records:#?}");
    let issued = records
        .iter()
        .filter(|record| record["outcome"] == "issued");
    assert!(issued.count() > 0, "{records:#?}");
}

#[test]
fn sdk_gets_credentials_with_the_endpoint_alone() {
    let (Some(aws), Some(python)) = (tool("aws"), boto3()) else {
        return;
    };
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    let origin = format!("http://{}", daemon.tcp());
    let aws = aws.to_str().unwrap();
    let by_aws = [aws, "--endpoint-url", upstream.sts(), "--output", "text"];
    let by_aws = [
        &by_aws[..],
        &["sts", "get-caller-identity", "--query", "Arn"],
    ]
    .concat();
    let by_boto3 = [python.to_str().unwrap(), "-c", BOTO3, upstream.sts()];
    for words in [&by_aws[..], &by_boto3] {
        let command = program(words, folder.path(), &[(ENDPOINT, &origin)]);
        assert_eq!(output(command).success(words[0]).trim(), ARN);
    }
    assert_protocol(&daemon);
}

#[test]
fn exec_sets_the_variables_of_metadata() {
    let Some(python) = boto3() else { return };
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    let config = folder.path().join("awsvid.toml");
    let origin = format!("http://{}", daemon.tcp());
    let exec = [
        PROGRAM,
        "exec",
        "--config",
        config.to_str().unwrap(),
        "--url",
        &origin,
        "--",
        // What an SDK does that does not know the container credential endpoint.
        "env",
        "-u",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ];
    let words = [
        &exec[..],
        &[python.to_str().unwrap(), "-c", BOTO3, upstream.sts()],
    ]
    .concat();
    // These would keep an SDK from awsvid.
    let inherited = [
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6"),
        ("http_proxy", "http://127.0.0.1:1"),
    ];
    let command = program(&words, folder.path(), &inherited);
    assert_eq!(output(command).success("awsvid exec").trim(), ARN);
    assert_protocol(&daemon);
}

#[test]
fn sdk_without_a_role_finds_no_credentials() {
    let Some(python) = boto3() else { return };
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let rule = "\n[[workload]]\nspiffe_id = \"spiffe://example.org/user/me\"\nuid = 54321\n";
    let configuration = imds_table(folder.path()) + &upstream.configuration() + rule;
    let daemon = Daemon::start(folder.path(), "", &configuration).ready();
    let origin = format!("http://{}", daemon.tcp());
    let words = [python.to_str().unwrap(), "-c", BOTO3, upstream.sts()];
    let output = output(program(&words, folder.path(), &[(ENDPOINT, &origin)]));
    assert!(
        !output.status.success() && output.stderr.contains("NoCredentialsError"),
        "{output:?}"
    );
    let records = daemon.audit_after(0);
    assert_eq!(records.last().unwrap()["reason"], "no_identity");
}

/// Runs a script with a number of rounds and the daemon's URL as its arguments, and asserts the
/// number of requests of each round by outcome and reason.
fn run_rounds(python: &Path, script: &str, of_each: [(&str, &str, u64); 4]) {
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let daemon = serve(folder.path(), &upstream, "");
    let rounds: u64 = if is_slow() { 10_000 } else { 200 };
    let valid = token(daemon.tcp());
    await_some("the credentials are cached", TIMEOUT, || {
        (get(daemon.tcp(), &format!("{ROLES}dev"), &valid).status == 200).then_some(())
    });
    let (count, origin) = (rounds.to_string(), format!("http://{}", daemon.tcp()));
    let words = [python.to_str().unwrap(), "-c", script, &count, &origin];
    let variables = [
        (ENDPOINT, origin.as_str()),
        ("AWS_METADATA_SERVICE_TIMEOUT", "10"),
    ];
    let mut command = program(&words, folder.path(), &variables);
    // The region comes from the metadata service. The socket of such a user decides alone, however
    // many descriptors other tests have.
    command.env_remove("AWS_DEFAULT_REGION").uid(TCP_USER);
    let limit = TIMEOUT + EACH_ROUND * u32::try_from(rounds).unwrap();
    let series = |outcome: &str, reason: &str| {
        format!(
            "awsvid_requests_total{{listener=\"tcp\",protocol=\"imds\",outcome=\"{outcome}\",reason=\"{reason}\"}}"
        )
    };
    let counts = || of_each.map(|(outcome, reason, _)| daemon.metric(&series(outcome, reason)));
    let before = counts();
    let begun = Instant::now();
    let output = run(command, b"", limit);
    eprintln!("{rounds} rounds took {:?}", begun.elapsed());
    let rejected = daemon.audit_where(|_, line| {
        line.contains("\"outcome\":\"refused\"") || line.contains("\"outcome\":\"failed\"")
    });
    assert_eq!(output.stdout.trim(), "done", "{output:?} {rejected:#?}");
    // The CRT would repeat these.
    assert!(rejected.is_empty(), "{rejected:#?}");
    for ((before, after), (_, reason, each)) in before.iter().zip(counts()).zip(of_each) {
        assert_eq!(after - before, rounds * each, "{reason}");
    }
}

#[test]
fn botocore_fetchers_are_answered_each_time() {
    let Some(python) = boto3() else { return };
    let of_each = [
        ("answered", "token", 2),
        ("answered", "role_name", 1),
        ("answered", "zone", 1),
        ("issued", "ok", 1),
    ];
    run_rounds(&python, BOTOCORE, of_each);
}

#[test]
fn crt_provider_is_answered_each_time() {
    let Some(python) = python("client-awscrt") else {
        return;
    };
    let of_each = [
        ("answered", "token", 1),
        ("answered", "role_name", 1),
        ("answered", "zone", 0),
        ("issued", "ok", 1),
    ];
    run_rounds(&python, CRT, of_each);
}
