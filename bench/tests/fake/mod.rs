//! A server with scripted replies.

// Not every test file needs all of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::{Frame, Hello, Message, Role, Shape, Status, Welcome};

/// A step of a script after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Go on.
    Continue,
    /// Send what there is, and close the connection.
    Hang,
}

/// The replies to the requests of one read, in the order in which they will be sent.
pub(crate) type Replies = Vec<Vec<u8>>;

/// Decides what a connection's `n`-th request (from 0) is answered.
pub(crate) type Script = Box<dyn FnMut(u64, Frame<'_>, &mut Replies) -> Then + Send>;

/// Starts a server; `script` makes the script of each connection, which it gets by its number.
pub(crate) fn start(
    service: Role,
    script: impl Fn(usize) -> Script + Send + Sync + 'static,
) -> SocketAddr {
    start_with(welcome(service), b"", script)
}

/// The same with this welcome, for clients that know the token.
pub(crate) fn start_with(
    welcome: Welcome,
    token: &'static [u8],
    script: impl Fn(usize) -> Script + Send + Sync + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let script = Arc::new(script);
    thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let (script, welcome) = (script(number), welcome.clone());
            thread::spawn(move || serve(stream, &welcome, token, script));
        }
    });
    addr
}

/// Answers all properly: every image with [`class_of`] it, every key with `value`'s.
pub(crate) fn proper() -> Script {
    Box::new(|_, frame, replies| {
        replies.push(right(frame));
        Then::Continue
    })
}

/// The right reply to a `ClassifyReq` or a `Ping`.
pub(crate) fn right(frame: Frame<'_>) -> Vec<u8> {
    match Message::decode(frame).unwrap() {
        Message::ClassifyReq { image, .. } => {
            classified(frame.header.id, class_of(image), Origin::Miss)
        }
        Message::Ping(bytes) => encode(frame.header.id, &Message::Pong(bytes)),
        other => panic!("no reply to {other:?}"),
    }
}

/// The one right label of an image.
pub(crate) fn class_of(image: &[u8]) -> u16 {
    image.iter().map(|&byte| u16::from(byte)).sum::<u16>() % 10
}

/// A `ClassifyResp`.
pub(crate) fn classified(id: u64, class: u16, origin: Origin) -> Vec<u8> {
    encode(id, &Message::ClassifyResp(Classification { label: class, origin }))
}

/// An `Error` reply to one request.
pub(crate) fn error(id: u64, status: Status) -> Vec<u8> {
    let connection = false;
    encode(id, &Message::Error { status, text: "as planned", connection })
}

/// The bytes of a message.
pub(crate) fn encode(id: u64, message: &Message<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(id, &mut bytes);
    bytes
}

/// A welcome for 28×28 images, or for keys.
pub(crate) fn welcome(service: Role) -> Welcome {
    let shape: &[u32] = if service.classifies() { &[28, 28] } else { &[] };
    Welcome {
        version: 1,
        service,
        features: 0,
        max_body: 1 << 20,
        window: 1 << 20,
        classes: 10,
        digest: [0; 32],
        shape: Shape::new(shape).unwrap(),
        name: "fake".into(),
    }
}

fn serve(mut stream: TcpStream, welcome: &Welcome, token: &[u8], mut script: Script) -> Option<()> {
    stream.set_nodelay(true).unwrap();
    let (mut input, mut len, mut n) = (vec![0; 1 << 16], 0, 0);
    loop {
        len += stream.read(&mut input[len..]).ok().filter(|&read| read > 0)?;
        let (mut start, mut replies, mut then) = (0, Replies::new(), Then::Continue);
        while let Some(frame) = Frame::decode(&input[start..len], 1 << 15).unwrap() {
            start += frame.header.frame_len();
            match Message::decode(frame) {
                Ok(Message::Hello(Hello { token: theirs, .. })) if theirs == token => {
                    replies.push(encode(0, &Message::Welcome(welcome.clone())));
                }
                Ok(Message::Hello(_)) => {
                    let (status, connection) = (Status::Unauthenticated, true);
                    replies.push(encode(0, &Message::Error { status, text: "no", connection }));
                    then = Then::Hang;
                }
                _ => {
                    then = script(n, frame, &mut replies);
                    n += 1;
                }
            }
            if then == Then::Hang {
                break;
            }
        }
        stream.write_all(&replies.concat()).ok()?;
        if then == Then::Hang {
            return None;
        }
        input.copy_within(start..len, 0);
        len -= start;
    }
}
