//! EC2's instance metadata service of the real daemon, with the servers of `awsvid dev`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use crate::harness::client::connect;
use crate::harness::daemon::{Daemon, imds_table};
use crate::harness::upstream::{Upstream, my_rule};

mod held;
mod mock;
mod programs;
mod requests;
mod tokens;

const TIMEOUT: Duration = Duration::from_secs(60);
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// The answer to one request.
#[derive(Debug)]
struct Metadata {
    status: u16,
    /// The head in lower case.
    head: String,
    body: String,
}

impl Metadata {
    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Sends a request with these headers after `Host`, each with its line end.
fn send(address: SocketAddr, line: &str, headers: &str) -> Metadata {
    send_over(connect(address), &address.to_string(), line, headers)
}

/// Sends such a request over a connection that is there.
fn send_over(mut stream: TcpStream, host: &str, line: &str, headers: &str) -> Metadata {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let request = format!("{line} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {answer:?}"));
    Metadata {
        status: head[9..12].parse().unwrap(),
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

fn put(address: SocketAddr, seconds: u32) -> Metadata {
    let ttl = format!("X-aws-ec2-metadata-token-ttl-seconds: {seconds}\r\n");
    send(address, "PUT /latest/api/token", &ttl)
}

fn token(address: SocketAddr) -> String {
    let answer = put(address, 21_600);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

fn get(address: SocketAddr, path: &str, token: &str) -> Metadata {
    let header = format!("X-aws-ec2-metadata-token: {token}\r\n");
    send(address, &format!("GET {path}"), &header)
}

/// Starts a daemon that serves metadata to this test, with these tables in addition.
fn serve(folder: &Path, upstream: &Upstream, more: &str) -> Daemon {
    let rest = [&upstream.configuration(), more, &my_rule()].join("\n");
    Daemon::start(folder, "", &(imds_table(folder) + &rest)).ready()
}

/// Starts a daemon with the key in this folder, and its other files in `folder`.
fn serve_with_key_of(keys: &Path, folder: &Path, upstream: &Upstream) -> Daemon {
    let rest = [imds_table(keys), upstream.configuration(), my_rule()].join("\n");
    Daemon::start(folder, "", &rest).ready()
}
