//! The codec of the hot messages: `cargo bench -p afterimage-wire --bench codec`.
//!
//! Each sample encodes or decodes a buffer of [`FRAMES`] frames. `bench/scripts/run.sh codec` keeps
//! a record of both.

use afterimage_wire::proto::header::DEFAULT_MAX_BODY;
use afterimage_wire::proto::message::{
    Classification, Origin, put_cache_read, put_cache_resp, put_classify_req, put_classify_resp,
};
use afterimage_wire::proto::{Frame, Message};
use divan::Bencher;
use divan::counter::ItemsCount;

const FRAMES: u64 = 512;

/// A function that encodes one frame.
type Encode = fn(&mut Vec<u8>, u64);

fn main() {
    divan::main();
}

const MESSAGES: [(&str, Encode); 4] = [
    ("CacheReq", |out, id| put_cache_read(out, id, id, 0)),
    ("CacheResp", |out, id| put_cache_resp(out, id, Some(9))),
    ("ClassifyReq", |out, id| put_classify_req(out, id, &[7; 784], 0)),
    ("ClassifyResp", |out, id| {
        put_classify_resp(out, id, Classification { label: 7, origin: Origin::Hit });
    }),
];

fn named(name: &str) -> Encode {
    MESSAGES.iter().find(|(known, _)| *known == name).expect("a name of the table").1
}

fn filled(encode: Encode) -> Vec<u8> {
    let mut buffer = Vec::new();
    (0..FRAMES).for_each(|id| encode(&mut buffer, id));
    buffer
}

#[divan::bench(args = MESSAGES.map(|(name, _)| name))]
fn encode(bencher: Bencher<'_, '_>, name: &str) {
    let encode = named(name);
    let mut buffer = filled(encode);
    bencher.counter(ItemsCount::new(FRAMES)).bench_local(move || {
        buffer.clear();
        (0..FRAMES).for_each(|id| encode(&mut buffer, id));
        buffer.len()
    });
}

#[divan::bench(args = MESSAGES.map(|(name, _)| name))]
fn decode(bencher: Bencher<'_, '_>, name: &str) {
    let buffer = filled(named(name));
    bencher.counter(ItemsCount::new(FRAMES)).bench_local(move || {
        let (mut rest, mut count) = (divan::black_box(&buffer[..]), 0);
        while let Ok(Some(frame)) = Frame::decode(rest, DEFAULT_MAX_BODY) {
            rest = &rest[frame.header.frame_len()..];
            count += u64::from(!matches!(Message::decode(frame), Err(_) | Ok(Message::StatsReq)));
        }
        assert_eq!(count, FRAMES);
    });
}
