//! A program that runs as on a kernel before Linux 6.5, which has no `SO_PEERPIDFD`.

use crate::sock_diag::{execute, statement};

/// The number of the option in asm-generic/socket.h.
const SO_PEERPIDFD: u32 = 77;

/// Executes a program with its words. A seccomp filter fails each getsockopt(2) of the option, as
/// such a kernel does.
pub(crate) fn run_without(words: &[&str]) -> ! {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    // Words of `struct seccomp_data`: the call, and its second and third argument.
    let load = |offset: u32| statement(BPF_LD | BPF_W | BPF_ABS, offset);
    let is = |value: u32, skip: u8| libc::sock_filter {
        jf: skip,
        ..statement(BPF_JMP | BPF_JEQ | BPF_K, value)
    };
    let number = |value: i64| u32::try_from(value).unwrap();
    let missing = libc::SECCOMP_RET_ERRNO | number(libc::ENOPROTOOPT.into());
    let mut program = [
        load(0),
        is(number(libc::SYS_getsockopt), 5),
        load(24),
        is(number(libc::SOL_SOCKET.into()), 3),
        load(32),
        is(SO_PEERPIDFD, 1),
        statement(BPF_RET | BPF_K, missing),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
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
