//! One request to any server, and its answer in a few words.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;

use crate::harness::client::connect;
use crate::imds::TIMEOUT;

const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// An answer, with the names of its headers in lower case.
#[derive(Debug)]
pub(super) struct ServerAnswer {
    pub(super) status: u16,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
}

/// Sends a request, with the server's own `Host` unless the headers have another. Servers may keep
/// the connection open.
pub(super) fn exchange(address: SocketAddr, line: &str, headers: &[&str]) -> ServerAnswer {
    let mut stream = connect(address);
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut request = format!("{line} HTTP/1.1\r\n");
    if !headers.iter().any(|header| header.starts_with("Host:")) {
        request += &format!("Host: {address}\r\n");
    }
    for header in headers {
        request += &format!("{header}\r\n");
    }
    request += "\r\n";
    if headers.contains(&"Content-Length: 1") {
        request += "x";
    }
    stream.write_all(request.as_bytes()).unwrap();
    read(BufReader::new(stream), line.starts_with("HEAD "))
}

fn read(mut stream: impl BufRead, is_head: bool) -> ServerAnswer {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let headers: Vec<(String, String)> = lines[1..]
        .iter()
        .map(|line| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_lowercase(), value.trim().to_owned())
        })
        .collect();
    let mut answer = ServerAnswer {
        status: lines[0][9..12].parse().unwrap(),
        headers,
        body: String::new(),
    };
    let length = answer.header("content-length").unwrap_or("0");
    let length = if is_head { 0 } else { length.parse().unwrap() };
    stream
        .take(length)
        .read_to_string(&mut answer.body)
        .unwrap();
    answer
}

impl ServerAnswer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(own, _)| own == name);
        found.next().map(|(_, value)| value.as_str())
    }

    /// Returns whether the type has a parameter, which is the charset.
    pub(super) fn has_charset(&self) -> bool {
        let parameter = self
            .header("content-type")
            .and_then(|value| value.split_once(';'));
        if let Some((_, parameter)) = parameter {
            assert_eq!(parameter.trim().to_lowercase(), "charset=utf-8", "{self:?}");
        }
        parameter.is_some()
    }

    /// Returns the status, the type, whether the header with the token's lifetime is there, and the
    /// kind of the body.
    pub(super) fn summary(&self, role: &str) -> String {
        let kind = self.header("content-type").unwrap_or("no type");
        let kind = kind.split(';').next().unwrap();
        let lifetime = self.header(TTL_HEADER).map_or("", |_| ", lifetime");
        let body = self.body_summary(role);
        format!("{} {kind}{lifetime}: {body}", self.status)
    }

    fn body_summary(&self, role: &str) -> String {
        let body = self.body.as_str();
        let is_token = |c: char| c.is_ascii_alphanumeric() || "+/=_-".contains(c);
        match body {
            "" => "empty".to_owned(),
            _ if body == role => "the role's name".to_owned(),
            "us-east-1" => "the region".to_owned(),
            "us-east-1a" => "a zone of it".to_owned(),
            _ if body.starts_with("awsvid: ") => "the reason".to_owned(),
            _ if body.starts_with('{') => json_summary(body),
            _ if body.starts_with('<') => "a page".to_owned(),
            _ if body.len() > 40 && body.chars().all(is_token) => {
                format!("a token of {} characters", body.len())
            }
            _ => "text".to_owned(),
        }
    }
}

fn json_summary(body: &str) -> String {
    let json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(body).unwrap();
    if !json.contains_key("AccessKeyId") {
        let fields = if json.len() == 1 { "field" } else { "fields" };
        return format!("JSON with {} {fields}", json.len());
    }
    for name in [
        "Code",
        "LastUpdated",
        "Type",
        "SecretAccessKey",
        "Token",
        "Expiration",
    ] {
        assert!(json.contains_key(name), "{body}");
    }
    let mut text = "credentials".to_owned();
    if json.contains_key("AccountId") {
        text += " with AccountId";
    }
    if json["LastUpdated"].as_str().unwrap().len() != "2026-01-01T00:00:00Z".len() {
        text += ", fractions of a second in LastUpdated";
    }
    text
}
