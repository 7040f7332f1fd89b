//! A classifier that spends virtual time. The real compute engine has threads of its own and cannot
//! run in a simulation. Everything around it (protocol, connections, draining) is the real server.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use afterimage_core::{ModelId, Origin, Response, RowAnswer, RowReply, gather};
use afterimage_wire::proto::{Role, Shape, stats::Stats};
use afterimage_wire::server::{Batch, Identity, Op, Service};
use tokio::time::sleep;

use super::determinism::Dice;
use super::network::Host;

/// Bytes of an image: its number, eight times.
pub(super) const IMAGE_LEN: usize = 8;

/// Enough labels that two models seldom agree on an image by chance.
pub(super) const CLASSES: u16 = 5000;

/// The number of a model. Its digest is this byte, thirty-two times; never 0.
pub(super) type Model = u8;

/// An image.
pub(super) fn image(number: u8) -> [u8; IMAGE_LEN] {
    [number; IMAGE_LEN]
}

/// The label that a model gives to an image.
pub(super) fn label(model: Model, number: u8) -> u16 {
    let seen = u64::from(model) << 8 | u64::from(number);
    (seen.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u16 % CLASSES
}

/// The classifier of a host. It outlives the host's processes.
#[derive(Clone, Debug)]
pub(super) struct Classifier(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    dice: Dice,
    model: Model,
    generation: u64,
    takes_ms: u64,
    /// Whether it gives labels that its model cannot give.
    corrupt: bool,
    calls: u64,
}

impl Classifier {
    /// A classifier with model 1 that takes at most this many milliseconds for an image.
    pub(super) fn new(seed: u64, host: Host, takes_ms: u64) -> Self {
        let dice = Dice::new(seed, 1000 + host as u64);
        let state = State { dice, model: 1, generation: 0, takes_ms, corrupt: false, calls: 0 };
        Classifier(Arc::new(Mutex::new(state)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// The present model.
    pub(super) fn model(&self) -> Model {
        self.lock().model
    }

    /// Sets another model.
    pub(super) fn set_model(&self, model: Model) {
        let mut state = self.lock();
        state.generation += u64::from(state.model != model);
        state.model = model;
    }

    /// Starts or stops giving impossible labels.
    pub(super) fn set_corrupt(&self, corrupt: bool) {
        self.lock().corrupt = corrupt;
    }

    /// Computes one row.
    fn answer(&self, number: u8, later: RowReply) {
        let mut state = self.lock();
        state.calls += 1;
        let mut class = label(state.model, number);
        if state.corrupt {
            class += CLASSES;
        }
        let most = state.takes_ms;
        let takes = Duration::from_millis(state.dice.of(0..=most));
        drop(state);
        tokio::spawn(async move {
            sleep(takes).await;
            later.send(Ok(RowAnswer::label(class, Origin::Miss)));
        });
    }

    /// The number of images it has classified.
    pub(super) fn calls(&self) -> u64 {
        self.lock().calls
    }
}

impl Service for Classifier {
    fn identity(&self) -> Identity {
        let digest = [self.model(); 32];
        let shape = Shape::new(&[IMAGE_LEN as u32]).expect("one dimension");
        Identity { service: Role::Classifier, digest, classes: CLASSES.into(), shape }
    }

    fn generation(&self) -> u64 {
        self.lock().generation
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            match request.op {
                Op::Classify { image } => self.answer(image[0], batch.row_reply(i)),
                Op::Infer(infer) => {
                    let id = ModelId::labels([self.model(); 32], None, CLASSES.into());
                    let combine =
                        move |rows: Vec<_>| Response { model: Arc::new(id), rows: rows.into() };
                    let replies = gather(infer.rows.len(), batch.response_reply(i), combine);
                    for (row, reply) in infer.rows.iter().zip(replies) {
                        self.answer(row[0], reply);
                    }
                }
                _ => {}
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}
