use super::*;

const C: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const U: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";

fn path(text: &str) -> CgroupPath {
    CgroupPath::parse(text).unwrap()
}

#[test]
fn container_paths_are_recognized() {
    let u_ = U.replace('-', "_");
    let paths = [
        format!("/kubepods/burstable/pod{U}/{C}"),
        format!(
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{u_}.slice/cri-containerd-{C}.scope"
        ),
        format!("/system.slice/docker-{C}.scope"),
        format!("/a/crio-{C}.scope"),
        format!("/docker/{C}"),
        format!("/kubepods-besteffort-pod{u_}.slice:cri-containerd:{C}"),
        "/kubelet/pod2732ca68f6358eba7703fb6f82a25c94".to_owned(),
        format!("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{C}.scope"),
        format!("/user.slice/user-1002.slice/user@1002.service/kubepods/besteffort/pod{U}/{C}"),
        format!("/x/{}", C.to_uppercase()),
        "/lxc.payload.web".to_owned(),
        "/machine.slice/machine-web.scope".to_owned(),
    ];
    for text in paths {
        assert!(path(&text).names_container(), "{text}");
    }
}

#[test]
fn container_name_is_equal_in_every_spelling() {
    let u_ = U.replace('-', "_");
    let (pod, id) = (Some(U.replace('-', "")), Some(C.to_owned()));
    let table = [
        ("/".to_owned(), None, None),
        ("/system.slice/billing.service".to_owned(), None, None),
        (
            format!("/kubepods/burstable/pod{U}/{C}"),
            pod.clone(),
            id.clone(),
        ),
        (
            format!("/kubepods/burstable/pod{U}/{C}/named/by/its/owner"),
            pod.clone(),
            id.clone(),
        ),
        (
            format!(
                "/kubepods.slice/kubepods-pod{u_}.slice/cri-containerd-{}.scope",
                C.to_uppercase()
            ),
            pod.clone(),
            id.clone(),
        ),
        (
            format!("/kubepods-besteffort-pod{u_}.slice:cri-containerd:{C}"),
            pod,
            id.clone(),
        ),
        (format!("/docker/{C}"), None, id),
    ];
    for (text, pod, id) in table {
        assert_eq!(
            path(&text).container(),
            Ok(ContainerName { pod, id }),
            "{text}"
        );
    }
    let nested = [
        format!("/docker/{C}/{C}"),
        format!("/docker/{C}/kubepods/pod{U}/{C}"),
        format!("/docker/{C}/pod{U}"),
        format!("/kubepods/pod{U}/{C}/docker/{C}"),
        format!("/kubepods/pod{U}/pod{U}/{C}"),
    ];
    for text in nested {
        assert_eq!(path(&text).container(), Err(NestedContainer), "{text}");
    }
}

#[test]
fn host_cgroups_are_not_containers() {
    let paths = [
        "/".to_owned(),
        "/system.slice/billing.service".to_owned(),
        "/user.slice/user-1001.slice/session-3.scope".to_owned(),
        format!("/a/{C}0"),
        format!("/a/{}", &C[1..]),
        "/system.slice/podman-like.service".to_owned(),
    ];
    for text in paths {
        assert!(!path(&text).names_container(), "{text}");
    }
}

#[test]
fn systemd_unit_is_the_outermost() {
    let table = [
        ("/system.slice/billing.service", Some("billing.service")),
        (
            "/system.slice/system-shop.slice/shop@1.service/worker",
            Some("shop@1.service"),
        ),
        (
            "/user.slice/user-1002.slice/user@1002.service/billing.service",
            Some("user@1002.service"),
        ),
        (
            "/user.slice/user-1002.slice/session-3.scope",
            Some("session-3.scope"),
        ),
        ("/somewhere/billing.service", None),
        ("/system.slice", None),
        ("/", None),
    ];
    for (text, unit) in table {
        assert_eq!(path(text).systemd_unit(), unit, "{text}");
    }
}

#[test]
fn workload_is_the_prefix_of_one_workload() {
    let u_ = U.replace('-', "_");
    let pod = format!("/kubepods/burstable/pod{U}");
    let slice =
        format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{u_}.slice");
    let table = [
        (format!("{pod}/{C}"), pod.as_str(), WorkloadKind::Pod),
        (
            format!("{pod}/{C}/named/by/its/owner"),
            &pod,
            WorkloadKind::Pod,
        ),
        (
            format!("{slice}/cri-containerd-{C}.scope"),
            &slice,
            WorkloadKind::Pod,
        ),
        (
            "/system.slice/a.service/below".to_owned(),
            "/system.slice/a.service",
            WorkloadKind::Unit,
        ),
        // A person has one workload, whatever the number of sessions, user units and containers
        // it starts.
        (
            "/user.slice/user-7.slice/session-3.scope".to_owned(),
            "/user.slice/user-7.slice",
            WorkloadKind::Person,
        ),
        (
            format!(
                "/user.slice/user-7.slice/user@7.service/user.slice/libpod-{C}.scope/container"
            ),
            "/user.slice/user-7.slice",
            WorkloadKind::Person,
        ),
        // A user gets no second workload if it names pods below its own unit.
        (
            format!("/user.slice/user-7.slice/user@7.service/pod{U}"),
            "/user.slice/user-7.slice",
            WorkloadKind::Person,
        ),
        (
            "/system.slice/user-7.slice/x".to_owned(),
            "/system.slice/user-7.slice/x",
            WorkloadKind::Unit,
        ),
        (
            "/user.slice/user-x.slice/x".to_owned(),
            "/user.slice/user-x.slice/x",
            WorkloadKind::Unit,
        ),
        (format!("/own/pod{U}"), "/own", WorkloadKind::Unit),
        (
            format!("/docker/{C}/x"),
            &format!("/docker/{C}"),
            WorkloadKind::Container,
        ),
        (
            format!("/system.slice/docker-{C}.scope/init.scope"),
            &format!("/system.slice/docker-{C}.scope"),
            WorkloadKind::Container,
        ),
        (
            "/machine.slice/machine-web.scope/payload".to_owned(),
            "/machine.slice/machine-web.scope",
            WorkloadKind::Container,
        ),
        ("/own.slice".to_owned(), "/own.slice", WorkloadKind::Unit),
        ("/".to_owned(), "/", WorkloadKind::Unit),
    ];
    for (text, part, kind) in table {
        let (found, found_kind) = path(&text).workload();
        assert_eq!((found.as_str(), found_kind), (part, kind), "{text}");
    }
}

#[test]
fn service_manager_cgroups_are_recognized() {
    for (text, is) in [
        ("/init.scope", true),
        ("/system.slice/web.socket", true),
        ("/user.slice/user-7.slice/user@7.service/init.scope", true),
        (
            "/user.slice/user-7.slice/user@7.service/app.slice/web.socket",
            true,
        ),
        ("/system.slice/web.service", false),
        ("/system.slice/socket.service", false),
        ("/init", false),
        ("/", false),
    ] {
        assert_eq!(path(text).is_service_managers(), is, "{text}");
    }
}

#[test]
fn lines_accept_colons_in_paths() {
    let text = "9:name=systemd:/a\n0::/kubelet:cri:x\n1:cpu\n";
    assert_eq!(
        lines(text).collect::<Vec<_>>(),
        [("name=systemd", "/a"), ("", "/kubelet:cri:x")]
    );
}

#[test]
fn parse_rejects_foreign_and_removed_paths() {
    for text in [
        "",
        "relative",
        "/../../kubepods",
        "/..",
        "/a/../b",
        "/system.slice/x.service (deleted)",
    ] {
        assert!(CgroupPath::parse(text).is_none(), "{text}");
    }
}
