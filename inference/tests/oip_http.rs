//! Requests and responses over HTTP: JSON and binary tensors.

use afterimage_inference::oip::{
    Datatype, Encoding, Error, OutputEncoding, Refusal, Request, Response, Value,
};
use bytes::Bytes;

fn json(body: &str) -> Result<Request, Error> {
    Request::parse(Bytes::copy_from_slice(body.as_bytes()), None)
}

/// A request with one input.
fn input(datatype: &str, shape: &str, data: &str) -> Result<Request, Error> {
    json(&format!(
        r#"{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]}}"#
    ))
}

/// A request with one binary input.
fn binary(datatype: &str, shape: &str, data: &[u8]) -> Result<Request, Error> {
    let json = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"parameters":{{"binary_data_size":{}}}}}]}}"#,
        data.len()
    );
    let body = [json.as_bytes(), data].concat();
    Request::parse(body.into(), Some(json.len()))
}

fn same(one: &Result<Request, Error>, two: &Result<Request, Error>) -> bool {
    let key = |request: &Result<Request, Error>| request.as_ref().expect("valid").key_bytes();
    key(one) == key(two)
}

#[test]
fn json_and_binary_have_one_key() {
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    let cases: &[(&str, &str, &str, Vec<u8>)] = &[
        ("FP32", "[2]", "[0.1, 1]", floats(&[0.1, 1.0])),
        (
            "FP32",
            "[3]",
            "[NaN, Infinity, -Infinity]",
            floats(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
        ),
        ("FP32", "[1]", "[-0.0]", floats(&[-0.0])),
        ("FP32", "[1]", "[0.10000000149011612]", floats(&[0.1])),
        (
            "FP64",
            "[2]",
            "[0.1, 2.5e-3]",
            [0.1f64, 2.5e-3].iter().flat_map(|v| v.to_le_bytes()).collect(),
        ),
        ("BOOL", "[2]", "[true, false]", vec![1, 0]),
        ("UINT8", "[2]", "[0, 255]", vec![0, 255]),
        ("INT8", "[2]", "[-128, 127]", vec![0x80, 0x7f]),
        ("INT64", "[1]", "[9007199254740993]", 9_007_199_254_740_993i64.to_le_bytes().to_vec()),
        ("INT64", "[1]", "[-9223372036854775808]", i64::MIN.to_le_bytes().to_vec()),
        ("UINT64", "[1]", "[18446744073709551615]", vec![0xff; 8]),
        (
            "BYTES",
            "[2]",
            r#"["ab", "é\u00e9"]"#,
            b"\x02\0\0\0ab\x04\0\0\0\xc3\xa9\xc3\xa9".to_vec(),
        ),
        ("BYTES", "[1]", r#"["\ud83d\ude00"]"#, b"\x04\0\0\0\xf0\x9f\x98\x80".to_vec()),
        ("FP32", "[0]", "[]", vec![]),
        ("FP32", "[2, 0]", "[[], []]", vec![]),
        ("INT16", "[]", "[-2]", vec![0xfe, 0xff]),
    ];
    for (datatype, shape, data, bytes) in cases {
        let one = input(datatype, shape, data);
        let two = binary(datatype, shape, bytes);
        assert!(same(&one, &two), "{datatype} {shape} {data}");
    }
}

#[test]
fn spelling_order_and_space_do_not_change_the_key() {
    let plain = input("FP32", "[2,2]", "[1,2,3,4]");
    for other in [
        input("FP32", "[2,2]", "[[1.0, 2e0],\n [30e-1, 4.000]]"),
        json(
            r#" { "inputs" : [ {"data":[[1,2],[3,4]],"shape":[2,2],"datatype":"FP32","name":"x"} ], "id": "9" } "#,
        ),
        json(
            r#"{"id":null,"parameters":{},"inputs":[{"n\u0061me":"x","datatype":"FP32","shape":[2,2],"parameters":{},"data":[1,2,3,4]}]}"#,
        ),
        json(
            r#"{"parameters":{"priority":3,"timeout":5,"binary_data_output":true},"inputs":[{"name":"x","datatype":"FP32","shape":[2,2],"data":[1,2,3,4]}]}"#,
        ),
    ] {
        assert!(same(&plain, &other), "{other:?}");
    }
}

#[test]
fn what_servers_read_differently_is_an_error() {
    for (datatype, shape, data) in [
        ("FP32", "[1]", "[-0]"),
        ("FP32", "[1]", "[1e39]"),
        ("FP64", "[1]", "[1e400]"),
        ("FP32", "[1]", "[null]"),
        ("FP32", "[1]", r#"["1"]"#),
        ("FP32", "[1]", "1"),
        ("FP32", "[1]", "[1"),
        ("FP32", "[1]", "[01]"),
        ("FP32", "[1]", "[1.]"),
        ("FP32", "[1]", "[.5]"),
        ("FP32", "[1]", "[+1]"),
        ("FP32", "[1]", "[-NaN]"),
        ("FP32", "[1]", "[nan]"),
        ("FP16", "[1]", "[1]"),
        ("BF16", "[1]", "[1]"),
        ("FP8", "[1]", "[1]"),
        ("fp32", "[1]", "[1]"),
        ("INT32", "[1]", "[1.0]"),
        ("INT32", "[1]", "[2147483648]"),
        ("UINT8", "[1]", "[-1]"),
        ("UINT8", "[1]", "[256]"),
        ("UINT64", "[1]", "[18446744073709551616]"),
        ("INT64", "[1]", "[true]"),
        ("BOOL", "[1]", "[1]"),
        ("BYTES", "[1]", r#"["\ud83d"]"#),
        ("BYTES", "[1]", "[\"\u{1}\"]"),
        ("INT32", "[2]", "[1]"),
        ("INT32", "[2]", "[1,2,3]"),
        ("INT32", "[2,2]", "[[1,2],[3]]"),
        ("INT32", "[2,2]", "[[1,2,3],[4]]"),
        ("INT32", "[2,2]", "[[1,2],3,4]"),
        ("INT32", "[2]", "[[1],[2]]"),
        ("INT32", "[-1]", "[1]"),
        ("INT32", "[1.0]", "[1]"),
        ("INT32", "[9223372036854775808]", "[1]"),
        ("INT32", "[4294967296,4294967296]", "[1]"),
        ("INT32", "[9223372036854775807]", "[1]"),
        ("INT32", "1", "[1]"),
    ] {
        assert!(input(datatype, shape, data).is_err(), "{datatype} {shape} {data}");
    }
    for body in [
        "",
        "{}",
        "[]",
        r#"{"inputs":[]} x"#,
        r#"{"inputs":[],"inputs":[]}"#,
        r#"{"inputs":[],"a":{"b":1,"\u0062":2}}"#,
        r#"{"inputs":[],"id":7}"#,
        r#"{"inputs":[],"parameters":{"binary_data_output":1}}"#,
        r#"{"inputs":[],"parameters":{"a":-0}}"#,
        r#"{"inputs":[{"name":"x","datatype":"INT8","shape":[1]}]}"#,
        r#"{"inputs":[{"datatype":"INT8","shape":[1],"data":[1]}]}"#,
        r#"{"inputs":[{"name":"x","datatype":"INT8","shape":[1],"data":[1]},{"name":"x","datatype":"INT8","shape":[1],"data":[1]}]}"#,
        r#"{"inputs":[{"name":"x","datatype":"INT8","shape":[1],"data":[1],"parameters":{"binary_data_size":0}}]}"#,
        r#"{"inputs":[],"outputs":[{"name":"y"},{"name":"y"}]}"#,
    ] {
        assert!(json(body).is_err(), "{body}");
    }
    let deep = format!(r#"{{"inputs":[],"a":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert!(json(&deep).is_err());
}

#[test]
fn binary_data_must_fill_the_body_exactly() {
    let json = br#"{"inputs":[{"name":"x","datatype":"INT8","shape":[2],"parameters":{"binary_data_size":2}}]}"#;
    let body = |extra: &[u8]| Bytes::from([json.as_slice(), extra].concat());
    assert!(Request::parse(body(&[1, 2]), Some(json.len())).is_ok());
    for (extra, len) in [
        (&[1u8][..], Some(json.len())),
        (&[1, 2, 3], Some(json.len())),
        (&[1, 2], None),
        (&[1, 2], Some(0)),
        (&[1, 2], Some(json.len() + 3)),
        (&[1, 2], Some(json.len() - 1)),
    ] {
        assert!(Request::parse(body(extra), len).is_err(), "{extra:?} {len:?}");
    }
}

#[test]
fn numbers_that_readers_round_differently_keep_their_spelling() {
    // Both are the same double. A server with a less exact reader may see two.
    let one = input("FP64", "[1]", "[0.1234567890123456789]");
    let two = input("FP64", "[1]", "[0.12345678901234568]");
    assert!(!same(&one, &two));
    let one = one.unwrap();
    let again = one.to_http(Encoding::Binary).unwrap();
    assert_eq!(again.json_len, None);
    let again = Request::parse(again.body, None).unwrap();
    assert_eq!(again.key_bytes(), one.key_bytes());

    let rows = input("FP64", "[2]", "[0.1234567890123456789, 0.5]").unwrap().split_rows().unwrap();
    assert_eq!(rows.key_bytes(0), one.key_bytes());
    assert_eq!(rows.select(&[0]).key_bytes(), one.key_bytes());
}

#[test]
fn refuses_state_shared_memory_and_streams() {
    let with = |parameters: &str| {
        json(&format!(r#"{{"inputs":[],"parameters":{{{parameters}}}}}"#)).unwrap().refusal()
    };
    assert_eq!(with(""), None);
    assert_eq!(with(r#""sequence_id":1"#), Some(Refusal::Sequence));
    assert_eq!(with(r#""sequence_end":false"#), Some(Refusal::Sequence));
    assert_eq!(with(r#""triton_enable_empty_final_response":true"#), Some(Refusal::Stream));
    assert_eq!(with(r#""temperature":0.7"#), Some(Refusal::Sampling));
    assert_eq!(with(r#""temperature":0"#), None);
    assert_eq!(with(r#""temperature":0.7,"seed":1"#), None);
    let shared = json(
        r#"{"inputs":[{"name":"x","datatype":"INT8","shape":[1],"parameters":{"shared_memory_region":"r","shared_memory_byte_size":1}}]}"#,
    );
    assert_eq!(shared.unwrap().refusal(), Some(Refusal::SharedMemory));
    let output =
        json(r#"{"inputs":[],"outputs":[{"name":"y","parameters":{"shared_memory_region":"r"}}]}"#);
    assert_eq!(output.unwrap().refusal(), Some(Refusal::SharedMemory));
}

#[test]
fn the_model_of_the_body_is_left_to_the_path() {
    let bare = json(r#"{"inputs":[]}"#).unwrap();
    let named = json(r#"{"model_name":"m","inputs":[]}"#).unwrap();
    assert_ne!(bare.key_bytes(), named.key_bytes());
    assert_ne!(bare.key_bytes(), named.clone().for_model("other").key_bytes());
    assert_eq!(bare.key_bytes(), named.for_model("m").key_bytes());
}

#[test]
fn a_response_is_rendered_as_wanted() {
    let body = r#"{"id":"u","model_name":"m","model_version":null,"parameters":{"p":1},"outputs":[
        {"name":"a","datatype":"FP32","shape":[1,2],"data":[[0.5,NaN]]},
        {"name":"b","datatype":"BYTES","shape":[1],"data":["x"],"parameters":{"q":"r"}}]}"#;
    let response = Response::parse(body.into(), None).unwrap();
    let stored = Response::from_bytes(response.to_bytes()).unwrap();
    assert_eq!(stored.id, None);
    let json = stored.render(Some("7"), &OutputEncoding::json()).unwrap();
    assert_eq!(json.json_len, None);
    assert_eq!(
        str::from_utf8(&json.body).unwrap(),
        r#"{"id":"7","model_name":"m","parameters":{"p":1},"model_version":null,"outputs":[{"name":"a","datatype":"FP32","shape":[1,2],"data":[0.5,NaN]},{"name":"b","datatype":"BYTES","shape":[1],"parameters":{"q":"r"},"data":["x"]}]}"#
    );
    let wanted = OutputEncoding { binary: true, outputs: vec![("b".into(), false)] };
    let mixed = stored.render(None, &wanted).unwrap();
    let json_len = mixed.json_len.unwrap();
    assert_eq!(mixed.body.len(), json_len + 8);
    let again = Response::parse(mixed.body, mixed.json_len).unwrap();
    assert_eq!(again.outputs[0].data, response.outputs[0].data);
    assert_eq!(again.outputs[1].parameters.get("q"), Some(&Value::String("r".into())));
    assert_eq!(again.outputs[1].datatype, Datatype::Bytes);
}

#[test]
fn a_response_keeps_more_digits_than_the_datatype() {
    let body = |data: &str| {
        format!(r#"{{"outputs":[{{"name":"a","datatype":"FP32","shape":[2],"data":[{data}]}}]}}"#)
    };
    let response = Response::parse(body("0.1, 1").into(), None).unwrap();
    let rows = response.split_rows(2).unwrap();
    let again = Response::assemble(&rows).unwrap();
    assert_eq!(again.render(None, &OutputEncoding::json()).unwrap().body, body("0.1,1"));
    assert_eq!(&again.outputs[0].data[..4], 0.1f32.to_le_bytes());
}

#[test]
fn what_json_cannot_hold_is_not_rendered_as_json() {
    let json = br#"{"outputs":[{"name":"a","datatype":"FP16","shape":[1],"parameters":{"binary_data_size":2}}]}"#;
    let body = Bytes::from([json.as_slice(), &[1, 2]].concat());
    let response = Response::parse(body.clone(), Some(json.len())).unwrap();
    assert_eq!(response.render(None, &OutputEncoding::json()), None);
    assert_eq!(response.render(None, &OutputEncoding::binary()).unwrap().body, body);
}

#[test]
fn an_error_is_not_a_response() {
    for body in [r#"{"error":"no"}"#, r#"{"outputs":null}"#, "no"] {
        assert!(Response::parse(body.into(), None).is_err(), "{body}");
    }
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    for (shape, data) in [("[]", "[1]"), ("[0]", "[]"), ("[0,3]", "[]")] {
        assert!(input("INT8", shape, data).unwrap().split_rows().is_none(), "{shape}");
    }
    let unequal = json(
        r#"{"inputs":[{"name":"x","datatype":"INT8","shape":[2],"data":[1,2]},
                      {"name":"y","datatype":"INT8","shape":[1],"data":[1]}]}"#,
    );
    assert!(unequal.unwrap().split_rows().is_none());
    assert!(json(r#"{"inputs":[]}"#).unwrap().split_rows().is_none());
    assert!(binary("BYTES", "[1]", &[9, 0, 0, 0, 1]).unwrap().split_rows().is_none());
}
