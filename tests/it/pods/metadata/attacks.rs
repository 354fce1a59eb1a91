//! Attacks on the metadata address: by other hosts (T39), with tokens of other pods (T40), by
//! deputies and pages in browsers (T42, T43), and by a pod that may change its own network (T44).

use super::*;

const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// Sends a request over a connection from inside, and returns its status and its body.
fn send(mut stream: TcpStream, host: &str, line: &str, header: &str) -> (u16, String) {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let request = format!("{line} HTTP/1.1\r\nHost: {host}\r\n{header}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    (head[9..12].parse().unwrap(), body.to_owned())
}

/// Runs `curl` in a pod, and returns the status and the body.
fn curl(node: &NetnsNode, name: &str, cgroup: &Cgroup, words: &[&str]) -> (u16, String) {
    let with_status = [
        "curl",
        "--silent",
        "--max-time",
        "20",
        "-w",
        "\n%{http_code}",
    ];
    let output = run_in_pod(node, name, cgroup, &[&with_status, words].concat()).success("curl");
    let (body, status) = output.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

fn token(node: &NetnsNode, name: &str, cgroup: &Cgroup) -> String {
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 300";
    let url = "http://169.254.169.254/latest/api/token";
    let (status, token) = curl(node, name, cgroup, &["-X", "PUT", "-H", ttl, url]);
    assert_eq!((status, token.len()), (200, 56), "{token}");
    token
}

/// Returns what another host gets for a token, and with the token, at the address that it routes to
/// the pod.
fn fetch_from(
    node: &NetnsNode,
    neighbour: &str,
    address: &str,
) -> Result<[(u16, String); 2], ErrorKind> {
    let to: SocketAddr = address.parse().unwrap();
    let connect = || {
        let connected = node.inside(neighbour, || {
            TcpStream::connect_timeout(&to, Duration::from_secs(5))
        });
        connected.map_err(|error| error.kind())
    };
    let host = address.trim_end_matches(":80");
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 300";
    let issued = send(connect()?, host, "PUT /latest/api/token", ttl);
    let token = format!("X-aws-ec2-metadata-token: {}", issued.1);
    let listed = send(connect()?, host, &format!("GET {ROLES}"), &token);
    Ok([issued, listed])
}

#[test]
fn other_host_that_routes_to_the_pod_reaches_nothing() {
    let Some(stage) = start(|node| {
        node.add("neighbour");
        let neighbour = node.path("neighbour");
        node.add_with("pod", |_| {
            let peer = ["peer", "name", "eth0", "netns", neighbour.to_str().unwrap()];
            ip(&[&["link", "add", "eth0", "type", "veth"][..], &peer].concat());
            connect_device(1);
            opt_in();
        });
        node.inside("neighbour", || {
            connect_device(2);
            ip(&["route", "add", "169.254.169.254/32", "via", "10.9.0.1"]);
            ip(&[
                "-6",
                "route",
                "add",
                "fd00:ec2::254/128",
                "via",
                "2001:db8::1",
            ]);
        });
    }) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    await_served(daemon, 1);
    // The neighbour reaches the pod, so that a rejection is that of the listener.
    let echo = node.inside("pod", || TcpListener::bind("10.9.0.1:81").unwrap());
    assert!(
        node.connect("neighbour", "10.9.0.1:81".parse().unwrap())
            .is_ok()
    );
    drop(echo);
    let cgroup = Cgroup::of_pod(70);
    for address in [METADATA_V4, METADATA_V6] {
        let answer = fetch_from(node, "neighbour", address);
        assert_eq!(answer, Err(ErrorKind::ConnectionRefused), "{address}");
        assert!(
            script_gets_credentials(node, "pod", &cgroup, address),
            "{address}"
        );
    }
}

/// From the pod's own address, as no SDK sends it. The PUT gets a token all the same, because SDKs
/// take another status for version 1, and a token is not an identity.
#[test]
fn rejected_caller_gets_a_token_and_no_role() {
    let Some(stage) = start(|node| add_pod(node, "a", opt_in)) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    let cgroup = Cgroup::of_pod(78);
    let from_outside = |words: &[&str]| {
        let from = ["--interface", "10.9.0.1"];
        curl(node, "a", &cgroup, &[&from, words].concat())
    };
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 300";
    let put = "http://169.254.169.254/latest/api/token";
    let (status, token) = from_outside(&["-X", "PUT", "-H", ttl, put]);
    assert_eq!((status, token.len()), (200, 56), "{token}");
    let issued = daemon.audit_after(0);
    assert_eq!(issued.len(), 1, "{issued:#?}");
    assert_eq!(
        (&issued[0]["outcome"], &issued[0]["reason"]),
        (&"answered".into(), &"token".into())
    );
    assert_eq!(issued[0].get("pod_uid"), None, "{issued:#?}");
    let header = format!("X-aws-ec2-metadata-token: {token}");
    let list = format!("http://169.254.169.254{ROLES}");
    for url in [list.clone(), format!("{list}dev")] {
        let (status, body) = from_outside(&["-H", &header, &url]);
        assert_eq!(status, 404, "{body}");
        assert!(body.starts_with("awsvid: "), "{body}");
    }
    let rejected = daemon.audit_where(|_, line| line.contains("\"not_loopback\""));
    assert_eq!(rejected.len(), 2, "{rejected:#?}");
    // The token is one like any other.
    let (status, role) = curl(node, "a", &cgroup, &["-H", &header, &list]);
    assert_eq!(status, 200, "{role}");
}

#[test]
fn token_of_another_pod_is_rejected() {
    let Some(stage) = start(|node| {
        add_pod(node, "a", opt_in);
        add_pod(node, "b", opt_in);
    }) else {
        return;
    };
    let node = &stage.site.node;
    let (own, other) = (Cgroup::of_pod(71), Cgroup::of_pod(72));
    let token = token(node, "a", &own);
    let header = format!("X-aws-ec2-metadata-token: {token}");
    let get = |name, cgroup, host: &str| {
        let url = format!("http://{host}{ROLES}");
        curl(node, name, cgroup, &["-H", &header, &url])
    };
    assert_eq!(get("a", &own, "169.254.169.254").0, 200);
    assert_eq!(get("b", &other, "169.254.169.254").0, 401);
    // The token belongs to the namespace, and not to one of its addresses.
    assert_eq!(get("a", &own, "127.0.0.1:974").0, 200);
    assert_eq!(get("b", &other, "127.0.0.1:974").0, 401);
}

/// The last one can send what an SDK sends. It gets the credentials of its own workload.
#[test]
fn deputy_gets_what_its_own_workload_gets() {
    let Some(stage) = start(|node| add_pod(node, "a", opt_in)) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    let cgroup = Cgroup::of_pod(77);
    let valid = token(node, "a", &cgroup);
    let token = format!("X-aws-ec2-metadata-token: {valid}");
    let list = format!("http://169.254.169.254{ROLES}");
    let credentials = format!("{list}dev");
    let rebound_list = format!("http://rebound.example{ROLES}");
    const PUT: &str = "http://169.254.169.254/latest/api/token";
    const REBOUND: &str = "http://rebound.example/latest/api/token";
    const NAME: &str = "rebound.example:80:169.254.169.254";
    const TTL: &str = "X-aws-ec2-metadata-token-ttl-seconds: 300";
    let cases: [(&str, &[&str], u16); 11] = [
        ("imds_token", &[&list], 401),
        ("imds_ttl", &["-X", "PUT", PUT], 400),
        (
            "host",
            &["--resolve", NAME, "-X", "PUT", "-H", TTL, REBOUND],
            400,
        ),
        (
            "host",
            &["--resolve", NAME, "-H", &token, &rebound_list],
            400,
        ),
        (
            "browser",
            &[
                "-X",
                "PUT",
                "-H",
                TTL,
                "-H",
                "Origin: http://a.example",
                PUT,
            ],
            403,
        ),
        (
            "browser",
            &["-X", "OPTIONS", "-H", "Origin: http://a.example", PUT],
            403,
        ),
        (
            "proxied",
            &[
                "-X",
                "PUT",
                "-H",
                TTL,
                "-H",
                "X-Forwarded-For: 10.0.0.1",
                PUT,
            ],
            403,
        ),
        (
            "proxied",
            &["-H", &token, "-H", "Via: 1.1 proxy", &list],
            403,
        ),
        // The service as a proxy to itself.
        (
            "proxied",
            &["--proxy", "http://169.254.169.254:80", "-H", &token, &list],
            403,
        ),
        ("role_name", &["-H", &token, &list], 200),
        ("ok", &["--retry", "30", "-H", &token, &credentials], 200),
    ];
    for (reason, words, expected) in cases {
        let known = daemon.audit().len();
        let (status, body) = curl(node, "a", &cgroup, words);
        assert_eq!(status, expected, "{words:?}: {body}");
        let records = daemon.audit_after(known);
        assert_eq!(records.last().unwrap()["reason"], reason, "{words:?}");
    }
    // They are those of the deputy's own pod.
    let record = daemon.audit().pop().unwrap();
    let id = "spiffe://example.org/user/pod";
    assert_eq!(
        (&record["outcome"], &record["spiffe_id"]),
        (&"issued".into(), &id.into())
    );
}

/// A pod with CAP_NET_ADMIN stops only its own metadata, and for seconds.
#[test]
fn pod_that_removes_or_moves_the_address_gets_it_back() {
    let Some(stage) = start(|node| {
        add_pod(node, "a", opt_in);
        add_pod(node, "b", opt_in);
    }) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    let cgroups = [73, 74].map(Cgroup::of_pod);
    let address = "169.254.169.254/32";
    let delete = ["address", "delete", address, "dev", "lo"];
    let attacks: [&[&[&str]]; 3] = [
        &[&delete],
        &[&delete, &["address", "add", address, "dev", "eth0"]],
        &[&["link", "set", "lo", "down"], &["link", "set", "lo", "up"]],
    ];
    for (count, attack) in (1..).zip(attacks) {
        node.inside("a", || attack.iter().for_each(|words| ip(words)));
        assert!(script_gets_credentials(node, "b", &cgroups[1], METADATA_V4));
        await_some("the address is back", TIMEOUT, || {
            (failures(daemon, "imds_removed") == count).then_some(())
        });
        if count == 2 {
            // The kernel takes connections for those of the other device, as long as that has it.
            let connected = node.connect("a", METADATA_V4.parse().unwrap());
            assert_eq!(connected.unwrap_err().kind(), ErrorKind::ConnectionRefused);
            node.inside("a", || ip(&["address", "delete", address, "dev", "eth0"]));
        }
        for address in [METADATA_V4, METADATA_V6] {
            let served = script_gets_credentials(node, "a", &cgroups[0], address);
            assert!(served, "{address} after {attack:?}");
        }
    }
    daemon.await_line(&[
        "a pod has removed 169.254.169.254: it was added again",
        "/netns/a",
    ]);
    // The listener is killed, and bound again with the same restrictions.
    let killed = node.inside("a", || {
        Command::new("ss")
            .args(["-K", "-lnt", "sport = :80"])
            .output()
            .unwrap()
    });
    assert!(
        String::from_utf8_lossy(&killed.stdout).contains(":80"),
        "{killed:?}"
    );
    for address in [METADATA_V4, METADATA_V6] {
        await_some("the listener is back", TIMEOUT, || {
            script_gets_credentials(node, "a", &cgroups[0], address).then_some(())
        });
    }
    let bound = node.inside("a", || {
        Command::new("ss")
            .args(["-lnt", "sport = :80"])
            .output()
            .unwrap()
    });
    let bound = String::from_utf8_lossy(&bound.stdout).into_owned();
    assert!(bound.contains("169.254.169.254%lo:80"), "{bound}");
}

/// A pod takes the address before awsvid does: its server answers there, and in no other pod.
#[test]
fn address_taken_by_a_pod_is_left_to_it() {
    let mut probes = Arc::<AtomicUsize>::default();
    let take = || {
        ip(&["link", "set", "lo", "up"]);
        ip(&["address", "add", "169.254.169.254/32", "dev", "lo"]);
        probes = serve_word(TcpListener::bind(METADATA_V4).unwrap());
        opt_in();
    };
    let Some(stage) = start(|node| {
        add_pod(node, "a", take);
        add_pod(node, "b", opt_in);
    }) else {
        return;
    };
    let (node, daemon) = (&stage.site.node, &stage.daemon);
    assert_eq!(daemon.metric(NAMESPACES), 1);
    assert_eq!(failures(daemon, "imds_port_taken"), 1);
    let cgroup = Cgroup::of_pod(75);
    assert!(script_gets_credentials(node, "b", &cgroup, METADATA_V4));
    // Its endpoint is served as before.
    assert!(stage.site.serves("a", &Cgroup::of_pod(76), V4));
    // Its own server is left alone, for as long as awsvid tries.
    await_some("awsvid has tried again for seconds", TIMEOUT, || {
        (probes.load(Ordering::Relaxed) >= 6).then_some(())
    });
    let mut own = TcpStream::from(node.connect("a", METADATA_V4.parse().unwrap()).unwrap());
    let mut word = String::new();
    own.read_to_string(&mut word).unwrap();
    assert_eq!(word, "pod");
}
