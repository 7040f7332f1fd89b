//! Sends two rows to a named model of a memo and prints the answers.
//!
//! `cargo run -p afterimage-wire --example infer -- 127.0.0.1:7400 resnet`

use std::process::ExitCode;
use std::time::Duration;

use afterimage_wire::client::{Infer, Report};
use afterimage_wire::{CallError, CallOptions, Client, ClientOptions};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(address) = args.next() else {
        eprintln!("usage: infer HOST:PORT [MODEL]");
        return ExitCode::FAILURE;
    };
    match infer(&address, &args.next().unwrap_or_default()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("infer: {}", Report(&error));
            ExitCode::FAILURE
        }
    }
}

async fn infer(address: &str, model: &str) -> Result<(), CallError> {
    let client = Client::connect(address, ClientOptions::new().fail_fast(true)).await?;
    // Each row of the built-in model has 784 bytes. Equal rows are computed once.
    let request = Infer::rows(model, [[0; 784], [255; 784]]).ttl(Duration::from_secs(3600));
    let options = CallOptions::new().timeout(Duration::from_secs(120));
    let inference = client.infer_with(&request, options).await?;
    for (number, row) in inference.rows.iter().enumerate() {
        println!("row {number}: {:?}, {:?}", row.answer, row.origin);
    }
    client.close().await;
    Ok(())
}
