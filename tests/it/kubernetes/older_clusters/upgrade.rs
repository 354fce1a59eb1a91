//! A cluster with the policy's `v1beta1` is upgraded to a version with `v1`.

use super::{API, CURRENT, DEFAULTS, GATE, OLDER, install, start, try_install};
use crate::harness::counterparts::folder;
use crate::harness::slow_only;

/// Helm reads the objects of its last release by the API that they were created with. The documents
/// have the order that keeps it there for one more release.
#[test]
fn release_of_v1beta1_is_upgraded_while_its_api_is_served() {
    const V1BETA1: &str = "MutatingAdmissionPolicy awsvid-environment, v1beta1)";
    const V1: &str = "MutatingAdmissionPolicy awsvid-environment, v1)";
    if !slow_only() {
        return;
    }
    let directory = folder();
    let Some(mut node) = start(directory.path(), OLDER, &[GATE, API]) else {
        return;
    };
    assert!(install(&node, DEFAULTS).contains(V1BETA1));

    node.replace_api_server(OLDER, CURRENT, &[]);
    let failed = try_install(&node, DEFAULTS);
    assert!(
        !failed.status.success()
            && failed
                .stderr
                .contains("no matches for kind \"MutatingAdmissionPolicy\""),
        "{failed:?}"
    );

    // The documented repair, which is also the right order.
    node.replace_api_server(CURRENT, CURRENT, &[API]);
    assert!(install(&node, DEFAULTS).contains(V1));
    node.replace_api_server(CURRENT, CURRENT, &[]);
    assert!(install(&node, DEFAULTS).contains(V1));
    let removed = node.helm(&["uninstall", "awsvid", "--namespace", "awsvid"]);
    removed.success("helm uninstall");
    let left = node.kubectl(&["get", "mutatingadmissionpolicies", "--output", "name"]);
    assert_eq!(left.success("the policies"), "");
}
