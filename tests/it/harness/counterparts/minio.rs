//! MinIO: an STS that verifies JWT-SVIDs against the OIDC discovery document, and an S3 that
//! accepts its credentials.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Deserializer, Value, json};

use super::process::{Process, run};
use super::{Port, http_get, read, tool};

/// Bounds each step of MinIO's start, and each call of its client, on a loaded machine.
const TIMEOUT: Duration = Duration::from_secs(60);
const ROOT_USER: &str = "minio-root";
const ROOT_PASSWORD: &str = "minio-password";
const POLICY: &str = "awsvid";

/// MinIO's name for AssumeRoleWithWebIdentity in the trace (`Record::api`), because one function of
/// MinIO serves two actions.
pub(crate) const ASSUME_ROLE: &str = "sts.AssumeRoleWithSSO";

/// The audience that MinIO requires in a token.
pub(crate) const AUDIENCE: &str = "minio";

/// A MinIO server with one OpenID provider and one role that any valid token of it may assume. It
/// ends when this is dropped.
pub(crate) struct Minio {
    folder: PathBuf,
    program: PathBuf,
    client: PathBuf,
    port: Port,
    issuer_url: String,
    server: Option<Process>,
}

impl Minio {
    /// Starts MinIO with its data below `folder` and its OpenID provider at `issuer_url`, which
    /// must respond already (`Spire::issuer_url`). Its audience is `AUDIENCE`, and `policy` is the
    /// role's IAM policy document. Returns `None` after a printed skip if the programs are missing.
    pub(crate) fn start(folder: &Path, issuer_url: &str, policy: &Value) -> Option<Minio> {
        let (program, client) = (tool("minio")?, tool("mc")?);
        let folder = folder.join("minio");
        fs::create_dir_all(folder.join("data")).expect("a folder for MinIO");
        let mut minio = Minio {
            folder,
            program,
            client,
            port: Port::reserve(),
            issuer_url: issuer_url.to_owned(),
            server: None,
        };
        minio.restart();
        let file = minio.folder.join("policy.json");
        fs::write(&file, policy.to_string()).expect("the policy's file");
        // The role names the policy, which MinIO reads at each request: it may be created after the
        // start.
        minio.client(
            &[
                "admin",
                "policy",
                "create",
                "m",
                POLICY,
                file.to_str().expect("a path in UTF-8"),
            ],
            b"",
        );
        Some(minio)
    }

    /// Returns the URL of both S3 and STS.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.port.address())
    }

    /// Returns the role's ARN, as MinIO printed it.
    pub(crate) fn role_arn(&self) -> String {
        role_arn(&self.log()).expect("MinIO has printed its role")
    }

    pub(crate) fn make_bucket(&self, bucket: &str) {
        self.client(&["mb", &format!("m/{bucket}")], b"");
    }

    /// Writes an object, as MinIO's root user.
    pub(crate) fn put(&self, bucket: &str, key: &str, content: &[u8]) {
        self.client(&["pipe", &format!("m/{bucket}/{key}")], content);
    }

    /// Writes objects, by key and content, all at one time.
    pub(crate) fn put_all(&self, bucket: &str, objects: &[(String, String)]) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (key, content) in objects {
            fs::write(folder.path().join(key), content).expect("an object's file");
        }
        let from = format!("{}/", folder.path().display());
        self.client(&["cp", "--recursive", &from, &format!("m/{bucket}/")], b"");
    }

    /// Returns MinIO's output so far.
    pub(crate) fn log(&self) -> String {
        read(&self.folder.join("server.log"))
    }

    /// Kills the server. Its endpoint then rejects connections.
    pub(crate) fn stop(&mut self) {
        self.server = None;
    }

    /// Starts the server again at the same endpoint, with the data, the policy and the role that it
    /// had.
    pub(crate) fn restart(&mut self) {
        self.stop();
        let printed = self.log().len();
        let mut command = Command::new(&self.program);
        command
            .args(["server", "--address", &self.port.address().to_string()])
            .arg(self.folder.join("data"))
            .env_clear()
            .envs([
                ("HOME", self.folder.to_str().expect("a path in UTF-8")),
                ("MINIO_ROOT_USER", ROOT_USER),
                ("MINIO_ROOT_PASSWORD", ROOT_PASSWORD),
                ("MINIO_BROWSER", "off"),
                ("MINIO_UPDATE", "off"),
                (
                    "MINIO_IDENTITY_OPENID_CONFIG_URL",
                    &format!("{}/.well-known/openid-configuration", self.issuer_url),
                ),
                ("MINIO_IDENTITY_OPENID_CLIENT_ID", AUDIENCE),
                ("MINIO_IDENTITY_OPENID_ROLE_POLICY", POLICY),
            ]);
        let server = Process::start("minio", command, &self.folder.join("server.log"));
        // It prints its roles when IAM is ready, which is after it has read the provider's keys.
        server.await_some("MinIO is ready", TIMEOUT, || {
            role_arn(&self.log()[printed..])?;
            http_get(self.port.address(), "/minio/health/ready")
                .filter(|(status, _)| *status == 200)
        });
        self.server = Some(server);
    }

    /// Starts `mc admin trace`, and returns once it shows the server's calls.
    pub(crate) fn trace(&self) -> Trace {
        let log = self.folder.join("trace.log");
        let mut command = self.client_command();
        command.args([
            "--json",
            "admin",
            "trace",
            "--call",
            "s3,internal",
            "--verbose",
            "m",
        ]);
        let trace = Trace {
            process: Process::start("mc admin trace", command, &log),
        };
        // Only a call that appears in the trace proves that the subscription exists.
        trace
            .process
            .await_some("mc admin trace shows a call", TIMEOUT, || {
                http_get(self.port.address(), "/awsvid-trace-begins/")?;
                trace
                    .records()
                    .iter()
                    .any(|record| record.path().starts_with("/awsvid-trace-begins"))
                    .then_some(())
            });
        trace
    }

    fn client_command(&self) -> Command {
        let mut command = Command::new(&self.client);
        let host = format!("http://{ROOT_USER}:{ROOT_PASSWORD}@{}", self.port.address());
        command
            .env_clear()
            .env("HOME", &self.folder)
            .env("MC_HOST_m", host);
        command
            .arg("--config-dir")
            .arg(self.folder.join("mc"))
            .arg("--disable-pager");
        command
    }

    fn client(&self, arguments: &[&str], input: &[u8]) {
        let mut command = self.client_command();
        command.args(arguments);
        run(command, input, TIMEOUT).success(&format!("mc {}", arguments.join(" ")));
    }
}

/// Returns a policy that lets the role read one bucket, but only with credentials from a token with
/// this `sub`.
pub(crate) fn readable_by(spiffe_id: &str, bucket: &str) -> Value {
    json!({ "Version": "2012-10-17", "Statement": [{
        "Effect": "Allow",
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": [format!("arn:aws:s3:::{bucket}"), format!("arn:aws:s3:::{bucket}/*")],
        "Condition": { "StringEquals": { "jwt:sub": spiffe_id } },
    }]})
}

fn role_arn(log: &str) -> Option<String> {
    let (_, rest) = log.split_once("arn:minio:iam:")?;
    let end = rest.find(|c: char| c.is_whitespace() || c == '\u{1b}')?;
    Some(format!("arn:minio:iam:{}", &rest[..end]))
}

/// A running `mc admin trace` of the server's S3 and STS calls, from its start on. It contains the
/// secrets of the calls. It ends when the server does.
pub(crate) struct Trace {
    process: Process,
}

impl Trace {
    /// Returns all calls shown so far, in their order. MinIO shows a call after its response, so
    /// the latest call may be missing: use `await_record`.
    pub(crate) fn records(&self) -> Vec<Record> {
        // The last record may be incomplete, which ends the stream.
        Deserializer::from_str(&self.process.log())
            .into_iter()
            .map_while(Result::ok)
            .map(Record)
            .collect()
    }

    /// Waits for the first record that `needed` accepts. `what` describes it in a failure.
    pub(crate) fn await_record(&self, what: &str, needed: impl Fn(&Record) -> bool) -> Record {
        self.process
            .await_some(what, TIMEOUT, || self.records().into_iter().find(&needed))
    }

    /// Returns the number of calls of this API so far that were signed with this access key id. For
    /// `ASSUME_ROLE` it counts the responses with it.
    pub(crate) fn count(&self, api: &str, access_key_id: &str) -> usize {
        self.records()
            .iter()
            .filter(|record| {
                record.api() == api && record.access_key_id().as_deref() == Some(access_key_id)
            })
            .count()
    }
}

/// One call, as MinIO recorded it.
#[derive(Debug)]
pub(crate) struct Record(Value);

impl Record {
    /// Returns the API, such as `s3.GetObject` or `ASSUME_ROLE`.
    pub(crate) fn api(&self) -> &str {
        self.0["api"].as_str().unwrap_or_default()
    }

    pub(crate) fn path(&self) -> &str {
        self.0["path"].as_str().unwrap_or_default()
    }

    /// Returns the HTTP status of the response.
    pub(crate) fn status(&self) -> u64 {
        self.0["response"]["statusCode"]
            .as_u64()
            .unwrap_or_default()
    }

    /// Returns the access key id of the call: the one in the STS response, else the one that signed
    /// the request. It is `None` if STS rejected, or if the call is unsigned.
    pub(crate) fn access_key_id(&self) -> Option<String> {
        let text = |pointer| {
            self.0
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        between(text("/response/body"), "<AccessKeyId>", "<")
            .or_else(|| between(text("/request/headers/Authorization"), "Credential=", "/"))
            .or_else(|| between(text("/request/rawQuery"), "X-Amz-Credential=", "%2F"))
    }
}

fn between(text: &str, start: &str, end: &str) -> Option<String> {
    let (_, rest) = text.split_once(start)?;
    let (found, _) = rest.split_once(end)?;
    Some(found.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_key_id_is_read_from_each_form_of_record() {
        let scope = "20261124/eu-central-1/s3/aws4_request";
        let signed = json!({ "Authorization": format!("AWS4-HMAC-SHA256 Credential=SIGNED/{scope}, Signature=0") });
        let presigned = format!(
            "X-Amz-Date=0&X-Amz-Credential=PRESIGNED%2F{}",
            scope.replace('/', "%2F")
        );
        let issued = "<Credentials><AccessKeyId>GIVEN</AccessKeyId><SecretAccessKey>s</SecretAccessKey></Credentials>";
        let rejected = "<Error><Code>AccessDenied</Code></Error>";
        for (call, expected) in [
            (json!({ "request": { "headers": signed } }), Some("SIGNED")),
            (
                json!({ "request": { "rawQuery": presigned } }),
                Some("PRESIGNED"),
            ),
            (json!({ "response": { "body": issued } }), Some("GIVEN")),
            (
                json!({ "request": { "headers": signed }, "response": { "body": issued } }),
                Some("GIVEN"),
            ),
            (
                json!({ "request": { "headers": {} }, "response": { "body": rejected } }),
                None,
            ),
            (json!({ "api": "s3.GetObject" }), None),
        ] {
            assert_eq!(
                Record(call.clone()).access_key_id().as_deref(),
                expected,
                "{call}"
            );
        }
    }
}
