//! A fake SPIRE agent, and the STS that trusts it. Like SPIRE, it attests a process by what `/proc`
//! shows of it during the call. The test decides at which moment that is.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use awsvid::dev::keys::SigningKey;
use awsvid::dev::oidc::DevOidcIssuer;
use awsvid::svid::proto::spire::api::agent::delegatedidentity::v1::delegated_identity_server::{
    DelegatedIdentity, DelegatedIdentityServer,
};
use awsvid::svid::proto::spire::api::agent::delegatedidentity::v1::{
    FetchJwtsviDsRequest, FetchJwtsviDsResponse,
};
use awsvid::svid::proto::spire::api::types::{Jwtsvid, Spiffeid};
use nix::unistd::Pid;
use serde_json::json;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use super::env::AWSVID;
use super::sts::{AUDIENCE, OneRoleSts};

const TRUST_DOMAIN: &str = "example.org";
/// Bounds steps that take milliseconds.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A registration entry: a process with all of these selectors has this SPIFFE ID.
pub(crate) struct Entry {
    id: String,
    /// The `sub` of the token that the agent returns for this entry.
    sub: String,
    selectors: Vec<String>,
}

impl Entry {
    /// Selectors are `unix:uid:N`, `unix:gid:N` and `unix:path:/P`.
    pub(crate) fn new(id: &str, selectors: &[&str]) -> Self {
        Self::labelled(id, id, selectors)
    }

    /// Makes an entry with the token of another ID, as an agent does that mixes up responses.
    pub(crate) fn labelled(id: &str, sub: &str, selectors: &[&str]) -> Self {
        let selectors = selectors.iter().map(|text| (*text).to_owned()).collect();
        Self {
            id: id.to_owned(),
            sub: sub.to_owned(),
            selectors,
        }
    }
}

/// The agent and the STS, which run until this is dropped.
pub(crate) struct FakeAgent {
    runtime: Runtime,
    state: Arc<AgentState>,
    socket: PathBuf,
    sts: OneRoleSts,
    _issuer: DevOidcIssuer,
}

struct AgentState {
    entries: Vec<Entry>,
    key: SigningKey,
    issuer: String,
    calls: Mutex<Calls>,
}

#[derive(Default)]
struct Calls {
    /// The number of queries about each process.
    count: HashMap<i32, usize>,
    /// The processes for which the next query is held.
    query: HashMap<i32, watch::Sender<QueryProgress>>,
    /// The number of queries that the client cancelled.
    cancelled: usize,
}

/// Counts a query as cancelled if it is dropped before its reply.
struct RunningQuery<'a> {
    calls: &'a Mutex<Calls>,
    is_replied: bool,
}

impl Drop for RunningQuery<'_> {
    fn drop(&mut self) {
        if !self.is_replied {
            self.calls.lock().unwrap().cancelled += 1;
        }
    }
}

/// The progress of a held query, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum QueryProgress {
    Expected,
    Received,
    Reading,
    Read,
    Replied,
}

/// A held query. It goes on when the test lets it, and at the latest when this is dropped.
pub(crate) struct HeldQuery<'a> {
    runtime: &'a Runtime,
    progress: watch::Sender<QueryProgress>,
}

impl FakeAgent {
    /// Serves these entries at a socket in `folder`.
    pub(crate) fn start(folder: &Path, mut entries: Vec<Entry>) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        entries.push(Entry::new(
            AWSVID,
            &[
                "unix:uid:0",
                &format!("unix:path:{}", env!("CARGO_BIN_EXE_awsvid")),
            ],
        ));
        let key = SigningKey::generate().expect("a key");
        let issuer = runtime
            .block_on(DevOidcIssuer::start(key.jwks()))
            .expect("an issuer");
        let sts = OneRoleSts::start(issuer.url());
        let state = Arc::new(AgentState {
            entries,
            key,
            issuer: issuer.url().to_owned(),
            calls: Mutex::default(),
        });
        let socket = folder.join("agent.sock");
        let listener = runtime
            .block_on(async { UnixListener::bind(&socket) })
            .expect("a socket");
        let service = DelegatedIdentityServer::from_arc(state.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        runtime.spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        Self {
            runtime,
            state,
            socket,
            sts,
            _issuer: issuer,
        }
    }

    /// Returns all tables that a daemon needs, except `[listen]`, `[audit]` and `[log]`.
    pub(crate) fn configuration(&self) -> String {
        let identity = format!(
            "admin_socket = \"unix://{}\"\naudience = \"{AUDIENCE}\"",
            self.socket.display()
        );
        format!(
            "[identity]\nsource = \"spire-delegated\"\n{identity}\n{}",
            self.sts.configuration()
        )
    }

    /// Holds the next query about this process.
    pub(crate) fn hold(&self, pid: i32) -> HeldQuery<'_> {
        let progress = watch::Sender::new(QueryProgress::Expected);
        self.state
            .calls
            .lock()
            .unwrap()
            .query
            .insert(pid, progress.clone());
        HeldQuery {
            runtime: &self.runtime,
            progress,
        }
    }

    /// Returns the number of queries about processes other than this one.
    pub(crate) fn queries_except(&self, but: Pid) -> usize {
        let calls = self.state.calls.lock().unwrap();
        calls
            .count
            .iter()
            .filter(|(pid, _)| **pid != but.as_raw())
            .map(|(_, count)| count)
            .sum()
    }

    /// Returns the number of queries that the client cancelled.
    pub(crate) fn cancelled(&self) -> usize {
        self.state.calls.lock().unwrap().cancelled
    }
}

impl HeldQuery<'_> {
    /// Waits until the query has arrived, before the agent reads anything of the process. Returns
    /// `false` if none arrives.
    pub(crate) fn await_query(&self) -> bool {
        self.reached(QueryProgress::Received)
    }

    /// Lets the agent read the process, and waits until it has. It has not replied yet.
    pub(crate) fn let_read(&self) {
        self.advance(QueryProgress::Reading);
        assert!(
            self.reached(QueryProgress::Read),
            "the agent reads within {TIMEOUT:?}"
        );
    }

    /// Lets the agent reply with what it has read.
    pub(crate) fn let_reply(&self) {
        self.advance(QueryProgress::Replied);
    }

    fn advance(&self, to: QueryProgress) {
        advance(&self.progress, to);
    }

    fn reached(&self, expected: QueryProgress) -> bool {
        let mut progress = self.progress.subscribe();
        let reached = async {
            tokio::time::timeout(TIMEOUT, progress.wait_for(|progress| *progress >= expected))
                .await
                .is_ok()
        };
        self.runtime.block_on(reached)
    }
}

impl Drop for HeldQuery<'_> {
    fn drop(&mut self) {
        self.advance(QueryProgress::Replied);
    }
}

fn advance(progress: &watch::Sender<QueryProgress>, to: QueryProgress) {
    progress.send_if_modified(|progress| {
        let is_later = *progress < to;
        *progress = (*progress).max(to);
        is_later
    });
}

#[tonic::async_trait]
impl DelegatedIdentity for AgentState {
    async fn fetch_jwtsvi_ds(
        &self,
        request: Request<FetchJwtsviDsRequest>,
    ) -> Result<Response<FetchJwtsviDsResponse>, Status> {
        let FetchJwtsviDsRequest { audience, pid, .. } = request.into_inner();
        let query = {
            let mut calls = self.calls.lock().unwrap();
            *calls.count.entry(pid).or_default() += 1;
            calls.query.remove(&pid)
        };
        let mut running = RunningQuery {
            calls: &self.calls,
            is_replied: false,
        };
        // The query is released at the latest when its `HeldQuery` is dropped.
        let reached = async |to: QueryProgress, expected: QueryProgress| {
            if let Some(progress) = &query {
                advance(progress, to);
                progress
                    .subscribe()
                    .wait_for(|progress| *progress >= expected)
                    .await
                    .expect("this has a sender");
            }
        };
        reached(QueryProgress::Received, QueryProgress::Reading).await;
        let attested = selectors(pid);
        reached(QueryProgress::Read, QueryProgress::Replied).await;
        running.is_replied = true;
        let attested = attested.map_err(|_| Status::unavailable("workload attestation failed"))?;
        let has_all = |entry: &&Entry| {
            entry
                .selectors
                .iter()
                .all(|selector| attested.contains(selector))
        };
        let svids: Vec<_> = self
            .entries
            .iter()
            .filter(has_all)
            .map(|entry| self.svid(entry, &audience))
            .collect();
        if svids.is_empty() {
            return Err(Status::permission_denied("no identity issued"));
        }
        Ok(Response::new(FetchJwtsviDsResponse { svids }))
    }
}

impl AgentState {
    fn svid(&self, entry: &Entry, audience: &[String]) -> Jwtsvid {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let claims = json!({ "iss": self.issuer, "sub": entry.sub, "aud": audience, "iat": now, "exp": now + 300 });
        let path = entry
            .id
            .strip_prefix("spiffe://")
            .and_then(|rest| rest.strip_prefix(TRUST_DOMAIN))
            .expect("an own ID");
        Jwtsvid {
            token: self.key.sign(&claims).expect("a signature"),
            id: Some(Spiffeid {
                trust_domain: TRUST_DOMAIN.to_owned(),
                path: path.to_owned(),
            }),
            ..Jwtsvid::default()
        }
    }
}

/// Returns the selectors that SPIRE's attestor `unix` finds with `discover_workload_path`: the
/// effective ids and the executable's path.
fn selectors(pid: i32) -> io::Result<Vec<String>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let effective = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_ascii_whitespace().nth(1))
            .ok_or(io::ErrorKind::InvalidData)
    };
    let path = fs::read_link(format!("/proc/{pid}/exe"))?;
    Ok(vec![
        format!("unix:uid:{}", effective("Uid:")?),
        format!("unix:gid:{}", effective("Gid:")?),
        format!("unix:path:{}", path.display()),
    ])
}
