//! Profiles that precede the container endpoint, and those that lead to it, with the real AWS CLI
//! and boto3.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use super::{daemon, output};
use crate::harness::counterparts::process::{Output, behind};
use crate::harness::counterparts::{folder, python, root, tool};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::upstream::Upstream;

const IDENTITY: &str =
    "import boto3, sys; boto3.client('sts', endpoint_url=sys.argv[1]).get_caller_identity()";
const CALLER: &str = "<GetCallerIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><GetCallerIdentityResult>\
    <Arn>arn:aws:iam::123456789012:user/x</Arn><UserId>x</UserId><Account>123456789012</Account>\
    </GetCallerIdentityResult></GetCallerIdentityResponse>";
const ROLE: &str = "<AssumeRoleResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><AssumeRoleResult><Credentials>\
    <AccessKeyId>ASIAASSUMED</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>\
    <Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>";

/// An STS that accepts every signature, and records the key of each request.
struct PermissiveSts {
    address: SocketAddr,
    /// The action, the access key id and the region of each request.
    requests: Arc<Mutex<Vec<(String, String, String)>>>,
}

impl PermissiveSts {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, requests) = (
            listener.local_addr().unwrap(),
            Arc::<Mutex<Vec<_>>>::default(),
        );
        let records = requests.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let records = records.clone();
                thread::spawn(move || answer(stream, &records));
            }
        });
        Self { address, requests }
    }

    fn take(&self) -> Vec<(String, String, String)> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

fn answer(stream: TcpStream, records: &Mutex<Vec<(String, String, String)>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let (mut head, mut length) = (String::new(), 0);
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        for line in head.lines().map(str::to_ascii_lowercase) {
            length = line
                .strip_prefix("content-length: ")
                .map_or(length, |value| value.parse().unwrap());
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).unwrap();
        let body = String::from_utf8(body).unwrap();
        let action = body
            .split('&')
            .find_map(|field| field.strip_prefix("Action="))
            .unwrap_or_default()
            .to_owned();
        let scope = head.split_once("Credential=").map_or("", |(_, rest)| rest);
        let mut scope = scope.split('/');
        let (key, region) = (
            scope.next().unwrap_or_default(),
            scope.nth(1).unwrap_or_default(),
        );
        let text = if action == "AssumeRole" { ROLE } else { CALLER };
        records
            .lock()
            .unwrap()
            .push((action, key.to_owned(), region.to_owned()));
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: {}\r\n\r\n",
            text.len()
        );
        if stream
            .get_mut()
            .write_all((head + text).as_bytes())
            .is_err()
        {
            return;
        }
    }
}

/// A config file, a credentials file, and variables.
type Setup<'a> = (String, &'a str, &'a [(&'a str, &'a str)]);

/// Returns the clients, each as a command that calls the STS for its own identity.
fn clients(sts: &str) -> Option<Vec<(&'static str, Vec<String>)>> {
    let python = python("client-boto3")?;
    let cli = |program: PathBuf| {
        let words = ["--endpoint-url", sts, "sts", "get-caller-identity"].map(str::to_owned);
        [vec![program.display().to_string()], words.to_vec()].concat()
    };
    let boto3 = vec![
        python.display().to_string(),
        "-c".to_owned(),
        IDENTITY.to_owned(),
        sts.to_owned(),
    ];
    Some(vec![
        ("aws", cli(tool("aws")?)),
        ("aws2", cli(tool("aws2")?)),
        ("boto3", boto3),
    ])
}

struct ExecStage {
    daemon: Daemon,
    sts: PermissiveSts,
    _upstream: Upstream,
    folder: tempfile::TempDir,
}

impl ExecStage {
    fn write(&self, config: &str, credentials: &str) {
        fs::create_dir_all(self.folder.path().join(".aws")).unwrap();
        fs::write(self.folder.path().join(".aws/config"), config).unwrap();
        fs::write(self.folder.path().join(".aws/credentials"), credentials).unwrap();
    }

    /// Runs the client behind `awsvid exec` with these variables. Returns its requests to the STS,
    /// and the output of exec.
    fn requests(
        &self,
        client: &[String],
        variables: &[(&str, &str)],
    ) -> (Vec<(String, String, String)>, String) {
        let output = self.run(&[], client, variables);
        let output_text = output.stderr.clone();
        output.success(&format!("{client:?}"));
        (self.sts.take(), output_text)
    }

    /// Runs the client behind these words and `awsvid exec`.
    fn run(&self, words: &[&str], client: &[String], variables: &[(&str, &str)]) -> Output {
        let (url, token) = (
            format!("http://{}", self.daemon.tcp()),
            self.folder.path().join("token"),
        );
        let options = ["--url", &url, "--token-file", token.to_str().unwrap(), "--"];
        let client: Vec<&str> = client.iter().map(String::as_str).collect();
        // The AWS CLI keeps the credentials of roles here.
        let _ = fs::remove_dir_all(self.folder.path().join(".aws/cli"));
        let mut command = behind(words, Path::new(PROGRAM));
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/bin");
        command.arg("exec").args(options).args(client);
        let sts = format!("http://{}", self.sts.address);
        // A profile's requests to an STS go to the same one.
        command
            .env("HOME", self.folder.path())
            .env("AWS_ENDPOINT_URL_STS", sts)
            .envs(variables.iter().copied());
        output(command)
    }

    /// Returns the access key ids that awsvid has served.
    fn issued(&self) -> BTreeSet<String> {
        let keys = self
            .daemon
            .audit()
            .into_iter()
            .filter_map(|record| Some(record["access_key_id"].as_str()?.to_owned()));
        keys.collect()
    }
}

const KEYS: &str = "[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = s3cret\n";

fn stage() -> ExecStage {
    let folder = folder();
    let (daemon, upstream) = daemon(folder.path(), "authorization = \"token\"");
    ExecStage {
        daemon,
        sts: PermissiveSts::start(),
        _upstream: upstream,
        folder,
    }
}

#[test]
fn profile_of_other_provider_is_replaced_except_its_settings() {
    let stage = stage();
    let Some(clients) = clients(&format!("http://{}", stage.sts.address)) else {
        return;
    };
    let process = r#"credential_process = /bin/echo '{"Version": 1, "AccessKeyId": "AKIAPROCESS", "SecretAccessKey": "s"}'"#;
    let setups: [Setup<'_>; 4] = [
        ("[default]\nregion = eu-central-1\n".to_owned(), KEYS, &[]),
        (format!("[default]\n{process}\nregion = eu-central-1\n"), "", &[]),
        ("[default]\nregion = eu-central-1\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n[sso-session s]\nsso_start_url = https://x\nsso_region = us-east-1\n".to_owned(), "", &[]),
        (format!("[default]\nregion = us-west-1\n[profile other]\n{process}\nregion = eu-central-1\n"), KEYS, &[("AWS_PROFILE", "other")]),
    ];
    for (config, credentials, variables) in setups {
        stage.write(&config, credentials);
        for (name, client) in &clients {
            let (requests, output_text) = stage.requests(client, variables);
            let [(action, key, region)] = &requests[..] else {
                panic!("{name}: {config}\n{requests:?}")
            };
            assert_eq!(
                (action.as_str(), region.as_str()),
                ("GetCallerIdentity", "eu-central-1"),
                "{name}: {config}"
            );
            assert!(stage.issued().contains(key), "{name}: {config}\n{key}");
            assert!(
                output_text.contains("the command has the profile [awsvid-exec]"),
                "{name}: {output_text}"
            );
        }
        assert_eq!(
            fs::read_to_string(stage.folder.path().join(".aws/config")).unwrap(),
            config
        );
    }
}

/// A machine without a writable directory, except for one in memory, and then without any.
#[test]
fn settings_are_kept_without_writable_directory() {
    if !root() {
        return;
    }
    let stage = stage();
    let Some(clients) = clients(&format!("http://{}", stage.sts.address)) else {
        return;
    };
    stage.write("[default]\nregion = eu-central-1\n", KEYS);
    let home = stage.folder.path().to_str().unwrap();
    let variables = [("TMPDIR", home)];
    for (name, client) in &clients {
        for (options, is_writable) in [("rw", true), ("ro", false)] {
            let script = "mount --bind \"$0\" \"$0\"; mount -o remount,bind,ro \"$0\"; \
                          mount -t tmpfs -o \"$1\" tmpfs /dev/shm; shift; exec \"$@\"";
            let words = ["unshare", "--mount", "sh", "-euc", script, home, options];
            let output = stage.run(&words, client, &variables);
            let requests = stage.sts.take();
            if is_writable {
                let [(action, key, region)] = &requests[..] else {
                    panic!("{name}: {requests:?} {output:?}")
                };
                assert_eq!(
                    (action.as_str(), region.as_str()),
                    ("GetCallerIdentity", "eu-central-1"),
                    "{name}"
                );
                assert!(stage.issued().contains(key), "{name}: {key}");
                assert!(
                    output.stderr.contains("are in /dev/shm/awsvid-0/"),
                    "{name}: {output:?}"
                );
            } else {
                assert_eq!(output.status.code(), Some(125), "{name}: {output:?}");
                assert_eq!(requests, [], "{name}: the command was started");
                assert!(
                    output.stderr.contains("Read-only file system")
                        && output.stderr.contains("set TMPDIR to a directory"),
                    "{name}: {output:?}"
                );
            }
        }
    }
}

#[test]
fn profile_for_awsvid_is_used() {
    let stage = stage();
    let Some(clients) = clients(&format!("http://{}", stage.sts.address)) else {
        return;
    };
    let role = "role_arn = arn:aws:iam::123456789012:role/x\ncredential_source = EcsContainer\nregion = eu-central-1\n";
    let chain = "role_arn = arn:aws:iam::123456789012:role/y\nsource_profile = base\nregion = eu-central-1\n";
    let setups: [(String, &[(&str, &str)]); 3] = [
        (format!("[default]\n{role}"), &[]),
        (
            format!("[profile other]\n{role}"),
            &[("AWS_PROFILE", "other")],
        ),
        (
            format!("[profile base]\n{role}[profile other]\n{chain}"),
            &[("AWS_PROFILE", "other")],
        ),
    ];
    for (config, variables) in setups {
        stage.write(&config, "");
        for (name, client) in &clients {
            // The version of Debian 12 has no variable for the STS of a profile.
            if *name == "aws2" {
                continue;
            }
            let (requests, output_text) = stage.requests(client, variables);
            let (first, last) = (&requests[0], &requests[requests.len() - 1]);
            // The role of the profile, with awsvid's credentials, and then with those of the role.
            assert!(
                first.0 == "AssumeRole" && stage.issued().contains(&first.1),
                "{name}: {config}\n{requests:?}"
            );
            assert_eq!(
                (&*last.0, &*last.1),
                ("GetCallerIdentity", "ASIAASSUMED"),
                "{name}: {config}\n{requests:?}"
            );
            assert!(
                !output_text.contains("awsvid exec"),
                "{name}: {output_text}"
            );
        }
    }
    // The process that sends the request over the unix socket.
    let process = format!(
        "credential_process = {PROGRAM} credential-process --socket {}",
        stage.daemon.unix().display()
    );
    stage.write(
        &format!("[default]\n{process}\nregion = eu-central-1\n"),
        "",
    );
    for (name, client) in &clients {
        let before = stage.daemon.audit().len();
        let (requests, output_text) = stage.requests(client, &[]);
        assert!(
            stage.issued().contains(&requests[0].1) && !output_text.contains("awsvid exec"),
            "{name}: {requests:?} {output_text}"
        );
        assert!(
            stage
                .daemon
                .audit_after(before)
                .iter()
                .all(|record| record["listener"] == "unix"),
            "{name}"
        );
    }
}
