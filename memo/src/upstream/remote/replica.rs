//! One classifier across the network: its client, and the model that its answers are of.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_wire::Client;
use afterimage_wire::proto::Welcome;

use crate::key::ModelId;

/// A client of a classifier.
pub(super) struct Replica {
    pub(super) client: Client,
    /// The last `Welcome` that was seen, and the model in it.
    known: Mutex<Option<Known>>,
}

#[derive(Clone)]
struct Known {
    welcome: Arc<Welcome>,
    model: Arc<ModelId>,
}

impl Replica {
    pub(super) fn new(client: Client) -> Arc<Self> {
        Arc::new(Replica { client, known: Mutex::new(None) })
    }

    pub(super) fn address(&self) -> &str {
        self.client.server()
    }

    /// The model of the open connection, if there is one; an equal one is the same `Arc` as before.
    pub(super) fn model(&self) -> Option<Arc<ModelId>> {
        let welcome = self.client.welcome()?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let model = match &*known {
            Some(known) if known.is_of(&welcome) => Arc::clone(&known.model),
            _ => Arc::new(model_in(&welcome)),
        };
        *known = Some(Known { welcome, model: Arc::clone(&model) });
        Some(model)
    }

    /// The model that an answer on the connection of `welcome` was given with. Such a connection
    /// may be an older one, so this changes nothing.
    pub(super) fn model_of(&self, welcome: &Arc<Welcome>) -> Arc<ModelId> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some(known) if known.is_of(welcome) => Arc::clone(&known.model),
            _ => Arc::new(model_in(welcome)),
        }
    }
}

impl Known {
    fn is_of(&self, welcome: &Arc<Welcome>) -> bool {
        Arc::ptr_eq(&self.welcome, welcome) || *self.model == model_in(welcome)
    }
}

fn model_in(welcome: &Welcome) -> ModelId {
    ModelId { digest: welcome.digest, shape: welcome.shape.clone(), classes: welcome.classes }
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Replica").field(&self.address()).finish()
    }
}
