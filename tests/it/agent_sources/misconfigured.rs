//! Each mismatch between awsvid and the agent gives one log line that names the fix, and rejects
//! callers. It never ends awsvid, since the agent's configuration may change at any moment.

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use api::delegated_identity_server::{DelegatedIdentity, DelegatedIdentityServer};
use awsvid::svid::proto::spire::api::agent::delegatedidentity::v1 as api;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use crate::harness::client::fetch;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::spire::{Spire, SpireSetting};
use crate::harness::counterparts::{folder, http_get, root};
use crate::harness::daemon::{Daemon, PROGRAM};
use crate::harness::env::{AWSVID, Source, awsvid_selectors};

/// Neither root nor in any group of the agent's.
const USER: u32 = 51_001;
/// Starts a program in a pid namespace of its own, with the `/proc` of that.
const OWN_PIDS: [&str; 5] = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];

/// Returns a configuration with `socket` as the admin socket. STS is unavailable: a request that
/// waits for it has passed the source.
fn by_delegated_identity(socket: &Path) -> String {
    format!(
        "[identity]\nsource = \"spire-delegated\"\nadmin_socket = \"unix://{}\"\naudience = \"shop\"\n[sts]\nendpoint = \"http://127.0.0.1:1\"\n\
         [[role]]\nname = \"shop\"\nspiffe_id = \"spiffe://example.org/**\"\nrole_arn = \"arn:minio:iam:::role/shop\"\n",
        socket.display()
    )
}

/// Starts an agent that trusts awsvid with other processes' identities, and does not know it yet.
fn spire(folder: &Path) -> Option<Spire> {
    if !root() {
        return None;
    }
    Spire::start_with(folder, Source::Delegated.of_spire())
}

fn register(spire: &Spire) {
    spire.register(
        AWSVID,
        &awsvid_selectors(Path::new(PROGRAM))
            .each_ref()
            .map(String::as_str),
    );
}

/// Returns the daemon's single line about the source that prevents readiness.
fn complaint(daemon: &Daemon, words: &[&str]) -> String {
    let line = daemon.await_line(&[&["not ready", "the identity source: "], words].concat());
    assert_eq!(http_get(daemon.admin(), "/readyz").unwrap().0, 503);
    line
}

/// Asserts that callers are rejected, and that the agent gets no query about any.
fn assert_rejected(daemon: &Daemon) {
    let (status, body) = fetch(UnixStream::connect(daemon.unix()).unwrap());
    assert_eq!(
        (status, body["code"].as_str()),
        (403, Some("source_misconfigured")),
        "{body}"
    );
}

/// Asserts that the fault is over: the source responds, and the daemon has logged its line only
/// once.
fn assert_recovered(daemon: &Daemon, line: &str) {
    daemon.await_line(&["not ready", "STS: "]);
    assert_eq!(daemon.line_count(line), 1, "{line}");
}

#[test]
fn missing_socket_is_logged_with_fix() {
    let folder = folder();
    let Some(mut spire) = spire(folder.path()) else {
        return;
    };
    register(&spire);
    spire.stop_agent();
    // An agent that has never run.
    fs::remove_file(spire.admin_socket()).unwrap();
    let daemon = Daemon::start(
        folder.path(),
        "",
        &by_delegated_identity(&spire.admin_socket()),
    );
    let line = complaint(
        &daemon,
        &[
            "no socket at unix://",
            "start the SPIFFE agent",
            "`admin_socket_path`",
        ],
    );
    spire.start_agent();
    assert_recovered(&daemon, &line);
}

#[test]
fn inaccessible_socket_is_logged_with_fix() {
    let folder = folder();
    let Some(spire) = spire(folder.path()) else {
        return;
    };
    let own = folder.path().join("own");
    fs::create_dir(&own).unwrap();
    chown(&own, Some(USER), Some(USER)).unwrap();
    let user = USER.to_string();
    let as_user = [
        "setpriv",
        "--reuid",
        &user,
        "--regid",
        &user,
        "--clear-groups",
        "--inh-caps=-all",
    ];
    let daemon = Daemon::start_behind(
        &as_user,
        &own,
        "",
        &by_delegated_identity(&spire.admin_socket()),
    );
    complaint(
        &daemon,
        &[
            "awsvid may not open unix://",
            "give uid 51001 write access",
            "mode 0770",
            "agent's group",
        ],
    );
}

#[test]
fn missing_entry_of_awsvid_is_logged_with_fix() {
    let folder = folder();
    let Some(spire) = spire(folder.path()) else {
        return;
    };
    let daemon = Daemon::start(
        folder.path(),
        "",
        &by_delegated_identity(&spire.admin_socket()),
    );
    let line = complaint(
        &daemon,
        &[
            "no identity for awsvid itself",
            "register one",
            "by its user and executable",
        ],
    );
    register(&spire);
    assert_recovered(&daemon, &line);
}

#[test]
fn missing_delegation_is_logged_with_fix() {
    if !root() {
        return;
    }
    let folder = folder();
    let Some(mut spire) = Spire::start(folder.path()) else {
        return;
    };
    register(&spire);
    let daemon = Daemon::start(
        folder.path(),
        "",
        &by_delegated_identity(&spire.admin_socket()),
    );
    let line = complaint(
        &daemon,
        &[
            "does not accept awsvid as a delegate",
            "`authorized_delegates`",
        ],
    );
    spire.stop_agent();
    spire.setting = Source::Delegated.of_spire();
    spire.start_agent();
    assert_recovered(&daemon, &line);
}

#[test]
fn wrong_socket_is_logged_with_fix() {
    let folder = folder();
    let Some(spire) = spire(folder.path()) else {
        return;
    };
    register(&spire);
    // A link, which later leads to the right socket.
    let socket = folder.path().join("admin.sock");
    symlink(spire.agent_socket(), &socket).unwrap();
    let daemon = Daemon::start(folder.path(), "", &by_delegated_identity(&socket));
    let words = "is not the admin socket of a SPIRE agent: set `admin_socket`";
    assert!(
        daemon.log().contains("callers are rejected") && daemon.log().contains(words),
        "{}",
        daemon.log()
    );
    let line = complaint(&daemon, &[words]);
    assert_rejected(&daemon);
    // The daemon rejects a change of the configuration meanwhile.
    symlink(spire.agent_socket(), folder.path().join("other.sock")).unwrap();
    assert!(!daemon.reload_text(&daemon.text().replace("admin.sock", "other.sock")));
    fs::remove_file(&socket).unwrap();
    symlink(spire.admin_socket(), &socket).unwrap();
    assert_recovered(&daemon, &line);
}

#[test]
fn foreign_pid_namespace_of_awsvid_is_logged_with_fix() {
    let folder = folder();
    let Some(spire) = spire(folder.path()) else {
        return;
    };
    register(&spire);
    let daemon = Daemon::start_behind(
        &OWN_PIDS,
        folder.path(),
        "",
        &by_delegated_identity(&spire.admin_socket()),
    );
    // It cannot attest even itself over TCP, so its readiness probe does not reach the source.
    let log = daemon.log();
    assert!(
        log.contains("in another pid namespace than awsvid") && log.contains("hostPID: true"),
        "{log}"
    );
    assert!(log.contains("callers are rejected"), "{log}");
    assert_eq!(http_get(daemon.admin(), "/readyz").unwrap().0, 503);
}

#[test]
fn foreign_pid_namespace_of_agent_is_logged_with_fix() {
    if !root() {
        return;
    }
    let folder = folder();
    let setting = SpireSetting {
        agent_behind: OWN_PIDS.map(str::to_owned).to_vec(),
        ..Source::Delegated.of_spire()
    };
    let Some(mut spire) = Spire::start_with(folder.path(), setting) else {
        return;
    };
    let daemon = Daemon::start(
        folder.path(),
        "",
        &by_delegated_identity(&spire.admin_socket()),
    );
    complaint(
        &daemon,
        &["in another pid namespace than awsvid", "hostPID: true"],
    );
    assert_rejected(&daemon);
    drop(daemon);

    // An agent that starts later in there is detected as well, and gets no query about a process.
    spire.stop_agent();
    let timeout = Duration::from_secs(30);
    // The killed process is the one that created the namespace, which ends the agent in there.
    await_some("the agent has ended", timeout, || {
        UnixStream::connect(spire.admin_socket()).err()
    });
    let own = folder.path().join("own");
    fs::create_dir(&own).unwrap();
    let daemon = Daemon::start(&own, "", &by_delegated_identity(&spire.admin_socket()));
    spire.start_agent();
    complaint(
        &daemon,
        &["in another pid namespace than awsvid", "hostPID: true"],
    );
    assert!(
        !spire.agent_log().contains("PID attested"),
        "the agent was queried about a process"
    );
}

/// An agent for which a process id has no meaning.
struct OldAgent {
    answer: ResponseFn,
}

type ResponseFn = fn() -> Status;

#[tonic::async_trait]
impl DelegatedIdentity for OldAgent {
    async fn fetch_jwtsvi_ds(
        &self,
        request: Request<api::FetchJwtsviDsRequest>,
    ) -> Result<Response<api::FetchJwtsviDsResponse>, Status> {
        if request.into_inner().audience.is_empty() {
            return Err(Status::invalid_argument("audience must be specified"));
        }
        Err((self.answer)())
    }
}

/// Runs that agent at this path, until the value is dropped.
fn old_agent(path: &Path, answer: ResponseFn) -> Runtime {
    let runtime = Runtime::new().unwrap();
    let listener = runtime.block_on(async { UnixListener::bind(path).unwrap() });
    runtime.spawn(
        tonic::transport::Server::builder()
            .add_service(DelegatedIdentityServer::new(OldAgent { answer }))
            .serve_with_incoming(UnixListenerStream::new(listener)),
    );
    runtime
}

#[test]
fn old_agent_is_logged_with_fix() {
    // One that reports a missing field of the request, and 1.10.1, which searches for entries
    // without selectors and finds none.
    let answers: [(ResponseFn, &str); 2] = [
        (
            || Status::invalid_argument("must provide selectors"),
            "upgrade SPIRE to 1.10.2 or newer",
        ),
        (
            || Status::permission_denied("no identity issued"),
            "or the agent is older than 1.10.2",
        ),
    ];
    for (answer, words) in answers {
        let folder = folder();
        let socket = folder.path().join("admin.sock");
        let _agent = old_agent(&socket, answer);
        let daemon = Daemon::start(folder.path(), "", &by_delegated_identity(&socket));
        complaint(&daemon, &[words]);
    }
}
