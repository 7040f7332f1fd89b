//! The jobs service: a [`Server`] on the streams of the TCP protocol.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_core::Status;
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Batch, Identity, Service};
use afterimage_wire::stream::{IncomingStream, Stream, StreamReader, StreamWriter};
use tokio::sync::Notify;

use crate::job::{Refused, WorkerId};
use crate::message::{Malformed, Request, Response, STREAM, Splitter, VERSION};
use crate::server::{Accepted, Ended, Reply, Server, Shown};
use crate::{Attach, Grant};

/// Requests of one stream that wait for an answer, at most.
const MAX_PENDING: usize = 16_384;

/// Answers that a client has not read, in bytes. Above it no further request is read.
const MAX_UNREAD: usize = 4 << 20;

/// Grants that a worker may allow at once.
const MAX_CREDIT: u32 = 10_000;

/// The jobs service.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use afterimage_jobs::{JobService, Server, ServerOptions, Sqlite};
///
/// let jobs = Server::start(Sqlite::open("jobs.db")?, &ServerOptions::default())?;
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:7430").await?;
/// let service = std::sync::Arc::new(JobService::new(jobs));
/// let server = afterimage_wire::server::Server::new(listener, service, Default::default());
/// server.serve(std::future::pending::<()>()).await;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct JobService {
    server: Server,
    runtime: tokio::runtime::Handle,
}

impl JobService {
    /// The service of a server. Must be called inside a runtime.
    #[must_use]
    pub fn new(server: Server) -> Self {
        let runtime = tokio::runtime::Handle::current();
        JobService { server, runtime }
    }
}

impl Service for JobService {
    fn identity(&self) -> Identity {
        Identity::without_model(Role::Jobs)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        let text = "a jobs service has no such request; open a stream named \"jobs\"";
        for index in 0..batch.requests().len() {
            batch.error(index, Status::Unsupported, text);
        }
    }

    fn open(&self, stream: IncomingStream) {
        if stream.name() != STREAM {
            let text = format!("no stream \"{}\"; a jobs service has \"jobs\"", stream.name());
            return stream.refuse(Status::Unsupported, &text);
        }
        if stream.header().first() != Some(&VERSION) {
            let text = format!("the header of a jobs stream must start with version {VERSION}");
            return stream.refuse(Status::Unsupported, &text);
        }
        let (server, is_admin) = (self.server.clone(), stream.is_admin());
        self.runtime.spawn(serve(server, stream.accept(), is_admin));
    }

    fn stats(&self, stats: &mut Stats) {
        self.server.stats(stats);
    }
}

/// Messages of this side that wait to be sent.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    buffer: Mutex<Vec<u8>>,
    filled: Notify,
    drained: Notify,
    pending: AtomicUsize,
}

impl Outbox {
    /// Appends a message.
    pub(crate) fn put(&self, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = buffer.is_empty();
        encode(&mut buffer);
        drop(buffer);
        if was_empty {
            self.filled.notify_one();
        }
    }

    fn len(&self) -> usize {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Sends messages until the stream ends.
    pub(crate) async fn send(&self, writer: &mut StreamWriter) {
        loop {
            let buffer =
                std::mem::take(&mut *self.buffer.lock().unwrap_or_else(PoisonError::into_inner));
            if buffer.is_empty() {
                self.filled.notified().await;
            } else if writer.write(buffer).await.is_err() {
                return;
            }
            self.drained.notify_one();
        }
    }

    fn is_full(&self) -> bool {
        self.pending.load(Ordering::Relaxed) >= MAX_PENDING || self.len() >= MAX_UNREAD
    }

    fn respond(&self, call: u32, response: &Response) {
        self.put(|out| response.encode(call, out));
    }

    fn refuse(&self, call: u32, refused: &Refused) {
        let (status, text) = (refused.status(), refused.to_string());
        self.respond(call, &Response::Refused { status, text });
    }
}

async fn serve(server: Server, stream: Stream, is_admin: bool) {
    let Stream { mut reader, mut writer, .. } = stream;
    let outbox = Arc::new(Outbox::default());
    let mut session = Session { server, outbox: Arc::clone(&outbox), is_admin, worker: None };
    let malformed = tokio::select! {
        read = session.read(&mut reader) => read.err(),
        () = outbox.send(&mut writer) => None,
    };
    if let Some(worker) = session.worker {
        session.server.detach(worker);
    }
    match malformed {
        Some(malformed) => writer.reset(Status::BadArgument, &malformed.to_string()),
        None => {
            let _ = writer.finish();
        }
    }
}

/// The server's side of one stream.
struct Session {
    server: Server,
    outbox: Arc<Outbox>,
    is_admin: bool,
    worker: Option<WorkerId>,
}

impl Session {
    /// Reads requests until the stream ends.
    async fn read(&mut self, reader: &mut StreamReader) -> Result<(), Malformed> {
        let mut splitter = Splitter::default();
        while let Ok(Some(chunk)) = reader.read().await {
            splitter.push(&chunk);
            while let Some((kind, call, fields)) = splitter.next_message()? {
                self.handle(call, Request::decode(kind, fields)?);
                while self.outbox.is_full() {
                    self.outbox.drained.notified().await;
                }
            }
        }
        Ok(())
    }

    /// The answer to a call: `make` turns a value into its response.
    fn reply<T>(&self, call: u32, make: impl FnOnce(T) -> Response + Send + 'static) -> Reply<T> {
        let outbox = Arc::clone(&self.outbox);
        outbox.pending.fetch_add(1, Ordering::Relaxed);
        Box::new(move |result| {
            outbox.pending.fetch_sub(1, Ordering::Relaxed);
            match result {
                Ok(value) => outbox.respond(call, &make(value)),
                Err(refused) => outbox.refuse(call, &refused),
            }
            outbox.drained.notify_one();
        })
    }

    /// The answer to a call without a value.
    fn done(&self, call: u32) -> Reply<()> {
        self.reply(call, |()| Response::Done {})
    }

    fn ended(&self, call: u32) -> Reply<Ended> {
        let outbox = Arc::clone(&self.outbox);
        // Without a place among the pending calls: a client may wait for many jobs.
        Box::new(move |ended| match ended {
            Ok(Ended { record, output }) => {
                outbox.respond(call, &Response::Ended { record, output });
            }
            Err(refused) => outbox.refuse(call, &refused),
        })
    }

    fn handle(&mut self, call: u32, request: Request) {
        let needs_admin = matches!(request, Request::Retry { .. } | Request::Define { .. });
        if needs_admin && !self.is_admin {
            let (status, text) = (Status::Unauthorized, Status::Unauthorized.text().to_owned());
            return self.outbox.respond(call, &Response::Refused { status, text });
        }
        match request {
            Request::Submit { submit, wait } => {
                let reply = self.reply(call, |accepted| match accepted {
                    Accepted::Queued(job) => {
                        Response::Queued { id: job.id, joined: job.joined, waiting: job.waiting }
                    }
                    Accepted::Remembered { id, output } => Response::Remembered { id, output },
                });
                let ended = (wait != 0).then(|| self.ended(wait));
                self.server.submit(submit, reply, ended);
            }
            Request::Wait { id } => self.server.wait(id, self.ended(call)),
            Request::Show { id } => {
                let make = |Shown { record, progress, output, history }| Response::Shown {
                    record,
                    progress,
                    output,
                    history,
                };
                self.server.show(id, self.reply(call, make));
            }
            Request::List { filter } => {
                let make = |records| Response::Listed { records };
                self.server.list(filter, self.reply(call, make));
            }
            Request::Cancel { id } => self.server.cancel(id, self.done(call)),
            Request::Retry { id } => self.server.retry(id, self.done(call)),
            Request::Definitions {} => {
                let make = |definitions| Response::Definitions { definitions };
                self.server.definitions(self.reply(call, make));
            }
            Request::Define { definition } => self.server.define(definition, self.done(call)),
            Request::Events { after, limit, wait } => {
                let make = |events| Response::Events { events };
                self.server.events(after, limit, wait, self.reply(call, make));
            }
            Request::Attach { name, definitions } => {
                if self.worker.is_some() {
                    let text = "this stream has a worker already; open another stream".to_owned();
                    return self.outbox.refuse(call, &Refused::Invalid(text));
                }
                let outbox = Arc::clone(&self.outbox);
                let sink = move |grant: Grant| outbox.respond(0, &Response::Granted { grant });
                let attach = Attach { name, definitions };
                let worker = self.server.attach(attach, Box::new(sink), self.done(call));
                self.worker = Some(worker);
            }
            Request::Credit { jobs } => {
                if let Some(worker) = self.worker {
                    self.server.credit(worker, jobs.min(MAX_CREDIT));
                }
            }
            Request::Drain {} => {
                if let Some(worker) = self.worker {
                    self.server.drain(worker);
                }
            }
            Request::Beats { beats } => match self.worker {
                Some(worker) => {
                    let make = |verdicts| Response::Verdicts { verdicts };
                    self.server.beat(worker, beats, self.reply(call, make));
                }
                None => self.not_attached(call),
            },
            Request::Finish { id, token, outcome } => match self.worker {
                Some(worker) => {
                    self.server.finish(worker, (id, token), outcome, self.done(call));
                }
                None => self.not_attached(call),
            },
        }
    }

    fn not_attached(&self, call: u32) {
        let text = "only workers may do this; send Attach first".to_owned();
        self.outbox.refuse(call, &Refused::Invalid(text));
    }
}
