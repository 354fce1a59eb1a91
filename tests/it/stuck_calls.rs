//! Calls of the daemon that wait for a file server or a name service, while these do not respond
//! (T25). Others are answered, and such calls do not pile up over reloads.
//!
//! `src/attest/lookups.rs` lists all calls that may block.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::actor::{Counts, fetch as fetch_as};
use crate::harness::cgroup::Cgroup;
use crate::harness::client::{connect, fetch};
use crate::harness::counterparts::process::{await_some, spawn};
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::hanging::HangingFiles;
use crate::harness::upstream::{Upstream, my_rule};

const TIMEOUT: Duration = Duration::from_secs(60);
const ALICE: u32 = 61001;
const BOB: u32 = 61002;
/// Users with a role at an STS whose name does not resolve.
const FIRST_USER: u32 = 61_101;
const USERS: u32 = 12;
const FILE_CALLS: [libc::c_long; 3] = [libc::SYS_openat, libc::SYS_statx, libc::SYS_newfstatat];
const RELOADS: usize = 3;

/// A file system that hangs, and a daemon that sees it. The daemon can end only after the files.
struct Stage {
    files: HangingFiles,
    daemon: Daemon,
    cgroup: Cgroup,
    folder: tempfile::TempDir,
}

/// Returns the configuration with a rule for the user of this test, and with `more`.
fn configuration(upstream: &Upstream, more: &str) -> String {
    format!("{}\n{}\n{more}", upstream.configuration(), my_rule())
}

/// Returns a rule for a user.
fn rule(name: &str, uid: u32, keys: &str) -> String {
    let id = format!("spiffe://example.org/user/{name}");
    format!("[[workload]]\nspiffe_id = \"{id}\"\nuid = {uid}\n{keys}\n")
}

/// Returns a role of this user alone, at another STS than that of all others.
fn role_at(name: &str, sts: &str) -> String {
    format!(
        "[[role]]\nname = \"{name}\"\nspiffe_id = \"spiffe://example.org/user/{name}\"\n\
         role_arn = \"arn:aws:iam::123456789012:role/dev\"\nsts_endpoint = \"{sts}\"\n\
         audience = \"elsewhere\"\n"
    )
}

fn upstream(others: &[(u32, &str)]) -> Upstream {
    let me = nix::unistd::geteuid().as_raw();
    Upstream::start(&[&[(me, "me")], others].concat())
}

/// Words in front of the daemon's, without and with `--watch`.
const WATCHING: [&[&str]; 2] = [&[], &["sh", "-c", "exec \"$@\" --watch", "sh"]];

impl Stage {
    fn start(files: HangingFiles, configuration: &str) -> Self {
        Self::start_behind(files, &[], configuration)
    }

    fn start_behind(files: HangingFiles, words: &[&str], configuration: &str) -> Self {
        let folder = folder();
        let enter = files.enter();
        let enter = enter.iter().map(String::as_str);
        let enter: Vec<&str> = enter.chain(words.iter().copied()).collect();
        let daemon = Daemon::start_behind(&enter, folder.path(), "", configuration);
        let name = folder.path().file_name().unwrap().display().to_string();
        Self {
            files,
            daemon,
            cgroup: Cgroup::new(&format!("callers-{name}.service")),
            folder,
        }
    }

    /// Replaces a file of the daemon's by a link to the file that hangs.
    fn hang(&mut self, name: &str) {
        let path = self.folder.path().join(name);
        fs::remove_file(&path).unwrap();
        symlink(self.files.program(), path).unwrap();
        self.files.hang();
    }

    fn fetch_as(&self, uid: u32) -> Counts {
        let address = self.daemon.listener("unix");
        fetch_as("unix", &address, uid, 1, self.cgroup.path())
    }

    fn await_one_blocked_thread(&self) {
        await_some("a thread is blocked", TIMEOUT, || {
            (self.blocked_threads() == 1).then_some(())
        });
    }

    /// Returns the number of the daemon's threads that are blocked in calls on files: in the same
    /// call at two times.
    fn blocked_threads(&self) -> usize {
        let first = self.file_calls();
        thread::sleep(Duration::from_millis(100));
        first.intersection(&self.file_calls()).count()
    }

    /// Returns each thread that runs such a call, with the call (proc_pid_syscall(5)).
    fn file_calls(&self) -> HashSet<(PathBuf, String)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.daemon.pid())).unwrap();
        let call = |task: fs::DirEntry| {
            let call = fs::read_to_string(task.path().join("syscall")).ok()?;
            let number: libc::c_long = call.split(' ').next()?.parse().ok()?;
            FILE_CALLS
                .contains(&number)
                .then(|| (task.path(), call.trim_end().to_owned()))
        };
        tasks.flatten().filter_map(call).collect()
    }
}

/// Checks that the user of this test is answered over each listener.
fn others_are_answered(daemon: &Daemon, when: &str) {
    let tcp = |address: SocketAddr| {
        let stream = connect(address);
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        fetch(stream)
    };
    for _ in 0..5 {
        let unix = UnixStream::connect(daemon.unix()).unwrap();
        unix.set_read_timeout(Some(TIMEOUT)).unwrap();
        for (status, body) in [fetch(unix), tcp(daemon.tcp()), tcp(daemon.tcp6())] {
            assert_eq!(status, 200, "{when}: {body}");
        }
    }
}

/// Rules of two users name a program on a file system that hangs. The reads of both, before and
/// after reloads, have one thread.
#[test]
fn hanging_exe_takes_one_thread_over_reloads() {
    if !root() {
        return;
    }
    let upstream = upstream(&[(ALICE, "alice"), (BOB, "bob")]);
    let mut files = HangingFiles::mount();
    files.hang();
    let exe = format!("exe = {:?}", files.program());
    let rules = [("alice", ALICE), ("bob", BOB)].map(|(name, uid)| rule(name, uid, &exe));
    let text = configuration(&upstream, &rules.concat());
    let stage = Stage::start(files, &text);
    for reload in 0..=RELOADS {
        let unresponsive = Counts::from([("process_unresponsive".to_owned(), 1)]);
        for uid in [ALICE, BOB] {
            assert_eq!(stage.fetch_as(uid), unresponsive, "reload {reload}");
        }
        assert_eq!(stage.blocked_threads(), 1, "reload {reload}");
        others_are_answered(&stage.daemon, "while the program hangs");
        assert!(stage.daemon.reload("", &text));
    }
}

/// `ca_file` is on a file system that hangs.
#[test]
fn hanging_ca_file_takes_one_thread_over_reloads() {
    if !root() {
        return;
    }
    for words in WATCHING {
        let files = HangingFiles::mount();
        let key = format!("ca_file = {:?}", files.program());
        hanging_certificates(files, words, &key);
    }
}

/// The system's certificates are on a file system that hangs.
#[test]
fn hanging_trust_store_takes_one_thread_over_reloads() {
    if !root() {
        return;
    }
    let files = HangingFiles::mount();
    let variable = format!("SSL_CERT_FILE={}", files.program().display());
    hanging_certificates(files, &["env", &variable], "");
}

fn hanging_certificates(mut files: HangingFiles, words: &[&str], key: &str) {
    let upstream = upstream(&[(ALICE, "alice")]);
    files.hang();
    let sts = format!("[sts]\ntimeout = \"1s\"\n{key}");
    let alice = rule("alice", ALICE, "") + &role_at("alice", "https://127.0.0.1:9");
    let text = configuration(&upstream, &alice)
        .replace("[sts]", &sts)
        .replace(
            "spiffe://example.org/user/*",
            "spiffe://example.org/user/me",
        );
    let stage = Stage::start_behind(files, words, &text);
    for reload in 0..=RELOADS {
        let answers = stage.fetch_as(ALICE);
        assert!(!answers.contains_key("Success"), "{answers:?}");
        stage.await_one_blocked_thread();
        others_are_answered(&stage.daemon, "while the CA file hangs");
        assert!(stage.daemon.reload("", &text), "reload {reload}");
    }
    assert_eq!(stage.blocked_threads(), 1);
}

/// The configuration itself is on a file system that hangs: the reload waits, and the signals of
/// the end do not.
#[test]
fn hanging_configuration_stops_only_reloads() {
    if !root() {
        return;
    }
    for words in WATCHING {
        hanging_configuration(words);
    }
}

fn hanging_configuration(words: &[&str]) {
    let upstream = upstream(&[]);
    let text = configuration(&upstream, "");
    let mut stage = Stage::start_behind(HangingFiles::mount(), words, &text);
    stage.hang("awsvid.toml");
    for _ in 0..RELOADS {
        stage.daemon.send_sighup();
        stage.await_one_blocked_thread();
        others_are_answered(&stage.daemon, "while the configuration hangs");
    }
    stage.daemon.process().signal(Signal::SIGTERM);
    // The process itself ends with the file system.
    let socket = stage.daemon.unix();
    await_some("it ends", TIMEOUT, || (!socket.exists()).then_some(()));
    assert_eq!(stage.blocked_threads(), 1);
}

/// The token's file is on a file system that hangs, and the daemon reads it for its own probes.
#[test]
fn hanging_token_file_takes_one_thread_over_reloads() {
    if !root() {
        return;
    }
    // Nothing listens there, so the daemon is not ready and probes go on.
    let upstream = upstream(&[]);
    let more = role_at("nobody", "https://127.0.0.1:9");
    let text = configuration(&upstream, &more).replace("user/*", "user/me");
    let mut stage = Stage::start(HangingFiles::mount(), &text);
    others_are_answered(&stage.daemon, "before");
    stage.hang("token");
    for _ in 0..RELOADS {
        assert!(stage.daemon.reload("", &text));
        stage.await_one_blocked_thread();
        others_are_answered(&stage.daemon, "while the token's file hangs");
    }
    // The probes of the listeners went on without the token.
    stage.daemon.await_line(&["not ready", "STS: "]);
    assert_eq!(stage.blocked_threads(), 1);
}

/// Identities that request roles at an STS that never replies, and the number of roles of each:
/// together all calls that the daemon makes at one time.
const HANGING: [(u32, &str); 4] = [
    (61_201, "hanging0"),
    (61_202, "hanging1"),
    (61_203, "hanging2"),
    (61_204, "hanging3"),
];
const ROLES: usize = 4;

/// Reads the daemon's request to STS. Returns the connection of an exchange, and nothing for one
/// that only tests whether STS responds.
fn exchange(mut stream: TcpStream) -> Option<TcpStream> {
    let (mut text, mut part) = (String::new(), [0; 4096]);
    loop {
        let length = stream.read(&mut part).unwrap();
        text += &String::from_utf8_lossy(&part[..length]);
        if text.contains("hang-") {
            return Some(stream);
        }
        if length == 0 || text.contains("role%2Fnone") {
            return None;
        }
    }
}

/// Four workloads hold all calls to STS (T29). Another is answered over each listener, and a call
/// of theirs gives way to it.
#[test]
fn sts_calls_that_hang_leave_room_for_others() {
    if !root() {
        return;
    }
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let honest = [
        (61_211, "honest0"),
        (61_212, "honest1"),
        (61_213, "honest2"),
    ];
    let users = [&HANGING[..], &honest].concat();
    let upstream = upstream(&users);
    let rules: String = users
        .iter()
        .map(|(uid, name)| rule(name, *uid, ""))
        .collect();
    let role = |number: usize| {
        role_at("*", &endpoint)
            .replace("\"*\"", &format!("\"hang-{number}\""))
            .replace("role/dev", &format!("role/hang-{number}"))
    };
    let roles: String = (0..ROLES).map(role).collect();
    let text =
        configuration(&upstream, &(rules + &roles)).replace("[sts]", "[sts]\ntimeout = \"30s\"");
    let folder = folder();
    let daemon = Daemon::start(folder.path(), "", &text);
    let socket = daemon.unix();
    let request = |uid: u32, number: usize| {
        let mut command = Command::new("setpriv");
        let id = uid.to_string();
        command
            .args(["--reuid", &id, "--regid", &id, "--clear-groups", "curl"])
            .args([
                "--silent",
                "--header",
                "Authorization: any",
                "--unix-socket",
            ])
            .arg(&socket)
            .arg(format!("http://localhost/v1/credentials/hang-{number}"))
            .stdout(Stdio::null());
        spawn(command).unwrap()
    };
    let _clients: Vec<_> = HANGING
        .iter()
        .flat_map(|(uid, _)| (0..ROLES).map(move |number| (*uid, number)))
        .map(|(uid, number)| request(uid, number))
        .collect();
    let calls = HANGING.len() * ROLES;
    let requests = silent.incoming().map(Result::unwrap);
    let _held: Vec<_> = requests.filter_map(exchange).take(calls).collect();
    let name = folder.path().file_name().unwrap().display().to_string();
    let cgroup = Cgroup::new(&format!("honest-{name}.service"));
    for (listener, (uid, _)) in ["unix", "tcp", "tcp6"].into_iter().zip(honest) {
        let answers = fetch_as(listener, &daemon.listener(listener), uid, 1, cgroup.path());
        let success = Counts::from([("Success".to_owned(), 1)]);
        assert_eq!(answers, success, "over {listener}");
    }
    let evicted = "awsvid_sts_calls_total{result=\"sts_busy\"}";
    await_some("a call gives way", TIMEOUT, || {
        (daemon.metric(evicted) > 0).then_some(())
    });
}

/// A DNS server that never replies, at an address of this test's own.
struct SilentDns {
    address: SocketAddr,
    /// The sockets of lookups. Each lookup has its own.
    clients: Arc<Mutex<HashSet<SocketAddr>>>,
}

impl SilentDns {
    fn start() -> Self {
        let [.., high, low] = std::process::id().to_be_bytes();
        let address = SocketAddr::from(([127, 53, high, low], 53));
        let socket = UdpSocket::bind(address).unwrap();
        let clients = Arc::<Mutex<HashSet<_>>>::default();
        let seen = clients.clone();
        thread::spawn(move || {
            while let Ok((_, client)) = socket.recv_from(&mut [0; 512]) {
                seen.lock().unwrap().insert(client);
            }
        });
        Self { address, clients }
    }

    fn lookups(&self) -> usize {
        self.clients.lock().unwrap().len()
    }

    /// Returns words in front of a command that has only this name service for hosts.
    fn behind(&self, folder: &Path) -> Vec<String> {
        let file = |name: &str, text: &str| -> PathBuf {
            let path = folder.join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let resolv = format!(
            "nameserver {}\noptions timeout:30 attempts:5\n",
            self.address.ip()
        );
        let mounts = [
            (file("resolv.conf", &resolv), "/etc/resolv.conf"),
            (
                file("nsswitch.conf", "hosts: dns\npasswd: files\ngroup: files\n"),
                "/etc/nsswitch.conf",
            ),
        ];
        let mounts: String = mounts
            .iter()
            .filter(|(_, to)| Path::new(to).exists())
            .map(|(from, to)| format!("mount --bind {} {to} && ", from.display()))
            .collect();
        let script = format!("{mounts}exec \"$@\"");
        let words = ["unshare", "--mount", "--propagation", "private", "sh", "-c"];
        words
            .into_iter()
            .chain([&*script, "sh"])
            .map(str::to_owned)
            .collect()
    }
}

/// Twelve users have roles at an STS whose name no DNS server resolves. They share a lookup, and
/// the others are answered.
#[test]
fn silent_name_service_takes_few_threads() {
    if !root() {
        return;
    }
    let (folder, dns) = (folder(), SilentDns::start());
    let names: Vec<(u32, String)> = (0..USERS)
        .map(|number| (FIRST_USER + number, format!("user{number}")))
        .collect();
    let users: Vec<(u32, &str)> = names.iter().map(|(uid, name)| (*uid, &**name)).collect();
    let upstream = upstream(&users);
    let of_user = |(uid, name): &(u32, &str)| {
        rule(name, *uid, "") + &role_at(name, "https://sts.silent.test")
    };
    let more: String = users.iter().map(of_user).collect();
    let text = configuration(&upstream, &more)
        .replace("user/*", "user/me")
        .replace("[sts]", "[sts]\ntimeout = \"4s\"");
    let words = dns.behind(folder.path());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let daemon = Daemon::start_behind(&words, folder.path(), "", &text);
    let name = folder.path().file_name().unwrap().display().to_string();
    let cgroup = Cgroup::new(&format!("silent-{name}.service"));
    for _ in 0..2 {
        let (address, cgroup) = (daemon.listener("unix"), cgroup.path());
        thread::scope(|scope| {
            for (uid, _) in &users {
                let address = &address;
                scope.spawn(move || {
                    let answers = fetch_as("unix", address, *uid, 1, cgroup);
                    assert!(!answers.contains_key("Success"), "{answers:?}");
                });
            }
        });
        others_are_answered(&daemon, "while names do not resolve");
        assert!(daemon.reload("", &text));
    }
    await_some("a lookup", TIMEOUT, || (dns.lookups() > 0).then_some(()));
    assert!(dns.lookups() <= 4, "{} lookups", dns.lookups());
}
