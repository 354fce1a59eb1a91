//! JWT-SVIDs from the real SPIRE that are valid for seconds only: they are used as long as STS
//! accepts them.

use std::time::Duration;

use crate::harness::counterparts::folder;
use crate::harness::counterparts::process::await_some;
use crate::harness::env::{Env, Setting, Source, id};

const TIMEOUT: Duration = Duration::from_secs(30);
const READER: u32 = 51_001;
/// SPIRE's default is five minutes.
const TOKEN_LIFETIMES: [&str; 2] = ["30", "20"];

fn check_short_lived_tokens(source: Source) {
    let folder = folder();
    // MinIO's shortest session is a quarter of an hour, so each life takes a role of its own.
    let setting = Setting::of(source);
    let Some(mut env) = Env::start(folder.path(), &[(READER, "reader")], &setting) else {
        return;
    };
    let role = env.minio.role_arn();
    for life in TOKEN_LIFETIMES {
        env.unregister(&id("reader"));
        let owner = if source == Source::Rules { 0 } else { READER };
        env.register(
            &id("reader"),
            &[&format!("unix:uid:{owner}")],
            &["-jwtSVIDTTL", life],
        );
        // The agent would otherwise keep returning the token that it has.
        env.spire.stop_agent();
        env.start_agent();
        let name = format!("life-{life}");
        let text = format!(
            "{}\n[[role]]\nname = {name:?}\nspiffe_id = \"{}\"\nrole_arn = \"{role}\"\n",
            env.daemon.text(),
            id("*")
        );
        assert!(env.daemon.reload_text(&text));
        for listener in ["unix", "tcp"] {
            let ask = || {
                env.curl_by(
                    "/usr/bin/curl".as_ref(),
                    READER,
                    listener,
                    &format!("/{name}"),
                )
            };
            // An agent that has just started returns awsvid's own identity a moment later.
            await_some(
                &format!("credentials over {listener} for {life} s"),
                TIMEOUT,
                || ask().0.starts_with("HTTP/1.1 200").then_some(()),
            );
        }
    }
}

#[test]
fn short_lived_tokens_are_exchanged_with_rules() {
    check_short_lived_tokens(Source::Rules);
}

#[test]
fn short_lived_tokens_are_exchanged_with_spire_delegated() {
    check_short_lived_tokens(Source::Delegated);
}

#[test]
fn short_lived_tokens_are_exchanged_with_spiffe_broker() {
    check_short_lived_tokens(Source::Broker);
}
