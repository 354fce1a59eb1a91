//! Generates the gRPC code from the vendored definitions in this folder.
//!
//! protox compiles them in pure Rust, so that a fresh machine needs no `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let definitions = ["spiffe/workload.proto"];
    for definition in definitions {
        println!("cargo:rerun-if-changed=proto/{definition}");
    }
    println!("cargo:rerun-if-changed=proto/build.rs");
    let descriptors = protox::compile(definitions, ["proto"])?;
    tonic_prost_build::configure().build_client(true).build_server(true).compile_fds(descriptors)?;
    Ok(())
}
