//! The fuzz target for parsers of the kernel's output, with arbitrary bytes.

use std::net::{Ipv4Addr, SocketAddr};

use crate::attest::cgroup_mounts::CgroupMounts;
use crate::attest::cgroup_tree::CgroupTree;
use crate::attest::{proc_files, sock_diag, status};
use crate::caller::Groups;
use crate::cgroup::{CgroupPath, PodRoots, WorkloadKind};

/// The connection that the parsers are queried about, as in the seeds.
const CLIENT: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 40000);
const SERVER: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 974);

/// Checks that a reply is accepted for at most one connection, and never for a socket without an
/// owner.
pub(crate) fn sock_diag(reply: &[u8]) -> bool {
    let (client, server) = (SocketAddr::from(CLIENT), SocketAddr::from(SERVER));
    let Ok(socket) = sock_diag::parse(reply, client, server) else {
        return false;
    };
    assert_ne!(socket.inode, 0);
    let mut others = [client, client, client];
    others[0].set_port(40001);
    others[1].set_ip(Ipv4Addr::new(127, 0, 0, 2).into());
    others[2].set_ip(std::net::Ipv6Addr::LOCALHOST.into());
    for other in others {
        assert!(
            sock_diag::parse(reply, other, server).is_err(),
            "believed about {other}, too"
        );
        assert!(
            sock_diag::parse(reply, client, other).is_err(),
            "believed about a connection to {other}, too"
        );
    }
    assert!(
        sock_diag::parse(reply, server, client).is_err(),
        "the server's own end is not the client's"
    );
    // A v4-mapped address equals the IPv4 address.
    let mapped = |(ip, port): (Ipv4Addr, u16)| SocketAddr::from((ip.to_ipv6_mapped(), port));
    assert_eq!(
        sock_diag::parse(reply, mapped(CLIENT), mapped(SERVER)),
        Ok(socket)
    );
    for end in 0..reply.len() {
        assert!(
            sock_diag::parse(&reply[..end], client, server).is_err() || end >= 16 + 72,
            "believed without its end"
        );
    }
    true
}

/// Checks the parsers of `/proc/<pid>/stat`, `status`, `uid_map` and `cgroup`.
pub(crate) fn proc(text: &str) -> bool {
    let start = proc_files::start_time(text);
    if let Some(start) = start {
        // The name that the process chooses does not matter.
        assert_eq!(
            proc_files::start_time(&format!("7 (a) R 1 (b) {text}")),
            Some(start)
        );
    }
    let lines = [
        ("Uid", 4),
        ("Gid", 4),
        ("Groups", Groups::MAX_GROUPS),
        ("NSpid", 33),
    ];
    let found = status::numbers_of(text.as_bytes(), lines, 4096);
    // The chunks in which the file arrives do not matter.
    assert_eq!(found, status::numbers_of(text.as_bytes(), lines, 1));
    if let Ok(found) = &found {
        assert!(
            found
                .iter()
                .zip(lines)
                .all(|(numbers, (_, most))| numbers.len() <= most)
        );
        let line = |(numbers, (name, _)): (&Vec<u32>, (&str, usize))| {
            format!(
                "{name}:\t{} \n",
                numbers
                    .iter()
                    .map(u32::to_string)
                    .collect::<Vec<_>>()
                    .join("\t")
            )
        };
        let again: String = found.iter().zip(lines).map(line).collect();
        let again = format!("Name:\tUid: 0\n{again}");
        assert_eq!(
            status::numbers_of(again.as_bytes(), lines, 4096).as_ref(),
            Ok(found)
        );
    }
    if proc_files::is_identity_map(text) {
        assert!(text.split_ascii_whitespace().eq(["0", "0", "4294967295"]));
    }
    for (_, path) in crate::cgroup::lines(text) {
        assert!(text.contains(path) && !path.contains('\n'));
    }
    start.is_some() || found.is_ok() || proc_files::is_identity_map(text)
}

/// Checks `/proc/self/mountinfo`: only a whole tree of cgroup v2 is accepted.
pub(crate) fn mountinfo(text: &str) -> bool {
    let tree = CgroupTree::find(&CgroupMounts::find(text), PodRoots::defaults());
    if let Some(tree) = &tree {
        assert!(
            text.contains(" - cgroup2 ")
                || text.ends_with(" - cgroup2")
                || text.contains(" - cgroup2\n"),
            "{tree:?}"
        );
    }
    tree.is_some()
}

/// Checks cgroup paths: cgroups below a path do not change its workload, and no path leads out of
/// the tree.
pub(crate) fn cgroup(text: &str) -> bool {
    let Some(path) = CgroupPath::parse(text) else {
        return false;
    };
    assert_eq!(path.as_str(), text);
    assert!(text.starts_with('/') && !text.split('/').any(|segment| segment == ".."));
    let (part, kind) = path.workload();
    assert!(
        text.starts_with(part.as_str())
            && matches!(text.as_bytes().get(part.as_str().len()), None | Some(b'/')),
        "{part:?} of {text}"
    );
    assert!(kind != WorkloadKind::Pod || path.names_container());
    if let Some(unit) = path.systemd_unit() {
        assert!(text.split('/').any(|segment| segment == unit));
    }
    // Names that a workload can choose below its own directory change neither of these.
    let Some(below) = CgroupPath::parse(&format!("{text}/system.slice/other.service")) else {
        return true;
    };
    if path.systemd_unit().is_some() {
        assert_eq!(below.systemd_unit(), path.systemd_unit());
        let (there, _) = below.workload();
        assert!(
            there == part || part.as_str() == text,
            "{there:?} and {part:?}"
        );
    }
    assert!(!path.names_container() || below.names_container());
    true
}
