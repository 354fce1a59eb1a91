//! Generates the gRPC code from the vendored definitions in this folder, and records the revision
//! that is built.
//!
//! protox compiles them in pure Rust, so that a fresh machine needs no `protoc`.

mod revision;

use std::env;
use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    record_revision();
    generate()
}

/// Records the revision for `awsvid --version`: the variable `AWSVID_REVISION`, the commit of the
/// working copy, or that of an archive. It is recorded in release builds only, because each commit
/// would otherwise rebuild a developer's debug builds.
fn record_revision() {
    println!("cargo:rerun-if-env-changed=AWSVID_REVISION");
    let is_release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    if env::var_os("AWSVID_REVISION").is_some() || !is_release {
        return;
    }
    let folder = Path::new(".");
    println!("cargo:rerun-if-changed=proto/archived_commit");
    if let Some(revision) = revision::archived(include_str!("archived_commit")) {
        println!("cargo:rustc-env=AWSVID_REVISION={revision}");
    } else if let Some(revision) = revision::revision(folder) {
        println!("cargo:rustc-env=AWSVID_REVISION={revision}");
        // A change in one of these files changes the revision. Cargo rebuilds for them in any case.
        for path in revision::moves(folder)
            .iter()
            .map(String::as_str)
            .chain(revision::SOURCES)
        {
            println!("cargo:rerun-if-changed={path}");
        }
    }
}

fn generate() -> Result<(), Box<dyn Error>> {
    let definitions = [
        "spiffe/workload.proto",
        "spiffe/broker.proto",
        "spire/types.proto",
        "spire/delegatedidentity.proto",
    ];
    // Their derived `Debug` would print keys and tokens; src/svid/proto.rs has another.
    let secret = [
        ".X509SVID",
        ".JWTSVID",
        ".spiffe.broker.JWTSVID",
        ".spiffe.broker.X509SVID",
        ".spire.api.agent.delegatedidentity.v1.X509SVIDWithKey",
        ".spire.api.types.JWTSVID",
    ];
    for definition in definitions {
        println!("cargo:rerun-if-changed=proto/{definition}");
    }
    for script in ["build.rs", "revision.rs"] {
        println!("cargo:rerun-if-changed=proto/{script}");
    }
    let descriptors = protox::compile(definitions, ["proto"])?;
    let mut code = tonic_prost_build::configure()
        .build_client(true)
        .build_server(env::var_os("CARGO_FEATURE_DEV").is_some())
        .generate_default_stubs(true);
    for message in secret {
        code = code.skip_debug([message]);
    }
    code.compile_fds(descriptors)?;
    Ok(())
}
