//! The same requests to awsvid and to AWS's two servers that resemble the instance metadata
//! service. The tables in deploy/docs/imds-compared.md have each difference with its reason, and
//! this test compares them; with `AWSVID_WRITE_TABLE=1` it writes them.

mod answers;
mod reasons;
mod requests;
mod servers;

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use answers::{ServerAnswer, exchange};
use requests::{METADATA, MetadataRequest, TOKENS};

/// The columns, which are one for each server.
const SERVERS: [&str; 3] = ["awsvid", "mock", "helper"];

/// A server with its own role and tokens.
struct Server {
    address: SocketAddr,
    role: &'static str,
    token: String,
    expired: String,
}

impl Server {
    fn new(address: SocketAddr, role: &'static str) -> Self {
        let [token, expired] = [300, 1].map(|seconds| {
            let ttl = format!("X-aws-ec2-metadata-token-ttl-seconds: {seconds}");
            let answer = exchange(address, "PUT /latest/api/token", &[&ttl]);
            assert_eq!(answer.status, 200, "{answer:?}");
            answer.body
        });
        Self {
            address,
            role,
            token,
            expired,
        }
    }

    fn answer(&self, request: &MetadataRequest) -> ServerAnswer {
        let filled = |text: &str| {
            text.replace("{role}", self.role)
                .replace("{token}", &self.token)
                .replace("{expired}", &self.expired)
                .replace("{address}", &self.address.to_string())
        };
        let headers: Vec<String> = request.headers.iter().copied().map(filled).collect();
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        exchange(self.address, &filled(request.line), &headers)
    }

    /// Waits until the short token has expired, and the credentials are cached.
    fn settle(&self) {
        let list = METADATA
            .iter()
            .find(|request| request.name == "list, expired token");
        let role = METADATA.iter().find(|request| request.name == "role");
        await_some("the short token expires", TIMEOUT, || {
            (self.answer(list.unwrap()).status != 200).then_some(())
        });
        await_some("the credentials are there", TIMEOUT, || {
            (self.answer(role.unwrap()).status == 200).then_some(())
        });
    }
}

/// A row of a table: the name, a cell for each server, the reason of a difference.
type TableRow = (&'static str, [String; 3], &'static str);

/// Returns the row with its reason. A difference without a reason, and a reason without a
/// difference, are an error.
fn row(name: &'static str, cells: [String; 3], errors: &mut Vec<String>) -> TableRow {
    let differs = cells.iter().any(|cell| *cell != cells[0]);
    let reason = reasons::reason(name);
    if differs != reason.is_some() {
        errors.push(format!("{name}, reason {reason:?}: {cells:#?}"));
    }
    (name, cells, reason.unwrap_or_default())
}

/// Returns how many of a server's answers have a header.
fn share(answers: &[ServerAnswer], name: &str) -> String {
    share_with(answers, |answer| answer.header(name).is_some())
}

fn share_with(answers: &[ServerAnswer], is_found: impl Fn(&ServerAnswer) -> bool) -> String {
    match answers.iter().filter(|answer| is_found(answer)).count() {
        0 => "none",
        count if count == answers.len() => "all",
        _ => "some",
    }
    .to_owned()
}

/// The row after those of the headers. The tables of requests have only the type.
const CHARSET: &str = "charset in content-type";

/// The headers of these answers that the table has, in its order.
const HEADERS: [&str; 10] = [
    "content-type",
    "content-length",
    "date",
    "cache-control",
    "connection",
    "x-aws-ec2-metadata-token-ttl-seconds",
    "allow",
    "location",
    "x-content-type-options",
    "server",
];

fn rendered(rows: &[TableRow]) -> String {
    let mut text = format!(
        "| request | {} | reason |\n|---|---|---|---|---|\n",
        SERVERS.join(" | ")
    );
    for (name, cells, reason) in rows {
        text += &format!("| {name} | {} | {reason} |\n", cells.join(" | "));
    }
    text
}

#[test]
fn each_difference_from_other_servers_has_a_reason() {
    let (folder, upstream) = (folder(), Upstream::start_for_me());
    let (Some(mock), Some(helper)) = (
        servers::start_mock(folder.path()),
        servers::start_helper(folder.path()),
    ) else {
        return;
    };
    let daemon = serve(folder.path(), &upstream, "");
    let servers = [
        Server::new(daemon.tcp(), "dev"),
        Server::new(mock.address, "baskinc-role"),
        Server::new(helper.address, "dev"),
    ];
    servers.iter().for_each(Server::settle);
    let requests: Vec<&MetadataRequest> = TOKENS.iter().chain(&METADATA).collect();
    let answers = servers
        .each_ref()
        .map(|server| Vec::from_iter(requests.iter().map(|request| server.answer(request))));
    let mut errors = Vec::new();
    let rows: Vec<TableRow> = (0..requests.len())
        .map(|number| {
            let cells = [0, 1, 2]
                .map(|server: usize| answers[server][number].summary(servers[server].role));
            row(requests[number].name, cells, &mut errors)
        })
        .collect();
    for answer in answers.iter().flatten() {
        for (name, _) in &answer.headers {
            assert!(HEADERS.contains(&name.as_str()), "{name}: {answer:?}");
        }
    }
    let mut headers: Vec<TableRow> = HEADERS
        .iter()
        .map(|name| {
            let cells = answers.each_ref().map(|answers| share(answers, name));
            row(name, cells, &mut errors)
        })
        .collect();
    let charset = answers
        .each_ref()
        .map(|answers| share_with(answers, ServerAnswer::has_charset));
    headers.push(row(CHARSET, charset, &mut errors));
    let (tokens, metadata) = rows.split_at(TOKENS.len());
    settle_tables(&[
        ("tokens", rendered(tokens)),
        ("metadata", rendered(metadata)),
        (
            "headers",
            rendered(&headers).replacen("request", "header", 1),
        ),
    ]);
    assert!(errors.is_empty(), "{}", errors.join("\n"));
}

fn document() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/docs/imds-compared.md")
}

/// Compares the tables with the document, or writes them.
fn settle_tables(tables: &[(&str, String)]) {
    let committed = fs::read_to_string(document()).unwrap();
    let mut text = committed.clone();
    for (name, table) in tables {
        let begin = format!("<!-- {name}: made by tests/it/imds/mock.rs. -->\n");
        let (before, rest) = text.split_once(&begin).expect("the marker of a table");
        let (_, after) = rest.split_once("<!-- end -->").expect("the end of a table");
        text = format!("{before}{begin}{table}<!-- end -->{after}");
    }
    if std::env::var_os("AWSVID_WRITE_TABLE").is_some_and(|value| !value.is_empty()) {
        fs::write(document(), text).unwrap();
    } else {
        assert!(
            committed == text,
            "imds-compared.md is not true any more (AWSVID_WRITE_TABLE=1 writes it):\n{text}"
        );
    }
}
