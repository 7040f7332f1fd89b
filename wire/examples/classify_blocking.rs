//! Asks a memo or a classifier for the class of an image that is all zeros, without an async
//! runtime.
//!
//! `cargo run -p afterimage-wire --example classify_blocking -- 127.0.0.1:7400`

use std::error::Error;

use afterimage_wire::ClientOptions;
use afterimage_wire::blocking::Client;
use afterimage_wire::client::Expect;

fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).ok_or("usage: classify_blocking HOST:PORT")?;
    let options = ClientOptions::new().expect(Expect::Classify);
    let client = Client::connect(address, options)?;
    if let Some(welcome) = client.welcome() {
        println!("connected to {} ({})", welcome.name, welcome.service);
    }
    let label = client.classify(&[0; 28 * 28])?;
    println!("class {}, {:?}", label.label, label.origin);
    client.close();
    Ok(())
}
