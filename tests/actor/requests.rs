//! Scenes in which a query to an agent has the caller's pid. The agent is the test's own. It holds
//! the query, and the test sends words on standard input when the scene is to go on. Each word gets
//! a reply of one line.
//!
//! This program is started from a folder with copies of it: `first`, which it is, `second`, and
//! `root` and `group`, which are setuid root and setgid [`BOB`].

use std::ffi::CString;
use std::fs;
use std::io::{BufRead, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::{Pid, Uid, execv, getegid, geteuid, setresgid, setresuid};

use crate::cgroup_moves::{self, Cgroup};
use crate::process::{become_user, child, reuse};
use crate::raw_http::{self, Address};
use crate::{ALICE, BOB, forged_exe};

/// A process that obeys words, whatever program it runs.
struct ScriptedProcess {
    pid: Pid,
    words: UnixStream,
}

/// The parts of a player.
struct Part<'a> {
    listener: &'a str,
    address: &'a str,
    words: UnixStream,
    /// The socket over which connections are passed.
    over: Option<UnixStream>,
    connection: Option<OwnedFd>,
}

/// The scene's caller is Alice. The heir has the same user and program, and gets the caller's
/// connection in scenes where the caller is to change.
struct Stage<'a> {
    scene: &'a str,
    to: [&'a str; 2],
    alice: ScriptedProcess,
    heir: ScriptedProcess,
    /// The process that has the caller's number after that.
    bob: Option<ScriptedProcess>,
    cgroup: Option<Cgroup>,
}

pub(crate) fn play(scene: &str, to: [&str; 2]) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let [alice, heir] = [ours, theirs].map(|over| ScriptedProcess::start(ALICE, to, over));
    let mut stage = Stage {
        scene,
        to,
        alice,
        heir,
        bob: None,
        cgroup: None,
    };
    println!("\"{}\"", stage.alice.pid);
    for word in std::io::stdin().lock().lines().map(Result::unwrap) {
        println!("{}", stage.step(&word));
    }
}

impl Stage<'_> {
    fn step(&mut self, word: &str) -> String {
        match word {
            "send" => self.alice.send_word("send"),
            "change" => self.change(),
            "back" if self.scene == "forged-and-back" => self.alice.send_word("show first"),
            // As `newgrp` and busybox's `su` do: from privileges back to the user, and to any
            // program.
            "back" => self.alice.send_word("back"),
            "answer" if self.keeps_connection() => self.alice.send_word("answer"),
            "answer" if self.scene == "vanished" => "\"\"".to_owned(),
            "answer" => self.heir.send_word("answer"),
            "again" => self.request_again(),
            other if other.starts_with("alice ") => self.alice.send_word(&other["alice ".len()..]),
            other => panic!("no step {other}"),
        }
    }

    /// Returns whether the caller itself reads the response.
    fn keeps_connection(&self) -> bool {
        matches!(self.scene, "still" | "moved" | "forged" | "forged-and-back")
    }

    /// Makes the change of the caller that the scene is about.
    fn change(&mut self) -> String {
        if !self.keeps_connection() && self.scene != "vanished" {
            self.alice.send_word("give");
            self.heir.send_word("take");
        }
        match self.scene {
            "still" | "forked" => {}
            "vanished" | "exited" => self.alice.end(true),
            "zombie" => self.alice.end(false),
            "reused" => {
                self.alice.end(true);
                self.bob = ScriptedProcess::reusing(self.alice.pid, BOB, self.to);
                if self.bob.is_none() {
                    return "\"the number is taken\"".to_owned();
                }
            }
            "executed" => drop(self.alice.send_word("become second")),
            "setuid" | "setuid-and-back" => drop(self.alice.send_word("become root")),
            "setgid" | "setgid-and-back" => drop(self.alice.send_word("become group")),
            "forged" | "forged-and-back" => drop(self.alice.send_word("show second")),
            "moved" => {
                let cgroup =
                    self.cgroup
                        .insert(Cgroup::new(&cgroup_moves::own_cgroup(), "moved-", ""));
                cgroup.write("cgroup.procs", &self.alice.pid.to_string());
            }
            other => panic!("no scene {other}"),
        }
        "\"changed\"".to_owned()
    }

    /// Makes the process that exists now send a request on a connection of its own.
    fn request_again(&mut self) -> String {
        match (self.scene, &mut self.bob) {
            (_, Some(bob)) => bob.send_word("again"),
            ("vanished" | "exited" | "zombie", None) => self.heir.send_word("again"),
            ("setuid" | "setgid", None) => {
                self.alice.send_word("settle");
                self.alice.send_word("again")
            }
            _ => self.alice.send_word("again"),
        }
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        if self.cgroup.is_some() {
            self.alice.end(true);
        }
    }
}

impl ScriptedProcess {
    fn start(uid: u32, to: [&str; 2], over: UnixStream) -> Self {
        let (words, theirs) = UnixStream::pair().unwrap();
        let started = child(|_| {
            become_user(uid);
            Part::new(to, theirs, Some(over)).obey();
            String::new()
        });
        Self {
            pid: started.pid,
            words,
        }
        .ready()
    }

    fn reusing(pid: Pid, uid: u32, to: [&str; 2]) -> Option<Self> {
        let (words, theirs) = UnixStream::pair().unwrap();
        let pid = reuse(pid, uid, || Part::new(to, theirs, None).obey())?;
        Some(Self { pid, words }.ready())
    }

    /// Waits for its line that it is the right user. It ends with this program.
    fn ready(mut self) -> Self {
        line(&mut self.words).expect("a player's first word");
        self
    }

    /// Sends it a word, and waits for its reply or for the daemon's response.
    fn send_word(&mut self, word: &str) -> String {
        self.words
            .write_all(format!("{word}\n").as_bytes())
            .unwrap();
        line(&mut self.words).expect("a player's word")
    }

    /// Ends it. With `reap` it is reaped, else it stays a zombie.
    fn end(&mut self, reap: bool) {
        self.words.write_all(b"end\n").unwrap();
        waitid(
            Id::Pid(self.pid),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT,
        )
        .unwrap();
        if reap {
            waitpid(self.pid, None).unwrap();
        }
    }
}

/// Reads a word byte by byte, since another program may have to read the next one. Returns `None`
/// at the end.
fn line(words: &mut UnixStream) -> Option<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        words.read_exact(&mut byte).ok()?;
        match byte[0] {
            b'\n' => return String::from_utf8(line).ok(),
            byte => line.push(byte),
        }
    }
}

/// Goes on as the player that has executed this program.
pub(crate) fn obey_on(descriptor: &str, to: [&str; 2]) {
    // SAFETY: the program before this one has left the descriptor open for it.
    let words = unsafe { UnixStream::from_raw_fd(descriptor.parse().unwrap()) };
    Part::new(to, words, None).obey();
}

impl<'a> Part<'a> {
    fn new([listener, address]: [&'a str; 2], words: UnixStream, over: Option<UnixStream>) -> Self {
        Self {
            listener,
            address,
            words,
            over,
            connection: None,
        }
    }

    /// Reports first that it runs, and then obeys each word.
    fn obey(mut self) {
        self.words.write_all(b"\"done\"\n").unwrap();
        while let Some(word) = line(&mut self.words) {
            if word == "end" {
                return;
            }
            let reply = self.act(&word);
            self.words
                .write_all(format!("{reply}\n").as_bytes())
                .unwrap();
        }
    }

    fn act(&mut self, word: &str) -> String {
        let to = Address::parse(self.listener, self.address);
        match word {
            "send" => raw_http::send(self.connection.insert(to.connect())),
            "give" => raw_http::pass(
                self.over.as_ref().unwrap(),
                self.connection.as_ref().unwrap(),
            ),
            "take" => self.connection = Some(raw_http::receive(self.over.as_ref().unwrap())),
            "answer" => return quoted(&raw_http::answer(self.connection.as_ref().unwrap())),
            "again" => return quoted(&raw_http::fetch(&to.connect())),
            moved if moved.starts_with("move ") => {
                let cgroup = Path::new(&moved["move ".len()..]);
                fs::create_dir_all(cgroup).unwrap();
                fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
            }
            // It goes on with the same code, under the name of another program.
            shown if shown.starts_with("show ") => {
                forged_exe::show_as(&neighbour(&shown["show ".len()..]));
            }
            "settle" => {
                let (uid, gid) = (geteuid(), getegid());
                setresgid(gid, gid, gid).unwrap();
                setresuid(uid, uid, uid).unwrap();
            }
            "back" => {
                let alice = Uid::from_raw(ALICE);
                let group = nix::unistd::getgid();
                setresgid(group, group, group).unwrap();
                setresuid(alice, alice, alice).unwrap();
                self.execute("first");
            }
            other => self.execute(other.strip_prefix("become ").expect("a word that is known")),
        }
        "\"done\"".to_owned()
    }

    /// Executes another program of the folder, which reports itself that it runs.
    fn execute(&self, program: &str) -> ! {
        let program = neighbour(program);
        let words = raw_http::inheritable(self.words.try_clone().unwrap().into()).to_string();
        let words = [
            program.to_str().unwrap(),
            "obey",
            &words,
            self.listener,
            self.address,
        ];
        let words = words.map(|word| CString::new(word).unwrap());
        let Err(error) = execv(&words[0], &words);
        panic!("{}: {error}", program.display());
    }
}

/// Returns the path of another program in the folder.
fn neighbour(program: &str) -> PathBuf {
    std::env::current_exe().unwrap().with_file_name(program)
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
