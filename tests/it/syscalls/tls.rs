//! The system calls with the real SPIRE over its Broker API, and with an STS behind TLS: by a name,
//! through a proxy, and at a host that only DNS could find.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::{ALICE, LISTENERS, TIMEOUT, TracedDaemon};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::spire::Spire;
use crate::harness::daemon::PROGRAM;
use crate::harness::env::{AWSVID, Source, awsvid_selectors, id};
use crate::harness::forward::Network;
use crate::harness::sts::{AUDIENCE, OneRoleSts};
use crate::harness::tls::{PROXIED_NAME, TlsFront};

/// A host that does not exist. The daemon is to query DNS for it.
const NOWHERE: &str = "sts.nowhere.invalid";

/// A proxy that connects each client to one address, whatever the client requests.
struct ConnectProxy {
    address: SocketAddr,
    tunnels: Arc<AtomicUsize>,
}

impl ConnectProxy {
    /// Runs until the test process ends.
    fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let tunnels = Arc::new(AtomicUsize::new(0));
        let count = tunnels.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // A client that closes its connection gets nothing.
                if tunnel(client, target).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { address, tunnels }
    }
}

fn tunnel(client: TcpStream, target: SocketAddr) -> io::Result<()> {
    let mut head = BufReader::new(client.try_clone()?);
    let mut line = String::new();
    while head.read_line(&mut line)? > 2 {
        line.clear();
    }
    (&client).write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
    let server = TcpStream::connect(target)?;
    for (from, to) in [(&client, &server), (&server, &client)] {
        let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
        thread::spawn(move || io::copy(&mut from, &mut to));
    }
    Ok(())
}

/// Returns the calls of a daemon with the source `spiffe-broker`. `None` without a real SPIRE.
pub(super) fn by_broker() -> Option<BTreeSet<String>> {
    let folder = folder();
    let spire = Spire::start_with(folder.path(), Source::Broker.of_spire())?;
    let [user, path] = awsvid_selectors(PROGRAM.as_ref());
    spire.register(AWSVID, &[&user, &path]);
    spire.register(&id("alice"), &[&format!("unix:uid:{ALICE}")]);
    let sts = OneRoleSts::start(&spire.issuer_url());
    let behind = sts.url().strip_prefix("http://").unwrap().parse().unwrap();
    let front = TlsFront::start(Network::Own, (Ipv4Addr::LOCALHOST, 0).into(), behind);
    let file = folder.path().join("ca.pem");
    fs::write(&file, front.certificate()).unwrap();
    let proxy = ConnectProxy::start(front.address());
    let configuration = |host: &str| {
        let roles = sts.configuration();
        let roles = roles.replace(
            &format!("{:?}", sts.url()),
            &format!(
                "\"https://{host}:{}\"\nca_file = {file:?}",
                front.address().port()
            ),
        );
        format!(
            "[identity]\nsource = \"spiffe-broker\"\nworkload_api_socket = \"unix://{}\"\n\
             broker_socket = \"unix://{}\"\naudience = \"{AUDIENCE}\"\n{roles}",
            spire.agent_socket().display(),
            spire.broker_socket().display(),
        )
    };
    let variables = [
        &format!("HTTPS_PROXY=http://{}", proxy.address),
        &format!("NO_PROXY={NOWHERE}"),
    ];
    let words = ["env", variables[0], variables[1]];
    let traced = TracedDaemon::start(&words, folder.path(), "", &configuration("localhost"));
    let cgroup = Cgroup::new("syscalls-broker.service");
    let await_answer = |words: &str| {
        for listener in LISTENERS {
            await_some(&format!("{words} over {listener}"), TIMEOUT, || {
                let answer = traced.daemon.curl(listener, (ALICE, 7), &cgroup);
                answer.contains(words).then_some(())
            });
        }
    };
    await_answer("AccessKeyId");
    assert_eq!(proxy.tunnels.load(Ordering::Relaxed), 0, "localhost");
    // Its entries are those of another STS, so that the daemon calls the new one.
    assert!(traced.daemon.reload("", &configuration(PROXIED_NAME)));
    await_answer("AccessKeyId");
    assert_ne!(proxy.tunnels.load(Ordering::Relaxed), 0, "{PROXIED_NAME}");
    assert!(traced.daemon.reload("", &configuration(NOWHERE)));
    await_answer("sts_unreachable");
    Some(traced.end())
}
