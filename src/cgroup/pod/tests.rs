use super::*;

const C: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const D: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";
const U: &str = "72f7f152-440c-66ac-9084-e0fc1d8a910c";
const U_: &str = "72f7f152_440c_66ac_9084_e0fc1d8a910c";
const V: &str = "00000000-440c-66ac-9084-e0fc1d8a910c";
const STATIC: &str = "2732ca68f6358eba7703fb6f82a25c94";

/// The expected result: the pod's UID and directory, the container's id and directory.
#[derive(Debug, PartialEq)]
enum ExpectedPod {
    Pod(String, String, Option<(String, String)>),
    No,
    Misplaced,
}

fn find(roots: &PodRoots, path: &str) -> ExpectedPod {
    let parsed = CgroupPath::parse(path).unwrap();
    match roots.find(&parsed) {
        Ok(Some(PodSegment {
            pod,
            directory,
            container,
        })) => {
            let container = pod
                .container
                .map(|id| (id.to_string(), path[..container.unwrap()].to_owned()));
            ExpectedPod::Pod(pod.uid.to_string(), path[..directory].to_owned(), container)
        }
        Ok(None) => ExpectedPod::No,
        Err(MisplacedPod) => ExpectedPod::Misplaced,
    }
}

/// Replaces `{C}` and the like by the constants.
fn text(template: &str) -> String {
    let names = [
        ("{C}", C),
        ("{D}", D),
        ("{U}", U),
        ("{U_}", U_),
        ("{V}", V),
        ("{S}", STATIC),
    ];
    names
        .into_iter()
        .fold(template.to_owned(), |text, (name, value)| {
            text.replace(name, value)
        })
}

fn check(roots: &PodRoots, table: &[(&str, &str, &str, &str)]) {
    for (pod, below, uid, id) in table {
        let (pod, path) = (text(pod), text(&format!("{pod}{below}")));
        let own = below
            .split('/')
            .nth(1)
            .map(|name| text(&format!("{pod}/{name}")))
            .unwrap_or_default();
        let container = (!id.is_empty()).then(|| (text(id), own));
        assert_eq!(
            find(roots, &path),
            ExpectedPod::Pod(text(uid), pod, container),
            "{path}"
        );
    }
}

#[test]
fn find_returns_pods_below_the_kubelets_roots() {
    let table = [
        ("/kubepods/burstable/pod{U}", "/{C}", "{U}", "{C}"),
        ("/kubepods/besteffort/pod{U}", "/{C}", "{U}", "{C}"),
        ("/kubepods/pod{U}", "/{C}", "{U}", "{C}"),
        ("/kubepods/pod{U}", "/crio-{C}", "{U}", "{C}"),
        ("/kubepods/pod{U}", "", "{U}", ""),
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{U_}.slice",
            "/cri-containerd-{C}.scope",
            "{U}",
            "{C}",
        ),
        (
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{U_}.slice",
            "/docker-{C}.scope",
            "{U}",
            "{C}",
        ),
        (
            "/kubepods.slice/kubepods-pod{U_}.slice",
            "/crio-{C}.scope",
            "{U}",
            "{C}",
        ),
        // crun creates a directory below the container's for its processes.
        (
            "/kubepods.slice/kubepods-pod{U_}.slice",
            "/crio-{C}.scope/container",
            "{U}",
            "{C}",
        ),
        (
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{U_}.slice",
            "/cri-containerd-{C}.scope",
            "{U}",
            "{C}",
        ),
        (
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{U_}.slice",
            "/cri-containerd-{C}.scope",
            "{U}",
            "{C}",
        ),
        ("/kubelet/kubepods/besteffort/pod{U}", "/{C}", "{U}", "{C}"),
        ("/kubepods/pod{S}", "/{C}", "{S}", "{C}"),
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{S}.slice",
            "/crio-{C}.scope",
            "{S}",
            "{C}",
        ),
        // Names that a container chooses below its own directory prove nothing.
        ("/kubepods/pod{U}", "/{C}/init", "{U}", "{C}"),
        ("/kubepods/pod{U}", "/{C}/docker/{D}", "{U}", "{C}"),
        (
            "/kubepods/pod{U}",
            "/{C}/kubepods/besteffort/pod{V}/{D}",
            "{U}",
            "{C}",
        ),
        (
            "/kubepods/pod{U}",
            "/{C}/kubepods.slice/kubepods-pod{V}.slice/crio-{D}.scope",
            "{U}",
            "{C}",
        ),
        ("/kubepods/pod{U}", "/crio-conmon-{C}", "{U}", ""),
        ("/kubepods/pod{U}", "/other/{D}", "{U}", ""),
        ("/kubepods/pod{U}", "/{C}0", "{U}", ""),
    ];
    check(&PodRoots::defaults(), &table);
    let upper = format!("/kubepods/pod{U}/{}", C.to_uppercase());
    assert_eq!(
        find(&PodRoots::defaults(), &upper),
        ExpectedPod::Pod(U.to_owned(), upper[..upper.len() - 65].to_owned(), None)
    );
}

#[test]
fn find_rejects_pod_names_at_other_paths() {
    let table = [
        "/user.slice/user-1002.slice/user@1002.service/kubepods/besteffort/pod{U}/{C}",
        "/user.slice/user-1002.slice/user@1002.service/kubepods.slice/kubepods-pod{U_}.slice/crio-{C}.scope",
        "/system.slice/billing.service/kubepods/pod{U}/{C}",
        "/pod{U}/{C}",
        "/a/kubepods/pod{U}/{C}",
        "/kubepods-besteffort-pod{U_}.slice:cri-containerd:{C}",
        "/docker/{D}/kubepods/besteffort/pod{U}/{C}",
        "/kubelet/pod{S}",
        // Names of one driver below the other's root, of another class, or of another root.
        "/kubepods.slice/pod{U}/{C}",
        "/kubepods/kubepods-pod{U_}.slice/{C}",
        "/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod{U_}.slice/crio-{C}.scope",
        "/kubepods.slice/kubepods-burstable.slice/kubepods-pod{U_}.slice/crio-{C}.scope",
        "/kubelet.slice/kubelet-kubepods.slice/kubepods-pod{U_}.slice/crio-{C}.scope",
        "/kubepods/guaranteed/pod{U}/{C}",
        "/kubepods/burstable/burstable/pod{U}/{C}",
        "/kubepods/burstable//pod{U}/{C}",
        "/kubepods2/pod{U}/{C}",
        // Spellings that no kubelet writes.
        "/kubepods/pod{U_}/{C}",
        "/kubepods.slice/kubepods-pod{U}.slice/crio-{C}.scope",
        "/kubepods/pod{U}0/{C}",
    ];
    for template in table {
        assert_eq!(
            find(&PodRoots::defaults(), &text(template)),
            ExpectedPod::Misplaced,
            "{template}"
        );
    }
    assert_eq!(
        find(
            &PodRoots::defaults(),
            &format!("/kubepods/pod{}/{C}", U.to_uppercase())
        ),
        ExpectedPod::Misplaced
    );
}

#[test]
fn find_returns_none_outside_pods() {
    let table = [
        "/",
        "/system.slice/billing.service",
        "/docker/{C}",
        "/system.slice/docker-{C}.scope",
        "/system.slice/crio-conmon-{C}.scope",
        "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{C}.scope",
        "/kubepods",
        "/kubepods/burstable",
        "/kubepods.slice/kubepods-burstable.slice",
        "/kubepods/other",
        "/kubepods/xpod{U}/{C}",
        "/system.slice/podman-like.service",
    ];
    for template in table {
        assert_eq!(
            find(&PodRoots::defaults(), &text(template)),
            ExpectedPod::No,
            "{template}"
        );
    }
}

#[test]
fn configured_root_replaces_the_defaults() {
    let at = |root: &str| PodRoots::at(CgroupPath::parse(&text(root)).unwrap());
    check(
        &at("/docker/{D}/kubelet/kubepods"),
        &[(
            "/docker/{D}/kubelet/kubepods/burstable/pod{U}",
            "/{C}",
            "{U}",
            "{C}",
        )],
    );
    let nested = "/system.slice/docker-{D}.scope/kubelet.slice/kubelet-kubepods.slice";
    check(
        &at(nested),
        &[(
            &format!("{nested}/kubelet-kubepods-pod{{U_}}.slice"),
            "/crio-{C}.scope",
            "{U}",
            "{C}",
        )],
    );
    assert_eq!(
        find(
            &at("/docker/{D}/kubelet/kubepods"),
            &text("/kubepods/pod{U}/{C}")
        ),
        ExpectedPod::Misplaced
    );
}

#[test]
fn pod_uid_has_the_spelling_of_kubernetes() {
    for uid in [U, STATIC] {
        assert_eq!(PodUid::parse(uid).unwrap().as_str(), uid);
    }
    assert!(PodUid::parse(STATIC).unwrap().is_static() && !PodUid::parse(U).unwrap().is_static());
    for text in [
        "",
        "-",
        U_,
        &U.to_uppercase(),
        &U[1..],
        &format!("{U}0"),
        &STATIC[1..],
        &format!("{STATIC}0"),
        "my-pod",
    ] {
        assert_eq!(PodUid::parse(text), None, "{text}");
    }
}
