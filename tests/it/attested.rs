//! SPIRE attests the callers itself: the Delegated Identity API and the SPIFFE Broker API, with the real agent.

use serde_json::Value;

use crate::harness::counterparts::folder;
use crate::harness::counterparts::minio;
use crate::harness::world::{Setting, Source, World, id};

/// The demonstration, without one rule in awsvid's configuration.
fn each_process_has_its_own_entry(source: Source) {
    let folder = folder();
    let setting = Setting { source, ..Setting::default() };
    let Some(world) = World::start(folder.path(), &[(1001, "reader"), (1002, "other")], &setting) else { return };
    let trace = world.minio.trace();
    let probes = world.daemon.audit().len();

    assert_eq!(world.copy(1001).success("aws s3 cp as the reader"), "hello from the shop\n");
    let [issued] = &world.daemon.audit_after(probes)[..] else { panic!("one request, one audit record") };
    assert_eq!((&issued["outcome"], &issued["spiffe_id"]), (&Value::from("issued"), &Value::from(id("reader"))));
    let key = issued["access_key_id"].as_str().unwrap();
    let (head, body) = world.curl(1001);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["AccessKeyId"], key, "the same over the unix socket");
    assert_eq!(trace.count(minio::ASSUME_ROLE, key), 1);

    let refused = world.copy(1002);
    assert!(!refused.status.success() && refused.stderr.contains("403"), "{refused:?}");
    let others = world.daemon.audit_after(probes + 2);
    assert_eq!((&others[0]["outcome"], &others[0]["spiffe_id"]), (&Value::from("issued"), &Value::from(id("other"))));

    let nobody = world.copy(1003);
    assert!(!nobody.status.success() && nobody.stderr.contains("uid 1003"), "{nobody:?}");
    assert_eq!(world.daemon.audit_after(probes + 3)[0]["reason"], "no_identity");
    let (head, _) = world.curl(1003);
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    assert!(!world.daemon.log().contains("eyJ"), "a token was written");
    drop(trace);
}

#[test]
fn by_delegated_identity_each_process_has_its_own_entry() {
    each_process_has_its_own_entry(Source::Delegated);
}
