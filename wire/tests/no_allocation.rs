//! The hot messages are encoded and decoded without a single allocation.

use afterimage_testkit::memory::allocations;
use afterimage_wire::proto::header::DEFAULT_MAX_BODY;
use afterimage_wire::proto::message::{
    Classification, Origin, put_cache_read, put_cache_resp, put_cache_write, put_classify_req,
    put_classify_resp,
};
use afterimage_wire::proto::{Frame, Message};

afterimage_testkit::count_allocations!();

#[test]
fn hot_messages_need_no_allocation() {
    let image = [7; 784];
    let mut buffer = Vec::with_capacity(1 << 16);
    let mut frames = 0;
    let made = allocations(|| {
        for id in 0..10 {
            put_cache_read(&mut buffer, id, id, 0);
            put_cache_write(&mut buffer, id, id, 5);
            put_cache_resp(&mut buffer, id, Some(5));
            put_cache_resp(&mut buffer, id, None);
            put_classify_req(&mut buffer, id, &image, 100);
            put_classify_resp(&mut buffer, id, Classification { label: 7, origin: Origin::Hit });
        }
        let mut rest = &buffer[..];
        while let Ok(Some(frame)) = Frame::decode(rest, DEFAULT_MAX_BODY) {
            rest = &rest[frame.header.frame_len()..];
            frames += u32::from(Message::decode(frame).is_ok());
        }
    });
    assert_eq!((frames, made), (60, 0));
    // The counter itself works.
    assert_eq!(allocations(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(1)))), 1);
}
