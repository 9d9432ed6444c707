//! Compiles the protocol with protox, so that a Rust toolchain is all that a build needs.

use std::path::PathBuf;
use std::{env, fs, io};

const PROTOS: [&str; 4] = [
    "proto/common/v1/errors.proto",
    "proto/common/v1/types.proto",
    "proto/payment/v1/payment.proto",
    "proto/simulation/v1/simulation.proto",
];

/// Reflection serves this file's bytes.
const DESCRIPTORS: &str = "payment_sim_descriptor.bin";

#[allow(
    clippy::disallowed_methods,
    reason = "the ban is for the program; a build script has no Config"
)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    for path in PROTOS.iter().chain(&["build.rs"]) {
        println!("cargo:rerun-if-changed={path}");
    }

    // Imports are written from the repository's root, as the published contract writes them. Source
    // info carries the comments into `grpcurl describe` and into rustdoc.
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true).open_files(PROTOS)?;

    let out = env::var_os("OUT_DIR")
        .map(PathBuf::from)
        .ok_or_else(|| io::Error::other("cargo sets OUT_DIR for every build script"))?;
    fs::write(out.join(DESCRIPTORS), compiler.encode_file_descriptor_set())?;

    tonic_prost_build::configure()
        // Sorted maps: the same message always has the same bytes, which stored replies and the hashes
        // behind idempotency keys rely on.
        .btree_map(".")
        .codec_path("crate::api::codec::Codec")
        .build_server(true)
        .build_client(true)
        // The server runs on hyper itself; without this the client would need tonic's transport.
        .build_transport(false)
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
