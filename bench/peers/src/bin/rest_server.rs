//! The REST API without a memo behind it: an axum handler that reads the body of
//! `POST /v1/classify` and answers with the bytes of a gateway's hit. Usage: rest_server ADDRESS
//!
//! It uses one thread, and shows what HTTP alone costs.

use anyhow::{Context, bail};
use axum::Router;
use axum::body::Bytes;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::post;
use tokio::net::TcpListener;

/// A hit of the gateway, with a usual time.
const HIT: &str = r#"{"label":7,"origin":"hit","time_us":12.345}"#;

async fn classify(image: Bytes) -> impl IntoResponse {
    // The body is read whole, as the gateway reads it.
    std::hint::black_box(&image);
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (headers, HIT)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address] = &args[..] else { bail!("usage: rest_server ADDRESS") };
    let socket = TcpListener::bind(address).await.with_context(|| address.clone())?;
    println!("listening on {}", socket.local_addr()?);
    axum::serve(socket, Router::new().route("/v1/classify", post(classify))).await?;
    Ok(())
}
