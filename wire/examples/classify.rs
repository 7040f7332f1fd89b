//! Asks a memo or a classifier for the class of an image that is all zeros.
//!
//! `cargo run -p afterimage-wire --example classify -- 127.0.0.1:7400`

use std::error::Error;

use afterimage_wire::client::Expect;
use afterimage_wire::{Client, ClientOptions};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).ok_or("usage: classify HOST:PORT")?;
    let options = ClientOptions::new().expect(Expect::Classify);
    let client = Client::connect(address, options).await?;
    if let Some(welcome) = client.welcome() {
        println!("connected to {} ({})", welcome.name, welcome.service);
    }
    let label = client.classify(&[0; 28 * 28]).await?;
    println!("class {}, {:?}", label.label, label.origin);
    client.close().await;
    Ok(())
}
