//! Network namespaces, mounted on files as a container runtime does it, in a mount namespace that
//! ends with the test.

use std::fs;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::Pid;

use super::actor;
use super::cgroup::Cgroup;
use super::counterparts::process::{OwnedProcess, behind, run, spawn};
use super::hanging::HangingFiles;

/// A node's mounts, and the directory of its pods' network namespaces.
pub(crate) struct NetnsNode {
    /// A process with the node's mounts.
    anchor: Pid,
    directory: PathBuf,
    _anchor: Option<OwnedProcess>,
}

/// The program that gives a process that it starts other mounts and another network.
const NSENTER: &str = "nsenter";

impl NetnsNode {
    /// Starts it with its directory below `folder`.
    pub(crate) fn start(folder: &Path) -> Self {
        let mut command = behind(
            &["unshare", "--mount", "--propagation", "private"],
            Path::new("sh"),
        );
        command
            .args(["-c", "echo; exec sleep infinity"])
            .stdout(Stdio::piped());
        let mut anchor = spawn(command).expect("unshare");
        // Its first output shows that it is in its own mount namespace.
        anchor
            .stdout()
            .expect("a pipe")
            .read_exact(&mut [0])
            .expect("the anchor's word");
        Self::with_mounts_of(anchor.id(), Some(anchor), folder)
    }

    /// Makes one whose mounts are those of a file system that can stop responding.
    pub(crate) fn with_hanging(files: &HangingFiles, folder: &Path) -> Self {
        Self::with_mounts_of(files.pid(), None, folder)
    }

    fn with_mounts_of(anchor: Pid, owned: Option<OwnedProcess>, folder: &Path) -> Self {
        let directory = folder.join("netns");
        fs::create_dir(&directory).expect("the directory");
        // Before its first pod a kubelet has a cgroup, too.
        Cgroup::create_kubelets();
        let node = Self {
            anchor,
            directory,
            _anchor: owned,
        };
        // Mounts in the directory propagate, as they do on a node.
        node.within(|| {
            bind(&node.directory, &node.directory);
            let none = None::<&str>;
            mount(none, &node.directory, none, MsFlags::MS_SHARED, none).expect("a shared mount");
        });
        node
    }

    /// Returns the directory of the namespace files.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the daemon's table `[pods]`, which has to follow the keys of `[listen]`.
    pub(crate) fn listen(&self) -> String {
        Self::listen_in(&self.directory)
    }

    /// Returns it for another path of the directory.
    pub(crate) fn listen_in(directory: &Path) -> String {
        format!("[pods]\nenabled = true\nnetns_dir = {directory:?}\nhandover_socket = \"\"\n")
    }

    /// Returns the file of this name.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn mounts(&self) -> String {
        format!("--mount=/proc/{}/ns/mnt", self.anchor)
    }

    /// Returns words in front of a command that make it see the node's mounts.
    pub(crate) fn enter(&self) -> Vec<String> {
        vec![NSENTER.to_owned(), self.mounts(), "--".to_owned()]
    }

    /// Runs `act` on a thread with the node's mounts.
    pub(crate) fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let mounts =
            fs::File::open(format!("/proc/{}/ns/mnt", self.anchor)).expect("the node's mounts");
        thread::scope(|scope| {
            let inside = || {
                unshare(CloneFlags::CLONE_FS).expect("a working directory of the thread's own");
                setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS).expect("into the node's mounts");
                act()
            };
            scope
                .spawn(inside)
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Adds a network namespace on the file of this name, with a loopback device as a CNI plugin
    /// leaves it.
    pub(crate) fn add(&self, name: &str) {
        self.add_with(name, |_| {});
    }

    /// Adds one in which `set_up` runs before it is mounted.
    pub(crate) fn add_with(&self, name: &str, set_up: impl FnOnce(&Path) + Send) {
        self.make(name, set_up, || {});
    }

    /// Adds one in which `act` runs as soon as it is mounted.
    pub(crate) fn add_and<T: Send>(&self, name: &str, act: impl FnOnce() -> T + Send) -> T {
        self.make(name, |_| {}, act)
    }

    fn make<T: Send>(
        &self,
        name: &str,
        set_up: impl FnOnce(&Path) + Send,
        act: impl FnOnce() -> T + Send,
    ) -> T {
        let path = self.path(name);
        self.within(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            set_up(&path);
            ip(&["link", "set", "lo", "up"]);
            // First the file, then the mount, as runtimes do it.
            fs::File::create_new(&path).expect("the file");
            bind(Path::new("/proc/thread-self/ns/net"), &path);
            act()
        })
    }

    /// Mounts the namespace of this file on another one, too.
    pub(crate) fn add_again(&self, name: &str, again: &str) {
        let (from, to) = (self.path(name), self.path(again));
        self.within(move || {
            fs::File::create_new(&to).expect("the file");
            bind(&from, &to);
        });
    }

    /// Mounts the test's own network namespace on a file of this name.
    pub(crate) fn add_own(&self, name: &str) {
        let path = self.path(name);
        self.within(move || {
            fs::File::create_new(&path).expect("the file");
            bind(Path::new("/proc/self/ns/net"), &path);
        });
    }

    /// Mounts the network namespace of a process on a file of this name, after `set_up` has run
    /// there.
    pub(crate) fn add_of(&self, name: &str, process: Pid, set_up: impl FnOnce() + Send) {
        let path = self.path(name);
        self.within(move || {
            let namespace = fs::File::open(format!("/proc/{process}/ns/net"));
            let namespace = namespace.expect("its network namespace");
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("into the network namespace");
            set_up();
            ip(&["link", "set", "lo", "up"]);
            fs::File::create_new(&path).expect("the file");
            bind(Path::new("/proc/thread-self/ns/net"), &path);
        });
    }

    /// Removes it, as a runtime does once the pod's processes are dead.
    pub(crate) fn remove(&self, name: &str) {
        let path = self.path(name);
        self.within(move || {
            umount2(&path, MntFlags::MNT_DETACH).expect("umount");
            fs::remove_file(&path).expect("remove the file");
        });
    }

    /// Unmounts the file but leaves it.
    pub(crate) fn unmount(&self, name: &str) {
        let path = self.path(name);
        self.within(move || umount2(&path, MntFlags::MNT_DETACH).expect("umount"));
    }

    /// Runs `act` on a thread in this namespace. Afterwards only what `act` returns may keep the
    /// namespace.
    pub(crate) fn inside<T: Send>(&self, name: &str, act: impl FnOnce() -> T + Send) -> T {
        let path = self.path(name);
        self.within(move || {
            let namespace = fs::File::open(path).expect("the namespace");
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("into the network namespace");
            act()
        })
    }

    /// Returns words in front of a command that make it run in this namespace and this cgroup.
    pub(crate) fn enter_pod(&self, name: &str, cgroup: &Cgroup) -> Vec<String> {
        let mut words = self.enter();
        let network = format!("--net={}", self.path(name).display());
        words.extend(cgroup.enter().map(str::to_owned));
        words.extend([NSENTER.to_owned(), network, "--".to_owned()]);
        words
    }

    /// Sends a request as the first act of a new process of this pod, and returns the response.
    pub(crate) fn fetch(&self, name: &str, cgroup: &Cgroup, address: SocketAddr) -> String {
        let words = self.enter_pod(name, cgroup);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = behind(&words, &actor::program());
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
            .args(["fetch", "tcp", &address.to_string()]);
        run(command, b"", Duration::from_secs(60)).stdout
    }

    /// Opens a connection from inside. Its descriptor keeps the namespace.
    pub(crate) fn connect(&self, name: &str, address: SocketAddr) -> io::Result<OwnedFd> {
        self.inside(name, || {
            std::net::TcpStream::connect(address).map(OwnedFd::from)
        })
    }
}

/// A device of the host that ends with this namespace: one end of a pair. `set_up` creates it.
pub(crate) struct Peer(String);

impl Peer {
    /// Makes a name for the device.
    pub(crate) fn new(number: usize) -> Self {
        Self(format!("awv{}x{number}", std::process::id()))
    }

    /// Creates the pair in the calling thread's network namespace, and moves the other end to the
    /// test's own.
    pub(crate) fn make(&self) {
        let own = std::process::id().to_string();
        ip(&[
            "link", "add", "eth0", "type", "veth", "peer", "name", &self.0, "netns", &own,
        ]);
    }

    /// Returns whether the device exists.
    pub(crate) fn exists(&self) -> bool {
        Path::new("/sys/class/net").join(&self.0).exists()
    }
}

/// Runs `ip` in the calling thread's network namespace.
pub(crate) fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output().expect("ip");
    assert!(
        output.status.success(),
        "ip {words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn bind(from: &Path, to: &Path) {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("bind mount");
}
