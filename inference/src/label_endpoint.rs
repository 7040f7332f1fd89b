//! A model of the Open Inference Protocol over HTTP, as an endpoint of a memo for labels.
//!
//! The model has one input of numbers with a fixed shape, and one output of integers with one
//! element a row: the label. The bytes of a row are the input's values, little-endian, as in the
//! protocol's binary tensors. The server's metadata gives the shape. Requests are JSON, which every
//! server takes.

use std::fmt::{self, Write as _};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use afterimage_core::model::MAX_CLASSES;
use afterimage_core::{Answer, Computed, ModelId, Rows, Shape, Status};
use afterimage_memo::pool::{Attempt, BatchLimit, Endpoint, EndpointError, Outcome, Retry};
use afterimage_memo::upstream::OnChange;
use arc_swap::ArcSwapOption;
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use serde_json::Value;

use crate::endpoint::{Whole, read};
use crate::forward::{ForwardError, Outgoing, Replica, Target};
use crate::identity::{Counter, Found, Repository, Source, describe, was_reloaded};

/// The interval at which a server is asked about the model.
const POLL_EVERY: Duration = Duration::from_secs(2);

/// The same until the model is known.
const FIRST_POLLS: Duration = Duration::from_millis(200);

/// The rows of one request.
const BATCH: BatchLimit = BatchLimit { rows: 64, bytes: 256 << 10 };

/// The largest response: 64 labels, and whatever else a server says.
const MAX_RESPONSE: usize = 1 << 20;

/// The URL of one model at one server: `http://host:8000/v2/models/NAME`, or with
/// `/versions/VERSION` behind it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ModelUrl {
    /// The server.
    pub target: Target,
    /// `NAME` or `NAME/versions/VERSION`.
    model: String,
}

impl FromStr for ModelUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected http://HOST:PORT/v2/models/NAME";
        let (server, model) = url.split_once("/v2/models/").ok_or(EXPECTED)?;
        let parts: Vec<&str> = model.split('/').collect();
        let is_model = match parts[..] {
            [name] => !name.is_empty(),
            [name, "versions", version] => !name.is_empty() && !version.is_empty(),
            _ => false,
        };
        if !is_model || model.contains(['?', '#', ' ']) {
            return Err(EXPECTED.into());
        }
        let target = server.parse().map_err(|error: crate::TargetError| error.to_string())?;
        Ok(ModelUrl { target, model: model.to_owned() })
    }
}

impl fmt::Display for ModelUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/v2/models/{}", self.target, self.model)
    }
}

/// A model with labels at one server.
pub struct LabelEndpoint(Arc<Inner>);

struct Inner {
    replica: Replica,
    /// The index of the server's repository.
    repository: Repository,
    url: String,
    /// Below `/v2/models/`.
    path: String,
    known: ArcSwapOption<Known>,
    changed: Mutex<Option<OnChange>>,
    /// Called when the server has loaded the same model again: its answers may be others.
    reloaded: Box<dyn Fn() + Send + Sync>,
    trouble: Mutex<Option<String>>,
}

/// The model, as its server describes it.
struct Known {
    model: Arc<ModelId>,
    signature: Signature,
    counters: Vec<Counter>,
}

impl LabelEndpoint {
    /// The model at this URL, whose server `replica` reaches. It is examined in the background, as
    /// long as the endpoint exists. `reloaded` is called when the server has loaded the model again
    /// under the same identity.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start(
        url: &ModelUrl,
        replica: Replica,
        reloaded: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let inner = Arc::new(Inner {
            replica,
            repository: Repository::new(POLL_EVERY / 4),
            url: url.to_string(),
            path: url.model.clone(),
            known: ArcSwapOption::empty(),
            changed: Mutex::default(),
            reloaded: Box::new(reloaded),
            trouble: Mutex::default(),
        });
        tokio::spawn(poll(Arc::downgrade(&inner)));
        Arc::new(LabelEndpoint(inner))
    }
}

async fn poll(endpoint: Weak<Inner>) {
    while let Some(inner) = endpoint.upgrade() {
        inner.examine().await;
        let is_known = inner.known.load().is_some();
        drop(inner);
        tokio::time::sleep(if is_known { POLL_EVERY } else { FIRST_POLLS }).await;
    }
}

impl Inner {
    /// Asks the server about the model, and takes the answer over.
    async fn examine(&self) {
        let Inner { replica, repository, path, .. } = self;
        let outcome = match describe(replica, repository, path, &Source::Inference).await {
            Found::Model(description) => match self.signature().await {
                Ok(signature) => Ok(Some((description, signature))),
                Err(trouble) => Err(trouble),
            },
            Found::Missing => Ok(None),
            Found::Unreachable(trouble) => {
                // The model that answered last stays, until the server describes another one.
                self.trouble(trouble);
                return;
            }
        };
        let next = match outcome {
            Ok(Some((description, signature))) => {
                let digest = ModelId::derived("", path, "", &description.identity(), 0);
                let shape = Shape::new(&[signature.row_bytes]);
                let model = Arc::new(ModelId::labels(digest, shape, MAX_CLASSES));
                Some(Known { model, signature, counters: description.counters })
            }
            Ok(None) => {
                self.trouble("the server does not have the model".to_owned());
                None
            }
            Err(trouble) => {
                self.trouble(trouble);
                None
            }
        };
        self.take_over(next);
    }

    fn take_over(&self, next: Option<Known>) {
        let before = self.known.load_full();
        let Some(mut next) = next else {
            self.known.store(None);
            return self.report(before.is_some());
        };
        let is_same = before.as_ref().is_some_and(|before| before.model == next.model);
        if let (true, Some(before)) = (is_same, &before) {
            // An unchanged model is the same `Arc`.
            next.model = Arc::clone(&before.model);
            if was_reloaded(&before.counters, &next.counters, 0) {
                tracing::info!(url = self.url, "the model was loaded again");
                (self.reloaded)();
            }
        }
        self.known.store(Some(Arc::new(next)));
        *self.lock_trouble() = None;
        self.report(!is_same);
    }

    fn report(&self, is_change: bool) {
        let changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if let (true, Some(changed)) = (is_change, &*changed) {
            changed();
        }
    }

    fn lock_trouble(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trouble(&self, text: String) {
        let mut trouble = self.lock_trouble();
        if trouble.as_ref() != Some(&text) {
            tracing::warn!(url = self.url, "no labels from this model: {text}");
        }
        *trouble = Some(text);
    }

    async fn signature(&self) -> Result<Signature, String> {
        let path = format!("/v2/models/{}", self.path);
        let (status, body) = self.replica.get(&path).await.map_err(|error| error.to_string())?;
        if status != StatusCode::OK {
            return Err(format!("the model's metadata has status {status}"));
        }
        let metadata = serde_json::from_slice(&body);
        Signature::of(&metadata.map_err(|_| "the model's metadata is no JSON".to_owned())?)
    }

    /// Sends rows, and reads their labels.
    async fn ask(&self, rows: &[Bytes], asked: &Arc<ModelId>) -> Result<Computed, EndpointError> {
        let known = self.known.load_full();
        let known = known.filter(|known| known.model == *asked);
        let Some(known) = known else { return Err(refused("the model has changed")) };
        let body = known.signature.request(rows).map_err(|text| EndpointError {
            status: Status::BadArgument,
            outcome: Outcome::Answered,
            retry: Retry::Never,
            ..refused(&text)
        })?;
        let mut request = Request::new(Outgoing::Full(Some(body.into()), None));
        *request.method_mut() = Method::POST;
        let uri = format!("/v2/models/{}/infer", self.path);
        *request.uri_mut() = uri.parse::<Uri>().map_err(|error| refused(&error.to_string()))?;
        let json = HeaderValue::from_static("application/json");
        request.headers_mut().insert(CONTENT_TYPE, json);
        let response = self.replica.send(request).await.map_err(|error| {
            let retry = match error {
                ForwardError::Unreachable { .. } => Retry::Free,
                _ => Retry::Budgeted,
            };
            self.trouble(error.to_string());
            EndpointError { retry, ..failed(Status::UpstreamCrashed, error.to_string()) }
        })?;
        let status = response.status();
        let body = match read(response.into_body(), MAX_RESPONSE).await {
            Ok(Whole::Complete(body)) => body,
            Ok(Whole::TooLarge(..)) => {
                return Err(failed(Status::UpstreamCorrupt, "the response is too large".into()));
            }
            Err(error) => {
                let text = format!("the model server's response ended early: {error}");
                return Err(failed(Status::UpstreamCrashed, text));
            }
        };
        match status {
            StatusCode::OK => {}
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                let text = format!("the model server answered with {status}");
                return Err(EndpointError { retry: Retry::Budgeted, ..refused(&text) });
            }
            StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => {
                let text = format!("the model server answered with {status}");
                return Err(failed(Status::UpstreamError, text));
            }
            // A model's own error says nothing about the server's health.
            _ => return Err(refused(&format!("the model server answered with {status}"))),
        }
        let answers = known.signature.labels(&body, rows.len());
        let answers = answers.map_err(|text| failed(Status::UpstreamCorrupt, text))?;
        // The model may have changed while it computed.
        match self.known.load_full() {
            Some(known) if known.model == *asked => {
                Ok(Computed { model: Arc::clone(asked), answers })
            }
            _ => Err(refused("the model has changed")),
        }
    }
}

/// An error that says nothing about the health of the server.
fn refused(text: &str) -> EndpointError {
    let (status, outcome, retry) = (Status::UpstreamError, Outcome::Refused, Retry::Never);
    EndpointError { status, text: text.to_owned(), outcome, retry, payload: None }
}

fn failed(status: Status, text: String) -> EndpointError {
    let (outcome, retry) = (Outcome::Failed, Retry::Budgeted);
    EndpointError { status, text, outcome, retry, payload: None }
}

/// Names and shapes of a model's input and output.
#[derive(Clone, Debug)]
struct Signature {
    input: String,
    datatype: &'static Number,
    /// Without the batch dimension.
    dims: Vec<u64>,
    has_batch: bool,
    row_bytes: u32,
    output: String,
}

/// A datatype of the protocol, its bytes, and its values as JSON.
#[derive(Debug)]
struct Number {
    name: &'static str,
    bytes: usize,
    json: fn(&[u8], &mut String) -> bool,
}

macro_rules! numbers {
    ($($name:literal $of:ty),* $(,)?) => {
        &[$(Number {
            name: $name,
            bytes: size_of::<$of>(),
            json: |bytes, out| {
                let Ok(bytes) = bytes.try_into() else { return false };
                let value = <$of>::from_le_bytes(bytes);
                let at = out.len();
                let _ = write!(out, "{value}");
                // JSON has neither infinities nor NaN.
                !out[at..].contains(['i', 'N'])
            },
        }),*]
    };
}

const NUMBERS: &[Number] = numbers![
    "UINT8" u8, "UINT16" u16, "UINT32" u32, "UINT64" u64,
    "INT8" i8, "INT16" i16, "INT32" i32, "INT64" i64,
    "FP32" f32, "FP64" f64,
];

impl Signature {
    fn of(metadata: &Value) -> Result<Self, String> {
        let list = |name: &str| metadata[name].as_array().cloned().unwrap_or_default();
        let (inputs, outputs) = (list("inputs"), list("outputs"));
        let [input] = &inputs[..] else {
            return Err(format!("it has {} inputs; a memo for labels needs 1", inputs.len()));
        };
        let name = |tensor: &Value| tensor["name"].as_str().unwrap_or_default().to_owned();
        let datatype = input["datatype"].as_str().unwrap_or_default();
        let number = NUMBERS.iter().find(|number| number.name == datatype);
        let datatype =
            number.ok_or(format!("its input has datatype {datatype:?}; expected numbers"))?;
        let shape = input["shape"].as_array().cloned().unwrap_or_default();
        let dims: Vec<i64> = shape.iter().filter_map(Value::as_i64).collect();
        let has_batch = dims.first() == Some(&-1);
        let dims = &dims[usize::from(has_batch)..];
        let fixed: Option<Vec<u64>> =
            dims.iter().map(|dim| u64::try_from(*dim).ok().filter(|dim| *dim > 0)).collect();
        let fixed =
            fixed.ok_or(format!("its input has the shape {dims:?}; expected fixed sizes"))?;
        let count = fixed.iter().try_fold(datatype.bytes as u64, |sum, dim| sum.checked_mul(*dim));
        let row_bytes = count.and_then(|bytes| u32::try_from(bytes).ok());
        let row_bytes = row_bytes.ok_or("its input is too large".to_owned())?;
        let is_integer =
            |tensor: &&Value| tensor["datatype"].as_str().is_some_and(|name| name.contains("INT"));
        let labels: Vec<&Value> = outputs.iter().filter(is_integer).collect();
        let [output] = labels[..] else {
            let count = labels.len();
            return Err(format!("it has {count} outputs of integers; a memo for labels needs 1"));
        };
        let (input, output) = (name(input), name(output));
        Ok(Signature { input, datatype, dims: fixed, has_batch, row_bytes, output })
    }

    fn request(&self, rows: &[Bytes]) -> Result<String, String> {
        let mut body = String::with_capacity(256 + rows.len() * self.row_bytes as usize * 4);
        let shape: Vec<u64> = match self.has_batch {
            true => std::iter::once(rows.len() as u64).chain(self.dims.iter().copied()).collect(),
            false => self.dims.clone(),
        };
        let (input, output) = (Value::from(&*self.input), Value::from(&*self.output));
        let _ = write!(
            body,
            "{{\"inputs\":[{{\"name\":{input},\"datatype\":\"{}\",\"shape\":{shape:?},\"data\":[",
            self.datatype.name
        );
        for value in rows.iter().flat_map(|row| row.chunks_exact(self.datatype.bytes)) {
            if !(self.datatype.json)(value, &mut body) {
                return Err("the input has a value that is not a finite number".to_owned());
            }
            body.push(',');
        }
        body.truncate(body.trim_end_matches(',').len());
        let _ = write!(body, "]}}],\"outputs\":[{{\"name\":{output}}}]}}");
        Ok(body)
    }

    fn labels(&self, body: &[u8], rows: usize) -> Result<Rows<Answer>, String> {
        let response: Value =
            serde_json::from_slice(body).map_err(|_| "the response is no JSON".to_owned())?;
        let outputs = response["outputs"].as_array().cloned().unwrap_or_default();
        let output = outputs.iter().find(|output| output["name"] == self.output);
        let data = output.and_then(|output| output["data"].as_array());
        let data = data.ok_or(format!("the response has no output {:?} with data", self.output))?;
        // Some servers nest the data as the shape.
        let flat = data.iter().flat_map(|value| match value {
            Value::Array(values) => values.clone(),
            value => vec![value.clone()],
        });
        let label = |value: Value| {
            let label = value.as_u64().and_then(|label| u16::try_from(label).ok());
            label.map(Answer::Label).ok_or(format!("{value} is not a label from 0 to 65535"))
        };
        let labels = flat.map(label).collect::<Result<Rows<Answer>, String>>()?;
        match labels.len() == rows {
            true => Ok(labels),
            false => Err(format!("the response has {} labels for {rows} rows", labels.len())),
        }
    }
}

impl Endpoint for LabelEndpoint {
    fn address(&self) -> &str {
        &self.0.url
    }

    fn model(&self) -> Option<Arc<ModelId>> {
        self.0.known.load().as_ref().map(|known| Arc::clone(&known.model))
    }

    fn on_change(&self, changed: OnChange) {
        *self.0.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(changed);
    }

    fn trouble(&self) -> Option<String> {
        self.0.lock_trouble().clone()
    }

    fn batch(&self) -> BatchLimit {
        match self.0.known.load().as_ref().is_some_and(|known| known.signature.has_batch) {
            true => BATCH,
            false => BatchLimit::ONE_ROW,
        }
    }

    fn call(&self, attempt: Attempt) {
        let (inner, asked) = (Arc::clone(&self.0), Arc::clone(attempt.model()));
        tokio::spawn(async move {
            let limit = attempt.timeout();
            let rows = attempt.rows().clone();
            let outcome = tokio::time::timeout(limit, inner.ask(&rows, &asked)).await;
            attempt.end(outcome.unwrap_or_else(|_| {
                let text = format!("the model server gave no response in {limit:?}");
                let (status, outcome) = (Status::DeadlineExceeded, Outcome::TimedOut);
                Err(EndpointError { outcome, ..failed(status, text) })
            }));
        });
    }
}

impl fmt::Debug for LabelEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LabelEndpoint").field(&self.0.url).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_one_model_at_one_server() {
        for url in ["http://h:8000/v2/models/digits", "https://h/a/v2/models/d/versions/2"] {
            assert_eq!(url.parse::<ModelUrl>().unwrap().to_string(), url);
        }
        for wrong in
            ["http://h:8000", "http://h/v2/models/", "http://h/v2/models/a/b", "h/v2/models/a"]
        {
            let error = wrong.parse::<ModelUrl>().unwrap_err();
            assert!(error.contains("http://"), "{wrong}: {error}");
        }
    }

    fn metadata(text: &str) -> Result<Signature, String> {
        Signature::of(&serde_json::from_str(text).unwrap())
    }

    #[test]
    fn rows_become_json_and_json_becomes_labels() {
        let signature = metadata(
            r#"{"inputs": [{"name": "x", "datatype": "INT16", "shape": [-1, 2]}],
                "outputs": [{"name": "p", "datatype": "FP32", "shape": [-1, 3]},
                            {"name": "label", "datatype": "INT64", "shape": [-1, 1]}]}"#,
        )
        .unwrap();
        assert_eq!((signature.row_bytes, signature.has_batch), (4, true));
        let rows = [[1i16, -2], [300, 4]].map(|row| {
            Bytes::from(row.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
        });
        let request: Value = serde_json::from_str(&signature.request(&rows).unwrap()).unwrap();
        assert_eq!(request["inputs"][0]["data"], serde_json::json!([1, -2, 300, 4]));
        assert_eq!(request["inputs"][0]["shape"], serde_json::json!([2, 2]));
        assert_eq!(request["outputs"], serde_json::json!([{"name": "label"}]));
        let labels = |data: &str| {
            let body = format!(r#"{{"outputs": [{{"name": "label", "data": {data}}}]}}"#);
            signature.labels(body.as_bytes(), 2)
        };
        let expected: Rows<Answer> =
            [Answer::Label(7), Answer::Label(65_535)].into_iter().collect();
        assert_eq!(labels("[7, 65535]").unwrap(), expected);
        assert_eq!(labels("[[7], [65535]]").unwrap(), expected);
        for wrong in ["[7]", "[7, 8, 9]", "[7, -1]", "[7, 65536]", "[7, 0.5]", "7"] {
            assert!(labels(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn models_without_one_input_and_one_label_are_refused() {
        let output = r#""outputs": [{"name": "y", "datatype": "INT64", "shape": [-1]}]"#;
        for (inputs, found) in [
            (r#"[]"#, "0 inputs"),
            (r#"[{"name": "x", "datatype": "BYTES", "shape": [-1, 1]}]"#, "BYTES"),
            (r#"[{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]"#, "shape"),
        ] {
            let error = metadata(&format!("{{\"inputs\": {inputs}, {output}}}")).unwrap_err();
            assert!(error.contains(found), "{error}");
        }
        let error = metadata(
            r#"{"inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}], "outputs": []}"#,
        )
        .unwrap_err();
        assert!(error.contains("0 outputs"), "{error}");
        let nan = Signature {
            input: "x".into(),
            datatype: NUMBERS.iter().find(|number| number.name == "FP32").unwrap(),
            dims: vec![1],
            has_batch: false,
            row_bytes: 4,
            output: "y".into(),
        };
        assert!(nan.request(&[Bytes::copy_from_slice(&f32::NAN.to_le_bytes())]).is_err());
    }
}
