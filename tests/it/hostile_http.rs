//! Hostile and clumsy clients, bytes in and bytes out. The client may have credentials, so a second
//! request that is hidden in a first one would return some.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::harness::actor::Connector;
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::{Daemon, imds_table};
use crate::harness::upstream::Upstream;

const TIMEOUT: Duration = Duration::from_secs(30);
const ALICE: u32 = 61001;
const HEADERS: &str = "Host: 127.0.0.1\r\nAuthorization: x\r\n";
/// The request that others hide: whole, and valid by itself.
const HIDDEN: &str = "GET /v1/credentials HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: x\r\n\r\n";

/// A listener, to which the client connects as a user with a rule, from a cgroup of its own.
struct Address {
    listener: &'static str,
    connector: Connector,
}

/// The response that is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExpectedResponse {
    Credentials,
    /// An error, audited: the status line, and the code in the body.
    Rejected(&'static str, &'static str),
    /// An error for a head that could not be parsed: counted as a connection without a request.
    BadHead(&'static str, &'static str),
}

const BAD: ExpectedResponse = ExpectedResponse::BadHead("HTTP/1.1 400 Bad Request", "bad_request");
const LARGE: ExpectedResponse = ExpectedResponse::BadHead(
    "HTTP/1.1 431 Request Header Fields Too Large",
    "head_too_large",
);
const HOST: ExpectedResponse = ExpectedResponse::Rejected("HTTP/1.1 400 Bad Request", "host");
const BODY: ExpectedResponse = ExpectedResponse::Rejected("HTTP/1.1 400 Bad Request", "body");
const PATH: ExpectedResponse = ExpectedResponse::Rejected("HTTP/1.1 404 Not Found", "path");
const METHOD: ExpectedResponse =
    ExpectedResponse::Rejected("HTTP/1.1 405 Method Not Allowed", "method");
const PROXIED: ExpectedResponse = ExpectedResponse::Rejected("HTTP/1.1 403 Forbidden", "proxied");
const UNAUTHORIZED: ExpectedResponse =
    ExpectedResponse::Rejected("HTTP/1.1 403 Forbidden", "no_authorization");

struct HttpStage {
    daemon: Daemon,
    _upstream: Upstream,
    cgroup: Cgroup,
    _folder: tempfile::TempDir,
}

impl HttpStage {
    /// Starts it, or returns `None` after a printed skip.
    fn set() -> Option<Self> {
        Self::set_with(|_| String::new())
    }

    /// Starts it with the tables that `more` returns for its folder.
    fn set_with(more: impl Fn(&Path) -> String) -> Option<Self> {
        if !root() {
            return None;
        }
        let folder = folder();
        let upstream = Upstream::start(&[(ALICE, "alice")]);
        // Alice's process makes the connections and passes them to the test, so the cgroup decides.
        let cgroup_rule = "cgroup = \"/awsvid-test-*.slice/**\"";
        let rule = format!(
            "[[workload]]\nspiffe_id = \"spiffe://example.org/user/alice\"\nuid = {ALICE}\n{cgroup_rule}\n"
        );
        let daemon = Daemon::start(
            folder.path(),
            "",
            &format!(
                "{}\n{}\n{rule}",
                more(folder.path()),
                upstream.configuration()
            ),
        )
        .ready();
        let cgroup = Cgroup::new(&format!(
            "alice-{}.service",
            folder.path().file_name().unwrap().display()
        ));
        Some(Self {
            daemon,
            _upstream: upstream,
            cgroup,
            _folder: folder,
        })
    }

    fn addresses(&self) -> [Address; 3] {
        ["tcp", "tcp6", "unix"].map(|listener| {
            let address = self.daemon.listener(listener);
            let connector = Connector::start(ALICE, listener, &address, self.cgroup.path());
            Address {
                listener,
                connector,
            }
        })
    }

    /// Returns the sum of a counter over all series that have these labels.
    fn counter(&self, name: &str, labels: &str) -> u64 {
        let metrics = self.daemon.metrics();
        let these = metrics
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(labels));
        these
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    }

    fn dropped(&self, reason: &str) -> u64 {
        self.counter(
            "awsvid_connections_dropped_total",
            &format!("reason=\"{reason}\""),
        )
    }

    /// Returns the number of requests with a complete head. Each has a record too, but one stands
    /// for several rejections in quick succession.
    fn requests(&self, labels: &str) -> u64 {
        self.counter("awsvid_requests_total", labels)
    }
}

/// A connection over TCP or the unix socket.
trait Connection: Read + Write + Send {
    fn end_writing(&self);
    fn wait_at_most(&self, time: Duration);
}

impl Connection for TcpStream {
    fn end_writing(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }

    fn wait_at_most(&self, time: Duration) {
        self.set_read_timeout(Some(time)).unwrap();
    }
}

impl Connection for UnixStream {
    fn end_writing(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }

    fn wait_at_most(&self, time: Duration) {
        self.set_read_timeout(Some(time)).unwrap();
    }
}

impl Address {
    fn connect(&self) -> Box<dyn Connection> {
        let fd = self.connector.connect();
        let stream: Box<dyn Connection> = if self.listener == "unix" {
            Box::new(UnixStream::from(fd))
        } else {
            Box::new(TcpStream::from(fd))
        };
        stream.wait_at_most(TIMEOUT);
        stream
    }

    /// Sends all of this, and reads until the daemon closes.
    fn exchange(&self, bytes: &[u8]) -> Vec<u8> {
        let mut stream = self.connect();
        // The daemon may have answered and closed before all is sent.
        let _ = stream.write_all(bytes);
        rest(&mut *stream)
    }
}

/// Reads until the daemon closes. It may do that with a reset if there was more input than it
/// accepts.
fn rest(stream: &mut dyn Connection) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return all,
            Ok(length) => all.extend(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return all,
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&all)),
        }
    }
}

/// Parses one response with nothing after it: its status line, its headers except `Date`, its body.
fn one_answer(bytes: &[u8]) -> (String, Vec<String>, Vec<u8>) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {text:?}"));
    let mut lines = head.split("\r\n").map(str::to_lowercase);
    let status = head.split("\r\n").next().unwrap().to_owned();
    let mut headers: Vec<String> = lines
        .by_ref()
        .skip(1)
        .filter(|line| !line.starts_with("date: "))
        .collect();
    headers.sort();
    let length = headers
        .iter()
        .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let length: usize = length.unwrap_or_else(|| panic!("no length: {head}"));
    // The response to HEAD has the length that the body would have had.
    assert!(
        body.is_empty() || body.len() == length,
        "{length} bytes and not one more: {text}"
    );
    (status, headers, body.as_bytes().to_vec())
}

/// Checks the body of an error: both spellings, a code, a message that begins with the daemon's
/// name, and nothing else.
fn check_error(body: &[u8], code: &str) {
    let body: Value = serde_json::from_slice(body).unwrap();
    let keys: Vec<_> = body
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(keys, ["Code", "Message", "code", "message"]);
    assert_eq!((&body["code"], &body["Code"]), (&code.into(), &code.into()));
    assert_eq!(body["message"], body["Message"]);
    let message = body["message"].as_str().unwrap();
    assert!(
        message.starts_with("awsvid: ") && message.contains(". (request "),
        "{body}"
    );
}

/// Sends `request` and checks the response and the counters.
fn check(stage: &HttpStage, address: &Address, request: &[u8], right: ExpectedResponse) {
    let shown = String::from_utf8_lossy(&request[..request.len().min(300)]).into_owned();
    let labels = match right {
        ExpectedResponse::Credentials => "outcome=\"issued\",reason=\"ok\"".to_owned(),
        ExpectedResponse::Rejected(_, code) | ExpectedResponse::BadHead(_, code) => {
            format!("outcome=\"refused\",reason=\"{code}\"")
        }
    };
    let (all, these, dropped) = (
        stage.requests(""),
        stage.requests(&labels),
        stage.dropped("bad_request"),
    );
    let answer = address.exchange(request);
    let (status, headers, body) = one_answer(&answer);
    let context = || {
        format!(
            "{shown:?} over {}: {}",
            address.listener,
            String::from_utf8_lossy(&answer)
        )
    };
    let mut expected = vec![
        "cache-control: no-store".to_owned(),
        "connection: close".to_owned(),
        headers
            .iter()
            .find(|line| line.starts_with("content-length: "))
            .unwrap()
            .clone(),
        "content-type: application/json".to_owned(),
    ];
    if right == METHOD {
        expected.insert(0, "allow: get".to_owned());
    }
    assert_eq!(headers, expected, "{}", context());
    match right {
        ExpectedResponse::Credentials => {
            assert!(
                status == "HTTP/1.1 200 OK" || status == "HTTP/1.0 200 OK",
                "{}",
                context()
            );
            assert_eq!(
                serde_json::from_slice::<Value>(&body).unwrap()["Code"],
                "Success",
                "{}",
                context()
            );
        }
        ExpectedResponse::Rejected(line, code) | ExpectedResponse::BadHead(line, code) => {
            // HTTP/1.0 is answered as such.
            let is_1_0 =
                shown.contains(" HTTP/1.0\r\n") && !matches!(right, ExpectedResponse::BadHead(..));
            let line = if is_1_0 {
                line.replacen("1.1", "1.0", 1)
            } else {
                line.to_owned()
            };
            assert_eq!(status, line, "{}", context());
            if shown.starts_with("HEAD ") {
                assert!(body.is_empty(), "{}", context());
            } else {
                check_error(&body, code);
            }
        }
    }
    if let ExpectedResponse::BadHead(..) = right {
        await_some("the connection is counted", TIMEOUT, || {
            (stage.dropped("bad_request") > dropped).then_some(())
        });
        assert_eq!(
            stage.requests(""),
            all,
            "nothing was understood: {}",
            context()
        );
        return;
    }
    // Counted before the response. Exactly one: the text hidden in the request was not read as
    // another request.
    assert_eq!(
        (stage.requests(""), stage.requests(&labels)),
        (all + 1, these + 1),
        "{}",
        context()
    );
    assert_eq!(stage.dropped("bad_request"), dropped, "{}", context());
}

fn check_all(cases: &[(Vec<u8>, ExpectedResponse)]) {
    let Some(stage) = HttpStage::set() else {
        return;
    };
    for address in stage.addresses() {
        check(
            &stage,
            &address,
            HIDDEN.as_bytes(),
            ExpectedResponse::Credentials,
        );
        for (request, right) in cases {
            // The unix socket requires no Authorization.
            let is_unix = address.listener == "unix";
            let right = if is_unix && *right == UNAUTHORIZED {
                ExpectedResponse::Credentials
            } else {
                *right
            };
            check(&stage, &address, request, right);
        }
    }
}

/// Returns a good request with this line instead of the first, and these headers in addition to
/// the usual.
fn request(line: &str, more: &str) -> Vec<u8> {
    format!("{line}\r\n{HEADERS}{more}\r\n").into_bytes()
}

/// Returns a good request with these headers in addition to the usual, and these bytes after it.
fn request_with(more: &str, after: &str) -> Vec<u8> {
    let mut bytes = request("GET /v1/credentials HTTP/1.1", more);
    bytes.extend(after.bytes());
    bytes
}

#[test]
fn hidden_second_request_is_not_answered() {
    let chunked = format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len());
    let length = format!("Content-Length: {}\r\n", HIDDEN.len());
    check_all(&[
        // One response, then the end: the second request gets none.
        (request_with("", HIDDEN), ExpectedResponse::Credentials),
        (
            request_with("Connection: keep-alive\r\n", HIDDEN),
            ExpectedResponse::Credentials,
        ),
        (
            request_with("Content-Length: 0\r\n", HIDDEN),
            ExpectedResponse::Credentials,
        ),
        (
            request_with("Content-Length: 0\r\nContent-Length: 0\r\n", HIDDEN),
            ExpectedResponse::Credentials,
        ),
        // Bodies.
        (request_with(&length, HIDDEN), BODY),
        (request_with(&format!("{length}{length}"), HIDDEN), BODY),
        (
            request_with("Transfer-Encoding: chunked\r\n", &chunked),
            BODY,
        ),
        (
            request_with(
                "Transfer-Encoding: chunked\r\n",
                &format!("0\r\n\r\n{HIDDEN}"),
            ),
            BODY,
        ),
        (
            request_with(&format!("{length}Transfer-Encoding: chunked\r\n"), &chunked),
            BODY,
        ),
        (
            request_with(&format!("Transfer-Encoding: chunked\r\n{length}"), &chunked),
            BODY,
        ),
        (
            request_with(
                "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
                &chunked,
            ),
            BODY,
        ),
        (
            request_with("Transfer-Encoding: gzip, chunked\r\n", &chunked),
            BODY,
        ),
        // Lengths and codings that readers would disagree about.
        (
            request_with("Content-Length: 5\r\nContent-Length: 0\r\n", HIDDEN),
            BAD,
        ),
        (request_with("Content-Length: 0, 5\r\n", HIDDEN), BAD),
        (request_with("Content-Length: +5\r\n", HIDDEN), BAD),
        (request_with("Content-Length: -1\r\n", HIDDEN), BAD),
        (request_with("Content-Length: 0x5\r\n", HIDDEN), BAD),
        (
            request_with("Content-Length: 99999999999999999999\r\n", HIDDEN),
            BAD,
        ),
        (request_with("Transfer-Encoding: gzip\r\n", &chunked), BAD),
        (
            request_with("Transfer-Encoding: chunked, gzip\r\n", &chunked),
            BAD,
        ),
        (
            request_with("Transfer-Encoding: xchunked\r\n", &chunked),
            BAD,
        ),
        (
            request_with("Transfer-Encoding : chunked\r\n", &chunked),
            BAD,
        ),
        (
            [
                request(
                    "GET /v1/credentials HTTP/1.0",
                    "Transfer-Encoding: chunked\r\n",
                ),
                chunked.into_bytes(),
            ]
            .concat(),
            BAD,
        ),
        // Headers that some parsers accept and others do not.
        (
            b"GET /v1/credentials HTTP/1.1\r\nHost : 127.0.0.1\r\nAuthorization: x\r\n\r\n"
                .to_vec(),
            BAD,
        ),
        (request_with("X: a\r\n Host: other\r\n", ""), BAD),
        (request_with("X: a\r\n\tb\r\n", ""), BAD),
        (
            b"GET /v1/credentials HTTP/1.1\r\n Host: 127.0.0.1\r\nAuthorization: x\r\n\r\n"
                .to_vec(),
            BAD,
        ),
        (HIDDEN.replace("\r\n", "\n").into_bytes(), BAD),
        (request_with("X: a\nY: b\r\n", ""), BAD),
        (request_with("X: a\n\r\n", ""), BAD),
        (request_with("X: a\rY: b\r\n", ""), BAD),
        (request_with("X: a\0b\r\n", ""), BAD),
        (request_with("no colon\r\n", ""), BAD),
        (request_with(": no name\r\n", ""), BAD),
        (request_with("X\u{fc}: a\r\n", ""), BAD),
    ]);
}

/// The only requests with another method than GET are those for metadata tokens.
#[test]
fn request_hidden_behind_one_for_metadata_is_not_answered() {
    let Some(stage) = HttpStage::set_with(imds_table) else {
        return;
    };
    let put = |more: &str, after: &str| {
        format!(
            "PUT /latest/api/token HTTP/1.1\r\nHost: 127.0.0.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n{more}\r\n{after}"
        )
    };
    let chunked = format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len());
    let length = format!("Content-Length: {}\r\n", HIDDEN.len());
    let good = put("", "");
    let cases = [
        (good.clone(), "200 OK"),
        (put("", HIDDEN), "200 OK"),
        (put("Connection: keep-alive\r\n", HIDDEN), "200 OK"),
        (put("Content-Length: 0\r\n", HIDDEN), "200 OK"),
        (put("Expect: 100-continue\r\n", ""), "200 OK"),
        (put(&length, HIDDEN), "400 Bad Request"),
        // s3fs sends its PUT so, with an empty body. A body is never read.
        (put("Transfer-Encoding: chunked\r\n", &chunked), "200 OK"),
        (
            put("Transfer-Encoding: gzip\r\n", &chunked),
            "400 Bad Request",
        ),
        (good.replace("\r\n", "\n"), "400 Bad Request"),
        (good.replace("Host: ", "Host : "), "400 Bad Request"),
        (good.replace("PUT ", "put "), "405 Method Not Allowed"),
        (
            good.replace("seconds: 60", "seconds: 60\r\n 0"),
            "400 Bad Request",
        ),
        (
            put(&format!("X: {}\r\n", "a".repeat(20_000)), ""),
            "431 Request Header Fields Too Large",
        ),
    ];
    let [tcp, tcp6, _] = stage.addresses();
    for address in [tcp, tcp6] {
        for (request, right) in &cases {
            let before = stage.requests("");
            let (status, ..) = one_answer(&address.exchange(request.as_bytes()));
            assert_eq!(status, format!("HTTP/1.1 {right}"), "{request:.300}");
            assert!(stage.requests("") <= before + 1, "{request:.300}");
        }
        // The other protocol of the same listener works as before.
        check(
            &stage,
            &address,
            HIDDEN.as_bytes(),
            ExpectedResponse::Credentials,
        );
    }
    assert_eq!(stage.requests("outcome=\"issued\""), 2);
}

#[test]
fn input_other_than_http_1_is_rejected() {
    let hello: &[u8] =
        b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x03GET /v1/credentials HTTP/1.1\r\n\r\n";
    let case = |bytes: &str| (bytes.as_bytes().to_vec(), BAD);
    check_all(&[
        (hello.to_vec(), BAD),
        case("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        case("GET /v1/credentials\r\n\r\n"),
        case("GET /v1/credentials\r\n"),
        case("GET\r\n\r\n"),
        case("GET HTTP/1.1\r\n\r\n"),
        (request("GET /v1/credentials HTTP/1.2", ""), BAD),
        (request("GET /v1/credentials HTTP/2.0", ""), BAD),
        (request("GET /v1/credentials http/1.1", ""), BAD),
        (request("GET  /v1/credentials HTTP/1.1", ""), BAD),
        (request("GET\t/v1/credentials\tHTTP/1.1", ""), BAD),
        (request("GET /v1/cred entials HTTP/1.1", ""), BAD),
        (request("GET /v1/credentials\0 HTTP/1.1", ""), BAD),
        (request("GET /v1/credentials\u{7f} HTTP/1.1", ""), BAD),
        (request("G\0T /v1/credentials HTTP/1.1", ""), BAD),
        (
            [
                b"GET /v1/credentials/\xff HTTP/1.1\r\n",
                HEADERS.as_bytes(),
                b"\r\n",
            ]
            .concat(),
            BAD,
        ),
        case("SSH-2.0-OpenSSH_9.9\r\n"),
        case("\0\0\0\0\0\0\0\0\r\n\r\n"),
        (vec![0xff; 300], BAD),
    ]);
}

#[test]
fn oversized_heads_are_rejected() {
    let long = |length: usize| "a".repeat(length);
    let many = |count: usize| {
        (0..count)
            .map(|number| format!("X-{number}: a\r\n"))
            .collect::<String>()
    };
    check_all(&[
        (
            request_with(&format!("X: {}\r\n", long(15_000)), ""),
            ExpectedResponse::Credentials,
        ),
        (request_with(&format!("X: {}\r\n", long(17_000)), ""), LARGE),
        (
            request_with(&format!("X: {}\r\n", long(500_000)), ""),
            LARGE,
        ),
        (request_with(&format!("{}: a\r\n", long(17_000)), ""), LARGE),
        (
            request(
                &format!("GET /v1/credentials/{} HTTP/1.1", long(15_000)),
                "",
            ),
            PATH,
        ),
        (
            request(
                &format!("GET /v1/credentials/{} HTTP/1.1", long(70_000)),
                "",
            ),
            LARGE,
        ),
        (request_with(&many(62), ""), ExpectedResponse::Credentials),
        (request_with(&many(63), ""), LARGE),
        (request_with(&many(5_000), ""), LARGE),
        // Without an end.
        (format!("GET /{}", long(20_000)).into_bytes(), LARGE),
    ]);
}

#[test]
fn valid_but_forbidden_requests_are_rejected() {
    let plain = |line: &str, right| (request(line, ""), right);
    let bare = |headers: &str, right| {
        (
            format!("GET /v1/credentials HTTP/1.1\r\n{headers}\r\n").into_bytes(),
            right,
        )
    };
    check_all(&[
        // Targets for proxies, and what has no path at all.
        plain("GET http://127.0.0.1/v1/credentials HTTP/1.1", PROXIED),
        plain("GET http://other.example/v1/credentials HTTP/1.1", PROXIED),
        plain("GET https://127.0.0.1/v1/credentials HTTP/1.1", PROXIED),
        plain(
            "GET http://user:password@127.0.0.1/v1/credentials HTTP/1.1",
            PROXIED,
        ),
        plain("GET 127.0.0.1:974 HTTP/1.1", PROXIED),
        (
            HIDDEN
                .replace(" /v1", " http://127.0.0.1/v1")
                .replace("Host: 127.0.0.1", "Host: other")
                .into_bytes(),
            HOST,
        ),
        plain("GET * HTTP/1.1", PATH),
        plain("OPTIONS * HTTP/1.1", METHOD),
        plain("CONNECT 127.0.0.1:974 HTTP/1.1", METHOD),
        // Methods.
        plain("HEAD /v1/credentials HTTP/1.1", METHOD),
        plain("POST /v1/credentials HTTP/1.1", METHOD),
        plain("TRACE /v1/credentials HTTP/1.1", METHOD),
        plain("get /v1/credentials HTTP/1.1", METHOD),
        plain("GETX /v1/credentials HTTP/1.1", METHOD),
        plain("PUT /latest/api/token HTTP/1.1", METHOD),
        // Paths.
        plain("GET //v1/credentials HTTP/1.1", PATH),
        plain("GET /v1//credentials HTTP/1.1", PATH),
        plain("GET /v1/./credentials HTTP/1.1", PATH),
        plain("GET /x/../v1/credentials HTTP/1.1", PATH),
        plain("GET /v1/credentials/.. HTTP/1.1", PATH),
        plain("GET /v1/credentials/%2e%2e HTTP/1.1", PATH),
        plain("GET /v1/credentials/%252e HTTP/1.1", PATH),
        plain("GET /v1/credentials/%00 HTTP/1.1", PATH),
        plain("GET /v1/credentials/dev%00 HTTP/1.1", PATH),
        plain("GET /v1/credentials/dev%2f HTTP/1.1", PATH),
        plain("GET /v1/credentials/%ff HTTP/1.1", PATH),
        plain("GET /v1/credentials/\u{fc} HTTP/1.1", PATH),
        plain("GET /v1/credentials/%zz HTTP/1.1", PATH),
        plain("GET /v1%2fcredentials HTTP/1.1", PATH),
        plain("GET /v1\\credentials HTTP/1.1", PATH),
        plain(
            "GET /v1/credentials? HTTP/1.1",
            ExpectedResponse::Credentials,
        ),
        plain(
            "GET /v1/credentials/dev? HTTP/1.1",
            ExpectedResponse::Credentials,
        ),
        plain(
            "GET /v1/credentials#dev HTTP/1.1",
            ExpectedResponse::Credentials,
        ),
        plain("GET /v1/credentials?role=dev HTTP/1.1", PATH),
        plain("GET /v1/credentials?? HTTP/1.1", PATH),
        plain("GET /v1/credentials%3f HTTP/1.1", PATH),
        plain("GET http://127.0.0.1/v1/credentials? HTTP/1.1", PROXIED),
        plain("GET /V1/credentials HTTP/1.1", PATH),
        plain(
            "GET /v1/credentials/%64ev HTTP/1.1",
            ExpectedResponse::Credentials,
        ),
        // HTTP/1.0.
        plain(
            "GET /v1/credentials HTTP/1.0",
            ExpectedResponse::Credentials,
        ),
        (
            b"GET /v1/credentials HTTP/1.0\r\nAuthorization: x\r\n\r\n".to_vec(),
            HOST,
        ),
        // Hosts.
        bare("Authorization: x\r\n", HOST),
        bare("Host:\r\nAuthorization: x\r\n", HOST),
        bare(
            "Host: 127.0.0.1\r\nHost: 127.0.0.1\r\nAuthorization: x\r\n",
            HOST,
        ),
        bare("Host: 127.0.0.1, other\r\nAuthorization: x\r\n", HOST),
        (
            b"GET /v1/credentials HTTP/1.1\r\nHost: 127.0.0.1\xff\r\nAuthorization: x\r\n\r\n"
                .to_vec(),
            HOST,
        ),
        // Authorization.
        bare("Host: 127.0.0.1\r\n", UNAUTHORIZED),
        bare("Host: 127.0.0.1\r\nAuthorization:\r\n", UNAUTHORIZED),
        bare("Host: 127.0.0.1\r\nAuthorization:  \t \r\n", UNAUTHORIZED),
        bare(
            "Host: 127.0.0.1\r\nAuthorization: x\r\nAuthorization: x\r\n",
            UNAUTHORIZED,
        ),
        (
            b"GET /v1/credentials HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: \xff\r\n\r\n"
                .to_vec(),
            ExpectedResponse::Credentials,
        ),
        // The standard lets a server ignore these.
        (
            [
                b"GET /v1/credentials HTTP/1.1\r\nX: \xff\x80\r\n",
                HEADERS.as_bytes(),
                b"\r\n",
            ]
            .concat(),
            ExpectedResponse::Credentials,
        ),
        (
            ["\r\n".to_owned(), HIDDEN.to_owned()].concat().into_bytes(),
            ExpectedResponse::Credentials,
        ),
        (
            request_with("Expect: 100-continue\r\n", ""),
            ExpectedResponse::Credentials,
        ),
        (
            request_with("Expect: something\r\n", ""),
            ExpectedResponse::Credentials,
        ),
        (
            request_with(
                "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\nConnection: Upgrade\r\n",
                "",
            ),
            ExpectedResponse::Credentials,
        ),
        (
            request_with("Upgrade: websocket\r\nConnection: Upgrade\r\n", ""),
            ExpectedResponse::Credentials,
        ),
        // Without `100 Continue`: the answer is final.
        (
            request_with("Expect: 100-continue\r\nContent-Length: 5\r\n", ""),
            BODY,
        ),
        (
            request_with("Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n", ""),
            BODY,
        ),
    ]);
}

/// Requests as SDKs send them, in pieces of every size: the daemon reads a head however it is
/// split.
#[test]
fn request_in_pieces_is_answered() {
    let Some(stage) = HttpStage::set() else {
        return;
    };
    for address in stage.addresses() {
        for size in [1, 2, 7, 64] {
            let mut stream = address.connect();
            for piece in HIDDEN.as_bytes().chunks(size) {
                stream.write_all(piece).unwrap();
            }
            let (status, _, _) = one_answer(&rest(&mut *stream));
            assert_eq!(status, "HTTP/1.1 200 OK", "in pieces of {size}");
            // A line feed alone is seen where a piece begins with it, too.
            let mut stream = address.connect();
            for piece in HIDDEN.replace("\r\n", "\n").as_bytes().chunks(size) {
                let _ = stream.write_all(piece);
            }
            assert_eq!(
                one_answer(&rest(&mut *stream)).0,
                "HTTP/1.1 400 Bad Request",
                "in pieces of {size}"
            );
        }
    }
}

/// A head that does not arrive, or not to its end: the daemon closes without a response, and counts
/// it.
#[test]
fn slow_heads_are_closed() {
    let Some(stage) = HttpStage::set() else {
        return;
    };
    let begun = [
        &b""[..],
        b"GET /v1/cre",
        &HIDDEN.as_bytes()[..HIDDEN.len() - 2],
    ];
    let addresses = stage.addresses();
    let mut open: Vec<_> = addresses
        .iter()
        .flat_map(|address| begun.map(|bytes| (address.connect(), bytes)))
        .map(|(mut stream, bytes)| {
            stream.write_all(bytes).unwrap();
            stream
        })
        .collect();
    // A client that sends a byte whenever it has waited a little, which is not progress.
    let mut dripping = stage.addresses()[0].connect();
    dripping.wait_at_most(Duration::from_millis(100));
    let drops = std::thread::spawn(move || {
        dripping.write_all(b"GET /").unwrap();
        loop {
            match dripping.read(&mut [0; 100]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if dripping.write_all(b"a").is_err() {
                        return 0;
                    }
                }
                Err(_) => return 0,
                Ok(length) => return length,
            }
        }
    });
    for stream in &mut open {
        assert!(rest(&mut **stream).is_empty());
    }
    assert_eq!(drops.join().unwrap(), 0);
    let all = u64::try_from(open.len()).unwrap() + 1;
    await_some("all are counted", TIMEOUT, || {
        (stage.dropped("slow_head") == all).then_some(())
    });
}

/// A client that closes before its whole head has arrived is counted, but not as a request.
#[test]
fn closing_clients_are_counted() {
    let Some(stage) = HttpStage::set() else {
        return;
    };
    let (requests, before) = (stage.requests(""), stage.dropped("closed"));
    for address in stage.addresses() {
        drop(address.connect());
        let mut stream = address.connect();
        stream.write_all(b"GET /v1/cre").unwrap();
        stream.end_writing();
        // Half a head and its end: nothing to answer.
        assert!(rest(&mut *stream).is_empty());
    }
    await_some("all are counted", TIMEOUT, || {
        (stage.dropped("closed") == before + 6).then_some(())
    });
    assert_eq!(stage.requests(""), requests);
}
