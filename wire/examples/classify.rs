//! Sends an image of zeros to a memo or a classifier and prints its label.
//!
//! `cargo run -p afterimage-wire --example classify -- 127.0.0.1:7400`

use std::process::ExitCode;

use afterimage_wire::client::{Expect, Report};
use afterimage_wire::{CallError, Client, ClientOptions};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        eprintln!("usage: classify HOST:PORT");
        return ExitCode::FAILURE;
    };
    match classify(&address).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("classify: {}", Report(&error));
            ExitCode::FAILURE
        }
    }
}

async fn classify(address: &str) -> Result<(), CallError> {
    // Without `fail_fast` the client would wait for the server to be started.
    let options = ClientOptions::new().expect(Expect::Classify).fail_fast(true);
    let client = Client::connect(address, options).await?;
    if let Some(welcome) = client.welcome() {
        println!("connected to {} ({})", welcome.name, welcome.service);
    }
    let answer = client.classify(&[0; 28 * 28]).await?;
    println!("label {}, {:?}", answer.label, answer.origin);
    client.close().await;
    Ok(())
}
