//! The client of a memo or a classifier: labels of images, and answers of named models.

use std::collections::VecDeque;
use std::time::Duration;

use afterimage_core::Reply;
use bytes::Bytes;

use super::call::{Read, read};
use super::client_type;
use super::error::CallError;
use super::infer::{Infer, Inference};
use super::options::CallOptions;
use super::request::Request;
use super::waiter::{Answer, Classified, Inferred, Waiter};
use crate::proto::message::Classification;

client_type! {
    /// A client of a memo or a classifier.
    ///
    /// ```no_run
    /// # async fn example(images: &[Vec<u8>]) -> Result<(), Box<dyn std::error::Error>> {
    /// use afterimage_wire::{Client, ClientOptions};
    ///
    /// let client = Client::connect("127.0.0.1:7400", ClientOptions::new()).await?;
    /// for (image, answer) in images.iter().zip(client.classify_many(images).await?) {
    ///     println!("{} bytes: label {}, {:?}", image.len(), answer.label, answer.origin);
    /// }
    /// # Ok(()) }
    /// ```
    Client
}

impl Client {
    /// The label of an image. It has as many bytes as the shape in the
    /// [`Welcome`](crate::proto::Welcome).
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn classify(&self, image: &[u8]) -> Result<Classification, CallError> {
        self.classify_with(image, CallOptions::new()).await
    }

    /// [`Client::classify`] with settings for this call.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn classify_with(
        &self,
        image: &[u8],
        options: CallOptions,
    ) -> Result<Classification, CallError> {
        let read = Read::begin(self.shared(), Request::Classify(image), options);
        self.label(read, &mut VecDeque::new()).await
    }

    /// The labels of many images, in the order of the images. They are in flight together, as far
    /// as the window and the limits of the [`ClientOptions`](super::ClientOptions) allow, and each
    /// image has the time limit of a call. If one image fails, all fail.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn classify_many<B: AsRef<[u8]>>(
        &self,
        images: &[B],
    ) -> Result<Vec<Classification>, CallError> {
        self.classify_many_with(images, CallOptions::new()).await
    }

    /// [`Client::classify_many`] with settings for these calls.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn classify_many_with<B: AsRef<[u8]>>(
        &self,
        images: &[B],
        options: CallOptions,
    ) -> Result<Vec<Classification>, CallError> {
        let (shared, mut labels) = (self.shared(), Vec::with_capacity(images.len()));
        // Half of the queue, so that these images do not have the calls of others refused.
        let (max_images, max_bytes) =
            (shared.options.max_in_flight, shared.options.max_queued_bytes / 2);
        let (mut in_flight, mut bytes) = (VecDeque::new(), 0);
        for image in images {
            let request = Request::Classify(image.as_ref());
            while let Some((read, cost)) = in_flight.pop_front() {
                if in_flight.len() + 1 < max_images && bytes + request.cost() <= max_bytes {
                    in_flight.push_front((read, cost));
                    break;
                }
                labels.push(self.label(read, &mut in_flight).await?);
                bytes -= cost;
            }
            bytes += request.cost();
            in_flight.push_back((Read::begin(shared, request, options), request.cost()));
        }
        while let Some((read, _)) = in_flight.pop_front() {
            labels.push(self.label(read, &mut in_flight).await?);
        }
        Ok(labels)
    }

    /// The label of the oldest image in flight. Images that are lost with it are sent again, too.
    async fn label<'a>(
        &self,
        read: Read<'a, &'a [u8]>,
        later: &mut VecDeque<(Read<'a, &'a [u8]>, usize)>,
    ) -> Result<Classification, CallError> {
        match read.outcome_before(later.iter_mut().map(|(read, _)| read)).await? {
            Answer::Classification(label) => Ok(label),
            answer => Err(answer.is_wrong_for("ClassifyReq", &self.shared().server)),
        }
    }

    /// A model's answers to rows of bytes, in order. Needs a memo of version 2.
    ///
    /// # Errors
    /// Any [`CallError`]; [`CallError::OldServer`] if the server speaks version 1 only.
    pub async fn infer(&self, request: &Infer) -> Result<Inference, CallError> {
        self.infer_with(request, CallOptions::new()).await
    }

    /// [`Client::infer`] with settings for this call.
    ///
    /// # Errors
    /// As [`Client::infer`].
    pub async fn infer_with(
        &self,
        request: &Infer,
        options: CallOptions,
    ) -> Result<Inference, CallError> {
        let timeout = options.timeout.unwrap_or(self.shared().options.timeout);
        let encoded = request.encode(timeout)?;
        let encoded = Request::Encoded(encoded.request());
        let server = &self.shared().server;
        match read(self.shared(), encoded, options).await? {
            Answer::Inference(inference) => inference.check(request.len(), server),
            answer => Err(answer.is_wrong_for(encoded.name(), server)),
        }
    }

    /// Sends an image. `reply` gets the label and the [`Welcome`](crate::proto::Welcome) of the
    /// connection that brought it, or the error. For services: no task and no channel lies between
    /// the socket and the reply.
    ///
    /// The reply is sent on the connection's task, or on the caller's thread before this returns
    /// if the outcome is known at once. Its sink must not block, and the caller must hold no lock
    /// that the sink takes. A request whose connection is lost is not sent again.
    ///
    /// ```no_run
    /// # fn example(client: &afterimage_wire::Client, image: &[u8]) {
    /// use std::time::Duration;
    ///
    /// use afterimage_wire::client::{Classified, Reply};
    ///
    /// let reply = Reply::call(|outcome: Classified| match outcome {
    ///     Ok((answer, _welcome)) => println!("label {}", answer.label),
    ///     Err(error) => eprintln!("{error}"),
    /// });
    /// client.submit_classify(image, Duration::from_secs(1), reply);
    /// # }
    /// ```
    pub fn submit_classify(&self, image: &[u8], timeout: Duration, reply: Reply<Classified>) {
        self.shared().submit(Request::Classify(image), timeout, Waiter::Classify(reply));
    }

    /// [`Client::submit_classify`] without a copy of an image of at least 16 KiB: the client shares
    /// it until it is sent.
    pub fn submit_classify_shared(
        &self,
        image: &Bytes,
        timeout: Duration,
        reply: Reply<Classified>,
    ) {
        self.shared().submit(Request::Classify(image), timeout, Waiter::Classify(reply));
    }

    /// Sends rows. `reply` gets one answer for each row in order, and the
    /// [`Welcome`](crate::proto::Welcome) of the connection that brought them, or the error.
    /// Otherwise as [`Client::submit_classify`]; errors are those of [`Client::infer`].
    pub fn submit_infer(&self, request: &Infer, timeout: Duration, reply: Reply<Inferred>) {
        match request.encode(timeout) {
            Ok(encoded) => {
                let waiter = Waiter::Infer(reply, request.len());
                self.shared().submit(Request::Encoded(encoded.request()), timeout, waiter);
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }
}
