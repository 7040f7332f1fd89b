//! A client of the jobs service.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use afterimage_core::Status;
use afterimage_wire::Connection;
use afterimage_wire::client::CallError;
use afterimage_wire::stream::{Stream, StreamError};
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::engine::{Overview, Submit};
use crate::message::{Malformed, Request, Response, STREAM, Splitter, VERSION};
use crate::server::{Ended, Shown};
use crate::service::Outbox;
use crate::store::{Event, Filter, Record};
use crate::{Definition, Grant, JobId};

/// Why a call of a [`Client`] failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobsError {
    /// The server cannot be reached, or has no streams.
    #[error(transparent)]
    Call(Arc<CallError>),
    /// The stream has ended.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The server refused the request.
    #[error("{text}")]
    Refused {
        /// The reason, for programs.
        status: Status,
        /// The reason, for people.
        text: String,
    },
    /// The server sent an invalid message.
    #[error("the server sent an invalid message: {0}")]
    Malformed(#[from] Malformed),
}

impl JobsError {
    /// Whether the same call can succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            JobsError::Call(error) => error.is_retryable(),
            JobsError::Stream(error) => error.is_retryable(),
            JobsError::Refused { status, .. } => status.is_retryable(),
            JobsError::Malformed(_) => false,
        }
    }
}

impl From<CallError> for JobsError {
    fn from(error: CallError) -> Self {
        JobsError::Call(Arc::new(error))
    }
}

/// The answer to a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Submission {
    /// The job was queued, or joined an equal one.
    Queued {
        /// The job.
        id: JobId,
        /// An equal job was there before.
        joined: bool,
        /// Jobs of the definition that wait.
        waiting: u64,
    },
    /// The result is remembered.
    Remembered {
        /// The job that computed it.
        id: JobId,
        /// The result.
        output: Bytes,
    },
}

/// A client of the jobs service, on one stream of a connection. Clones share the stream.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use afterimage_jobs::{Client, Submit};
/// use afterimage_wire::{ClientOptions, Connection};
///
/// let connection = Connection::connect("127.0.0.1:7430", ClientOptions::new()).await?;
/// let jobs = Client::open(&connection).await?;
/// let (submission, ended) = jobs.run(Submit::new("swap", "input")).await?;
/// println!("{submission:?}");
/// if let Some(ended) = ended {
///     println!("{:?}", ended.await?.output);
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    link: Arc<Link>,
}

/// The stream, and the calls that wait.
#[derive(Debug)]
struct Link {
    outbox: Arc<Outbox>,
    calls: Arc<Mutex<Calls>>,
    next: AtomicU32,
    task: JoinHandle<()>,
    /// Without a handle, the connection would close.
    _connection: Connection,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug, Default)]
struct Calls {
    waiting: HashMap<u32, oneshot::Sender<Result<Response, JobsError>>>,
    /// Why the stream has ended.
    over: Option<JobsError>,
}

/// A response that will come.
#[derive(Debug)]
pub(crate) struct Pending(oneshot::Receiver<Result<Response, JobsError>>);

impl Future for Pending {
    type Output = Result<Response, JobsError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|response| {
            match response.unwrap_or(Err(JobsError::Stream(StreamError::Ended)))? {
                Response::Refused { status, text } => Err(JobsError::Refused { status, text }),
                response => Ok(response),
            }
        })
    }
}

/// Takes the fields of the expected response.
macro_rules! expect {
    ($response:expr, $pattern:pat => $value:expr) => {
        match $response {
            $pattern => Ok($value),
            _ => Err(unexpected()),
        }
    };
}

impl Client {
    /// Opens the stream.
    ///
    /// # Errors
    /// If the server cannot be reached, or is too old for streams.
    pub async fn open(connection: &Connection) -> Result<Self, JobsError> {
        Client::open_with(connection, None).await
    }

    /// Opens a stream whose grants go to a worker.
    pub(crate) async fn open_with(
        connection: &Connection,
        grants: Option<mpsc::UnboundedSender<Grant>>,
    ) -> Result<Self, JobsError> {
        let stream = connection.open(STREAM, Bytes::from_static(&[VERSION])).await?;
        let (outbox, calls) = (Arc::new(Outbox::default()), Arc::new(Mutex::default()));
        let task = tokio::spawn(run(stream, Arc::clone(&outbox), Arc::clone(&calls), grants));
        let (next, _connection) = (AtomicU32::new(1), connection.clone());
        Ok(Client { link: Arc::new(Link { outbox, calls, next, task, _connection }) })
    }

    /// A call number and its response.
    fn call(&self) -> (u32, Pending) {
        let (sender, receiver) = oneshot::channel();
        let call = loop {
            let call = self.link.next.fetch_add(1, Ordering::Relaxed);
            if call != 0 {
                break call;
            }
        };
        let mut calls = self.link.calls.lock().unwrap_or_else(PoisonError::into_inner);
        match &calls.over {
            Some(error) => drop(sender.send(Err(error.clone()))),
            None => drop(calls.waiting.insert(call, sender)),
        }
        (call, Pending(receiver))
    }

    /// Sends a request.
    pub(crate) fn send(&self, request: &Request) -> Pending {
        let (call, pending) = self.call();
        self.link.outbox.put(|out| request.encode(call, out));
        pending
    }

    /// Sends a request that has no response.
    pub(crate) fn tell(&self, request: &Request) {
        self.link.outbox.put(|out| request.encode(0, out));
    }

    /// Submits a job. It is durable when this returns.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn submit(&self, submit: Submit) -> Result<Submission, JobsError> {
        submission(self.send(&Request::Submit { submit, wait: 0 }).await?)
    }

    /// Submits a job, and gives the future of its end: `None` for a result that is remembered.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn run(
        &self,
        submit: Submit,
    ) -> Result<
        (Submission, Option<impl Future<Output = Result<Ended, JobsError>> + Send + use<>>),
        JobsError,
    > {
        let (wait, end) = self.call();
        let submitted = self.send(&Request::Submit { submit, wait }).await;
        let submitted = submitted.and_then(submission);
        if !matches!(submitted, Ok(Submission::Queued { .. })) {
            self.forget(wait);
        }
        let submitted = submitted?;
        let is_remembered = matches!(submitted, Submission::Remembered { .. });
        Ok((submitted, (!is_remembered).then_some(async move { ended(end.await?) })))
    }

    /// Removes a call whose response does not come.
    fn forget(&self, call: u32) {
        let mut calls = self.link.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.waiting.remove(&call);
    }

    /// Waits for the end of a job.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn wait(&self, id: JobId) -> Result<Ended, JobsError> {
        ended(self.send(&Request::Wait { id }).await?)
    }

    /// Shows a job and its history.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn show(&self, id: JobId) -> Result<Shown, JobsError> {
        let response = self.send(&Request::Show { id }).await?;
        expect!(response, Response::Shown { record, progress, output, history } =>
            Shown { record, progress, output, history })
    }

    /// Lists jobs, newest first, at most 1,000.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn list(&self, filter: Filter) -> Result<Vec<Record>, JobsError> {
        let response = self.send(&Request::List { filter }).await?;
        expect!(response, Response::Listed { records } => records)
    }

    /// Cancels a job. Its worker learns it at the next heartbeat.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn cancel(&self, id: JobId) -> Result<(), JobsError> {
        done(self.send(&Request::Cancel { id })).await
    }

    /// Queues a job again that has ended without a result.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn retry(&self, id: JobId) -> Result<(), JobsError> {
        done(self.send(&Request::Retry { id })).await
    }

    /// Lists the definitions.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn definitions(&self) -> Result<Vec<Overview>, JobsError> {
        let response = self.send(&Request::Definitions {}).await?;
        expect!(response, Response::Definitions { definitions } => definitions)
    }

    /// Creates or changes a definition.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn define(&self, definition: Definition) -> Result<(), JobsError> {
        done(self.send(&Request::Define { definition })).await
    }

    /// Reads the log of all steps after a position. With `wait` it waits for the next step.
    ///
    /// # Errors
    /// [`JobsError`]
    pub async fn events(
        &self,
        after: u64,
        limit: u32,
        wait: bool,
    ) -> Result<Vec<Event>, JobsError> {
        let response = self.send(&Request::Events { after, limit, wait }).await?;
        expect!(response, Response::Events { events } => events)
    }
}

pub(crate) async fn done(pending: Pending) -> Result<(), JobsError> {
    expect!(pending.await?, Response::Done {} => ())
}

fn submission(response: Response) -> Result<Submission, JobsError> {
    match response {
        Response::Queued { id, joined, waiting } => Ok(Submission::Queued { id, joined, waiting }),
        Response::Remembered { id, output } => Ok(Submission::Remembered { id, output }),
        _ => Err(unexpected()),
    }
}

fn ended(response: Response) -> Result<Ended, JobsError> {
    expect!(response, Response::Ended { record, output } => Ended { record, output })
}

fn unexpected() -> JobsError {
    JobsError::Malformed(Malformed::Invalid { kind: 0, what: "kind of response" })
}

/// Sends and receives until the stream ends, and then fails all calls that wait.
async fn run(
    stream: Stream,
    outbox: Arc<Outbox>,
    calls: Arc<Mutex<Calls>>,
    grants: Option<mpsc::UnboundedSender<Grant>>,
) {
    let Stream { mut reader, mut writer, .. } = stream;
    let receive = async {
        let mut splitter = Splitter::default();
        while let Some(chunk) = reader.read().await? {
            splitter.push(&chunk);
            while let Some((kind, call, fields)) = splitter.next_message()? {
                match (Response::decode(kind, fields)?, &grants) {
                    (Response::Granted { grant }, Some(grants)) => {
                        let _ = grants.send(grant);
                    }
                    (response, _) => {
                        let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
                        let waiting = calls.waiting.remove(&call);
                        drop(calls);
                        if let Some(waiting) = waiting {
                            let _ = waiting.send(Ok(response));
                        }
                    }
                }
            }
        }
        Err(JobsError::Stream(StreamError::Lost { cause: None }))
    };
    let ended: Result<(), JobsError> = tokio::select! {
        ended = receive => ended,
        () = outbox.send(&mut writer) => Err(JobsError::Stream(StreamError::Lost { cause: None })),
    };
    let error = ended.err().unwrap_or(JobsError::Stream(StreamError::Ended));
    let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
    calls.over = Some(error.clone());
    for (_, waiting) in calls.waiting.drain() {
        let _ = waiting.send(Err(error.clone()));
    }
}
