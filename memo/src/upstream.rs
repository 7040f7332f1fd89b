//! Upstreams: what computes the answers that no store has.
//!
//! An upstream is a model in this process ([`Function`], or a type of your own that implements
//! [`Upstream`]) or a [pool](crate::pool) of endpoints across the network.

mod function;

use std::sync::Arc;

use afterimage_core::{ClientId, Computed, Failure, ModelId, Reply, Rows, gather};
use afterimage_wire::proto::stats::Stats;
use bytes::Bytes;

use crate::request::Context;

pub use function::Function;

/// Computes answers of one model.
pub trait Upstream: Send + Sync + 'static {
    /// The model that answers now, or that answered last; `None` before it is known. Called for
    /// every batch of requests, so it must be cheap. Keep the `Arc` of an unchanged model: another
    /// one is the same model if it is equal, but costs a comparison for each batch.
    fn model(&self) -> Option<Arc<ModelId>>;

    /// Registers a function to call whenever [`model`](Self::model) may have changed. Without it, a
    /// change is noticed with the next request.
    fn on_change(&self, changed: OnChange) {
        drop(changed);
    }

    /// Why the upstream cannot be reached, if that is known.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// Whether it could compute a row now without a delay for others. Audits run only then.
    fn is_idle(&self) -> bool {
        false
    }

    /// Computes the rows of each call, in batches as suits it. Returns at once; each reply is sent
    /// later. An upstream that takes single rows uses [`Call::scatter`].
    fn compute(&self, calls: Vec<Call>);

    /// Adds counters to `stats`, without addresses and names of other services.
    fn stats(&self, stats: &mut Stats);

    /// Adds what only operators may see, such as addresses.
    fn admin_stats(&self, stats: &mut Stats) {
        let _ = stats;
    }
}

/// A function that an upstream calls when its model may have changed.
pub type OnChange = Box<dyn Fn() + Send + Sync>;

impl<U: Upstream + ?Sized> Upstream for Box<U> {
    fn model(&self) -> Option<Arc<ModelId>> {
        (**self).model()
    }

    fn on_change(&self, changed: OnChange) {
        (**self).on_change(changed);
    }

    fn trouble(&self) -> Option<String> {
        (**self).trouble()
    }

    fn is_idle(&self) -> bool {
        (**self).is_idle()
    }

    fn compute(&self, calls: Vec<Call>) {
        (**self).compute(calls);
    }

    fn stats(&self, stats: &mut Stats) {
        (**self).stats(stats);
    }

    fn admin_stats(&self, stats: &mut Stats) {
        (**self).admin_stats(stats);
    }
}

/// Rows to compute in one go, and the reply that is owed for them.
#[derive(Debug)]
pub struct Call {
    /// The rows, at least one.
    pub rows: Rows<Bytes>,
    /// The number of each row in the request of the context.
    pub positions: Rows<u32>,
    /// The context of the front end, from the first request of the flight.
    pub context: Option<Context>,
    /// The model whose answers are wanted. Those of another model are refused.
    pub model: Arc<ModelId>,
    /// The client that asked first, for fair queues.
    pub client: ClientId,
    /// The id of the request that asked first, for logs.
    pub request_id: u64,
    /// One answer for each row, in order. Before costly work, ask it whether it is still wanted.
    pub reply: Reply<Result<Computed, Failure>>,
}

impl Call {
    /// Splits the call into one call for each row. In a call of the memo each row has its own
    /// outcome; in any other call the first failure fails the whole call.
    pub fn scatter(self) -> impl Iterator<Item = Call> {
        let Call { rows, positions, context, model, client, request_id, reply } = self;
        let of = Arc::clone(&model);
        let combine = move |parts: Vec<Computed>| {
            let answers = parts.into_iter().flat_map(|computed| computed.answers).collect();
            Computed { model: of, answers }
        };
        let mut replies = Rows::new();
        match rows.len() {
            1 => replies.push(reply),
            len => match reply.into_parts() {
                Ok(parts) => replies.extend(parts),
                Err(whole) => replies.extend(gather(len, whole, combine)),
            },
        }
        rows.into_iter().zip(positions).zip(replies).map(move |((row, position), reply)| {
            let (rows, positions) = (Rows::from_buf([row]), Rows::from_buf([position]));
            let (model, context) = (Arc::clone(&model), context.clone());
            Call { rows, positions, context, model, client, request_id, reply }
        })
    }

    /// The row of a call that has a single one.
    ///
    /// # Panics
    /// When it has several.
    pub fn row(&self) -> &Bytes {
        match &self.rows[..] {
            [row] => row,
            rows => panic!("a call of {} rows was not scattered", rows.len()),
        }
    }

    /// Answers a call of one row with a label of the wanted model.
    pub fn send_label(self, label: u16) {
        let answers = Rows::from_buf([afterimage_core::Answer::Label(label)]);
        self.reply.send(Ok(Computed { model: self.model, answers }));
    }
}
