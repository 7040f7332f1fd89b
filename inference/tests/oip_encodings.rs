//! One request has one key in every encoding, and every change of it has another.

use std::collections::HashMap;

use afterimage_inference::oip::{
    Encoding, FIELDS, Form, OutputEncoding, Place, Request, Response, Role,
};
use afterimage_testkit::inference::Call;
use afterimage_wire::splitmix::SplitMix64;
use bytes::Bytes;

/// A request from gRPC, without the model that HTTP has in its path.
fn parse_grpc(message: Vec<u8>) -> Request {
    let mut request = Request::parse_grpc(message.into()).expect("a valid message");
    assert_eq!(request.take_model(), (Some("model".to_owned()), None));
    request
}

/// The request in every encoding that can hold it.
fn encodings(call: &Call, draw: &mut dyn FnMut() -> u64) -> Vec<Request> {
    let mut requests = Vec::new();
    let (body, json_len) = call.binary(draw);
    requests.push(Request::parse(body.into(), Some(json_len)).expect("a valid body"));
    if let Some(body) = call.json(draw) {
        let text = String::from_utf8_lossy(&body).into_owned();
        requests.push(Request::parse(body.into(), None).unwrap_or_else(|e| panic!("{e}: {text}")));
    }
    for typed in [false, true] {
        requests.extend(call.grpc(typed, draw).map(parse_grpc));
    }
    requests
}

#[test]
fn all_encodings_of_a_request_have_one_key() {
    let mut random = SplitMix64(1);
    let mut draw = || random.number();
    let mut typed = 0;
    for _ in 0..4000 {
        let call = Call::random(&mut draw, None);
        let requests = encodings(&call, &mut draw);
        typed += usize::from(requests.len() == 4);
        let key = requests[0].key_bytes();
        for request in &requests {
            assert_eq!(request.key_bytes(), key, "{call:?}\n{request:?}");
            assert_eq!(request.id(), call.id.as_deref());
            // Each rendering has the key, too.
            for encoding in [Encoding::AsReceived, Encoding::Json, Encoding::Binary] {
                let encoded = request.to_http(encoding).expect("HTTP can hold it");
                let again = Request::parse(encoded.body, encoded.json_len).expect("valid");
                assert_eq!(again.key_bytes(), key, "{call:?} {encoding:?}");
                assert_eq!(again.id(), call.id.as_deref());
            }
            let again = Request::parse_grpc(request.to_grpc().expect("gRPC can hold it"));
            assert_eq!(again.expect("valid").key_bytes(), key, "{call:?}");
        }
    }
    assert!(typed > 500, "{typed} requests had all four encodings");
}

#[test]
fn each_change_of_a_request_changes_its_key() {
    let mut random = SplitMix64(2);
    let mut draw = || random.number();
    let mut changes: HashMap<&str, usize> = HashMap::new();
    for _ in 0..4000 {
        let call = Call::random(&mut draw, None);
        let mut changed = call.clone();
        let change = changed.mutate(&mut draw);
        *changes.entry(change).or_default() += 1;
        let keys: Vec<Bytes> = encodings(&call, &mut draw).iter().map(Request::key_bytes).collect();
        for request in encodings(&changed, &mut draw) {
            assert!(!keys.contains(&request.key_bytes()), "{change}: {call:?}\n{changed:?}");
        }
    }
    assert_eq!(changes.len(), 12, "{changes:?}");
}

/// All keys of many random requests, equal if and only if the requests are.
#[test]
fn equal_keys_mean_equal_requests() {
    let mut random = SplitMix64(3);
    let mut draw = || random.number();
    let mut known: HashMap<Bytes, Call> = HashMap::new();
    for _ in 0..3000 {
        let mut call = Call::random(&mut draw, None);
        for _ in 0..3 {
            call.mutate(&mut draw);
            let mut plain = Call { id: None, ..call.clone() };
            plain.parameters.sort_by(|one, two| one.0.cmp(&two.0));
            if plain.parameters.windows(2).any(|pair| pair[0].0 == pair[1].0) {
                break;
            }
            let (body, json_len) = plain.binary(&mut draw);
            let Ok(request) = Request::parse(body.into(), Some(json_len)) else { break };
            let before = known.insert(request.key_bytes(), plain.clone());
            // The debug form distinguishes all bits, also those of -0.0 and NaN.
            let before = before.map(|call| format!("{call:?}"));
            assert!(before.is_none_or(|before| before == format!("{plain:?}")));
        }
    }
}

#[test]
fn a_row_has_the_key_of_a_request_of_its_own() {
    let mut random = SplitMix64(4);
    let mut draw = || random.number();
    for _ in 0..2000 {
        let len = draw() % 5 + 1;
        let call = Call::random(&mut draw, Some(len));
        for request in encodings(&call, &mut draw) {
            let rows = request.split_rows().expect("all inputs have the same first dimension");
            assert_eq!(rows.len() as u64, len);
            for row in 0..rows.len() {
                let (body, json_len) = call.row(row).binary(&mut draw);
                let alone = Request::parse(body.into(), Some(json_len)).expect("valid");
                assert_eq!(rows.key_bytes(row), alone.key_bytes(), "{call:?}");
            }
            let all: Vec<usize> = (0..rows.len()).collect();
            assert_eq!(rows.select(&all).key_bytes(), request.key_bytes());
            let some = [rows.len() - 1, 0];
            let chosen = rows.select(&some).split_rows().expect("two rows");
            for (at, row) in some.into_iter().enumerate() {
                assert_eq!(chosen.key_bytes(at), rows.key_bytes(row));
            }
        }
    }
}

/// A response with the tensors of a request.
fn response(call: &Call, draw: &mut dyn FnMut() -> u64) -> Response {
    let (body, json_len) = call.binary(draw);
    let request = Request::parse(body.into(), Some(json_len)).expect("valid");
    let mut response = Response::default();
    response.model = Some("m".to_owned());
    response.outputs = request.inputs;
    response
}

#[test]
fn responses_survive_rendering_storing_and_splitting() {
    let mut random = SplitMix64(5);
    let mut draw = || random.number();
    let data = |response: &Response| -> Vec<Bytes> {
        response.outputs.iter().map(|output| output.data.clone()).collect()
    };
    for _ in 0..2000 {
        let len = draw() % 5 + 1;
        let call = Call::random(&mut draw, Some(len));
        let one = response(&call, &mut draw);
        assert_eq!(Response::from_bytes(one.to_bytes()).expect("undamaged"), one);
        for wanted in [OutputEncoding::json(), OutputEncoding::binary()] {
            let Some(encoded) = one.render(Some("i"), &wanted) else {
                assert!(call.json(&mut draw).is_none(), "{call:?}");
                continue;
            };
            let again = Response::parse(encoded.body, encoded.json_len).expect("valid");
            assert_eq!(data(&again), data(&one), "{call:?}");
            assert_eq!(again.id.as_deref(), Some("i"));
            let json = again.render(None, &OutputEncoding::binary()).expect("binary holds all");
            assert_eq!(json, one.render(None, &OutputEncoding::binary()).expect("as above"));
        }
        for form in [Form::Binary, Form::Typed] {
            let message = one.render_grpc(None, form).expect("gRPC holds all");
            let again = Response::parse_grpc(message).expect("valid");
            assert_eq!(data(&again), data(&one));
        }
        let rows = one.split_rows(len as usize).expect("all outputs have the same first dimension");
        assert_eq!(Response::assemble(&rows).expect("alike"), one);
        assert!(one.split_rows(len as usize + 1).is_none());
        let mut other = rows[0].clone();
        other.outputs[0].name.push('!');
        assert!(Response::assemble([&rows[0], &other]).is_none());
    }
}

/// Each known field is in the key or excluded, as the table says.
#[test]
fn each_known_field_does_what_its_role_says() {
    let body = |place: Place, member: &str| {
        let at = |here: Place| if here == place { format!(",{member}") } else { String::new() };
        let in_parameters = |here: Place| {
            if here == place { format!(r#","parameters":{{{member}}}"#) } else { String::new() }
        };
        let input = format!(
            r#"{{"name":"x","datatype":"INT8","shape":[1],"data":[1]{}{}}}"#,
            at(Place::Input),
            in_parameters(Place::InputParameter),
        );
        let output = format!(
            r#"{{"name":"y"{}{}}}"#,
            at(Place::Output),
            in_parameters(Place::OutputParameter)
        );
        let more = in_parameters(Place::RequestParameter);
        format!(r#"{{"inputs":[{input}],"outputs":[{output}]{}{more}}}"#, at(Place::Request))
    };
    let key = |body: &str| {
        let request = Request::parse(Bytes::copy_from_slice(body.as_bytes()), None);
        request.map(|request| (request.key_bytes(), request.refusal()))
    };
    let (plain, refusal) = key(&body(Place::Request, r#""id":"0""#)).expect("valid");
    assert_eq!(refusal, None);
    let unknown = [
        Place::Request,
        Place::RequestParameter,
        Place::Input,
        Place::InputParameter,
        Place::Output,
        Place::OutputParameter,
    ];
    for place in unknown {
        let values = ["1", "2", "1.0", "true", r#""1""#, "null", "[1]", r#"{"a":1}"#];
        let keys =
            values.map(|value| key(&body(place, &format!(r#""new":{value}"#))).expect("valid").0);
        for (at, key) in keys.iter().enumerate() {
            assert_ne!(*key, plain, "{place:?} {}", values[at]);
            assert!(!keys[..at].contains(key), "{place:?} {}", values[at]);
        }
        assert_ne!(key(&body(place, r#""other":1"#)).expect("valid").0, keys[0]);
    }
    for field in FIELDS {
        let member = match (field.role, field.name) {
            (Role::Id, _) => r#""id":"1""#.to_owned(),
            (Role::Transport, "binary_data_size") => continue, // `json_and_binary_have_one_key`
            (Role::Transport, name) => format!(r#""{name}":true"#),
            (Role::Scheduling | Role::Sequence | Role::SharedMemory | Role::Stream, name) => {
                format!(r#""{name}":1"#)
            }
            (Role::Key, "model_name") => r#""model_name":"m""#.to_owned(),
            (Role::Key, "classification") => r#""classification":2"#.to_owned(),
            // Members that every request has: `each_change_of_a_request_changes_its_key`.
            (Role::Key, _) => continue,
        };
        let (with, refusal) = key(&body(field.place, &member)).expect("valid");
        match field.role {
            Role::Key => assert_ne!(with, plain, "{field:?}"),
            Role::Id | Role::Transport | Role::Scheduling => assert_eq!(with, plain, "{field:?}"),
            Role::Sequence | Role::SharedMemory | Role::Stream => {
                assert!(refusal.is_some(), "{field:?}");
            }
        }
    }
    // A server that does not know a scheduling parameter gives it another type.
    let (text, _) = key(&body(Place::RequestParameter, r#""timeout":"never""#)).expect("valid");
    assert_ne!(text, plain);
}
