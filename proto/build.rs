//! Generates the gRPC code from the vendored definitions in this folder.
//!
//! protox compiles them in pure Rust, so that a fresh machine needs no `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let definitions =
        ["spiffe/workload.proto", "spiffe/broker.proto", "spire/types.proto", "spire/delegatedidentity.proto"];
    // Their derived `Debug` would print keys and tokens; src/svid/proto.rs has another.
    let secret = [".X509SVID", ".JWTSVID", ".spiffe.broker.JWTSVID", ".spire.api.types.JWTSVID"];
    for definition in definitions {
        println!("cargo:rerun-if-changed=proto/{definition}");
    }
    println!("cargo:rerun-if-changed=proto/build.rs");
    let descriptors = protox::compile(definitions, ["proto"])?;
    let mut code = tonic_prost_build::configure().build_client(true).build_server(true).generate_default_stubs(true);
    for message in secret {
        code = code.skip_debug([message]);
    }
    code.compile_fds(descriptors)?;
    Ok(())
}
