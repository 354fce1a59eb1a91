//! A file system of this process's own that stops answering: one directory with one file, over `/dev/fuse` itself, as
//! linux/fuse.h has its messages.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
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
/// `FOPEN_DIRECT_IO`, and `FOPEN_KEEP_CACHE`, without which to open the file waits for its pages.
const DIRECT_IO: u32 = 1;
const KEEP_CACHE: u32 = 2;
/// The file's inode; the directory's is 1.
const FILE: u64 = 2;
const FILE_SIZE: u64 = 1 << 20;
/// For how many seconds the kernel believes what it was told of the file, but not of its name.
const VALID: u64 = 3600;

/// What is never answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hangs {
    /// What is read of the file.
    Read,
    /// Where the file is, once it has been opened.
    Lookup,
}

/// A mounted file system. It ends with the value.
pub(crate) struct HangingFiles {
    directory: PathBuf,
    server: Option<Child>,
    asked: UnixStream,
}

impl HangingFiles {
    /// Mounts it, in a mount namespace of this process's own.
    pub(crate) fn mount_privately(hangs: Hangs) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let directory = std::env::temp_dir().join(format!("awsvid-fuse-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        Self::mount(directory, hangs)
    }

    /// Mounts it here, where others see it too.
    pub(crate) fn mount(directory: PathBuf, hangs: Hangs) -> Self {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        mount(Some("hanging"), &directory, Some("fuse"), MsFlags::empty(), Some(&*options)).unwrap();
        let (tell, asked) = UnixStream::pair().unwrap();
        let server = child(|_| {
            serve(&device, hangs, || (&tell).write_all(b"x").unwrap());
            String::new()
        });
        Self { directory, server: Some(server), asked }
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.directory.join("file")
    }

    /// Waits until somebody has asked for something that is not answered.
    pub(crate) fn await_asked(&self) {
        (&self.asked).read_exact(&mut [0]).unwrap();
    }
}

impl Drop for HangingFiles {
    fn drop(&mut self) {
        // Whoever waits for an answer gets an error.
        umount2(&self.directory, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).unwrap();
        if let Some(server) = self.server.take() {
            let _ = kill(server.pid, Signal::SIGKILL);
            server.reap();
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Answers all but what `hangs` says; calls `on_hang` for that.
fn serve(mut device: &File, hangs: Hangs, on_hang: impl Fn()) {
    let mut opened = 0;
    let mut request = vec![0; 1 << 20];
    // Ends with the mount.
    while let Ok(length) = device.read(&mut request) {
        let header = &request[..length];
        let number = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let (opcode, unique) = (number(4), &header[8..16]);
        let node = u64::from_ne_bytes(header[16..24].try_into().unwrap());
        let answer: Result<Vec<u8>, i32> = match opcode {
            INIT => Ok(init()),
            LOOKUP if !header[40..].starts_with(b"file\0") => Err(-libc::ENOENT),
            LOOKUP if hangs == Hangs::Read || opened == 0 => Ok(entry()),
            GETATTR => Ok([&VALID.to_ne_bytes()[..], &[0; 8], &attributes(node)].concat()),
            OPEN => {
                opened += 1;
                // The first who opens it reads through the page cache, and the next ones beside it.
                Ok(open(if opened == 1 { KEEP_CACHE } else { DIRECT_IO | KEEP_CACHE }))
            }
            OPENDIR => Ok(open(0)),
            STATFS => Ok(vec![0; 80]),
            RELEASE | RELEASEDIR | FLUSH | ACCESS => Ok(Vec::new()),
            FORGET | BATCH_FORGET => continue,
            READ if hangs == Hangs::Lookup => Ok(Vec::new()),
            LOOKUP | READ => {
                on_hang();
                continue;
            }
            _ => Err(-libc::ENOSYS),
        };
        let (error, body) = answer.map_or_else(|error| (error, Vec::new()), |body| (0, body));
        let length = u32::try_from(16 + body.len()).unwrap();
        let message = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), unique, &body].concat();
        let _ = device.write_all(&message);
    }
}

/// `struct fuse_init_out`: version 7.31, and nothing of what may be left out.
fn init() -> Vec<u8> {
    let words: [u32; 16] = [7, 31, 0, 0, 12 | 12 << 16, 1 << 17, 1, 256, 0, 0, 0, 0, 0, 0, 0, 0];
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `struct fuse_entry_out`. The name is to be looked up each time.
fn entry() -> Vec<u8> {
    let words: [u64; 5] = [FILE, 0, 0, VALID, 0];
    words.iter().flat_map(|word| word.to_ne_bytes()).chain(attributes(FILE)).collect()
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, links, size) = if node == FILE { (0o100_755, 1, FILE_SIZE) } else { (0o40_755, 2, 0) };
    let long: [u64; 6] = [node, size, size / 512, 0, 0, 0];
    let short: [u32; 10] = [0, 0, 0, mode, links, 0, 0, 0, 4096, 0];
    long.iter().flat_map(|word| word.to_ne_bytes()).chain(short.iter().flat_map(|word| word.to_ne_bytes())).collect()
}

/// `struct fuse_open_out`.
fn open(flags: u32) -> Vec<u8> {
    [&7_u64.to_ne_bytes()[..], &flags.to_ne_bytes(), &[0; 4]].concat()
}

/// Whether a process sleeps so that only the end of it wakes it, as one does that waits for a lock or for such a file.
pub(crate) fn is_stuck(pid: nix::unistd::Pid) -> bool {
    let status = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:\tD"))
}
