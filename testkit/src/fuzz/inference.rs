//! Fuzz targets of the inference protocols: parsers of JSON, binary tensors and protobuf against
//! each other, and against the encoders of [`crate::inference`].

use afterimage_inference::Bypass;
use afterimage_inference::embeddings::{self, Format};
use afterimage_inference::grpc::message;
use afterimage_inference::oip::{Datatype, Encoding, Form, OutputEncoding, Request, Response};
use bytes::{Buf, Bytes};
use hyper::HeaderMap;
use hyper::header::HeaderValue;

use super::{Rng, Seed, Source, Target};
use crate::inference::Call;

/// All targets of the inference protocols.
pub const TARGETS: &[Target] = &[
    Target { name: "oip_http", body: oip_http, seeds: http_seeds, memory_per_byte: 256 },
    Target { name: "oip_grpc", body: oip_grpc, seeds: grpc_seeds, memory_per_byte: 256 },
    Target { name: "grpc_framing", body: framing, seeds: framing_seeds, memory_per_byte: 64 },
    Target { name: "oip_encodings", body: oip_encodings, seeds: call_seeds, memory_per_byte: 4096 },
    Target { name: "embeddings", body: embeddings, seeds: embeddings_seeds, memory_per_byte: 256 },
];

/// The length of the JSON (2 bytes, 0 for all), then a body: as a request and as a response.
fn oip_http(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let json_len = usize::from(source.u16());
    let body = Bytes::copy_from_slice(source.rest());
    let json_len = (json_len > 0).then_some(json_len);
    if let Ok(request) = Request::parse(body.clone(), json_len) {
        check_request(&request);
    }
    if let Ok(response) = Response::parse(body.clone(), json_len) {
        check_response(&response);
    }
    if let Ok(response) = Response::from_bytes(body) {
        let again = Response::from_bytes(response.to_bytes());
        assert_eq!(again.as_ref(), Ok(&response));
    }
}

/// A message of gRPC: as a request and as a response.
fn oip_grpc(bytes: &[u8]) {
    let body = Bytes::copy_from_slice(bytes);
    if let Ok(request) = Request::parse_grpc(body.clone()) {
        check_request(&request);
    }
    if let Ok(response) = Response::parse_grpc(body) {
        check_response(&response);
    }
}

/// The encoding and the limit of messages (2 bytes each), then a body: of a call, of a reply, and
/// as a message to write.
fn framing(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let encoding = ENCODINGS[source.below(ENCODINGS.len())];
    let limit = usize::from(source.u16());
    let body = Bytes::copy_from_slice(source.rest());
    let mut headers = HeaderMap::new();
    if !encoding.is_empty() {
        headers.insert("grpc-encoding", HeaderValue::from_static(encoding));
    }
    let read = message::of_request(&headers, &body, limit);
    // Exactly one message that is not compressed is read in place, without a limit of its own.
    let (flag, mut rest) = body.split_at(body.len().min(1));
    let stated = rest.try_get_u32().ok().map(|len| len as usize);
    let is_plain = flag == [0] && stated == Some(rest.len());
    let plain = is_plain.then(|| body.slice(message::PREFIX..));
    assert_eq!(message::of_reply(&body), plain);
    match (&read, plain) {
        (read, Some(plain)) => assert_eq!(read, &Ok(plain)),
        (Ok(message), None) => {
            assert_eq!(body[0], 1, "only a compressed message differs from its bytes");
            assert!(message.len() <= limit, "{} bytes; the limit is {limit}", message.len());
        }
        (Err(_), None) => {}
    }
    assert_eq!(message::of_reply(&message::framed(&body)), Some(body.clone()));
    if let Some(packed) = message::deflated(encoding, &body) {
        assert_eq!(message::of_request(&headers, &packed, body.len()), Ok(body.clone()));
        if !body.is_empty() {
            let read = message::of_request(&headers, &packed, body.len() - 1);
            assert_eq!(read, Err(Bypass::TooLarge));
        }
    }
}

/// Values of `grpc-encoding`; an empty one is for no field.
const ENCODINGS: [&str; 5] = ["", "identity", "gzip", "deflate", "snappy"];

/// Each rendering of a request has its key, and so has each row.
fn check_request(request: &Request) {
    let key = request.key_bytes();
    let from_http =
        request.inputs.iter().all(|input| input.form != Form::Typed) && request.version.is_none();
    for encoding in [Encoding::AsReceived, Encoding::Json, Encoding::Binary] {
        // The URL has the version. Some values of gRPC have another type in JSON.
        let Some(encoded) = request.to_http(encoding).filter(|_| from_http) else { continue };
        let Ok(again) = Request::parse(encoded.body, encoded.json_len) else { continue };
        assert_eq!(again.id, request.id);
        // A long FP64 in JSON keeps its spelling in the key: readers round it differently.
        let may_be_long = encoding == Encoding::Json && has_fp64(request);
        if has_plain_values(request) && !may_be_long {
            assert_eq!(again.key_bytes(), key, "{encoding:?} of {request:?}");
        }
    }
    if let Some(message) = request.to_grpc() {
        let again = Request::parse_grpc(message).expect("a message of our own");
        if request.extras.is_empty()
            && request.outputs.iter().all(|output| output.extras.is_empty())
            && request.inputs.iter().all(|input| input.extras.is_empty())
        {
            assert_eq!(again.key_bytes(), key, "{request:?}");
        }
    }
    if let Some(rows) = request.split_rows().filter(|rows| rows.len() <= 64) {
        let all: Vec<usize> = (0..rows.len()).collect();
        assert_eq!(rows.select(&all).key_bytes(), key);
        for row in all {
            assert_eq!(rows.select(&[row]).key_bytes(), rows.key_bytes(row));
        }
    }
}

/// Whether JSON and gRPC have the same types for all parameters.
fn has_plain_values(request: &Request) -> bool {
    use afterimage_inference::oip::Value;
    let own = [&request.parameters].into_iter();
    let parameters = own
        .chain(request.inputs.iter().map(|input| &input.parameters))
        .chain(request.outputs.iter().map(|output| &output.parameters));
    parameters.flat_map(|parameters| parameters.iter()).all(|(_, value)| match value {
        Value::Double(_) => false,
        Value::Uint(value) => i64::try_from(*value).is_err(),
        _ => true,
    })
}

fn has_fp64(request: &Request) -> bool {
    request.inputs.iter().any(|input| input.datatype == Datatype::Fp64)
}

/// Storing, rendering and splitting keep the data.
fn check_response(response: &Response) {
    let stored = Response::from_bytes(response.to_bytes()).expect("a stored form of our own");
    let mut plain = response.clone();
    plain.id = None;
    assert_eq!(stored, plain);
    let data = |response: &Response| -> Vec<Bytes> {
        response.outputs.iter().map(|output| output.data.clone()).collect()
    };
    for wanted in [OutputEncoding::json(), OutputEncoding::binary()] {
        let Some(encoded) = response.render(response.id.as_deref(), &wanted) else { continue };
        let Ok(again) = Response::parse(encoded.body, encoded.json_len) else { continue };
        assert_eq!(again.id, response.id);
        let is_nan = response.outputs.iter().any(|output| output.datatype.name().starts_with("FP"));
        if wanted.binary || !is_nan {
            assert_eq!(data(&again), data(response));
        }
    }
    for form in [Form::Binary, Form::Typed] {
        let Some(message) = response.render_grpc(None, form) else { continue };
        let again = Response::parse_grpc(message).expect("a message of our own");
        if response.outputs.iter().all(|output| output.datatype.name() != "BOOL") {
            assert_eq!(data(&again), data(response));
        }
    }
    let rows = response.outputs.first().and_then(|output| output.shape.first().copied());
    if let Some(rows) = rows.filter(|rows| *rows <= 64)
        && let Some(split) = response.split_rows(rows as usize)
    {
        assert_eq!(Response::assemble(&split).as_ref(), Some(&stored));
    }
}

/// Choices: a request in all encodings of the oracle, and one change of it.
fn oip_encodings(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let mut rng = Rng(source.u64());
    let mut draw = || if source.is_empty() { rng.number() } else { u64::from(source.u8()) };
    let call = Call::random(&mut draw, None);
    let keys = keys(&call, &mut draw);
    assert!(keys.iter().all(|key| *key == keys[0]), "{call:?}");
    let mut changed = call.clone();
    let change = changed.mutate(&mut draw);
    for key in self::keys(&changed, &mut draw) {
        assert_ne!(key, keys[0], "{change} of {call:?}");
    }
}

fn keys(call: &Call, draw: &mut dyn FnMut() -> u64) -> Vec<Bytes> {
    let (body, json_len) = call.binary(draw);
    let mut requests = vec![Request::parse(body.into(), Some(json_len))];
    requests.extend(call.json(draw).map(|body| Request::parse(body.into(), None)));
    for typed in [false, true] {
        requests.extend(call.grpc(typed, draw).map(|message| {
            let mut request = Request::parse_grpc(message.into());
            if let Ok(request) = &mut request {
                request.take_model();
            }
            request
        }));
    }
    // Some names come twice. All parsers refuse these.
    let is_valid = requests[0].is_ok();
    assert!(requests.iter().all(|request| request.is_ok() == is_valid), "{call:?}");
    requests.into_iter().flatten().map(|request| request.key_bytes()).collect()
}

/// The length of a request (2 bytes), the request, and a response to it.
fn embeddings(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let len = usize::from(source.u16());
    let request = source.bytes(len);
    let Ok(request) = embeddings::Request::parse(request) else { return };
    let again = embeddings::Request::parse(&request.to_json()).expect("a body of our own");
    assert_eq!(again, request);
    for row in 0..request.inputs.len().min(64) {
        let alone = request.select(&[row]);
        let alone = embeddings::Request::parse(&alone.to_json()).expect("a body of our own");
        assert_eq!(alone.key_bytes(0), request.key_bytes(row));
    }
    let Ok(rows) = embeddings::parse_response(source.rest(), &request) else { return };
    assert_eq!(rows.len(), request.inputs.len());
    for row in &rows {
        assert_eq!(embeddings::Row::from_bytes(row.to_bytes()).as_ref(), Ok(row));
    }
    for format in [Format::Float, Format::Base64] {
        let body = embeddings::render(&rows, format).expect("the rows of one response");
        let again = embeddings::parse_response(&body, &request);
        // `estimated` is not a count, and base64 can hold values that JSON cannot.
        if let Ok(again) = again {
            assert!(again.iter().zip(&rows).all(|(again, row)| again.data == row.data));
        }
    }
}

fn draw_of(seed: u64) -> impl FnMut() -> u64 {
    let mut rng = Rng(seed);
    move || rng.number()
}

fn http_seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for seed in 0..12 {
        let mut draw = draw_of(seed);
        let call = Call::random(&mut draw, (seed % 2 == 0).then_some(2));
        let (body, json_len) = call.binary(&mut draw);
        let head = (json_len as u16).to_le_bytes();
        seeds.push((format!("binary-{seed}"), [&head[..], &body].concat()));
        let json = call.json(&mut draw);
        seeds.extend(json.map(|body| (format!("json-{seed}"), [&[0, 0][..], &body].concat())));
    }
    let response = br#"{"model_name":"m","model_version":"1","id":"i","outputs":[
        {"name":"y","datatype":"FP32","shape":[2,1],"data":[[0.1],[NaN]]},
        {"name":"z","datatype":"BYTES","shape":[2],"data":["a","\u00e9"]}]}"#;
    seeds.push(("response".to_owned(), [&[0, 0][..], response].concat()));
    if let Ok(response) = Response::parse(Bytes::from_static(response), None) {
        seeds.push(("stored".to_owned(), [&[0, 0][..], &response.to_bytes()].concat()));
    }
    seeds
}

fn grpc_seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for seed in 0..12 {
        let mut draw = draw_of(seed);
        let call = Call::random(&mut draw, (seed % 2 == 0).then_some(2));
        for typed in [false, true] {
            let message = call.grpc(typed, &mut draw);
            seeds.extend(message.map(|message| (format!("typed-{typed}-{seed}"), message)));
        }
    }
    seeds
}

fn framing_seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (number, encoding) in ENCODINGS.iter().enumerate() {
        let head = [number as u8, 0, 100, 0];
        for len in [0, 7, 100, 1000] {
            let text = vec![b'a'; len];
            let mut bodies = vec![message::framed(&text)];
            bodies.extend(message::deflated(encoding, &text));
            for (kind, body) in bodies.iter().enumerate() {
                seeds.push((format!("{number}-{len}-{kind}"), [&head[..], body].concat()));
            }
        }
    }
    seeds
}

fn call_seeds() -> Vec<Seed> {
    (0..16u64).map(|seed| (format!("call-{seed}"), seed.to_le_bytes().to_vec())).collect()
}

fn embeddings_seeds() -> Vec<Seed> {
    let one =
        br#"{"data":[{"index":0,"embedding":[0.5,-0.1]}],"model":"m","usage":{"prompt_tokens":3}}"#;
    let two = br#"{"object":"list","data":[{"index":1,"embedding":"AAAAPw=="},{"index":0,"embedding":[1]}],"usage":{"total_tokens":7,"x":null}}"#;
    let cases: [(&str, &[u8], &[u8]); 4] = [
        ("text", br#"{"model":"m","input":"a","user":"u"}"#, one),
        ("texts", br#"{"model":"m","input":["a","bb"],"dimensions":8}"#, two),
        ("tokens", br#"{"input":[1,2],"encoding_format":"base64"}"#, one),
        ("token-lists", br#"{"input":[[1,2],[3]],"input_type":"query"}"#, two),
    ];
    let seed = |(name, request, response): (&str, &[u8], &[u8])| {
        let len = (request.len() as u16).to_le_bytes();
        (name.to_owned(), [&len[..], request, response].concat())
    };
    cases.map(seed).to_vec()
}
