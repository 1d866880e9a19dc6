//! Compiles `proto/` to Rust and to the descriptor set that reflection serves.

use std::path::PathBuf;

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["migration", "node", "peer"].map(|name| format!("ramferry/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["proto"])?;
    let path = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("no OUT_DIR")?).join("descriptors.bin");
    std::fs::write(path, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".ramferry.v1.DeviceState").compile_fds(descriptors)?;
    Ok(())
}
