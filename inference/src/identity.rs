//! The identity of a model, from what its server says about it.
//!
//! No server of the protocol states a digest of the weights. The identity is a digest of the
//! model's metadata and configuration, and of those of the models in an ensemble, with their
//! entries in the index of the server's repository. A model that is replaced in place can keep all
//! of them. Its counters show it: they belong to the loaded model, and begin at zero again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::StatusCode;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::forward::Replica;
use crate::policy::Bypass;

/// Models of an ensemble that are examined. Larger ensembles exist in theory.
const MAX_STEPS: usize = 32;

/// The path of the index of the models that a server has.
const INDEX: &str = "/v2/repository/index";

/// A server without an index is not asked for it within this time.
const NO_INDEX: Duration = Duration::from_secs(60);

/// The result of a question about a model.
#[derive(Debug)]
pub(crate) enum Found {
    /// The server has the model.
    Model(Description),
    /// The server does not know the model, or does not describe it.
    Missing,
    /// The server gave no answer.
    Unreachable(String),
}

/// A model, as its server describes it.
#[derive(Debug)]
pub(crate) struct Description {
    /// A digest of metadata and configuration.
    pub(crate) digest: [u8; 32],
    /// A digest of the model's entries in the index of the repository.
    pub(crate) entries: [u8; 32],
    /// Why no answer of this model is stored; `None` if answers are.
    pub(crate) refusal: Option<Bypass>,
    /// The counters of the model, and of the models in an ensemble.
    pub(crate) counters: Vec<Counter>,
    /// The rows of the largest batch that may be split; 0 when the configuration shows that rows
    /// depend on each other.
    pub(crate) max_rows: usize,
    /// Whether each successful call counts. It does not with the server's own response cache.
    pub(crate) counts_all: bool,
}

impl Description {
    /// The bytes that identify the model.
    pub(crate) fn identity(&self) -> Vec<u8> {
        [self.digest, self.entries].concat()
    }
}

/// The counter of one version of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Counter {
    name: String,
    version: String,
    /// Rows computed since the model was loaded.
    count: u64,
    /// The time of the last one.
    last: u64,
}

/// Where a server describes a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Below `/v2/models`, by its path: a name, or `NAME/versions/VERSION`.
    Inference,
    /// In a list of models at the path `list`, under this name. This is a model of embeddings.
    Embeddings { list: String, name: Option<String> },
}

/// The index of one server's repository, which all of its models share.
#[derive(Debug)]
pub(crate) struct Repository {
    /// The oldest reading that is used again.
    max_age: Duration,
    state: tokio::sync::Mutex<Reading>,
}

#[derive(Debug, Default)]
struct Reading {
    at: Option<Instant>,
    /// Name, version and state of each model; `None` without an index.
    entries: Option<Arc<Vec<[String; 3]>>>,
}

impl Repository {
    pub(crate) fn new(max_age: Duration) -> Self {
        Repository { max_age, state: tokio::sync::Mutex::default() }
    }

    /// Makes the next question go to the server.
    pub(crate) async fn expire(&self) {
        self.state.lock().await.at = None;
    }

    /// The index, read not long ago. After an error, it is the last one that was read.
    async fn entries(&self, replica: &Replica) -> Option<Arc<Vec<[String; 3]>>> {
        let mut state = self.state.lock().await;
        let max_age = if state.entries.is_none() { NO_INDEX } else { self.max_age };
        if state.at.is_some_and(|at| at.elapsed() < max_age) {
            return state.entries.clone();
        }
        let Ok((status, body)) = replica.post(INDEX, b"{}").await else {
            return state.entries.clone();
        };
        if status.is_success() {
            state.entries = index(&body).map(Arc::new);
        } else if !status.is_server_error() || status == StatusCode::NOT_IMPLEMENTED {
            state.entries = None;
        }
        state.at = Some(Instant::now());
        state.entries.clone()
    }

    /// A digest of the entries of these models, with one version if the path has one.
    async fn digest(&self, replica: &Replica, names: &[&str], version: Option<&str>) -> [u8; 32] {
        let mut digest = Sha256::new();
        if let Some(entries) = self.entries(replica).await {
            let is_named = |entry: &&[String; 3]| {
                let at = names.iter().position(|name| *name == entry[0]);
                // The version in the path is that of the first model.
                at.is_some_and(|at| at > 0 || version.is_none_or(|version| version == entry[1]))
            };
            let mut named: Vec<_> = entries.iter().filter(is_named).collect();
            named.sort_unstable();
            for part in named.into_iter().flatten() {
                digest.update((part.len() as u64).to_le_bytes());
                digest.update(part);
            }
        }
        digest.finalize().into()
    }
}

/// Name, version and state of each model in an index; `None` if the text is no index.
fn index(text: &[u8]) -> Option<Vec<[String; 3]>> {
    let models: Value = serde_json::from_slice(text).ok()?;
    let entry = |model: &Value| {
        let text = |name: &str| model[name].as_str().unwrap_or_default().to_owned();
        model["name"].is_string().then(|| ["name", "version", "state"].map(text))
    };
    models.as_array()?.iter().map(entry).collect()
}

/// Asks a server about a model.
pub(crate) async fn describe(
    replica: &Replica,
    repository: &Repository,
    path: &str,
    source: &Source,
) -> Found {
    match source {
        Source::Inference => describe_inference(replica, repository, path).await,
        Source::Embeddings { list, name } => {
            describe_embeddings(replica, list, name.as_deref()).await
        }
    }
}

/// Asks a server of embeddings for its list of models. A server without a list is asked about
/// nothing else: then the path and the name of the model are its identity.
async fn describe_embeddings(replica: &Replica, list: &str, name: Option<&str>) -> Found {
    let mut digest = Sha256::new();
    for (path, members) in [(list, &LISTED[..]), (EMBEDDER_INFO, &INFORMED[..])] {
        let answer = match replica.get(path).await {
            Ok((status, body)) if status.is_success() => body,
            Ok((StatusCode::NOT_IMPLEMENTED, _)) => Bytes::new(),
            Ok((status, _)) if status.is_server_error() || status.as_u16() == 429 => {
                return Found::Unreachable(format!("{path}: {status}"));
            }
            Ok(_) => Bytes::new(),
            Err(error) => return Found::Unreachable(error.to_string()),
        };
        let answer = serde_json::from_slice(&answer).unwrap_or(Value::Null);
        for (member, value) in stable(&answer, name, members) {
            digest.update((member.len() as u64).to_le_bytes());
            digest.update(member);
            digest.update((value.len() as u64).to_le_bytes());
            digest.update(value);
        }
        digest.update(u64::MAX.to_le_bytes());
    }
    let (digest, counters, entries) = (digest.finalize().into(), Vec::new(), [0; 32]);
    let (refusal, max_rows, counts_all) = (None, usize::MAX, false);
    Found::Model(Description { digest, entries, refusal, counters, max_rows, counts_all })
}

/// The members of a listed model that do not change as long as the model stays. Others, such as
/// `created`, are the time of the question at some servers.
const LISTED: [&str; 8] =
    ["id", "owned_by", "root", "parent", "max_model_len", "version", "sha", "backend"];

/// The path at which Text Embeddings Inference describes its model.
const EMBEDDER_INFO: &str = "/info";

/// The members there that belong to the model.
const INFORMED: [&str; 5] = ["model_id", "model_sha", "model_dtype", "model_type", "version"];

/// Some members of the models in a list: of the one with this name, or of all without it. An
/// answer that is no list is one model.
fn stable<'a>(
    answer: &Value,
    name: Option<&str>,
    members: &'a [&'a str],
) -> Vec<(&'a str, String)> {
    let all: Vec<&Value> = match answer["data"].as_array() {
        Some(list) => list.iter().collect(),
        None => vec![answer],
    };
    let named = all.iter().find(|model| name.is_some_and(|name| model["id"] == name));
    let models = named.map_or(all.clone(), |model| vec![model]);
    let of = |model: &Value| {
        let known = members.iter().filter_map(|member| Some((*member, model.get(member)?)));
        known.map(|(member, value)| (member, value.to_string())).collect::<Vec<_>>()
    };
    models.into_iter().flat_map(of).collect()
}

async fn describe_inference(replica: &Replica, repository: &Repository, path: &str) -> Found {
    let (metadata, config) = match model(replica, path).await {
        Ok(Some(known)) => known,
        Ok(None) => return Found::Missing,
        Err(reason) => return Found::Unreachable(reason),
    };
    let mut digest = Sha256::new();
    let mut put = |part: &[u8]| {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    };
    put(&metadata);
    put(&config);
    let config: Value = serde_json::from_slice(&config).unwrap_or(Value::Null);
    let mut counters = Vec::new();
    if !config.is_null() {
        counters.extend(counters_of(replica, path).await);
    }
    for step in steps(&config) {
        match model(replica, step).await {
            Ok(Some((metadata, config))) => {
                put(&metadata);
                put(&config);
            }
            Ok(None) => put(b"missing"),
            Err(reason) => return Found::Unreachable(reason),
        }
        counters.extend(counters_of(replica, step).await);
    }
    let counts_all = config["response_cache"]["enable"] != Value::Bool(true);
    let digest = digest.finalize().into();
    let (name, version) = match path.split_once("/versions/") {
        Some((name, version)) => (name, Some(version)),
        None => (path, None),
    };
    let names: Vec<&str> = std::iter::once(name).chain(steps(&config)).collect();
    let entries = repository.digest(replica, &names, version).await;
    let (refusal, max_rows) = (refusal(&config), max_rows(&config));
    Found::Model(Description { digest, entries, refusal, counters, max_rows, counts_all })
}

/// Metadata and configuration of a model; the latter is empty for a server without it.
async fn model(replica: &Replica, path: &str) -> Result<Option<(Vec<u8>, Vec<u8>)>, String> {
    let ask = async |path: String| match replica.get(&path).await {
        Ok((status, body)) if status.is_success() => Ok(Some(body)),
        Ok((status, _)) if status.is_server_error() => Err(format!("{path}: {status}")),
        Ok(_) => Ok(None),
        Err(error) => Err(error.to_string()),
    };
    let Some(metadata) = ask(format!("/v2/models/{path}")).await? else { return Ok(None) };
    let is_model =
        serde_json::from_slice(&metadata).is_ok_and(|value: Value| value["name"].is_string());
    if !is_model {
        return Ok(None);
    }
    let config = ask(format!("/v2/models/{path}/config")).await.ok().flatten();
    Ok(Some((metadata.to_vec(), config.unwrap_or_default().to_vec())))
}

async fn counters_of(replica: &Replica, path: &str) -> Vec<Counter> {
    match replica.get(&format!("/v2/models/{path}/stats")).await {
        Ok((status, body)) if status.is_success() => counters(&body),
        _ => Vec::new(),
    }
}

fn counters(stats: &[u8]) -> Vec<Counter> {
    let stats: Value = serde_json::from_slice(stats).unwrap_or(Value::Null);
    let models = stats["model_stats"].as_array().map_or(&[][..], Vec::as_slice);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let counter = |model: &Value| Counter {
        name: text(&model["name"]),
        version: text(&model["version"]),
        count: model["inference_count"].as_u64().unwrap_or(0),
        last: model["last_inference"].as_u64().unwrap_or(0),
    };
    models.iter().map(counter).collect()
}

/// The models of an ensemble.
fn steps(config: &Value) -> Vec<&str> {
    let steps = config["ensemble_scheduling"]["step"].as_array().map_or(&[][..], Vec::as_slice);
    steps.iter().filter_map(|step| step["model_name"].as_str()).take(MAX_STEPS).collect()
}

fn refusal(config: &Value) -> Option<Bypass> {
    if config.get("sequence_batching").is_some_and(|value| !value.is_null()) {
        return Some(Bypass::SequenceModel);
    }
    let decoupled = &config["model_transaction_policy"]["decoupled"];
    (*decoupled == Value::Bool(true)).then_some(Bypass::Decoupled)
}

/// The rows of the largest batch that may be split. Without a configuration, probes decide alone.
fn max_rows(config: &Value) -> usize {
    if config.is_null() {
        return usize::MAX;
    }
    let list = |name: &str| config[name].as_array().map_or(&[][..], Vec::as_slice);
    let is_set = |tensor: &Value, name: &str| tensor[name] == Value::Bool(true);
    let depends = ["allow_ragged_batch", "is_shape_tensor", "is_non_linear_format_io"];
    let tensors = || list("input").iter().chain(list("output"));
    let is_tied = tensors().any(|tensor| depends.iter().any(|name| is_set(tensor, name)));
    let has_batch_tensors = !list("batch_input").is_empty() || !list("batch_output").is_empty();
    match config["max_batch_size"].as_u64() {
        Some(most) if !is_tied && !has_batch_tensors => usize::try_from(most).unwrap_or(0),
        _ => 0,
    }
}

/// Whether a model was loaded again between two readings of its counters. `answered` is a number of
/// successful calls that surely fell in between; it is 0 where it is not known.
pub(crate) fn was_reloaded(before: &[Counter], now: &[Counter], answered: u64) -> bool {
    // The calls went to one of several versions, or through an ensemble.
    let answered = if before.len() == 1 { answered } else { 0 };
    before.iter().any(|before| {
        let same = |now: &&Counter| now.name == before.name && now.version == before.version;
        now.iter().find(same).is_none_or(|now| {
            now.last < before.last || now.count < before.count.saturating_add(answered)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(count: u64, last: u64) -> Counter {
        Counter { name: "m".into(), version: "1".into(), count, last }
    }

    #[test]
    fn counters_that_fall_back_show_a_reload() {
        let before = [counter(100, 7)];
        assert!(!was_reloaded(&before, &[counter(100, 7)], 0));
        assert!(!was_reloaded(&before, &[counter(105, 9)], 5));
        assert!(was_reloaded(&before, &[counter(0, 0)], 0));
        assert!(was_reloaded(&before, &[counter(3, 9)], 3));
        assert!(was_reloaded(&before, &[], 0), "the version is gone");
        // A new model that has overtaken the old one since is found by the calls of the proxy.
        assert!(was_reloaded(&[counter(2, 7)], &[counter(5, 9)], 5));
        assert!(!was_reloaded(&[], &[counter(5, 9)], 5));
    }

    #[test]
    fn a_configuration_names_steps_and_refuses_state() {
        let config = |text| serde_json::from_str::<Value>(text).unwrap();
        let ensemble = config(
            r#"{"ensemble_scheduling": {"step": [
            {"model_name": "a"}, {"model_name": "b"}]}}"#,
        );
        assert_eq!(steps(&ensemble), ["a", "b"]);
        assert_eq!(refusal(&ensemble), None);
        let sequence = config(r#"{"sequence_batching": {"oldest": {}}}"#);
        assert_eq!(refusal(&sequence), Some(Bypass::SequenceModel));
        let decoupled = config(r#"{"model_transaction_policy": {"decoupled": true}}"#);
        assert_eq!(refusal(&decoupled), Some(Bypass::Decoupled));
        let plain = config(r#"{"model_transaction_policy": {"decoupled": false}}"#);
        assert_eq!(refusal(&plain), None);
        assert_eq!(steps(&Value::Null), Vec::<&str>::new());
        let batch = |text| max_rows(&config(text));
        assert_eq!(max_rows(&Value::Null), usize::MAX);
        assert_eq!(batch(r#"{"max_batch_size": 8, "input": [{"name": "x"}]}"#), 8);
        assert_eq!(batch(r#"{"max_batch_size": 0}"#), 0);
        let ragged = r#"{"max_batch_size": 8, "input": [{"allow_ragged_batch": true}]}"#;
        assert_eq!(batch(ragged), 0);
        assert_eq!(batch(r#"{"max_batch_size": 8, "batch_input": [{"kind": 1}]}"#), 0);
    }

    #[test]
    fn a_listed_model_is_known_by_its_stable_members() {
        let list = serde_json::json!({"object": "list", "data": [
            {"id": "a", "created": 1, "root": "a-v1", "permission": [{"id": "p1"}]},
            {"id": "b", "created": 2, "root": "b-v1"},
        ]});
        let root =
            |model: &str| vec![("id", format!("{model:?}")), ("root", format!("\"{model}-v1\""))];
        assert_eq!(stable(&list, Some("b"), &LISTED), root("b"));
        let all = [root("a"), root("b")].concat();
        assert_eq!(stable(&list, Some("alias"), &LISTED), all, "the server may take any name");
        let info = serde_json::json!({"model_id": "e5", "model_sha": "1f", "max_batch_tokens": 9});
        let expected = vec![("model_id", "\"e5\"".to_owned()), ("model_sha", "\"1f\"".to_owned())];
        assert_eq!(stable(&info, Some("b"), &INFORMED), expected);
        assert_eq!(stable(&Value::Null, None, &LISTED), []);
    }

    #[test]
    fn an_index_has_name_version_and_state() {
        let text = br#"[{"name": "m", "version": "2", "state": "READY"}, {"name": "n"}]"#;
        let entry = |parts: [&str; 3]| parts.map(str::to_owned);
        assert_eq!(index(text), Some(vec![entry(["m", "2", "READY"]), entry(["n", "", ""])]));
        assert_eq!(index(br#"{"error": "unknown"}"#), None);
        assert_eq!(index(br#"[{"version": "2"}]"#), None);
    }

    #[test]
    fn counters_are_read_from_statistics() {
        let stats = br#"{"model_stats": [{"name": "m", "version": "1", "last_inference": 7,
            "inference_count": 100, "inference_stats": {}}]}"#;
        assert_eq!(counters(stats), [counter(100, 7)]);
        assert_eq!(counters(b"no JSON"), []);
    }
}
