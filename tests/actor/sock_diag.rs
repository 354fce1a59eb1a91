//! A program that runs as on a kernel without a handler for TCP in sock_diag(7), as long as a file
//! exists.
//!
//! A seccomp filter passes each `socket(AF_NETLINK, _, NETLINK_SOCK_DIAG)` of the program to a
//! supervisor (seccomp_unotify(2)). The program gets a socket to the supervisor instead of the
//! kernel's. The supervisor forwards requests to the kernel, or replies as the kernel does without
//! the module `tcp_diag`.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket, socketpair,
};
use nix::unistd::{ForkResult, execv, fork};

use crate::raw_http;

const NLMSG_ERROR: u16 = 2;

nix::ioctl_readwrite!(receive_call, b'!', 0, libc::seccomp_notif);
nix::ioctl_write_ptr!(add_descriptor, b'!', 3, libc::seccomp_notif_addfd);

/// Executes a program with its words. It has no handler for TCP while the file `lost` exists.
pub(crate) fn run_without(lost: &str, words: &[&str]) -> ! {
    let (over, from) = UnixStream::pair().unwrap();
    // SAFETY: this program has one thread.
    if let ForkResult::Child = unsafe { fork() }.unwrap() {
        set_pdeathsig(Signal::SIGKILL).unwrap();
        supervise(&raw_http::receive(&from), Path::new(lost));
    }
    raw_http::pass(&over, &filter_sockets());
    drop((over, from));
    execute(words)
}

/// Executes a program with its words, in this process.
pub(crate) fn execute(words: &[&str]) -> ! {
    let words: Vec<CString> = words
        .iter()
        .map(|word| CString::new(*word).unwrap())
        .collect();
    let Err(error) = execv(&words[0], &words);
    panic!("{:?}: {error}", words[0]);
}

/// Installs the filter, and returns the descriptor on which its calls are received.
fn filter_sockets() -> OwnedFd {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    // Words of `struct seccomp_data`: the call, and the first and third argument.
    let load = |offset: u32| statement(BPF_LD | BPF_W | BPF_ABS, offset);
    let is = |value: u32, skip: u8| libc::sock_filter {
        jf: skip,
        ..statement(BPF_JMP | BPF_JEQ | BPF_K, value)
    };
    let number = |value: i64| u32::try_from(value).unwrap();
    let mut program = [
        load(0),
        is(number(libc::SYS_socket), 5),
        load(16),
        is(number(libc::AF_NETLINK.into()), 3),
        load(32),
        is(number(libc::NETLINK_SOCK_DIAG.into()), 1),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_USER_NOTIF),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, and returns a new descriptor.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const filter,
        );
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        std::os::fd::FromRawFd::from_raw_fd(RawFd::try_from(fd).unwrap())
    }
}

pub(crate) fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: 0,
        jf: 0,
        k,
    }
}

/// Gives the program a socket for each call, until the program ends.
fn supervise(calls: &OwnedFd, lost: &Path) -> ! {
    loop {
        // SAFETY: all zero is a value of it, which the kernel requires.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one call to where the reference points.
        unsafe { receive_call(calls.as_raw_fd(), &raw mut call) }.unwrap();
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let reply_fd = libc::seccomp_notif_addfd {
            id: call.id,
            flags: u32::try_from(libc::SECCOMP_ADDFD_FLAG_SEND).unwrap(),
            srcfd: theirs.as_raw_fd().cast_unsigned(),
            newfd: 0,
            newfd_flags: libc::O_CLOEXEC.cast_unsigned(),
        };
        // SAFETY: the kernel reads one value. An error means that the program has ended.
        if unsafe { add_descriptor(calls.as_raw_fd(), &raw const reply_fd) }.is_ok() {
            let lost: PathBuf = lost.to_owned();
            thread::spawn(move || reply(&ours, &lost));
        }
    }
}

/// Replies to the requests on one socket.
fn reply(program: &OwnedFd, lost: &Path) {
    let kernel = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )
    .unwrap();
    let none = MsgFlags::empty();
    let (mut request, mut buffer) = ([0; 1024], [0; 1024]);
    while let Ok(length @ 1..) = recv(program.as_raw_fd(), &mut request, none) {
        let request = &request[..length];
        if lost.exists() {
            send(program.as_raw_fd(), &no_handler(request), none).unwrap();
        } else {
            send(kernel.as_raw_fd(), request, none).unwrap();
            let length = recv(kernel.as_raw_fd(), &mut buffer, none).unwrap();
            send(program.as_raw_fd(), &buffer[..length], none).unwrap();
        }
    }
}

/// Returns `struct nlmsghdr` and `struct nlmsgerr` with ENOENT, as the kernel sends it both if it
/// has no such socket and if it has no handler.
fn no_handler(request: &[u8]) -> Vec<u8> {
    let header = &request[..16];
    let mut reply = 36_u32.to_ne_bytes().to_vec();
    reply.extend(NLMSG_ERROR.to_ne_bytes());
    reply.extend([0; 2]);
    reply.extend(&header[8..]);
    reply.extend((-libc::ENOENT).to_ne_bytes());
    reply.extend(header);
    reply
}
