//! CPU time of the codecs: reading a request and its key, and rendering a stored response.
//!
//!     cargo bench -p afterimage-inference --bench oip

use afterimage_inference::oip::{Encoding, OutputEncoding, Request, Response};
use bytes::Bytes;
use divan::{Bencher, black_box};

fn main() {
    divan::main();
}

/// A body of HTTP and the length of its JSON.
type Body = (Bytes, Option<usize>);

/// A request with one FP32 input of this many numbers, with binary data.
fn binary(numbers: usize) -> Body {
    let data: Vec<u8> = (0..numbers).flat_map(|at| (at as f32 / 7.0).to_le_bytes()).collect();
    let json = format!(
        r#"{{"id":"1","inputs":[{{"name":"x","shape":[1,{numbers}],"datatype":"FP32","parameters":{{"binary_data_size":{}}}}}],"parameters":{{"binary_data_output":true}}}}"#,
        data.len()
    );
    ([json.as_bytes(), &data].concat().into(), Some(json.len()))
}

/// The same as JSON.
fn json(numbers: usize) -> Body {
    let (body, json_len) = binary(numbers);
    let request = Request::parse(body, json_len).expect("valid");
    let encoded = request.to_http(Encoding::Json).expect("JSON can hold it");
    (encoded.body, encoded.json_len)
}

fn key_of(bencher: Bencher<'_, '_>, (body, json_len): Body) {
    bencher.counter(divan::counter::BytesCount::new(body.len())).bench_local(|| {
        let request = Request::parse(black_box(body.clone()), json_len).expect("valid");
        request.key_parts()
    });
}

#[divan::bench]
fn key_of_1_kib_json(bencher: Bencher<'_, '_>) {
    key_of(bencher, json(45));
}

#[divan::bench]
fn key_of_1_kib_binary(bencher: Bencher<'_, '_>) {
    key_of(bencher, binary(220));
}

#[divan::bench]
fn key_of_600_kib_binary(bencher: Bencher<'_, '_>) {
    key_of(bencher, binary(153_600));
}

#[divan::bench]
fn key_of_600_kib_grpc(bencher: Bencher<'_, '_>) {
    let (body, json_len) = binary(153_600);
    let message = Request::parse(body, json_len).expect("valid").to_grpc().expect("no JSON only");
    bencher.counter(divan::counter::BytesCount::new(message.len())).bench_local(|| {
        Request::parse_grpc(black_box(message.clone())).expect("valid").key_parts()
    });
}

#[divan::bench(args = [false, true])]
fn render_a_stored_1_kib_response(bencher: Bencher<'_, '_>, binary: bool) {
    let data: String = (0..250).map(|at| format!("{},", at as f32 / 7.0)).collect();
    let body = format!(
        r#"{{"model_name":"m","model_version":"1","outputs":[{{"name":"y","datatype":"FP32","shape":[1,250],"data":[{}]}}]}}"#,
        data.trim_end_matches(',')
    );
    let (body, json_len) = {
        let response = Response::parse(body.into(), None).expect("valid");
        let encoded = response.render(None, &OutputEncoding::binary()).expect("binary");
        (encoded.body, encoded.json_len)
    };
    let stored = Response::parse(body, json_len).expect("valid").to_bytes();
    let wanted = OutputEncoding { binary, outputs: Vec::new() };
    bencher.bench_local(|| {
        let response = Response::from_bytes(black_box(stored.clone())).expect("undamaged");
        response.render(Some("1"), &wanted)
    });
}
