//! Turns the .proto file into Rust, without the C++ compiler of protocol buffers.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/classify.proto");
    let files = protox::compile(["classify.proto"], ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(files)?;
    Ok(())
}
