use std::os::unix::net::UnixDatagram;

use super::*;
use crate::attest::sock_diag::tests::error_reply;

fn classified(
    reported: Option<u64>,
    own: Option<u64>,
    hides_cgroups: bool,
    is_new: bool,
) -> &'static str {
    match classify(
        reported,
        own,
        &KernelFacts {
            root: Some(1),
            hides_cgroups,
            is_new,
        },
    ) {
        Ok(()) => "works",
        Err(TcpUnsupported::NoCgroupId) => "none",
        Err(TcpUnsupported::WrongCgroupId) => "wrong",
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn classify_uses_the_version_only_in_doubt() {
    let table = [
        // The own cgroup: RHEL 9's 5.14, and 5.10 of the stable series from 2024 on.
        (Some(77), Some(77), false, false, "works"),
        (Some(77), Some(77), true, false, "works"),
        (Some(77), Some(77), true, true, "works"),
        // The root's cgroup instead of the own: a 5.10 with net_prio.
        (Some(1), Some(77), true, false, "wrong"),
        (Some(1), Some(77), false, false, "wrong"),
        (Some(78), Some(77), false, true, "wrong"),
        // No cgroup: Linux before 5.8.
        (None, Some(77), false, false, "none"),
        (None, None, false, true, "none"),
        // In the root cgroup old and new kernels report the same.
        (Some(1), Some(1), false, false, "works"),
        (Some(1), Some(1), true, true, "works"),
        (Some(1), Some(1), true, false, "wrong"),
        // The own cgroup is not visible from here.
        (Some(77), None, false, false, "works"),
        (Some(1), None, true, false, "wrong"),
    ];
    for (reported, own, hides_cgroups, is_new, expected) in table {
        assert_eq!(
            classified(reported, own, hides_cgroups, is_new),
            expected,
            "{reported:?} {own:?} {hides_cgroups} {is_new}"
        );
    }
}

#[test]
fn kernel_facts_are_read_from_mounts_and_release() {
    let mounts = "30 23 0:26 / /cgroup/unified rw - cgroup2 cgroup2 rw\n\
                  31 23 0:27 / /cgroup/net rw - cgroup cgroup rw,net_cls,net_prio\n";
    let hierarchies = CgroupMounts::find(mounts);
    let folder = tempfile::tempdir().unwrap();
    let cgroups = CgroupTree::at(
        folder.path().to_owned(),
        crate::cgroup::PodRoots::defaults(),
    );
    for (release, is_new) in [
        ("5.14.0-503.el9", false),
        ("5.15.0", true),
        ("6.1.0-9-amd64", true),
        ("4.18.0-553.el8", false),
        ("x", false),
    ] {
        let read = KernelFacts::read(&hierarchies, &cgroups, release);
        assert_eq!(
            (read.is_new, read.hides_cgroups),
            (is_new, true),
            "{release}"
        );
    }
    let none = CgroupMounts::find("30 23 0:26 / /cgroup rw - cgroup2 cgroup2 rw\n");
    assert!(!KernelFacts::read(&none, &cgroups, "6.1").hides_cgroups);
}

/// Works on any machine: the result is positive exactly if a lookup of this process's connection
/// returns its cgroup.
#[test]
fn try_tcp_agrees_with_a_real_lookup() {
    let tested = try_tcp(Path::new("/proc"));
    let reported = SockDiag::open()
        .ok()
        .and_then(|diag| own_socket(&diag).ok())
        .and_then(|socket| socket.cgroup_id);
    assert_eq!(
        tested.is_ok(),
        reported.is_some(),
        "{tested:?} {reported:?}"
    );
    let connected = sys::peer_pidfd(UnixStream::pair().unwrap().0.as_fd());
    assert_eq!(
        unix_support() == UnixSupport::Process,
        connected.is_ok_and(|pidfd| pidfd.is_some())
    );
}

/// Tests with a kernel that replies with this error about each socket. `None` is a socket for
/// queries that does not work at all.
fn with_replies(errno: Option<i32>) -> TcpUnsupported {
    let (ours, kernel) = UnixDatagram::pair().unwrap();
    match errno {
        Some(errno) => {
            let reply = std::thread::spawn(move || {
                let mut request = [0; 128];
                kernel.recv(&mut request).unwrap();
                let sequence = [request[8], request[9], request[10], request[11]];
                kernel.send(&error_reply(errno, sequence)).unwrap();
                kernel
            });
            let result = own_socket(&SockDiag::over(ours.into()));
            reply.join().unwrap();
            result.unwrap_err()
        }
        None => {
            drop(kernel);
            own_socket(&SockDiag::over(ours.into())).unwrap_err()
        }
    }
}

/// For a caller's socket ENOENT means that the caller has gone. For this process's own, which
/// exists, it means that the kernel has no handler for TCP.
#[test]
fn missing_handler_is_not_taken_for_a_missing_socket() {
    let failed = "a query to the kernel for the caller failed";
    for (errno, cause) in [
        (Some(libc::ENOENT), "it does not find a socket that exists"),
        (Some(libc::EINVAL), failed),
        (Some(libc::EPERM), failed),
        (None, failed),
    ] {
        let missing = with_replies(errno);
        assert_eq!(
            missing.to_string(),
            format!("sock_diag(7) does not work for TCP: {cause}"),
            "{errno:?}"
        );
        assert!(
            missing
                .fix(UnixSupport::NoPidfd)
                .contains("inet_diag and tcp_diag"),
            "{errno:?}"
        );
        let rejection = missing.rejection();
        assert_eq!(rejection.reason(), "unsupported_kernel", "{errno:?}");
        assert!(rejection.to_string().contains("tcp_diag"), "{errno:?}");
    }
}

/// Versions prove little: a rejection names the interface.
#[test]
fn rejections_name_what_is_missing() {
    let io = || io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    for (missing, words) in [
        (TcpUnsupported::NoCgroups, "no cgroup v2 tree is mounted"),
        (
            TcpUnsupported::NoCgroupId,
            "does not report the cgroup of a",
        ),
        (TcpUnsupported::WrongCgroupId, "wrong cgroup"),
        (TcpUnsupported::NoLoopback(io()), "the device lo"),
        (no_sock_diag(io()), "sock_diag(7)"),
    ] {
        let text = missing.rejection().to_string();
        assert!(text.contains(words) && !text.contains("5.15"), "{text}");
    }
}

#[test]
fn fix_proposes_the_unix_socket_only_where_it_serves_callers() {
    let missing = TcpUnsupported::NoCgroupId;
    for unix in [UnixSupport::Process, UnixSupport::Pid] {
        assert!(missing.fix(unix).contains("unix socket"), "{unix:?}");
    }
    let fix = missing.fix(UnixSupport::NoPidfd);
    assert!(
        !fix.contains("unix socket") && fix.contains("Linux 5.8"),
        "{fix}"
    );
}
