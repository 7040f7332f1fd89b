//! `afterimage demo --proxy`: the gain of a proxy in front of a model server whose batches overlap.
//!
//! The server is a small one of our own that speaks the Open Inference Protocol and takes a stated
//! time for each row. Server, proxy and client talk over loopback sockets. Every value is checked.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use afterimage_cache::ByteStore;
use afterimage_http::{HttpOptions, RequestBody, serve};
use afterimage_inference::forward::Outgoing;
use afterimage_inference::{Proxy, ProxyOptions, Replica, RowsMode};
use afterimage_memo::{Memo, MemoOptions, Secret};
use anyhow::{Context, ensure};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::format::{grouped, nanos};
use crate::print::say;

/// Rows of a batch, and numbers of a row.
const ROWS: i64 = 8;
const WIDTH: i64 = 4;

/// Batches of each part of the demo.
const BATCHES: i64 = 40;

/// Rows of a batch of the last part that are known already.
const KNOWN: i64 = 6;

/// Batches that the proxy may take to examine the model: some times its number of probes.
const EXAMINATION: i64 = 60;

/// Runs the demo with a server that takes `time` a row.
pub(crate) async fn run(time: Duration) -> anyhow::Result<()> {
    let server = Arc::new(Server { time, rows: AtomicU64::new(0) });
    let direct = server.start().await?;
    let through = start_proxy(direct).await?;
    say!(
        "A model server that takes {} a row, and a proxy in front of it.",
        nanos(time.as_nanos() as u64)
    )?;
    say!("client → proxy {through} → server {direct}\n")?;
    let (direct, through) = (client(direct)?, client(through)?);
    say!("{BATCHES} batches of {ROWS} rows               a batch   rows computed")?;
    let mut checked = 0;
    let mut part = async |name: &str, client: &Replica, rows: &dyn Fn(i64) -> Vec<i64>| {
        let (computed, began) = (server.rows.load(Relaxed), Instant::now());
        for batch in 0..BATCHES {
            checked += ask(client, &rows(batch)).await?;
        }
        let each = began.elapsed() / BATCHES as u32;
        let computed = server.rows.load(Relaxed) - computed;
        say!("  {name:<32}{:>11}{computed:>12}", nanos(each.as_nanos() as u64))?;
        anyhow::Ok(each)
    };
    let new = |batch| (batch * ROWS..(batch + 1) * ROWS).collect::<Vec<i64>>();
    let mixed = |batch| {
        let known = (0..KNOWN).map(|i| (batch * 7 + i * 13) % (BATCHES * ROWS));
        let unknown = (KNOWN..ROWS).map(|i| 1_000_000 + batch * ROWS + i);
        known.chain(unknown).collect::<Vec<i64>>()
    };
    let plain = part("directly", &direct, &new).await?;
    // The proxy splits batches only after it has seen that rows do not depend on each other.
    for batch in 0..EXAMINATION {
        ask(&through, &[2_000_000 + 2 * batch, 2_000_001 + 2 * batch]).await?;
    }
    part("through the proxy, new rows", &through, &new).await?;
    let again = part("the same batches again", &through, &new).await?;
    let name = format!("{KNOWN} known rows and {} new ones", ROWS - KNOWN);
    let partly = part(&name, &through, &mixed).await?;
    let gain = |each: Duration| plain.as_secs_f64() / each.as_secs_f64().max(1e-9);
    say!(
        "\nknown batches are {:.0} × as fast, partly known ones {:.1} ×",
        gain(again),
        gain(partly)
    )?;
    say!("{} rows checked: all values are the model's", grouped(checked))?;
    Ok(())
}

/// A server with one model, which adds the squares of a row.
struct Server {
    time: Duration,
    /// Rows computed so far.
    rows: AtomicU64,
}

impl Server {
    async fn start(self: &Arc<Self>) -> anyhow::Result<SocketAddr> {
        let server = Arc::clone(self);
        let service = service_fn(move |request| {
            let server = Arc::clone(&server);
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        let socket = TcpListener::bind("127.0.0.1:0").await.context("cannot listen")?;
        let address = socket.local_addr()?;
        tokio::spawn(serve(socket, service, HttpOptions::default(), CancellationToken::new()));
        Ok(address)
    }

    async fn answer(&self, request: Request<RequestBody>) -> Response<Full<Bytes>> {
        let (status, body) = match request.uri().path() {
            "/v2" => (StatusCode::OK, json!({"name": "demo", "version": "1", "extensions": []})),
            "/v2/models/squares" => {
                (StatusCode::OK, json!({"name": "squares", "platform": "demo"}))
            }
            "/v2/models/squares/infer" => {
                let body = request.into_body().collect().await.map(|body| body.to_bytes());
                let data = body.ok().as_deref().and_then(numbers);
                match data {
                    None => (StatusCode::BAD_REQUEST, json!({"error": "numbers are expected"})),
                    Some(data) => {
                        let squares: Vec<i64> = data.chunks(WIDTH as usize).map(square).collect();
                        let rows = squares.len() as u32;
                        tokio::time::sleep(self.time * rows).await;
                        self.rows.fetch_add(rows.into(), Relaxed);
                        let output = json!({
                            "name": "sum", "datatype": "INT64", "shape": [rows, 1], "data": squares,
                        });
                        (StatusCode::OK, json!({"model_name": "squares", "outputs": [output]}))
                    }
                }
            }
            _ => (StatusCode::NOT_FOUND, json!({"error": "not found"})),
        };
        let mut response = Response::new(Full::new(body.to_string().into()));
        *response.status_mut() = status;
        response
    }
}

/// The numbers of a request's input.
fn numbers(body: &[u8]) -> Option<Vec<i64>> {
    let body: Value = serde_json::from_slice(body).ok()?;
    body["inputs"][0]["data"].as_array()?.iter().map(Value::as_i64).collect()
}

fn square(row: &[i64]) -> i64 {
    row.iter().map(|x| x * x).sum()
}

async fn start_proxy(server: SocketAddr) -> anyhow::Result<SocketAddr> {
    let secret = Secret::random().context("cannot get random numbers from the operating system")?;
    let mut options = ProxyOptions::default();
    options.rows = RowsMode::Auto;
    // The demo counts the rows that the server computes.
    options.canaries = 0;
    let store = Arc::new(ByteStore::new(64 << 20, options.max_answer));
    let memo = Memo::of_bytes(store, MemoOptions::new(secret));
    let proxy = Proxy::new(vec![client(server)?], memo, options);
    let socket = TcpListener::bind("127.0.0.1:0").await.context("cannot listen")?;
    let address = socket.local_addr()?;
    tokio::spawn(serve(socket, proxy, HttpOptions::default(), CancellationToken::new()));
    Ok(address)
}

fn client(address: SocketAddr) -> anyhow::Result<Replica> {
    Ok(Replica::new(format!("http://{address}").parse()?, None)?)
}

/// Sends a batch of these rows and checks every value. Returns the number of rows.
async fn ask(client: &Replica, rows: &[i64]) -> anyhow::Result<u64> {
    let data: Vec<i64> = rows.iter().flat_map(|row| (0..WIDTH).map(move |i| row + i)).collect();
    let expected: Vec<i64> = data.chunks(WIDTH as usize).map(square).collect();
    let input =
        json!({"name": "x", "datatype": "INT64", "shape": [rows.len(), WIDTH], "data": data});
    let body = json!({"inputs": [input]}).to_string();
    let mut request = Request::new(Outgoing::Full(Some(body.into()), None));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = "/v2/models/squares/infer".parse()?;
    let response = client.send(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    ensure!(status == StatusCode::OK, "{status}: {}", String::from_utf8_lossy(&body));
    let body: Value = serde_json::from_slice(&body)?;
    let found = body["outputs"][0]["data"].as_array().context("the reply has no output")?;
    let found: Vec<Option<i64>> = found.iter().map(Value::as_i64).collect();
    let expected: Vec<Option<i64>> = expected.into_iter().map(Some).collect();
    ensure!(found == expected, "wrong values: {found:?}, expected {expected:?}");
    Ok(rows.len() as u64)
}
