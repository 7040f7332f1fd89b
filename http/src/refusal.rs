//! The answer to a connection above a limit: 503 for HTTP/1.1, GOAWAY for HTTP/2.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::places::Full;

/// The longest wait for the first bytes of a client. One that sends none gets the answer of
/// HTTP/1.1.
const FIRST_BYTES: Duration = Duration::from_millis(300);

/// How an HTTP/2 client begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Sends the reason. With `waits`, the first bytes of the client decide about the protocol, and the
/// rest is read so that the close does not overtake the answer. Else the answer goes at once, for
/// HTTP/2 if `is_http2`. The caller limits the time.
pub(crate) async fn send(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    full: Full,
    is_http2: bool,
    waits: bool,
) {
    // An error means that the client has gone.
    let _ = answer(&mut stream, &full.to_string(), is_http2, waits).await;
}

async fn answer(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    text: &str,
    is_http2: bool,
    waits: bool,
) -> io::Result<()> {
    let is_http2 = is_http2
        || (waits && matches!(timeout(FIRST_BYTES, begins_http2(stream)).await, Ok(Ok(true))));
    let answer = if is_http2 { goaway(text) } else { unavailable(text) };
    stream.write_all(&answer).await?;
    stream.shutdown().await?;
    if waits {
        tokio::io::copy(stream, &mut tokio::io::sink()).await?;
    }
    Ok(())
}

/// Whether the next bytes are the preface of HTTP/2.
async fn begins_http2(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<bool> {
    for &expected in PREFACE {
        if stream.read_u8().await? != expected {
            return Ok(false);
        }
    }
    Ok(true)
}

fn unavailable(text: &str) -> Vec<u8> {
    let len = text.len() + 1;
    format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {len}\r\n\r\n{text}\n"
    )
    .into_bytes()
}

/// Empty SETTINGS, which HTTP/2 begins with, and a GOAWAY that no stream precedes.
fn goaway(text: &str) -> Vec<u8> {
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const ENHANCE_YOUR_CALM: u32 = 11;
    let payload = [&[0; 4][..], &ENHANCE_YOUR_CALM.to_be_bytes(), text.as_bytes()].concat();
    let len = (payload.len() as u32).to_be_bytes();
    [&SETTINGS[..], &len[1..], &[7, 0, 0, 0, 0, 0], &payload].concat()
}
