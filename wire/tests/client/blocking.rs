//! The client without an async runtime.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use afterimage_wire::CallError;
use afterimage_wire::blocking::Client;
use afterimage_wire::proto::codec::FrameCodec;
use afterimage_wire::proto::{Kind, Message};
use bytes::BytesMut;
use tokio_util::codec::Decoder;

use crate::{PATIENCE, answer, label, options};

/// A server on a thread. It closes a connection when `on_frame` returns false.
fn serve(mut on_frame: impl FnMut(Kind) -> bool + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            converse(stream.unwrap(), &mut on_frame);
        }
    });
    address
}

fn converse(mut stream: TcpStream, on_frame: &mut impl FnMut(Kind) -> bool) {
    stream.set_nodelay(true).unwrap();
    let (mut codec, mut input, mut chunk) = (FrameCodec::default(), BytesMut::new(), [0; 1 << 16]);
    loop {
        let read = match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        input.extend_from_slice(&chunk[..read]);
        let mut out = Vec::new();
        while let Some(frame) = codec.decode(&mut input).unwrap() {
            if !on_frame(frame.header.kind) {
                return;
            }
            answer(&frame, &mut out);
        }
        if stream.write_all(&out).is_err() {
            return;
        }
    }
}

#[test]
fn every_call_gets_its_answer_in_a_plain_thread() {
    let client = Client::connect(serve(|_| true), options()).unwrap();
    assert_eq!(client.classify(&[7]).unwrap(), label(7));
    assert_eq!(client.cache().get(4).unwrap(), Some(4));
    client.cache().set(1, 1).unwrap();
    assert_eq!(client.cache().get_many(&[2, 3]).unwrap(), [Some(2), None]);
    assert!(client.ping().unwrap() > Duration::ZERO);
    assert!(client.admin().stats().unwrap().entries.is_empty());
    assert!(client.is_connected() && client.welcome().is_some());
    client.close();
    assert!(matches!(client.classify(&[7]), Err(CallError::Closed)));
}

#[test]
fn eight_threads_get_their_own_answers() {
    let client = Client::connect(serve(|_| true), options()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            let client = client.clone();
            scope.spawn(move || {
                for n in 0..500 {
                    let class = thread.wrapping_mul(31).wrapping_add(n as u8);
                    assert_eq!(client.classify(&[class]).unwrap(), label(class.into()));
                    if n % 100 == 0 {
                        // Pauses hand the connection over between the threads.
                        std::thread::sleep(Duration::from_millis(u64::from(thread) * 3));
                    }
                }
            });
        }
    });
    let counters = client.counters();
    assert_eq!((counters.received, counters.unknown_ids), (8 * 500, 0));
}

#[test]
fn pings_keep_the_connection_between_calls() {
    let (sender, pings) = std::sync::mpsc::channel();
    let address = serve(move |kind| {
        if kind == Kind::Ping {
            sender.send(()).unwrap();
        }
        true
    });
    let options = options().keepalive(Some(Duration::from_millis(300)));
    let client = Client::connect(address, options).unwrap();
    for _ in 0..3 {
        pings.recv_timeout(PATIENCE).unwrap();
    }
    assert_eq!(client.counters().connects, 1);
}

#[test]
fn a_write_is_sent_without_a_later_call() {
    let (sender, writes) = std::sync::mpsc::channel();
    let address = serve(move |kind| {
        if kind == Kind::CacheReq {
            sender.send(()).unwrap();
        }
        true
    });
    let client = Client::connect(address, options()).unwrap();
    client.cache().set(1, 1).unwrap();
    writes.recv_timeout(PATIENCE).unwrap();
    client.cache().set(1, 2).unwrap();
    drop(client);
    writes.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_lost_connection_is_replaced_between_calls() {
    let mut hangs_up = true;
    let address = serve(move |kind| kind == Kind::Hello || !std::mem::take(&mut hangs_up));
    let client = Client::connect(address, options()).unwrap();
    assert_eq!(client.classify(&[1]).unwrap(), label(1));
    let start = Instant::now();
    while client.counters().connects < 2 || !client.is_connected() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_closed_port_is_an_error() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let error = Client::connect(address, options().fail_fast(true)).unwrap_err();
    assert!(matches!(error, CallError::Unavailable { .. }), "{error}");
}

#[test]
fn the_last_handle_may_be_dropped_inside_a_runtime() {
    let client = Client::connect(serve(|_| true), options()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async move { drop(client) });
}

#[test]
fn replies_in_any_order_reach_their_threads() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut codec, mut input, mut chunk) = (FrameCodec::default(), BytesMut::new(), [0; 4096]);
        let mut held = Vec::new();
        loop {
            let read = stream.read(&mut chunk).unwrap_or(0);
            if read == 0 {
                return;
            }
            input.extend_from_slice(&chunk[..read]);
            while let Some(frame) = codec.decode(&mut input).unwrap() {
                let hello = matches!(frame.message().unwrap(), Message::Hello(_));
                held.push(frame);
                if hello || held.len() == 8 {
                    let mut out = Vec::new();
                    held.iter().rev().for_each(|frame| answer(frame, &mut out));
                    held.clear();
                    stream.write_all(&out).unwrap();
                }
            }
        }
    });
    let client = Client::connect(address, options()).unwrap();
    std::thread::scope(|scope| {
        for class in 0..8u8 {
            let client = &client;
            scope
                .spawn(move || assert_eq!(client.classify(&[class]).unwrap(), label(class.into())));
        }
    });
}
