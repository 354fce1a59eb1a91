//! The metadata address and the key of its tokens pass from one daemon to the next.

use super::*;
use crate::harness::counterparts::process::{OwnedProcess, spawn};

/// Fetches metadata in a loop, each time with a new token and with one that it keeps, until its
/// input ends. Prints how many of each kind were answered, and the first failure.
const LOOP: &str = r#"
url=http://169.254.169.254/latest
ttl='X-aws-ec2-metadata-token-ttl-seconds: 21600'
issue() { curl --silent --fail --show-error -X PUT -H "$ttl" $url/api/token; }
list() { curl --silent --fail --show-error -H "X-aws-ec2-metadata-token: $1" $url/meta-data/iam/security-credentials/; }
kept=$(issue 2>&1) || { echo "failed $kept"; exit; }
echo begun
count=0
while [ -e "$1" ]; do
  role=$(list $kept 2>&1) || { echo "failed kept $role after $count"; exit; }
  token=$(issue 2>&1) || { echo "failed put $token after $count"; exit; }
  role=$(list $token 2>&1) || { echo "failed new $role after $count"; exit; }
  count=$((count + 1))
done
echo "answered $count"
"#;

/// A process of a pod that fetches metadata until the test stops it.
struct Fetcher {
    owned: OwnedProcess,
    output: std::io::BufReader<std::process::ChildStdout>,
    /// The loop goes on while it exists.
    flag: PathBuf,
}

impl Fetcher {
    fn start(site: &PodSite, name: &str, cgroup: &Cgroup) -> Self {
        let flag = site.folder.path().join("fetching");
        fs::write(&flag, "").unwrap();
        let enter = site.node.enter_pod(name, cgroup);
        let enter: Vec<&str> = enter.iter().map(String::as_str).collect();
        let mut command = behind(&enter, Path::new("sh"));
        command
            .args(["-c", LOOP, "sh"])
            .arg(&flag)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .stdout(std::process::Stdio::piped());
        let mut owned = spawn(command).expect("the loop");
        let output = std::io::BufReader::new(owned.stdout().expect("a pipe"));
        let mut fetcher = Self {
            owned,
            output,
            flag,
        };
        assert_eq!(fetcher.line(), "begun");
        fetcher
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut self.output, &mut line).unwrap();
        line.trim().to_owned()
    }

    /// Stops it, and returns the number of rounds. None of them has failed.
    fn stop(mut self) -> u32 {
        fs::remove_file(&self.flag).unwrap();
        let line = self.line();
        assert!(self.owned.wait(TIMEOUT).is_some());
        let count = line.strip_prefix("answered ");
        count.unwrap_or_else(|| panic!("{line}")).parse().unwrap()
    }
}

fn handing_over(site_folder: &Path, own_folder: &Path, node: &NetnsNode) -> String {
    let key = own_folder.join("imds-key");
    let pods = crate::pods::handover::handing_over(site_folder, node);
    pods + &format!("[imds]\nmode = \"address\"\nkey_file = {key:?}\n")
}

/// Starts a daemon whose key is where the manifests have it: in the directory of the handover
/// socket, which does not exist yet.
fn start_first() -> Option<PodsStage> {
    PodsStage::set_with(
        |node| add_pod(node, "a", opt_in),
        |folder, node| handing_over(folder, &folder.join("handover"), node),
    )
}

/// Starts a daemon with files and a key of its own.
fn start_next(site: &PodSite, folder: &Path) -> Daemon {
    site.start(
        folder,
        &handing_over(site.folder.path(), folder, &site.node),
    )
}

#[test]
fn update_rejects_no_request_and_no_token() {
    let Some(PodsStage {
        daemon: mut old,
        site,
    }) = start_first()
    else {
        return;
    };
    let cgroup = Cgroup::of_pod(80);
    let key = await_some("the key is stored", TIMEOUT, || {
        fs::read(site.folder.path().join("handover/imds-key")).ok()
    });
    let fetcher = Fetcher::start(&site, "a", &cgroup);
    let folders = [folder(), folder(), folder()];
    for own in &folders {
        let new = start_next(&site, own.path());
        new.await_line(&["took over pods' listeners"]);
        old.await_line(&["passed pods' listeners to the next instance"]);
        assert_eq!(new.metric(NAMESPACES), 1);
        old.process().signal(Signal::SIGTERM);
        old.await_end();
        assert!(has_address(&site.node, "a"), "the next one has it");
        assert!(!old.log().contains("removed 169.254.169.254 from pods"));
        await_some("the key is stored", TIMEOUT, || {
            let stored = fs::read(own.path().join("imds-key")).ok()?;
            (stored == key).then_some(())
        });
        old = new;
    }
    // A crash: the next one has the key from the file.
    let rounds = fetcher.stop();
    eprintln!("three updates: {rounds} rounds of three requests, none failed");
    assert!(rounds >= 3, "{rounds}");
    assert_eq!(failures(&old, "imds_removed"), 0);
    old.process().signal(Signal::SIGTERM);
    assert!(old.process().owned().wait(TIMEOUT).is_some());
    assert!(!has_address(&site.node, "a"));
}

/// The next daemon adds no address that the previous one has left to another, and loses none by it.
#[test]
fn update_respects_obstacles_to_ipv6() {
    const NAMES: [&str; 2] = ["routed", "server"];
    let mut server = None;
    let set_up = |node: &NetnsNode| {
        add_pod(node, NAMES[0], || {
            ip(&["-6", "route", "add", "blackhole", "fd00:ec2::254"]);
            opt_in();
        });
        add_pod(node, NAMES[1], || {
            // The server leaves IPv4 to others.
            fs::write("/proc/sys/net/ipv6/bindv6only", "1").unwrap();
            server = Some(TcpListener::bind("[::]:80").unwrap());
            opt_in();
        });
    };
    let Some(PodsStage {
        daemon: mut old,
        site,
    }) = PodsStage::set_with(set_up, |folder, node| {
        handing_over(folder, &folder.join("handover"), node)
    })
    else {
        return;
    };
    let assert_unserved = |daemon: &Daemon| {
        await_some(
            "the address of IPv6 is counted as unserved",
            TIMEOUT,
            || {
                let counts =
                    ["imds_routed", "imds_port_taken"].map(|reason| failures(daemon, reason));
                (counts == [1, 1]).then_some(())
            },
        );
        for (name, number) in NAMES.into_iter().zip(84..) {
            assert_eq!(addresses(&site.node, name), [true, false], "{name}");
            let cgroup = Cgroup::of_pod(number);
            let served = script_gets_credentials(&site.node, name, &cgroup, METADATA_V4);
            assert!(served, "{name}");
        }
        assert_eq!(daemon.metric(NAMESPACES), 2);
    };
    assert_unserved(&old);
    let own = folder();
    let new = start_next(&site, own.path());
    new.await_line(&["took over pods' listeners"]);
    old.await_line(&["passed pods' listeners to the next instance"]);
    old.process().signal(Signal::SIGTERM);
    old.await_end();
    // It finds the obstacles itself with its first check.
    assert_unserved(&new);
    drop(server);
    await_some("the server's port is free", TIMEOUT, || {
        addresses(&site.node, NAMES[1])[1].then_some(())
    });
    assert_eq!(addresses(&site.node, NAMES[0]), [true, false]);
}

/// Both are restarted before the next one could serve.
#[test]
fn ending_daemon_passes_address_to_standby_not_yet_ready() {
    let Some(PodsStage {
        daemon: mut old,
        site,
    }) = start_first()
    else {
        return;
    };
    let cgroup = Cgroup::of_pod(81);
    let fetch = |path: &str, header: &str| {
        let url = format!("http://169.254.169.254/latest/{path}");
        let words = ["curl", "--silent", "--fail", "-H", header, &url];
        run_in_pod(&site.node, "a", &cgroup, &words)
    };
    let issue = [
        "curl",
        "--silent",
        "--fail",
        "-X",
        "PUT",
        "-H",
        "X-aws-ec2-metadata-token-ttl-seconds: 300",
        "http://169.254.169.254/latest/api/token",
    ];
    let token = run_in_pod(&site.node, "a", &cgroup, &issue).success("curl");
    let own = folder();
    let words = site.node.enter();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let unready = Path::new("/nonexistent/agent.sock");
    let configuration = site.upstream.configuration_at(unready) + RULE;
    let listen = handing_over(site.folder.path(), own.path(), &site.node);
    let next = Daemon::start_behind(&words, own.path(), &listen, &configuration);
    next.await_line(&["waiting to take over pods' listeners"]);
    old.process().signal(Signal::SIGTERM);
    next.await_line(&["took over pods' listeners"]);
    old.await_end();
    assert!(has_address(&site.node, "a"));
    await_served(&next, 1);
    // The token is accepted: a rule names the identity, and so the first role.
    let header = format!("X-aws-ec2-metadata-token: {token}");
    let output = fetch("meta-data/iam/security-credentials/", &header);
    assert!(!output.success("curl").is_empty());
    let rejected = next.audit_where(|_, line| line.contains("\"imds_token\""));
    assert!(rejected.is_empty(), "{rejected:#?}");
}

/// The next daemon serves no metadata, as one of an earlier version does not.
#[test]
fn successor_without_metadata_leaves_no_address() {
    let Some(PodsStage {
        daemon: mut old,
        site,
    }) = start_first()
    else {
        return;
    };
    let own = folder();
    let next = site.next(own.path());
    old.await_line(&["passed pods' listeners to the next instance"]);
    let connected = site.node.connect("a", METADATA_V4.parse().unwrap());
    assert_eq!(connected.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(site.serves("a", &Cgroup::of_pod(82), V4));
    assert_eq!(next.issued(), 1);
    old.process().signal(Signal::SIGTERM);
    old.await_end();
    assert!(!has_address(&site.node, "a"));
}

#[test]
fn failed_update_leaves_address_to_previous_daemon() {
    let Some(stage) = start_first() else {
        return;
    };
    let (own, cgroup) = (folder(), Cgroup::of_pod(83));
    let mut next = start_next(&stage.site, own.path());
    stage
        .daemon
        .await_line(&["passed pods' listeners to the next instance"]);
    // It ends as on a failed update: the previous one is alive, so it leaves the address.
    next.process().signal(Signal::SIGTERM);
    assert!(next.process().owned().wait(TIMEOUT).is_some());
    stage.daemon.await_line(&["the next instance is gone"]);
    await_served(&stage.daemon, 1);
    let served = |address| script_gets_credentials(&stage.site.node, "a", &cgroup, address);
    assert!(served(METADATA_V4) && served(METADATA_V6));
    assert_eq!(failures(&stage.daemon, "imds_removed"), 0);
    // The same where the next one serves no metadata, so that the address was closed.
    let own = folder();
    let next = stage.site.next(own.path());
    await_some("it has taken over", TIMEOUT, || {
        (next.metric("awsvid_pod_listeners") == 1).then_some(())
    });
    drop(next);
    await_some("the address is served again", TIMEOUT, || {
        served(METADATA_V4).then_some(())
    });
}
