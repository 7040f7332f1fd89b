//! The service over TCP, with real clients and workers in this process.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use afterimage_core::Status;
use afterimage_jobs::message::{Malformed, Request, Response, Splitter};
use afterimage_jobs::worker::{Handler, function};
use afterimage_jobs::{
    Action, Client, Code, Definition, Event, Filter, JobId, JobService, JobsError, Record,
    Recovered, ResultKey, Row, Server, ServerOptions, Sqlite, State, Store, StoreError, Submission,
    Submit, Worker,
};
use afterimage_wire::{ClientOptions, Connection};
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(30);

async fn serve(store: impl Store) -> SocketAddr {
    let jobs = Server::start(store, &ServerOptions::default()).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = Arc::new(JobService::new(jobs));
    let server = afterimage_wire::server::Server::new(listener, service, Default::default());
    tokio::spawn(async move { server.serve(std::future::pending::<()>()).await });
    address
}

async fn client(address: SocketAddr) -> Client {
    let connection = Connection::connect(address, ClientOptions::new()).await.unwrap();
    Client::open(&connection).await.unwrap()
}

/// Starts a worker and waits until the server knows it.
async fn work(
    address: SocketAddr,
    definition: Definition,
    code: &[u8],
    handler: impl Handler,
) -> CancellationToken {
    let (stop, name) = (CancellationToken::new(), definition.name.clone());
    let worker = Worker::new("worker").concurrency(4).with(definition, Code::of(&[code]), handler);
    let connection = Connection::connect(address, ClientOptions::new()).await.unwrap();
    tokio::spawn(worker.run(connection, stop.clone()));
    let client = client(address).await;
    until(async || {
        let all = client.definitions().await.unwrap();
        let found = all.iter().find(|one| one.kind.definition.name == name);
        found.is_some_and(|one| one.idle_workers > 0 && one.kind.code == Some(Code::of(&[code])))
    })
    .await;
    stop
}

async fn until(mut is_true: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !is_true().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it comes true in time");
}

async fn result(client: &Client, submit: Submit) -> Bytes {
    let (submission, end) = client.run(submit).await.unwrap();
    match submission {
        Submission::Remembered { output, .. } => output,
        Submission::Queued { .. } => {
            let ended = tokio::time::timeout(PATIENCE, end.unwrap()).await.unwrap().unwrap();
            ended.output.unwrap_or_else(|| panic!("{:?}", ended.record))
        }
    }
}

fn sqlite(folder: &Path) -> Sqlite {
    Sqlite::open(folder.join("jobs.db")).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_equal_submissions_run_once() {
    let folder = tempfile::tempdir().unwrap();
    let address = serve(sqlite(folder.path())).await;
    let runs = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&runs);
    let slow = function(move |input| {
        counted.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(300));
        Ok(input.to_ascii_uppercase())
    });
    let _worker = work(address, Definition::new("upper"), b"1", slow).await;
    let clients = [client(address).await, client(address).await];
    let tasks: Vec<_> = (0..10_000)
        .map(|index| {
            let client = clients[index % 2].clone();
            tokio::spawn(async move { result(&client, Submit::new("upper", "hello")).await })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.unwrap(), "HELLO");
    }
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    let all = clients[0].list(Filter { limit: 100, ..Filter::default() }).await.unwrap();
    assert_eq!(all.len(), 1);
    let counts = clients[0].definitions().await.unwrap()[0].counts;
    assert_eq!((counts.accepted, counts.joined + counts.remembered), (1, 9_999));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_different_results_make_a_definition_unstable() {
    let folder = tempfile::tempdir().unwrap();
    let address = serve(sqlite(folder.path())).await;
    let count = AtomicU64::new(0);
    let random = function(move |_| Ok(vec![count.fetch_add(1, Ordering::Relaxed) as u8]));
    let _worker = work(address, Definition::new("random"), b"1", random).await;
    let client = client(address).await;
    let submit = || Submit::new("random", "x");
    assert_eq!(result(&client, submit()).await, [0][..]);
    assert_eq!(result(&client, submit()).await, [0][..], "remembered");
    let fresh = Submit { fresh: true, ..submit() };
    assert_eq!(result(&client, fresh).await, [1][..]);
    let unstable = client.definitions().await.unwrap()[0].kind.unstable.unwrap();
    assert_ne!(unstable.0, unstable.1);
    assert_eq!(result(&client, submit()).await, [2][..], "nothing is remembered any more");
    // A new version starts again.
    client.define(Definition::new("random").version(2)).await.unwrap();
    assert_eq!(client.definitions().await.unwrap()[0].kind.unstable, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_disk_stops_changes_and_not_known_results() {
    let folder = tempfile::tempdir().unwrap();
    let fails = Arc::new(AtomicBool::new(false));
    let store = Faulty { store: sqlite(folder.path()), fails: Arc::clone(&fails) };
    let address = serve(store).await;
    let upper = function(|input| Ok(input.to_ascii_uppercase()));
    let _worker = work(address, Definition::new("upper"), b"1", upper).await;
    let client = client(address).await;
    assert_eq!(result(&client, Submit::new("upper", "a")).await, "A");
    fails.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        let refused = client.submit(Submit::new("upper", "b")).await.unwrap_err();
        let is_storage = |error: &JobsError| match error {
            JobsError::Refused { status, .. } => *status == Status::StorageFailed,
            _ => false,
        };
        assert!(is_storage(&refused), "{refused}");
        // The disk works again, but the state of the file is not known.
        fails.store(false, Ordering::Relaxed);
    }
    assert_eq!(result(&client, Submit::new("upper", "a")).await, "A", "remembered");
    let all = client.list(Filter { limit: 10, ..Filter::default() }).await.unwrap();
    assert_eq!(all.len(), 1, "the refused job was not stored");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_followed_without_gaps() {
    let folder = tempfile::tempdir().unwrap();
    let address = serve(sqlite(folder.path())).await;
    let upper = function(|input| Ok(input.to_ascii_uppercase()));
    let _worker = work(address, Definition::new("upper"), b"1", upper).await;
    let (writer, reader) = (client(address).await, client(address).await);
    let following = tokio::spawn(async move {
        let mut log: Vec<Event> = Vec::new();
        while log.len() < 300 {
            let after = log.last().map_or(0, |event| event.position);
            log.extend(reader.events(after, 7, true).await.unwrap());
        }
        log
    });
    for index in 0..100_u32 {
        result(&writer, Submit::new("upper", index.to_le_bytes().to_vec())).await;
    }
    let log = tokio::time::timeout(PATIENCE, following).await.unwrap().unwrap();
    assert!(log.iter().zip(1..).all(|(event, position)| event.position == position));
    let succeeded = log.iter().filter(|event| event.state == State::Succeeded).count();
    assert_eq!(succeeded, 100);
}

#[tokio::test]
async fn a_malformed_message_ends_its_stream_only() {
    let folder = tempfile::tempdir().unwrap();
    let address = serve(sqlite(folder.path())).await;
    let connection = Connection::connect(address, ClientOptions::new()).await.unwrap();
    for bytes in [&[0xff; 4][..], &[5, 0, 0, 0, 0x7e, 1, 0, 0, 0], &[6, 0, 0, 0, 2, 1, 0, 0, 0, 9]]
    {
        let mut stream = connection.open("jobs", &[1][..]).await.unwrap();
        stream.writer.write(bytes.to_vec()).await.unwrap();
        let error = stream.reader.read().await.unwrap_err();
        assert_eq!(error.status(), Status::BadArgument, "{error}");
    }
    let client = Client::open(&connection).await.unwrap();
    assert_eq!(client.definitions().await.unwrap(), []);
    let error = client.show(JobId::of(7, 7)).await.unwrap_err();
    assert!(error.to_string().starts_with("there is no job "), "{error}");
    let error = client.submit(Submit::new("none", "")).await.unwrap_err();
    assert!(error.to_string().starts_with("there is no definition \"none\""), "{error}");
}

#[test]
fn messages_survive_every_split_and_lie_detection() {
    let mut bytes = Vec::new();
    let submit = Submit::new("upper", "hello");
    Request::Submit { submit: submit.clone(), wait: 8 }.encode(7, &mut bytes);
    Request::Wait { id: JobId::of(1, 2) }.encode(9, &mut bytes);
    for split in 0..=bytes.len() {
        let mut splitter = Splitter::default();
        let mut found = Vec::new();
        for part in [&bytes[..split], &bytes[split..]] {
            splitter.push(part);
            while let Some((kind, call, fields)) = splitter.next_message().unwrap() {
                found.push((call, Request::decode(kind, fields).unwrap()));
            }
        }
        let expected = [
            (7, Request::Submit { submit: submit.clone(), wait: 8 }),
            (9, Request::Wait { id: JobId::of(1, 2) }),
        ];
        assert_eq!(found, expected, "split at {split}");
    }
    // A message that is cut or has more bytes is refused, and no length makes it panic.
    let fields = Bytes::copy_from_slice(&bytes[9..]);
    for len in 0..30 {
        let decoded = Request::decode(0x02, fields.slice(..len));
        assert_eq!(decoded.is_ok(), len == 16, "{len}");
    }
    assert_eq!(Response::decode(0x02, Bytes::new()), Err(Malformed::UnknownKind(0x02)));
}

#[test]
fn golden_bytes_of_a_submission() {
    let mut bytes = Vec::new();
    let submit = Submit::new("up", "hi");
    Request::Submit { submit, wait: 2 }.encode(1, &mut bytes);
    let golden = [
        &[39, 0, 0, 0, 0x01, 1, 0, 0, 0][..],
        &[2, 0, 0, 0, b'u', b'p', 2, 0, 0, 0, b'h', b'i'],
        &[100, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[2, 0, 0, 0],
    ];
    assert_eq!(bytes, golden.concat());
}

/// A store whose commits can fail.
struct Faulty {
    store: Sqlite,
    fails: Arc<AtomicBool>,
}

impl Store for Faulty {
    fn recover(&mut self) -> Result<Recovered, StoreError> {
        self.store.recover()
    }

    fn commit(&mut self, rows: &[Row], floor: i64) -> Result<(), StoreError> {
        match self.fails.load(Ordering::Relaxed) {
            true => Err(StoreError::Failed("the disk is broken".to_owned())),
            false => self.store.commit(rows, floor),
        }
    }

    fn job(&mut self, id: JobId) -> Result<Option<(Record, Option<Bytes>)>, StoreError> {
        self.store.job(id)
    }

    fn input(&mut self, id: JobId) -> Result<Option<(Option<Action>, Bytes)>, StoreError> {
        self.store.input(id)
    }

    fn result(&mut self, id: JobId) -> Result<Option<(Option<ResultKey>, Bytes)>, StoreError> {
        self.store.result(id)
    }

    fn list(&mut self, filter: &Filter) -> Result<Vec<Record>, StoreError> {
        self.store.list(filter)
    }

    fn events(&mut self, after: u64, limit: usize) -> Result<Vec<Event>, StoreError> {
        self.store.events(after, limit)
    }

    fn history(&mut self, last: u64) -> Result<Vec<Event>, StoreError> {
        self.store.history(last)
    }
}
