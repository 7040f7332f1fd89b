//! Fairness between a flooding peer and others. The tests count bytes and use no clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use afterimage_testkit::doubles::Endless;
use afterimage_testkit::doubles::FirstByte;
use afterimage_wire::proto::{Hello, Message, Role, Shape, Welcome};
use afterimage_wire::server::{ServerOptions, serve_stream};
use afterimage_wire::{Client, ClientOptions};
use tokio::io::duplex;
use tokio_util::sync::CancellationToken;

/// Bytes of a flood in one turn: the turn itself, and the rest of one read.
const TURN: u64 = 2 * (256 << 10);

/// Turns of a flood during one call: request and reply, at both ends of a pipe.
const TURNS: u64 = 8;

fn served(floods: &[Arc<AtomicU64>]) -> u64 {
    floods.iter().map(|bytes| bytes.load(SeqCst)).max().unwrap()
}

#[tokio::test]
async fn a_flooding_client_does_not_block_others() {
    let options = ServerOptions::default;
    let serve = move |io| {
        tokio::spawn(serve_stream(Arc::new(FirstByte), options(), io, CancellationToken::new()))
    };
    let connector = move |_| {
        let (near, far) = duplex(1 << 16);
        serve(far);
        async move { Ok(near) }
    };
    let client =
        Client::with_connector(connector, ClientOptions::new().timeout(Duration::from_secs(60)));
    assert_eq!(client.classify(&[1; 784]).await.unwrap().label, 1);

    let flood = || {
        let (endless, bytes) = Endless::new(|n, out| match n {
            0 => Message::Hello(Hello::new(b"")).encode(0, out),
            id => Message::ClassifyReq { image: &[9; 784], budget_ms: 0 }.encode(id, out),
        });
        let (service, drain) = (Arc::new(FirstByte), CancellationToken::new());
        tokio::spawn(serve_stream(service, options(), endless, drain));
        bytes
    };
    let floods = [flood(), flood(), flood()];
    for n in 0..50 {
        let before = served(&floods);
        assert_eq!(client.classify(&[n; 784]).await.unwrap().label, u16::from(n));
        let meanwhile = served(&floods) - before;
        assert!(meanwhile <= TURNS * TURN, "{meanwhile} bytes of a flood came first");
    }
    assert!(served(&floods) > 10 * TURN, "the flood is also served");
}

#[tokio::test]
async fn a_flooding_server_does_not_block_other_tasks() {
    let (endless, bytes) = Endless::new(|n, out| match n {
        0 => Message::Welcome(welcome()).encode(0, out),
        // The client drops unexpected Pongs.
        _ => Message::Pong(&[7; 64]).encode(0, out),
    });
    let endless = std::sync::Mutex::new(Some(endless));
    let connector = move |_| {
        let endless = endless.lock().unwrap().take();
        async move { endless.ok_or_else(|| std::io::ErrorKind::ConnectionRefused.into()) }
    };
    let client = Client::with_connector(connector, ClientOptions::new());
    client.connected(Duration::from_secs(30)).await.unwrap();
    for _ in 0..50 {
        let before = bytes.load(SeqCst);
        tokio::task::yield_now().await;
        let meanwhile = bytes.load(SeqCst) - before;
        assert!(meanwhile <= 2 * TURN, "{meanwhile} bytes came first");
    }
    assert!(bytes.load(SeqCst) > TURN, "the flood is also read");
    assert!(client.is_connected());
}

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        service: Role::Memo,
        features: 0,
        max_body: 4096,
        window: 1024,
        classes: 0,
        digest: [7; 32],
        shape: Shape::default(),
        name: "endless".into(),
    }
}
