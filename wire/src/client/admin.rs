//! The client for the operation of a server: statistics, snapshots, and deletion of answers.

use std::time::Duration;

use super::call::{ask, read};
use super::error::CallError;
use super::options::CallOptions;
use super::request::{EncodedRequest, Request};
use super::waiter::Answer;
use super::{client_type, infer};
use crate::proto::infer::put_name;
use crate::proto::stats::Stats;
use crate::proto::{Kind, Snapshot};

client_type! {
    /// A client for the operation of any server. Some requests need admin rights.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use afterimage_wire::{Admin, ClientOptions};
    ///
    /// let options = ClientOptions::new().token("the admin token");
    /// let admin = Admin::connect("127.0.0.1:7400", options).await?;
    /// println!("{} hits", admin.stats().await?.counter_value("hits"));
    /// admin.flush("resnet").await?;
    /// # Ok(()) }
    /// ```
    Admin
}

impl Admin {
    /// The server's statistics.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn stats(&self) -> Result<Stats, CallError> {
        let request = Request::Stats;
        match ask(self.shared(), request, self.shared().options.timeout).await? {
            Answer::Stats(stats) => Ok(*stats),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// Makes the server write a snapshot of its stored answers, to the file that it was started
    /// with, and waits until the file is safely on disk. If a snapshot is being written, this
    /// waits for that one. A large table takes seconds, so `timeout` should be generous.
    ///
    /// # Errors
    /// Any [`CallError`]; [`CallError::Server`] with
    /// [`Status::Unsupported`](crate::Status::Unsupported) if the server keeps no snapshot, and
    /// with [`Status::StorageFailed`](crate::Status::StorageFailed) if it cannot write the
    /// file.
    pub async fn snapshot(&self, timeout: Duration) -> Result<Snapshot, CallError> {
        let request = Request::Snapshot;
        match ask(self.shared(), request, timeout).await? {
            Answer::Snapshot(snapshot) => Ok(snapshot),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// Deletes the stored answer of one row; an empty `version` is the present one. Returns how
    /// many answers were deleted, as far as the store knows. Needs admin rights and a memo of
    /// version 2.
    ///
    /// # Errors
    /// Any [`CallError`]; [`CallError::OldServer`] if the server speaks version 1 only.
    pub async fn forget(&self, model: &str, version: &str, row: &[u8]) -> Result<u64, CallError> {
        infer::check_name("model", model)?;
        infer::check_name("version", version)?;
        let mut body = Vec::with_capacity(2 + model.len() + version.len() + row.len());
        for name in [model, version] {
            put_name(&mut body, name);
        }
        body.extend_from_slice(row);
        let request = Request::Encoded(EncodedRequest::plain(Kind::ForgetReq, 0, &body[..]));
        match read(self.shared(), request, CallOptions::new()).await? {
            Answer::Forgotten(count) => Ok(count),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// Deletes all stored answers of a model; of all models if `model` is empty. Needs admin
    /// rights and a memo of version 2.
    ///
    /// # Errors
    /// As [`Admin::forget`].
    pub async fn flush(&self, model: &str) -> Result<(), CallError> {
        infer::check_name("model", model)?;
        let mut body = Vec::with_capacity(1 + model.len());
        put_name(&mut body, model);
        let request = Request::Encoded(EncodedRequest::plain(Kind::FlushReq, 0, &body[..]));
        match read(self.shared(), request, CallOptions::new()).await? {
            Answer::Flushed => Ok(()),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }
}
