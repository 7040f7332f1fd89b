//! Stores a label and some bytes in a cache service, reads both, and prints the server's counters.
//!
//! `afterimage cache --bytes 64MiB`, then
//! `cargo run -p afterimage-wire --example cache -- 127.0.0.1:7401`

use std::process::ExitCode;
use std::time::Duration;

use afterimage_wire::client::{Expect, Report};
use afterimage_wire::{CacheClient, CallError, ClientOptions};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        eprintln!("usage: cache HOST:PORT");
        return ExitCode::FAILURE;
    };
    match talk(&address).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cache: {}", Report(&error));
            ExitCode::FAILURE
        }
    }
}

async fn talk(address: &str) -> Result<(), CallError> {
    let options = ClientOptions::new().expect(Expect::Cache).fail_fast(true);
    let cache = CacheClient::connect(address, options).await?;
    // A write of a label has no reply. A later read on the same connection sees it.
    cache.set(42, 7)?;
    println!("labels: {:?}", cache.get_many(&[42, 43]).await?);
    let key = *b"sixteen byte key";
    cache.write_bytes(&key, b"any bytes", Some(Duration::from_secs(60))).await?;
    println!("bytes: {:?}", cache.read_bytes(&key).await?);
    // The same connection serves all kinds of requests.
    let stats = cache.admin().stats().await?;
    println!("{} hits, {} misses", stats.counter_value("hits"), stats.counter_value("misses"));
    cache.close().await;
    Ok(())
}
