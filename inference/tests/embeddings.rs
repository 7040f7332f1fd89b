//! Embeddings by input, with the faults of other caches as tests.

use afterimage_inference::embeddings::{Format, Input, Request, Row, parse_response, render};
use afterimage_inference::oip::Error;

fn request(body: &str) -> Request {
    Request::parse(body.as_bytes()).unwrap_or_else(|error| panic!("{error}: {body}"))
}

/// The key of the first row.
fn key(body: &str) -> Vec<u8> {
    request(body).key_bytes(0).to_vec()
}

/// A response with one number for each input: its length.
fn reply(request: &Request) -> String {
    let items = request.inputs.iter().enumerate().map(|(index, input)| {
        let value = match input {
            Input::Text(text) => text.len() as f32 + 0.5,
            Input::Tokens(tokens) => -(tokens.len() as f32) - 0.5,
        };
        format!(r#"{{"object":"embedding","index":{index},"embedding":[{value}]}}"#)
    });
    // The order of the list has no meaning.
    let items: Vec<String> = items.collect::<Vec<_>>().into_iter().rev().collect();
    let count = 3 * request.inputs.len() + 2;
    format!(
        r#"{{"object":"list","data":[{}],"model":"m","usage":{{"prompt_tokens":{count},"total_tokens":{count}}}}}"#,
        items.join(",")
    )
}

fn values(body: &[u8]) -> Vec<f64> {
    let body: serde_json::Value = serde_json::from_slice(body).expect("JSON");
    let data = body["data"].as_array().expect("a list");
    assert!(data.iter().enumerate().all(|(at, item)| item["index"] == at));
    data.iter().map(|item| item["embedding"][0].as_f64().expect("a number")).collect()
}

#[test]
fn a_string_and_its_list_have_one_key() {
    let plain = key(r#"{"model":"m","input":"a"}"#);
    for same in [
        r#"{"input":["a"],"model":"m"}"#,
        r#"{"input":["\u0061","b"],"model":"m"}"#,
        r#"{"model":"m","input":"a","encoding_format":"base64","user":"u"}"#,
        r#"{"model":"m","input":"a","encoding_format":"float"}"#,
    ] {
        assert_eq!(key(same), plain, "{same}");
    }
}

#[test]
fn every_other_field_is_part_of_the_key() {
    let bodies = [
        r#"{"model":"m","input":"a"}"#,
        r#"{"model":"n","input":"a"}"#,
        r#"{"model":"m","input":"b"}"#,
        r#"{"model":"m","input":""}"#,
        r#"{"model":"m","input":"a","dimensions":8}"#,
        r#"{"model":"m","input":"a","dimensions":8.0}"#,
        r#"{"model":"m","input":"a","dimensions":null}"#,
        r#"{"model":"m","input":"a","input_type":"query"}"#,
        r#"{"model":"m","input":"a","input_type":"passage"}"#,
        r#"{"model":"m","input":"a","truncate":"END"}"#,
        r#"{"model":"m","input":"a","task":{"x":[1]}}"#,
        r#"{"model":"m","input":"a","task":{"x":[2]}}"#,
        r#"{"model":"m","input":"a","encoding_format":"int8"}"#,
        r#"{"model":"m","input":"a","encoding_format":null}"#,
        r#"{"model":"m","input":[97]}"#,
        r#"{"model":"m","input":"[101, 7, 9]"}"#,
        r#"{"model":"m","input":[101,7,9]}"#,
        r#"{"model":"m","input":[101,79]}"#,
    ];
    let keys: Vec<_> = bodies.iter().map(|body| key(body)).collect();
    for (at, key) in keys.iter().enumerate() {
        assert!(!keys[..at].contains(key), "{}", bodies[at]);
    }
    assert_eq!(keys[16], key(r#"{"model":"m","input":[[101,7,9]]}"#));
}

#[test]
fn refuses_bodies_that_servers_read_differently() {
    for body in [
        "",
        "{}",
        r#"{"input":[]}"#,
        r#"{"input":null}"#,
        r#"{"input":5}"#,
        r#"{"input":["known",5,"known"]}"#,
        r#"{"input":[5,"known"]}"#,
        r#"{"input":[[5],"known"]}"#,
        r#"{"input":[-1]}"#,
        r#"{"input":[1.0]}"#,
        r#"{"input":[[[1]]]}"#,
        r#"{"input":"a","input":"b"}"#,
    ] {
        assert!(Request::parse(body.as_bytes()).is_err(), "{body}");
    }
}

#[test]
fn partial_hits_come_back_in_order() {
    let texts = ["a", "bb", "a", "dddd", "ccc", "bb"];
    let body = format!(r#"{{"model":"m","input":{texts:?}}}"#);
    let all = request(&body);
    // Rows 1 and 4 are known. Each of the others is asked once.
    let known = all.select(&[1, 4]);
    let known = parse_response(reply(&known).as_bytes(), &known).expect("valid");
    let missing = request(str::from_utf8(&all.select(&[0, 3]).to_json()).expect("UTF-8"));
    let new = parse_response(reply(&missing).as_bytes(), &missing).expect("valid");
    let rows = [&new[0], &known[0], &new[0], &new[1], &known[1], &known[0]].map(Row::clone);
    let body = render(&rows, Format::Float).expect("one model");
    assert_eq!(values(&body), texts.map(|text| text.len() as f64 + 0.5));
    assert_eq!(values(&body), values_in_order(&all));
}

/// The values of a direct reply, by index.
fn values_in_order(request: &Request) -> Vec<f64> {
    let rows = parse_response(reply(request).as_bytes(), request).expect("valid");
    values(&render(&rows, Format::Float).expect("one model"))
}

#[test]
fn a_split_request_keeps_the_kind_of_its_input() {
    for (body, rows, expected) in [
        (r#"{"input":["a","b"]}"#, &[1][..], r#"{"input":["b"]}"#),
        (r#"{"input":[[5],[6]]}"#, &[0], r#"{"input":[[5]]}"#),
        (r#"{"input":"a"}"#, &[0], r#"{"input":"a"}"#),
        (r#"{"input":[5,6]}"#, &[0], r#"{"input":[5,6]}"#),
        (
            r#"{"input":["a"],"user":"u","encoding_format":"base64","model":"m","x": 1.50}"#,
            &[0],
            r#"{"model":"m","user":"u","encoding_format":"base64","x":1.50,"input":["a"]}"#,
        ),
    ] {
        assert_eq!(request(body).select(rows).to_json(), expected, "{body}");
    }
}

#[test]
fn one_entry_serves_floats_and_base64() {
    let request = request(r#"{"input":"a"}"#);
    let floats = [0.1f32, -0.0, 1e-40, f32::MAX];
    let exact: Vec<String> =
        floats.iter().map(|value| format!("{:?}", f64::from(*value))).collect();
    let short: Vec<String> = floats.iter().map(|value| format!("{value:?}")).collect();
    let body = |embedding: String| {
        format!(r#"{{"data":[{{"index":0,"embedding":{embedding}}}],"model":"m"}}"#)
    };
    let parse = |embedding: String| {
        let rows = parse_response(body(embedding).as_bytes(), &request).expect("valid");
        Row::from_bytes(rows[0].to_bytes()).expect("undamaged")
    };
    let list = |numbers: &[String]| format!("[{}]", numbers.join(","));
    let (exact, short) = (list(&exact), list(&short));
    let from_exact = parse(exact.clone());
    let from_short = parse(short.clone());
    let encoded = render(std::slice::from_ref(&from_exact), Format::Base64).expect("one row");
    assert_eq!(render(std::slice::from_ref(&from_short), Format::Base64), Some(encoded.clone()));
    let from_base64 = parse_response(&encoded, &request).expect("valid");
    assert_eq!(from_base64[0].data, from_exact.data);

    let number = |row: &Row| -> Vec<f64> {
        let body = render(std::slice::from_ref(row), Format::Float).expect("one row");
        let body: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        let list = body["data"][0]["embedding"].as_array().expect("a list");
        list.iter().map(|number| number.as_f64().expect("a number")).collect()
    };
    let spelled = |text: &str| serde_json::from_str::<Vec<f64>>(text).expect("JSON");
    assert_eq!(number(&from_exact), spelled(&exact));
    assert_eq!(number(&from_base64[0]), spelled(&exact));
    // More digits than a 32-bit float holds stay as the server wrote them.
    assert_eq!(number(&from_short), spelled(&short));
    assert_ne!(spelled(&short), spelled(&exact));
}

#[test]
fn usage_of_a_batch_is_shared_and_adds_up() {
    let batch = request(r#"{"input":["a","bb bb","ccc"]}"#);
    let rows = parse_response(reply(&batch).as_bytes(), &batch).expect("valid");
    let usage = |rows: &[Row]| -> serde_json::Value {
        let body = render(rows, Format::Float).expect("one model");
        serde_json::from_slice::<serde_json::Value>(&body).expect("JSON")["usage"].clone()
    };
    let all = usage(&rows);
    assert_eq!(all["prompt_tokens"], 11);
    assert_eq!(all["total_tokens"], 11);
    assert_eq!(all["estimated"], true);
    // A reply of another Afterimage is an estimate, too.
    let again = render(&rows[..1], Format::Float).expect("one model");
    let single = request(r#"{"input":["a"]}"#);
    let again = parse_response(&again, &single).expect("valid");
    assert_eq!(usage(&again)["estimated"], true);
    // The count of a request of one input is exact.
    let one = request(r#"{"input":["a"]}"#);
    let row = parse_response(reply(&one).as_bytes(), &one).expect("valid");
    assert_eq!(usage(&row), serde_json::json!({"prompt_tokens": 5, "total_tokens": 5}));
}

#[test]
fn refuses_responses_that_do_not_fit_the_request() {
    let request = request(r#"{"input":["a","b"]}"#);
    let parse = |data: &str| parse_response(format!(r#"{{"data":{data}}}"#).as_bytes(), &request);
    assert!(parse(r#"[{"index":1,"embedding":[1.5]},{"index":0,"embedding":[2.5]}]"#).is_ok());
    for data in [
        r#"[{"index":0,"embedding":[1.5]}]"#,
        r#"[{"index":0,"embedding":[1.5]},{"index":0,"embedding":[1.5]}]"#,
        r#"[{"index":0,"embedding":[1.5]},{"index":2,"embedding":[1.5]}]"#,
        r#"[{"embedding":[1.5]},{"index":1,"embedding":[1.5]}]"#,
        r#"[{"index":0,"embedding":[null]},{"index":1,"embedding":[1.5]}]"#,
        r#"[{"index":0,"embedding":[1e39]},{"index":1,"embedding":[1.5]}]"#,
        r#"[{"index":0,"embedding":"AAA="},{"index":1,"embedding":[1.5]}]"#,
        r#"[{"index":0},{"index":1,"embedding":[1.5]}]"#,
        "{}",
    ] {
        assert!(parse(data).is_err(), "{data}");
    }
    let error = parse_response(br#"{"error":{"message":"no"}}"#, &request);
    assert_eq!(
        error.unwrap_err(),
        Error::Field { field: "data", reason: "fewer embeddings than inputs" }
    );
}

#[test]
fn rows_of_different_models_are_not_combined() {
    let request = request(r#"{"input":"a"}"#);
    let row = |model: &str| {
        let body = format!(r#"{{"data":[{{"index":0,"embedding":[1.5]}}],"model":"{model}"}}"#);
        parse_response(body.as_bytes(), &request).expect("valid").remove(0)
    };
    assert!(render(&[row("m"), row("m")], Format::Float).is_some());
    assert!(render(&[row("m"), row("n")], Format::Float).is_none());
    assert!(render(&[], Format::Float).is_none());
}

#[test]
fn damaged_rows_are_refused() {
    let request = request(r#"{"model":"m","input":"a"}"#);
    let row = parse_response(reply(&request).as_bytes(), &request).expect("valid").remove(0);
    let bytes = row.to_bytes();
    assert_eq!(Row::from_bytes(bytes.clone()), Ok(row));
    for len in 0..bytes.len() {
        assert_eq!(Row::from_bytes(bytes.slice(..len)), Err(Error::Stored), "{len} bytes");
    }
}
