//! Calls of model servers over HTTP: inputs of a model's declared shape, texts for embeddings, or
//! recorded bodies, with the expected answers.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// The most bytes of all bodies.
const MAX_BYTES: usize = 4 << 30;

/// Words of random texts.
const WORDS: [&str; 16] = [
    "answer", "bridge", "cloud", "data", "engine", "field", "graph", "harbour", "index", "journal",
    "kernel", "label", "model", "number", "order", "paper",
];

/// Stands for "no answer yet".
const NO_ANSWER: u64 = 0;

/// HTTP requests of one path, and the expected answer of each.
///
/// The first answer to a request is the expected one, whichever connection got it. Answers are
/// compared by value: the layout of JSON and an `id` make no difference.
#[derive(Debug)]
pub struct Calls {
    host: String,
    path: String,
    bodies: Vec<Vec<u8>>,
    answers: Vec<Expected>,
}

/// The expected answer of a request.
#[derive(Debug, Default)]
struct Expected {
    /// A hash of its value.
    value: AtomicU64,
    /// A hash of the bytes that had this value last: the same bytes need no second comparison.
    bytes: AtomicU64,
}

/// The path of a server's model, as in the address of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol<'a> {
    /// `/v2/models/NAME` or `/v2/models/NAME/versions/VERSION`, with or without `/infer`.
    OpenInference {
        /// The path without `/infer`.
        model: &'a str,
    },
    /// A path that ends with `/v1/embeddings`.
    Embeddings {
        /// The part of the path before it.
        prefix: &'a str,
    },
}

impl<'a> Protocol<'a> {
    /// The protocol of a path.
    ///
    /// # Errors
    /// One sentence with the paths that are possible.
    pub fn of(path: &'a str) -> Result<Self, String> {
        if let Some(prefix) = path.strip_suffix("/v1/embeddings") {
            return Ok(Protocol::Embeddings { prefix });
        }
        let model = path.strip_suffix("/infer").unwrap_or(path);
        let name = model.split_once("/v2/models/").map(|(_, name)| name);
        if name.is_some_and(|name| !name.is_empty()) {
            return Ok(Protocol::OpenInference { model });
        }
        let shown = if path.is_empty() { "/" } else { path };
        Err(format!("the path {shown} is not /v2/models/NAME and not /v1/embeddings"))
    }

    /// The path of the document that describes the inputs.
    pub fn description(self) -> String {
        match self {
            Protocol::OpenInference { model } => model.into(),
            Protocol::Embeddings { prefix } => format!("{prefix}/v1/models"),
        }
    }

    /// `count` different random bodies for the model that `description` describes.
    ///
    /// # Errors
    /// One sentence about the part of the description that is missing or unknown.
    pub fn bodies(
        self,
        description: &[u8],
        count: usize,
        seed: u64,
    ) -> Result<Vec<Vec<u8>>, String> {
        let make: Make = match self {
            Protocol::OpenInference { .. } => {
                let model: Model = serde_json::from_slice(description)
                    .map_err(|error| format!("the metadata of the model are invalid: {error}"))?;
                if model.inputs.is_empty() {
                    return Err("the metadata of the model name no inputs".into());
                }
                for input in &model.inputs {
                    input.check()?;
                }
                Box::new(move |rng, number| {
                    let inputs: Vec<_> =
                        model.inputs.iter().map(|input| input.tensor(rng, number)).collect();
                    json!({ "inputs": inputs })
                })
            }
            Protocol::Embeddings { .. } => {
                let models: Value = serde_json::from_slice(description)
                    .map_err(|error| format!("the list of models is invalid: {error}"))?;
                let name = models["data"][0]["id"].as_str().map(str::to_owned);
                let name = name.ok_or("the list of models is empty")?;
                Box::new(move |rng, number| json!({ "model": name, "input": text(rng, number) }))
            }
        };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (mut bodies, mut bytes) = (Vec::new(), 0);
        for number in 0..count {
            let body = make(&mut rng, number).to_string().into_bytes();
            bytes += body.len();
            if bytes > MAX_BYTES {
                return Err(format!(
                    "{count} inputs have more than {MAX_BYTES} bytes; the population must be smaller"
                ));
            }
            bodies.push(body);
        }
        Ok(bodies)
    }
}

/// The bodies of a recording for a path: an HTTP archive (HAR), or a file with one body a line.
///
/// # Errors
/// One sentence about a recording without bodies.
pub fn recorded(text: &str, path: &str) -> Result<Vec<Vec<u8>>, String> {
    let archive = serde_json::from_str::<Value>(text).ok();
    let entries = archive.as_ref().and_then(|archive| archive["log"]["entries"].as_array());
    let bodies: Vec<Vec<u8>> = match entries {
        Some(entries) => {
            let requests = entries.iter().map(|entry| &entry["request"]);
            let of_path = requests.filter(|request| {
                let url = request["url"].as_str().unwrap_or_default();
                request["method"] == "POST"
                    && url.split(['?', '#']).next().unwrap_or_default().ends_with(path)
            });
            of_path
                .filter_map(|request| {
                    Some(request["postData"]["text"].as_str()?.as_bytes().to_vec())
                })
                .collect()
        }
        None => {
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            lines.map(|line| line.trim().as_bytes().to_vec()).collect()
        }
    };
    match bodies.is_empty() {
        true => Err(format!("the recording has no body for {path}")),
        false => Ok(bodies),
    }
}

impl Calls {
    /// Requests with these bodies to `host` and the path of an address.
    ///
    /// # Errors
    /// One sentence for a path of no known protocol.
    pub fn new(host: &str, path: &str, bodies: Vec<Vec<u8>>) -> Result<Self, String> {
        let path = match Protocol::of(path)? {
            Protocol::OpenInference { model } => format!("{model}/infer"),
            Protocol::Embeddings { .. } => path.into(),
        };
        let answers = bodies.iter().map(|_| Expected::default()).collect();
        Ok(Calls { host: host.into(), path, bodies, answers })
    }

    /// The number of requests.
    #[allow(clippy::len_without_is_empty, reason = "a plan without requests is refused")]
    pub fn len(&self) -> usize {
        self.bodies.len()
    }

    /// Appends a whole request.
    pub(crate) fn put(&self, about: u32, output: &mut Vec<u8>) {
        let body = &self.bodies[about as usize];
        let (path, host, length) = (&self.path, &self.host, body.len());
        output.extend_from_slice(
            format!(
                "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
                 Accept: application/json\r\nContent-Length: {length}\r\n\r\n"
            )
            .as_bytes(),
        );
        output.extend_from_slice(body);
    }

    /// Compares an answer with the expected one, and takes the first as the expected one. The error
    /// has the hashes of both.
    pub(crate) fn check(&self, about: u32, body: &[u8]) -> Result<(), (u64, u64)> {
        let expected = &self.answers[about as usize];
        let bytes = hash(body);
        if expected.bytes.load(Ordering::Relaxed) == bytes {
            return Ok(());
        }
        let value = value_of(body);
        let first =
            expected.value.compare_exchange(NO_ANSWER, value, Ordering::Relaxed, Ordering::Relaxed);
        match first {
            Err(other) if other != value => Err((value, other)),
            _ => {
                expected.bytes.store(bytes, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

/// A maker of random bodies, by their number.
type Make = Box<dyn Fn(&mut ChaCha8Rng, usize) -> Value>;

/// A model's metadata, as far as inputs need them.
#[derive(Debug, Deserialize)]
struct Model {
    #[serde(default)]
    inputs: Vec<Input>,
}

#[derive(Debug, Deserialize)]
struct Input {
    name: String,
    datatype: String,
    #[serde(default)]
    shape: Vec<i64>,
}

impl Input {
    fn check(&self) -> Result<(), String> {
        let Input { name, datatype, .. } = self;
        let known = [
            "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
            "FP16", "FP32", "FP64", "BYTES",
        ];
        match known.contains(&datatype.as_str()) {
            true => Ok(()),
            false => Err(format!(
                "the input {name} has the datatype {datatype}, which has no JSON form; give recorded inputs"
            )),
        }
    }

    /// A random tensor of the declared shape. A dimension of any length has one element.
    fn tensor(&self, rng: &mut impl Rng, number: usize) -> Value {
        let shape: Vec<i64> =
            self.shape.iter().map(|&extent| if extent < 0 { 1 } else { extent }).collect();
        let len = shape.iter().map(|&extent| extent.unsigned_abs()).product::<u64>();
        let data: Vec<Value> = (0..len).map(|_| self.element(rng, number)).collect();
        json!({ "name": self.name, "datatype": self.datatype, "shape": shape, "data": data })
    }

    fn element(&self, rng: &mut impl Rng, number: usize) -> Value {
        match self.datatype.as_str() {
            "BOOL" => rng.random::<bool>().into(),
            "INT8" => rng.random::<i8>().into(),
            "UINT8" => rng.random::<u8>().into(),
            "INT16" | "INT32" | "INT64" => rng.random::<i16>().into(),
            "UINT16" | "UINT32" | "UINT64" => rng.random::<u16>().into(),
            "BYTES" => text(rng, number).into(),
            // Multiples of 1/1024 below 1 are exact in FP16, too.
            _ => (f64::from(rng.random_range(0..1024_u16)) / 1024.0).into(),
        }
    }
}

/// A text that no other number has.
fn text(rng: &mut impl Rng, number: usize) -> String {
    let words: Vec<_> = (0..12).map(|_| WORDS[rng.random_range(0..WORDS.len())]).collect();
    format!("{number} {}", words.join(" "))
}

/// A hash of bytes that is not [`NO_ANSWER`].
fn hash(bytes: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish() | 1
}

/// A hash of an answer's value. Bodies that are not JSON are compared by their bytes.
fn value_of(body: &[u8]) -> u64 {
    match serde_json::from_slice::<Map<String, Value>>(body) {
        Ok(mut object) => {
            // Servers give each answer another id.
            object.remove("id");
            let mut hasher = DefaultHasher::new();
            add(&Value::Object(object), &mut hasher);
            hasher.finish() | 1
        }
        Err(_) => hash(body),
    }
}

/// Adds a value to a hash. Numbers count as the FP32 that they stand for, since servers print them
/// with different numbers of digits; integers are exact.
fn add(value: &Value, hasher: &mut DefaultHasher) {
    match value {
        Value::Null => 0_u8.hash(hasher),
        Value::Bool(value) => (1_u8, value).hash(hasher),
        Value::Number(number) => {
            let float = number.as_f64().unwrap_or_default();
            match number.as_i64() {
                Some(integer) => (2_u8, integer).hash(hasher),
                None if float.fract() == 0.0 && float.abs() < 2_f64.powi(53) => {
                    (2_u8, float as i64).hash(hasher);
                }
                None => (3_u8, (float as f32).to_bits()).hash(hasher),
            }
        }
        Value::String(text) => (4_u8, text).hash(hasher),
        Value::Array(values) => {
            (5_u8, values.len()).hash(hasher);
            values.iter().for_each(|value| add(value, hasher));
        }
        Value::Object(fields) => {
            (6_u8, fields.len()).hash(hasher);
            // The order of the fields has no meaning.
            let mut names: Vec<_> = fields.keys().collect();
            names.sort_unstable();
            for name in names {
                name.hash(hasher);
                add(&fields[name], hasher);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METADATA: &[u8] =
        br#"{"name":"m","inputs":[{"name":"x","datatype":"FP32","shape":[-1,3]},
        {"name":"s","datatype":"BYTES","shape":[1]}],"outputs":[]}"#;

    #[test]
    fn inputs_have_the_declared_shape_and_differ() {
        let protocol = Protocol::of("/v2/models/m").unwrap();
        let bodies = protocol.bodies(METADATA, 50, 1).unwrap();
        for body in &bodies {
            let body: Value = serde_json::from_slice(body).unwrap();
            let input = &body["inputs"][0];
            assert_eq!((&input["shape"], &input["datatype"]), (&json!([1, 3]), &json!("FP32")));
            assert_eq!(input["data"].as_array().unwrap().len(), 3);
        }
        let different: std::collections::HashSet<_> = bodies.iter().collect();
        assert_eq!(different.len(), 50);
        assert_eq!(
            protocol.bodies(METADATA, 50, 1).unwrap(),
            bodies,
            "the seed decides the inputs"
        );
    }

    #[test]
    fn a_path_names_its_protocol() {
        let embeddings = Protocol::of("/openai/v1/embeddings").unwrap();
        assert_eq!(embeddings.description(), "/openai/v1/models");
        let bodies = embeddings.bodies(br#"{"data":[{"id":"e5"}]}"#, 2, 1).unwrap();
        assert!(bodies[0].starts_with(br#"{"input":"0 "#), "{}", bodies[0].escape_ascii());
        for path in ["/v2/models/m", "/v2/models/m/infer"] {
            let mut request = Vec::new();
            Calls::new("h:1", path, vec![b"{}".to_vec()]).unwrap().put(0, &mut request);
            assert!(request.starts_with(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h:1\r\n"));
            assert!(request.ends_with(b"Content-Length: 2\r\n\r\n{}"));
        }
        for path in ["", "/", "/v2/models/", "/v1/chat/completions"] {
            assert!(Protocol::of(path).is_err(), "{path}");
        }
    }

    #[test]
    fn answers_are_compared_by_value() {
        let calls = Calls::new("h", "/v2/models/m", vec![Vec::new(), Vec::new()]).unwrap();
        let first = br#"{"id":"1","outputs":[{"data":[0.1,2],"name":"y"}]}"#;
        assert_eq!(calls.check(0, first), Ok(()));
        let same = br#"{"outputs":[{"name":"y","data":[0.10000000149011612, 2.0]}],"id":"2"}"#;
        assert_eq!(calls.check(0, same), Ok(()));
        for other in [
            &br#"{"outputs":[{"name":"y","data":[0.2,2]}]}"#[..],
            br#"{"outputs":[{"name":"y","data":[2,0.1]}]}"#,
            br#"{"outputs":[{"name":"y","data":[0.1,2,3]}]}"#,
            b"not JSON",
        ] {
            assert!(calls.check(0, other).is_err(), "{}", other.escape_ascii());
        }
        assert_eq!(calls.check(1, b"not JSON"), Ok(()));
    }

    #[test]
    fn recordings_are_archives_or_lines() {
        let archive = r#"{"log":{"entries":[
            {"request":{"method":"POST","url":"http://h/v1/embeddings?x=1","postData":{"text":"{\"a\":1}"}}},
            {"request":{"method":"POST","url":"http://h/v1/other","postData":{"text":"no"}}},
            {"request":{"method":"GET","url":"http://h/v1/embeddings"}}]}}"#;
        assert_eq!(recorded(archive, "/v1/embeddings"), Ok(vec![br#"{"a":1}"#.to_vec()]));
        let lines = "{\"a\":1}\n\n {\"a\":2}\r\n";
        assert_eq!(recorded(lines, "/x").unwrap(), [&b"{\"a\":1}"[..], b"{\"a\":2}"]);
        assert!(recorded("\n", "/x").is_err());
    }
}
