//! Scenes about a caller whom an agent is being asked about, by its number. The agent is the test's own, which holds it
//! back and tells this program, by words on standard input, when to go on; each has an answer of one line.
//!
//! This program is started from a folder with copies of it: `first`, which it is, `second`, and `root` and `group`, which
//! are setuid root and setgid [`BOB`].

use std::ffi::CString;
use std::fs;
use std::io::{BufRead, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::{Pid, Uid, execv, getegid, geteuid, setresgid, setresuid};

use crate::cgroup_moves::{self, Cgroup};
use crate::process::{become_user, child, reuse};
use crate::raw_http::{self, Address};
use crate::{ALICE, BOB};

/// A process that does what it is told to, word by word, whatever it runs.
struct Player {
    pid: Pid,
    words: UnixStream,
}

/// What a player is made of.
struct Part<'a> {
    listener: &'a str,
    address: &'a str,
    words: UnixStream,
    /// Over which a connection is given and taken.
    over: Option<UnixStream>,
    connection: Option<OwnedFd>,
}

/// The scene's caller is Alice. Her heir has the same user and program, and is given her connection where she is to change.
struct Stage<'a> {
    scene: &'a str,
    to: [&'a str; 2],
    alice: Player,
    heir: Player,
    /// Who has the caller's number after that.
    bob: Option<Player>,
    cgroup: Option<Cgroup>,
}

pub(crate) fn play(scene: &str, to: [&str; 2]) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let [alice, heir] = [ours, theirs].map(|over| Player::start(ALICE, to, over));
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
            "ask" => self.alice.does("ask"),
            "change" => self.change(),
            // As `newgrp` does and a busybox's `su`: from privileges back to the user, and to whatever he wants to run.
            "back" => self.alice.does("back"),
            "answer" if matches!(self.scene, "still" | "moved") => self.alice.does("answer"),
            "answer" if self.scene == "vanished" => "\"\"".to_owned(),
            "answer" => self.heir.does("answer"),
            "again" => self.again(),
            other if other.starts_with("alice ") => self.alice.does(&other["alice ".len()..]),
            other => panic!("no step {other}"),
        }
    }

    /// What becomes of the caller.
    fn change(&mut self) -> String {
        if !matches!(self.scene, "still" | "moved" | "vanished") {
            self.alice.does("give");
            self.heir.does("take");
        }
        match self.scene {
            "still" | "forked" => {}
            "vanished" | "exited" => self.alice.ends(true),
            "zombie" => self.alice.ends(false),
            "reused" => {
                self.alice.ends(true);
                self.bob = Player::reusing(self.alice.pid, BOB, self.to);
                if self.bob.is_none() {
                    return "\"the number is taken\"".to_owned();
                }
            }
            "executed" => drop(self.alice.does("become second")),
            "setuid" | "setuid-and-back" => drop(self.alice.does("become root")),
            "setgid" | "setgid-and-back" => drop(self.alice.does("become group")),
            "moved" => {
                let cgroup = self
                    .cgroup
                    .insert(Cgroup::new(&cgroup_moves::own_cgroup(), "moved"));
                cgroup.write("cgroup.procs", &self.alice.pid.to_string());
            }
            other => panic!("no scene {other}"),
        }
        "\"changed\"".to_owned()
    }

    /// Who is there now asks on a connection of its own.
    fn again(&mut self) -> String {
        match (self.scene, &mut self.bob) {
            (_, Some(bob)) => bob.does("again"),
            ("vanished" | "exited" | "zombie", None) => self.heir.does("again"),
            ("setuid" | "setgid", None) => {
                self.alice.does("settle");
                self.alice.does("again")
            }
            _ => self.alice.does("again"),
        }
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        if self.cgroup.is_some() {
            self.alice.ends(true);
        }
    }
}

impl Player {
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

    /// Once it says so it is the user that it is to be, and ends with this program.
    fn ready(mut self) -> Self {
        line(&mut self.words).expect("a player's first word");
        self
    }

    /// Tells it to, and waits until it has said that it is done, or what it was answered.
    fn does(&mut self, word: &str) -> String {
        self.words
            .write_all(format!("{word}\n").as_bytes())
            .unwrap();
        line(&mut self.words).expect("a player's word")
    }

    /// It ends; `reap`, or it stays a zombie.
    fn ends(&mut self, reap: bool) {
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

/// Byte by byte: another program may have to read the next one. `None` at the end.
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
    // SAFETY: whoever executed this program has left the descriptor open for it.
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

    /// Says first that it is there.
    fn obey(mut self) {
        self.words.write_all(b"\"done\"\n").unwrap();
        while let Some(word) = line(&mut self.words) {
            if word == "end" {
                return;
            }
            let said = self.act(&word);
            self.words
                .write_all(format!("{said}\n").as_bytes())
                .unwrap();
        }
    }

    fn act(&mut self, word: &str) -> String {
        let to = Address::parse(self.listener, self.address);
        match word {
            "ask" => raw_http::send(self.connection.insert(to.connect())),
            "give" => raw_http::pass(
                self.over.as_ref().unwrap(),
                self.connection.as_ref().unwrap(),
            ),
            "take" => self.connection = Some(raw_http::receive(self.over.as_ref().unwrap())),
            "answer" => return quoted(&raw_http::answer(self.connection.as_ref().unwrap())),
            "again" => return quoted(&raw_http::ask(&to.connect())),
            moved if moved.starts_with("move ") => {
                let cgroup = Path::new(&moved["move ".len()..]);
                fs::create_dir_all(cgroup).unwrap();
                fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
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

    /// Becomes another program of the folder, which says itself that it is there.
    fn execute(&self, program: &str) -> ! {
        let program = std::env::current_exe().unwrap().with_file_name(program);
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

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
