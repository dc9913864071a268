//! Compiles the contract with protox: no `protoc` on the machine.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    let files = [
        "vmsnap/v1/snapshot.proto",
        "vmsnap/v1/vm.proto",
        "vmsnap/v1/storage.proto",
        "vmsnap/v1/workflow.proto",
        "vmsnap/v1/inventory.proto",
        "vmsnap/v1/known_issue.proto",
        "vmsnap/v1/audit.proto",
    ];
    println!("cargo:rerun-if-changed=vmsnap");
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
