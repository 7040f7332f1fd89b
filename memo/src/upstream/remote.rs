//! A classifier across the network: anything that speaks its protocol, another memo included.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Status, Welcome};
use afterimage_wire::{CallError, Client};

use super::{Answer, Classifier, Failure, Job, Reply};
use crate::key::ModelId;

/// How often a request is sent again that was turned away. A call's timeout holds for each attempt.
const RETRIES: u32 = 2;

/// A client of a classifier.
#[derive(Debug)]
pub struct Remote {
    client: Client,
    timeout: Duration,
    /// The last `Welcome` that was seen, and the model in it.
    known: Mutex<Option<Known>>,
}

#[derive(Clone, Debug)]
struct Known {
    welcome: Arc<Welcome>,
    model: Arc<ModelId>,
}

impl Remote {
    /// A classifier behind `client`, which should fail fast: while the classifier is away, misses
    /// fail at once. Each call may take `timeout`.
    pub fn new(client: Client, timeout: Duration) -> Arc<Self> {
        Arc::new(Remote { client, timeout, known: Mutex::new(None) })
    }

    /// The model in `welcome`: the same `Arc` for the same `Welcome`, or an equal one.
    fn model_of(&self, welcome: Arc<Welcome>) -> Arc<ModelId> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*known
            && Arc::ptr_eq(&known.welcome, &welcome)
        {
            return Arc::clone(&known.model);
        }
        let model = ModelId {
            digest: welcome.digest,
            shape: welcome.shape.clone(),
            classes: welcome.classes,
        };
        let model = match &*known {
            Some(known) if *known.model == model => Arc::clone(&known.model),
            _ => Arc::new(model),
        };
        *known = Some(Known { welcome, model: Arc::clone(&model) });
        model
    }
}

impl Classifier for Arc<Remote> {
    fn model(&self) -> Option<Arc<ModelId>> {
        match self.client.welcome() {
            Some(welcome) => Some(self.model_of(welcome)),
            None => {
                let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                known.as_ref().map(|known| Arc::clone(&known.model))
            }
        }
    }

    fn trouble(&self) -> Option<String> {
        self.client.last_error().map(|error| error.to_string())
    }

    fn classify(&self, jobs: Vec<Job>) {
        for Job { image, reply } in jobs {
            self.ask(image, reply, RETRIES);
        }
    }

    fn stats(&self, stats: &mut Stats) {
        stats.text("classifier", "remote");
        stats.text("classifier_connected", if self.client.is_connected() { "yes" } else { "no" });
    }
}

impl Remote {
    /// Sends one image. A classifier that goes away, or whose model changes, turns requests away
    /// that it has not begun; those go to its next connection.
    fn ask(self: &Arc<Self>, image: Box<[u8]>, reply: Reply, retries: u32) {
        let (remote, again) = (Arc::clone(self), image.clone());
        self.client.submit_classify(&image, self.timeout, move |answer| match answer {
            Ok((label, welcome)) => {
                // Not through `model_of`: a late answer must not bring an old model back.
                let model = remote.model_of_answer(&welcome);
                reply.send(Ok(Answer { label: label.class, model }));
            }
            Err(CallError::Server { status: Status::ShuttingDown, .. }) if retries > 0 => {
                remote.ask(again, reply, retries - 1);
            }
            Err(error) => reply.send(Err(failure(&error))),
        });
    }

    /// The model that an answer on the connection of `welcome` was given with.
    fn model_of_answer(&self, welcome: &Arc<Welcome>) -> Arc<ModelId> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some(known) if Arc::ptr_eq(&known.welcome, welcome) => Arc::clone(&known.model),
            _ => Arc::new(ModelId {
                digest: welcome.digest,
                shape: welcome.shape.clone(),
                classes: welcome.classes,
            }),
        }
    }
}

/// What the memo's client is told of an error of the memo's own client.
fn failure(error: &CallError) -> Failure {
    let status = match error.status() {
        // These are about the memo's request, not about the client's.
        Status::Unauthenticated
        | Status::Unsupported
        | Status::TooLarge
        | Status::DeadlineExceeded => Status::UpstreamError,
        status => status,
    };
    Failure { status, text: format!("classifier: {error}") }
}
