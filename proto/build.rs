//! Compiles the .proto files without protoc.
use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = [
        "types",
        "objects",
        "store",
        "control",
        "dispatcher",
        "ca",
        "raft",
        "node",
    ]
    .map(|name| format!("swarm/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    // For gRPC reflection.
    std::fs::write(
        out.join("swarm_descriptor.bin"),
        descriptors.encode_to_vec(),
    )?;
    tonic_prost_build::configure()
        .codec_path("crate::codec::LeanCodec")
        .bytes(".")
        // Maps in order: equal objects have equal bytes (snapshots, digests).
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
