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
        .boxed(".swarm.v1.ServiceSpec.task")
        .boxed(".swarm.v1.Task.spec")
        .boxed(".swarm.v1.Task.service_annotations")
        .compile_fds(descriptors)?;
    share(&out.join("swarm.v1.rs"), 3)
}

/// Makes a `Shared` of every `Box`: a service's tasks hold its spec, and each state that is kept holds all tasks.
/// prost can put a message into a box, and into nothing else.
fn share(generated: &std::path::Path, expected: usize) -> Result<(), Box<dyn std::error::Error>> {
    const BOX: &str = "::prost::alloc::boxed::Box<";
    let code = std::fs::read_to_string(generated)?;
    let found = code.matches(BOX).count();
    if found != expected {
        return Err(format!("{found} fields are in boxes instead of {expected}").into());
    }
    std::fs::write(generated, code.replace(BOX, "crate::Shared<"))?;
    Ok(())
}
