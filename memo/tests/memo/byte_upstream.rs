//! Models of bytes behind the TCP protocol, with a memo before them and another before that.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use afterimage_cache::{ByteStore, Capacity, Table};
use afterimage_core::{Answer, ModelId, Origin, Response, RowAnswer};
use afterimage_memo::pool::{Pool, PoolOptions};
use afterimage_memo::service::identity_of;
use afterimage_memo::{Memo, MemoOptions, MemoService, ModelOptions, Secret, Store};
use afterimage_testkit::services::{ByteModel, PATIENCE, connect, serve, until};
use afterimage_wire::client::Infer;
use afterimage_wire::proto::{Role, stats::Stats};
use afterimage_wire::server::{Batch, Identity, Op, Service};
use afterimage_wire::{CallError, Client, Status};

/// A memo in front of these servers. Returns its address, once it knows the model.
async fn memo_of(servers: &[&str]) -> String {
    let mut clients = Vec::new();
    for server in servers {
        clients.push(connect(server).await);
    }
    let options = PoolOptions { timeout: PATIENCE, ..PoolOptions::default() };
    let labels = Arc::new(Table::new(Capacity::Entries(64)).unwrap());
    let bytes = Arc::new(ByteStore::new(8 << 20, 1 << 20));
    let options_of_memo = MemoOptions::new(Secret::new([7; 32]));
    let memo = Memo::new(Store::Embedded(labels, None), bytes, options_of_memo);
    memo.add_model("", Pool::of_clients(clients, options), ModelOptions::default());
    until("the memo knows the model", async || memo.model("").is_some()).await;
    serve(MemoService::of(&memo, "").unwrap()).await
}

async fn ask(client: &Client, rows: &[&[u8]]) -> Vec<RowAnswer> {
    client.infer(&Infer::rows("", rows)).await.unwrap().rows
}

fn computed(row: &[u8], origin: Origin) -> (Answer, Origin) {
    (Answer::Bytes(ByteModel::answer(5, row).into()), origin)
}

fn found(rows: Vec<RowAnswer>) -> Vec<(Answer, Origin)> {
    rows.into_iter().map(|row| (row.answer, row.origin)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memo_stores_the_answers_of_a_byte_model_over_tcp() {
    let model = ByteModel::new(5);
    let (rows, requests) = (Arc::clone(&model.rows), Arc::clone(&model.requests));
    let near = memo_of(&[&serve(model).await]).await;
    // A second memo before the first one.
    let far = memo_of(&[&near]).await;
    let client = connect(&far).await;
    let large = vec![b'x'; 300_000];
    let inputs: [&[u8]; 4] = [b"", b"a", b"bc", &large];
    for origin in [Origin::Miss, Origin::Hit] {
        for row in inputs {
            assert_eq!(found(ask(&client, &[row]).await), [computed(row, origin)]);
        }
    }
    assert_eq!((rows.load(SeqCst), requests.load(SeqCst)), (4, 4));
    // Stored rows are answered, equal rows are asked once, and the rest is one request.
    let mixed = found(ask(&client, &[b"new", b"a", b"new", b"d"]).await);
    let expected = [
        computed(b"new", Origin::Miss),
        computed(b"a", Origin::Hit),
        computed(b"new", Origin::Coalesced),
        computed(b"d", Origin::Miss),
    ];
    assert_eq!(mixed, expected);
    assert_eq!((rows.load(SeqCst), requests.load(SeqCst)), (6, 5));
    let near = connect(&near).await;
    assert_eq!(found(ask(&near, &[b"d"]).await), [computed(b"d", Origin::Hit)]);
}

#[tokio::test]
async fn a_byte_model_refuses_a_request_for_a_label() {
    let memo = connect(&memo_of(&[&serve(ByteModel::new(5)).await]).await).await;
    let error = memo.classify(b"row").await.unwrap_err();
    let CallError::Server { status, .. } = &error else { panic!("{error}") };
    assert_eq!(*status, Status::Unsupported, "{error}");
    assert!(error.to_string().contains("the model answers with bytes"), "{error}");
}

/// A server that breaks its promise: the `Welcome` says bytes, and the answers are labels.
struct Labels(AtomicUsize);

impl Service for Labels {
    fn identity(&self) -> Identity {
        identity_of(Role::Classifier, &ModelId::bytes("", [9; 32]))
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for i in 0..batch.requests().len() {
            let Op::Infer(infer) = batch.requests()[i].op else { panic!("a request for a label") };
            self.0.fetch_add(1, SeqCst);
            let rows = infer.rows().map(|_| RowAnswer::label(3, Origin::Miss)).collect();
            let model = Arc::new(ModelId::bytes("", [9; 32]));
            batch.response_reply(i).send(Ok(Response { model, rows }));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test]
async fn labels_from_a_byte_model_are_corrupt() {
    let memo = connect(&memo_of(&[&serve(Labels(AtomicUsize::new(0))).await]).await).await;
    for rows in [&["a"][..], &["a", "b"]] {
        let error = memo.infer(&Infer::rows("", rows)).await.unwrap_err();
        let CallError::Server { status, .. } = &error else { panic!("{error}") };
        assert_eq!(*status, Status::UpstreamCorrupt, "{error}");
        assert!(error.to_string().contains("answers with bytes"), "{error}");
    }
}
