//! A minimal service.

use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Role, Status};
use afterimage_wire::server::{Batch, Identity, Op, Service};

/// Answers each image with its first byte.
pub struct FirstByte;

impl Service for FirstByte {
    fn identity(&self) -> Identity {
        Identity::without_model(Role::Memo)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            let Op::Classify { image } = request.op else {
                batch.error(i, Status::Unsupported, "this service takes images only");
                continue;
            };
            batch.label(i, Classification { label: image[0].into(), origin: Origin::Miss });
        }
    }

    fn stats(&self, _: &mut Stats) {}
}
