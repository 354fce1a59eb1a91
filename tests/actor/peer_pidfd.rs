//! A program that runs as on an older kernel, without some facts about a pidfd.

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};

use crate::sock_diag::{execute, statement};

/// The number of the option in asm-generic/socket.h.
const SO_PEERPIDFD: u32 = 77;
/// Type and number of the request in linux/pidfd.h. Its upper bits have the size of the structure,
/// which newer kernels extend.
const PIDFD_GET_INFO: u32 = 0xff0b;

/// Executes a program with its words as before Linux 6.5: each getsockopt(2) of `SO_PEERPIDFD`
/// fails.
pub(crate) fn run_without(words: &[&str]) -> ! {
    let mut program = [
        load(0),
        is(number(libc::SYS_getsockopt), 5),
        load(24),
        is(number(libc::SOL_SOCKET.into()), 3),
        load(32),
        is(SO_PEERPIDFD, 1),
        fail(libc::ENOPROTOOPT),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    run_behind(&mut program, words)
}

/// Executes a program with its words as before Linux 6.13: each ioctl(2) `PIDFD_GET_INFO` fails.
pub(crate) fn run_without_info(words: &[&str]) -> ! {
    let mut program = [
        load(0),
        is(number(libc::SYS_ioctl), 4),
        load(24),
        statement(BPF_ALU | BPF_AND | BPF_K, 0xffff),
        is(PIDFD_GET_INFO, 1),
        fail(libc::ENOTTY),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    run_behind(&mut program, words)
}

/// Loads a word of `struct seccomp_data`: the call at 0, its second argument at 24, its third at
/// 32.
fn load(offset: u32) -> libc::sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

/// Skips the next `skip` statements unless the loaded word is `value`.
fn is(value: u32, skip: u8) -> libc::sock_filter {
    libc::sock_filter {
        jf: skip,
        ..statement(BPF_JMP | BPF_JEQ | BPF_K, value)
    }
}

fn fail(errno: i32) -> libc::sock_filter {
    let value = libc::SECCOMP_RET_ERRNO | number(errno.into());
    statement(BPF_RET | BPF_K, value)
}

fn number(value: i64) -> u32 {
    u32::try_from(value).unwrap()
}

/// Executes a program whose system calls pass this seccomp filter.
fn run_behind(program: &mut [libc::sock_filter], words: &[&str]) -> ! {
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const filter,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    execute(words)
}
