//! A file system of this process's own that stops responding: one directory with one file, over
//! `/dev/fuse` itself, with the messages of linux/fuse.h.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};

use crate::process::{Child, child};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
const ACCESS: u32 = 34;
const BATCH_FORGET: u32 = 42;
/// `FOPEN_DIRECT_IO`, and `FOPEN_KEEP_CACHE`, without which opening the file waits for its pages.
const DIRECT_IO: u32 = 1;
const KEEP_CACHE: u32 = 2;
/// The file's inode. The directory's is 1.
const FILE: u64 = 2;
const FILE_SIZE: u64 = 1 << 20;
/// The seconds for which the kernel caches the attributes of a file without another lookup. It
/// never caches the name.
const VALID: u64 = 3600;
/// A lookup of this name makes the file system stop responding. No file has it.
const CUE: &str = "hang";

/// The requests that never get a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hangs {
    /// Reads of the file.
    Read,
    /// Lookups and attributes of the file, from [`HangingFiles::hang`] on. The file is this
    /// program.
    Lookup,
}

/// A mounted file system. It ends with the value.
pub(crate) struct HangingFiles {
    directory: PathBuf,
    server: Option<Child>,
    lookups: UnixStream,
}

impl HangingFiles {
    /// Mounts it, in a mount namespace of this process's own.
    pub(crate) fn mount_privately(hangs: Hangs) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
        .unwrap();
        let directory = tempfile::Builder::new()
            .prefix("awsvid-fuse-")
            .tempdir()
            .unwrap();
        Self::mount(directory.keep(), hangs)
    }

    /// Mounts it here, where other processes see it too.
    pub(crate) fn mount(directory: PathBuf, hangs: Hangs) -> Self {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        mount(
            Some("hanging"),
            &directory,
            Some("fuse"),
            MsFlags::empty(),
            Some(&*options),
        )
        .unwrap();
        let (ready, lookups) = UnixStream::pair().unwrap();
        let server = child(|_| {
            Server::new(hangs).serve(&device, || (&ready).write_all(b"x").unwrap());
            String::new()
        });
        Self {
            directory,
            server: Some(server),
            lookups,
        }
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.directory.join("file")
    }

    /// Makes the requests of [`Hangs::Lookup`] hang from here on.
    fn hang(&self) {
        fs::metadata(self.directory.join(CUE)).unwrap_err();
    }

    /// Ends the server: from here on each request is an error.
    fn end_server(&mut self) {
        if let Some(server) = self.server.take() {
            let _ = kill(server.pid, Signal::SIGKILL);
            server.reap();
        }
    }

    /// Waits until the kernel has sent a request that gets no response.
    pub(crate) fn await_hanging_request(&self) {
        (&self.lookups).read_exact(&mut [0]).unwrap();
    }
}

impl Drop for HangingFiles {
    fn drop(&mut self) {
        // Each process that waits for a response gets an error.
        umount2(&self.directory, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).unwrap();
        self.end_server();
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Mounts such a file system, prints the path of its file, and obeys the words on standard input
/// until that ends. It prints `done` for each word.
pub(crate) fn obey() {
    let mut files = HangingFiles::mount_privately(Hangs::Lookup);
    println!("{}", files.file().display());
    for word in std::io::stdin().lock().lines() {
        match word.unwrap().as_str() {
            "hang" => files.hang(),
            "end" => files.end_server(),
            other => panic!("no word {other}"),
        }
        println!("done");
    }
}

/// The server that responds to the kernel.
struct Server {
    hangs: Hangs,
    content: Vec<u8>,
    size: u64,
    opened: usize,
    has_cue: bool,
}

impl Server {
    fn new(hangs: Hangs) -> Self {
        let content = match hangs {
            Hangs::Read => Vec::new(),
            Hangs::Lookup => fs::read("/proc/self/exe").unwrap(),
        };
        let size = u64::try_from(content.len()).unwrap().max(FILE_SIZE);
        Self {
            hangs,
            content,
            size,
            opened: 0,
            has_cue: false,
        }
    }

    /// Responds to all requests except those that hang, and calls `on_hang` for these.
    fn serve(mut self, mut device: &File, on_hang: impl Fn()) {
        let mut request = vec![0; 1 << 20];
        // Ends with the mount.
        while let Ok(length) = device.read(&mut request) {
            let header = &request[..length];
            let unique = &header[8..16];
            let answer = match self.answer(header) {
                Answer::Body(body) => Ok(body),
                Answer::Error(error) => Err(error),
                Answer::Nothing => continue,
                Answer::Hang => {
                    on_hang();
                    continue;
                }
            };
            let (error, body) = answer.map_or_else(|error| (-error, Vec::new()), |body| (0, body));
            let length = u32::try_from(16 + body.len()).unwrap();
            let message = [
                &length.to_ne_bytes()[..],
                &error.to_ne_bytes(),
                unique,
                &body,
            ]
            .concat();
            let _ = device.write_all(&message);
        }
    }

    fn answer(&mut self, request: &[u8]) -> Answer {
        let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        let (opcode, node) = (number(4), long(16));
        let name = |name: &str| request[40..].starts_with(name.as_bytes());
        let does_hang = match (opcode, self.hangs) {
            (READ, Hangs::Read) => true,
            (LOOKUP, Hangs::Lookup) => name("file\0") && self.has_cue,
            (GETATTR, Hangs::Lookup) => node == FILE && self.has_cue,
            _ => false,
        };
        if does_hang {
            return Answer::Hang;
        }
        let body = match opcode {
            INIT => init(),
            LOOKUP if name("file\0") => self.entry(),
            LOOKUP => {
                self.has_cue |= name(CUE);
                return Answer::Error(libc::ENOENT);
            }
            GETATTR => [
                &self.valid().to_ne_bytes()[..],
                &[0; 8],
                &self.attributes(node),
            ]
            .concat(),
            OPEN => {
                self.opened += 1;
                // If reads hang, the first open reads through the page cache, and the next ones
                // past it.
                let through_cache = self.hangs == Hangs::Lookup || self.opened == 1;
                open(if through_cache {
                    KEEP_CACHE
                } else {
                    DIRECT_IO | KEEP_CACHE
                })
            }
            READ => {
                let start = usize::try_from(long(48)).unwrap().min(self.content.len());
                let end = (start + usize::try_from(number(56)).unwrap()).min(self.content.len());
                self.content[start..end].to_vec()
            }
            OPENDIR => open(0),
            STATFS => vec![0; 80],
            RELEASE | RELEASEDIR | FLUSH | ACCESS => Vec::new(),
            FORGET | BATCH_FORGET => return Answer::Nothing,
            _ => return Answer::Error(libc::ENOSYS),
        };
        Answer::Body(body)
    }

    /// Builds `struct fuse_entry_out`. The kernel caches no name.
    fn entry(&self) -> Vec<u8> {
        let words: [u64; 5] = [FILE, 0, 0, self.valid(), 0];
        words
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .chain(self.attributes(FILE))
            .collect()
    }

    /// Returns the seconds for which the kernel may cache the file's attributes.
    fn valid(&self) -> u64 {
        if self.hangs == Hangs::Lookup {
            0
        } else {
            VALID
        }
    }

    /// Builds the bytes of `struct fuse_attr`.
    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, links, size) = if node == FILE {
            (0o100_755, 1, self.size)
        } else {
            (0o40_755, 2, 0)
        };
        let long: [u64; 6] = [node, size, size / 512, 0, 0, 0];
        let short: [u32; 10] = [0, 0, 0, mode, links, 0, 0, 0, 4096, 0];
        long.iter()
            .flat_map(|word| word.to_ne_bytes())
            .chain(short.iter().flat_map(|word| word.to_ne_bytes()))
            .collect()
    }
}

/// The server's reaction to a request.
enum Answer {
    Body(Vec<u8>),
    Error(i32),
    /// The kernel expects no response.
    Nothing,
    /// The kernel waits in vain.
    Hang,
}

/// Builds `struct fuse_init_out`: version 7.31, without optional parts.
fn init() -> Vec<u8> {
    let words: [u32; 16] = [
        7,
        31,
        0,
        0,
        12 | 12 << 16,
        1 << 17,
        1,
        256,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Builds the bytes of `struct fuse_open_out`.
fn open(flags: u32) -> Vec<u8> {
    [&7_u64.to_ne_bytes()[..], &flags.to_ne_bytes(), &[0; 4]].concat()
}

/// Returns whether a process sleeps so that only its end wakes it, as in a wait for a lock or for
/// such a file.
pub(crate) fn is_stuck(pid: nix::unistd::Pid) -> bool {
    let status = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"))
        .unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:\tD"))
}
