//! A chain of three roles at the verifying STS of `awsvid dev`, behind a proxy that counts the
//! calls of each hop and can fail them.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use awsvid::clock::Clock;
use awsvid::dev::authority::DevAuthority;
use awsvid::dev::keys::SigningKey;
use awsvid::dev::oidc::DevOidcIssuer;
use awsvid::dev::sts::{ChainedTrust, DevAccount, DevProvider, DevSts, TrustedRole};
use awsvid::dev::workload_api::{DevWorkloadApi, Registrations};
use awsvid::identity::{RoleArn, SpiffeId, SpiffeIdPattern};
use tokio::runtime::Runtime;

use super::sts::AUDIENCE;

/// The roles of the chain, in their order.
pub(crate) const HOPS: [&str; 3] = [
    "arn:aws:iam::111111111111:role/hop",
    "arn:aws:iam::222222222222:role/middle",
    "arn:aws:iam::333333333333:role/last",
];
/// The chain in the configuration, with a tag and a source identity of the SPIFFE ID.
pub(crate) const CHAIN: &str = "\
[[role.chain]]
role_arn = \"arn:aws:iam::222222222222:role/middle\"
external_id = \"shared-id\"
source_identity = \"{path[1]}={path[3]}\"
tags = { \"kubernetes-namespace\" = \"{path[1]}\", \"spiffe-id\" = \"{spiffe_id}\" }
transitive_tags = [\"spiffe-id\"]
[[role.chain]]
role_arn = \"arn:aws:iam::333333333333:role/last\"
";

/// The way in which the proxy fails the calls for a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HopFault {
    /// The connection ends without a response.
    Closed,
    Throttled,
    /// A trust policy that rejects the caller.
    Denied,
}

/// A gate that is closed at first.
#[derive(Default)]
pub(crate) struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    pub(crate) fn open(&self) {
        *self.is_open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn wait(&self) {
        let closed = self.is_open.lock().unwrap();
        drop(self.opened.wait_while(closed, |is_open| !*is_open).unwrap());
    }
}

#[derive(Default)]
struct ProxyCalls {
    counts: HashMap<String, usize>,
    faults: HashMap<String, HopFault>,
    /// Holds the calls for the first role.
    gate: Option<Arc<Gate>>,
    /// Lifetime of all sessions, instead of the requested one.
    lifetime: Option<Duration>,
}

/// The servers, which run until this is dropped.
pub(crate) struct ChainUpstream {
    workload_api: DevWorkloadApi,
    calls: Arc<Mutex<ProxyCalls>>,
    listener: TcpListener,
    _issuer: DevOidcIssuer,
    _sts: DevSts,
    _runtime: Runtime,
}

impl ChainUpstream {
    /// Serves these SPIFFE IDs, with the socket of the Workload API below `folder`.
    pub(crate) fn start(folder: &Path, ids: &[&str]) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let _guard = runtime.enter();
        let key = Arc::new(SigningKey::generate().expect("a key"));
        let issuer = runtime
            .block_on(DevOidcIssuer::start(key.jwks()))
            .expect("an issuer");
        let sts = runtime
            .block_on(DevSts::start(account(issuer.url()), Clock::system()))
            .expect("an STS");
        let authority = DevAuthority::generate("example.org", Clock::system().now());
        let authority = authority.expect("a certificate authority");
        let registrations = Registrations {
            trust_domain: "example.org".to_owned(),
            spiffe_ids: ids
                .iter()
                .map(|id| SpiffeId::parse(id).expect("an ID"))
                .collect(),
            issuer: issuer.url().to_owned(),
            key,
            authority: Arc::new(authority),
            clock: Clock::system(),
        };
        let workload_api = DevWorkloadApi::start(&folder.join("workload-api"), registrations)
            .expect("a Workload API");
        let target = sts.url().trim_start_matches("http://").parse();
        let (listener, calls) = proxy(target.expect("an address"));
        Self {
            workload_api,
            calls,
            listener,
            _issuer: issuer,
            _sts: sts,
            _runtime: runtime,
        }
    }

    /// Returns `[identity]`, `[sts]` and a role with this chain.
    pub(crate) fn configuration(&self, chain: &str) -> String {
        let address = self.listener.local_addr().expect("its own address");
        format!(
            "[identity]\nworkload_api_socket = {:?}\naudience = \"{AUDIENCE}\"\n\
             [sts]\nregion = \"us-east-1\"\nendpoint = \"http://{address}\"\n\
             [[role]]\nname = \"chained\"\nspiffe_id = \"spiffe://example.org/ns/*/sa/*\"\nrole_arn = \"{}\"\n{chain}",
            self.workload_api.address(),
            HOPS[0],
        )
    }

    /// Fails the calls for a role, or stops doing so.
    pub(crate) fn fail(&self, role_arn: &str, fault: Option<HopFault>) {
        let faults = &mut self.calls.lock().unwrap().faults;
        match fault {
            Some(fault) => drop(faults.insert(role_arn.to_owned(), fault)),
            None => drop(faults.remove(role_arn)),
        }
    }

    /// Forgets the calls for a role so far.
    pub(crate) fn restart_count(&self, role_arn: &str) {
        self.calls.lock().unwrap().counts.remove(role_arn);
    }

    /// Holds the calls for the first role until this gate is open.
    pub(crate) fn hold_first(&self, gate: &Arc<Gate>) {
        self.calls.lock().unwrap().gate = Some(gate.clone());
    }

    /// Ends all sessions that start from now on after this time.
    pub(crate) fn shorten_sessions(&self, lifetime: Duration) {
        self.calls.lock().unwrap().lifetime = Some(lifetime);
    }

    /// Returns the number of calls for each role of the chain.
    pub(crate) fn counts(&self) -> [usize; 3] {
        let calls = self.calls.lock().unwrap();
        HOPS.map(|role_arn| calls.counts.get(role_arn).copied().unwrap_or_default())
    }
}

impl Drop for ChainUpstream {
    fn drop(&mut self) {
        // Ends accept(2) in the proxy's thread.
        let _ = nix::sys::socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&self.listener),
            nix::sys::socket::Shutdown::Both,
        );
    }
}

fn account(issuer: &str) -> DevAccount {
    let arn = |arn: &str| RoleArn::parse(arn).expect("an ARN");
    let trust = |role: usize, external_id: Option<&str>| ChainedTrust {
        arn: arn(HOPS[role]),
        principal: arn(HOPS[role - 1]),
        external_id: external_id.map(str::to_owned),
        tag_session: true,
        set_source_identity: true,
    };
    DevAccount {
        region: "us-east-1".to_owned(),
        providers: vec![DevProvider {
            issuer: issuer.to_owned(),
            client_ids: vec![AUDIENCE.to_owned()],
        }],
        roles: vec![TrustedRole {
            arn: arn(HOPS[0]),
            issuer: issuer.to_owned(),
            audience: AUDIENCE.to_owned(),
            subjects: vec![SpiffeIdPattern::parse("spiffe://example.org/ns/*/sa/*").unwrap()],
            max_duration: Duration::from_secs(12 * 3600),
        }],
        trust_anchors: Vec::new(),
        chained: vec![trust(1, Some("shared-id")), trust(2, None)],
    }
}

/// Starts the proxy in front of `target`.
fn proxy(target: SocketAddr) -> (TcpListener, Arc<Mutex<ProxyCalls>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let calls: Arc<Mutex<ProxyCalls>> = Arc::default();
    let (accepting, shared) = (listener.try_clone().unwrap(), calls.clone());
    thread::spawn(move || {
        for client in accepting.incoming().map_while(Result::ok) {
            let shared = shared.clone();
            thread::spawn(move || pass(client, target, &shared));
        }
    });
    (listener, calls)
}

/// Answers one request: by a fault of its role, or by the server.
fn pass(mut client: TcpStream, target: SocketAddr, calls: &Mutex<ProxyCalls>) -> io::Result<()> {
    let request = read_request(&mut client)?;
    let text = String::from_utf8_lossy(&request);
    let (_, body) = text.split_once("\r\n\r\n").unwrap_or_default();
    let encoded = |role_arn: &str| role_arn.replace(':', "%3A").replace('/', "%2F");
    let role_arn = HOPS
        .into_iter()
        .find(|role_arn| body.contains(&format!("RoleArn={}", encoded(role_arn))));
    let fault = role_arn.and_then(|role_arn| {
        let mut calls = calls.lock().unwrap();
        *calls.counts.entry(role_arn.to_owned()).or_default() += 1;
        calls.faults.get(role_arn).copied()
    });
    if role_arn == Some(HOPS[0]) {
        let gate = calls.lock().unwrap().gate.clone();
        gate.iter().for_each(|gate| gate.wait());
    }
    match fault {
        Some(HopFault::Closed) => client.shutdown(Shutdown::Both),
        Some(HopFault::Throttled) => reject(client, 400, "Throttling", "Rate exceeded"),
        Some(HopFault::Denied) => {
            let text = "is not authorized to perform: sts:AssumeRole";
            reject(client, 403, "AccessDenied", text)
        }
        None => {
            let lifetime = calls.lock().unwrap().lifetime;
            let mut server = TcpStream::connect(target)?;
            server.write_all(&request)?;
            let mut response = String::new();
            server.read_to_string(&mut response)?;
            client.write_all(with_lifetime(response, lifetime).as_bytes())?;
            client.shutdown(Shutdown::Both)
        }
    }
}

/// Replaces the time at which a session ends. The text keeps its length.
fn with_lifetime(response: String, lifetime: Option<Duration>) -> String {
    let (Some(lifetime), Some((before, rest))) = (lifetime, response.split_once("<Expiration>"))
    else {
        return response;
    };
    let (time, after) = rest.split_once('<').expect("the end of the element");
    let end = humantime::format_rfc3339_seconds(SystemTime::now() + lifetime).to_string();
    assert_eq!(time.len(), end.len(), "{time}");
    format!("{before}<Expiration>{end}<{after}")
}

/// Reads a request with its body, whose length the head has.
fn read_request(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = client.read(&mut buffer)?;
        request.extend_from_slice(&buffer[..count]);
        let text = String::from_utf8_lossy(&request).to_ascii_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return Ok(request);
            }
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn reject(mut client: TcpStream, status: u16, code: &str, message: &str) -> io::Result<()> {
    let body = format!(
        "<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>"
    );
    write!(
        client,
        "HTTP/1.1 {status} Rejected\r\nContent-Type: text/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
