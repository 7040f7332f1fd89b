//! Version 2 of the protocol over TCP: rows of bytes for many models, and deletion of answers.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_cache::{ByteStore, Capacity, Table};
use afterimage_core::{Answer, Failure, ModelId, Origin, Status};
use afterimage_memo::upstream::Function;
use afterimage_memo::{Memo, MemoOptions, MemoService, ModelOptions, Secret, Store};
use afterimage_wire::client::{CallError, Client, ClientOptions, Infer, Inference};
use afterimage_wire::server::{Server, ServerOptions, Token};
use bytes::Bytes;

/// The rows of each call of the model, in order.
type Calls = Arc<Mutex<Vec<Vec<Bytes>>>>;

const DIGEST: [u8; 32] = [3; 32];

/// A memo with two models, served on a free port: `capitals` answers with bytes, 4 KiB for a row of
/// 1 MiB; `length` answers with a label.
async fn serve(options: ServerOptions) -> (std::net::SocketAddr, Calls) {
    let labels = Arc::new(Table::new(Capacity::Entries(1 << 10)).unwrap());
    let bytes = Arc::new(ByteStore::new(8 << 20, 1 << 20));
    let options_of_memo = MemoOptions::new(Secret::new([7; 32]));
    let memo = Memo::new(Store::Embedded(labels, None), Some(bytes), options_of_memo);
    let calls = Calls::default();
    let seen = Arc::clone(&calls);
    let mut id = ModelId::bytes("capitals", DIGEST);
    id.version = "2".to_owned();
    let capitals = Function::new(id, 1, move |rows| {
        seen.lock().unwrap().push(rows.to_vec());
        let answer = |row: &Bytes| row[..row.len().min(4096)].to_ascii_uppercase().into();
        Ok(rows.iter().map(|row| Answer::Bytes(answer(row))).collect())
    });
    memo.add_model("capitals", capitals, ModelOptions::default());
    let length = Function::new(ModelId::labels([4; 32], None, 1000), 1, |rows| {
        if rows.iter().any(|row| row.is_empty()) {
            return Err(Failure::new(Status::UpstreamError, "planned"));
        }
        Ok(rows.iter().map(|row| Answer::Label(row.len() as u16)).collect())
    });
    memo.add_model("length", length, ModelOptions::default());
    let service = Arc::new(MemoService::of(&memo, "length").unwrap());
    let server = Server::bind("127.0.0.1:0", service, options).await.unwrap();
    let addr = server.local_addr().unwrap();
    tokio::spawn(server.serve(std::future::pending()));
    (addr, calls)
}

async fn connect(options: ServerOptions) -> (Client, Calls) {
    let (addr, calls) = serve(options).await;
    (Client::connect(addr, ClientOptions::new()).await.unwrap(), calls)
}

fn rows(answers: &Inference) -> Vec<(Bytes, Origin)> {
    let row = |row: &afterimage_core::RowAnswer| match &row.answer {
        Answer::Bytes(bytes) => (bytes.clone(), row.origin),
        Answer::Label(label) => panic!("a label: {label}"),
    };
    answers.rows.iter().map(row).collect()
}

fn capitals<const N: usize>(texts: [&'static str; N]) -> Infer {
    Infer::rows("capitals", texts)
}

async fn origin(client: &Client, request: Infer) -> Origin {
    client.infer(&request).await.unwrap().rows[0].origin
}

fn status(error: &CallError) -> Option<Status> {
    match error {
        CallError::Server { status, .. } => Some(*status),
        _ => None,
    }
}

#[tokio::test]
async fn known_rows_are_hits_and_equal_rows_are_asked_once() {
    let (client, calls) = connect(ServerOptions::default()).await;
    let first = client.infer(&capitals(["b"])).await.unwrap();
    assert_eq!((first.digest, rows(&first)), (DIGEST, vec![("B".into(), Origin::Miss)]));
    let second = client.infer(&capitals(["a", "b", "a"])).await.unwrap();
    let expected = [("A", Origin::Miss), ("B", Origin::Hit), ("A", Origin::Coalesced)];
    assert_eq!(rows(&second), expected.map(|(text, origin)| (text.into(), origin)));
    assert_eq!(*calls.lock().unwrap(), [vec!["b"], vec!["a"]]);
}

#[tokio::test]
async fn directives_govern_the_use_of_the_store() {
    let (client, calls) = connect(ServerOptions::default()).await;
    assert_eq!(origin(&client, capitals(["a"]).no_store()).await, Origin::Miss);
    assert_eq!(origin(&client, capitals(["a"])).await, Origin::Miss, "nothing was stored");
    assert_eq!(origin(&client, capitals(["a"])).await, Origin::Hit);
    assert_eq!(origin(&client, capitals(["a"]).refresh()).await, Origin::Miss);
    assert_eq!(origin(&client, capitals(["b"]).ttl(Duration::from_secs(1))).await, Origin::Miss);
    assert_eq!(origin(&client, capitals(["b"])).await, Origin::Hit);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(origin(&client, capitals(["b"])).await, Origin::Miss, "its time is over");
    assert_eq!(calls.lock().unwrap().len(), 5);
}

#[tokio::test]
async fn forget_takes_one_answer_back_and_flush_all() {
    let (client, _) = connect(ServerOptions::default()).await;
    for text in ["a", "b"] {
        client.infer(&capitals([text])).await.unwrap();
    }
    assert_eq!(client.admin().forget("capitals", "2", b"a").await.unwrap(), 1);
    assert_eq!(origin(&client, capitals(["a"])).await, Origin::Miss);
    assert_eq!(origin(&client, capitals(["b"])).await, Origin::Hit);
    for model in ["capitals", ""] {
        client.admin().flush(model).await.unwrap();
        assert_eq!(origin(&client, capitals(["b"])).await, Origin::Miss);
        assert_eq!(origin(&client, capitals(["b"])).await, Origin::Hit);
    }
    let error = client.admin().forget("capitals", "3", b"a").await.unwrap_err();
    assert_eq!(status(&error), Some(Status::BadArgument), "{error}");
}

#[tokio::test]
async fn deletion_needs_the_admin_token() {
    let options = ServerOptions {
        token: Token::new("use"),
        admin_token: Token::new("admin"),
        ..Default::default()
    };
    let (addr, _) = serve(options).await;
    let client = Client::connect(addr, ClientOptions::new().token("use")).await.unwrap();
    client.infer(&capitals(["a"])).await.unwrap();
    for error in [
        client.admin().flush("").await.unwrap_err(),
        client.admin().forget("capitals", "", b"a").await.map(|_| ()).unwrap_err(),
    ] {
        assert_eq!(status(&error), Some(Status::Unauthorized), "{error}");
    }
    assert_eq!(origin(&client, capitals(["a"])).await, Origin::Hit);
    let admin = Client::connect(addr, ClientOptions::new().token("admin")).await.unwrap();
    admin.admin().flush("").await.unwrap();
    assert_eq!(origin(&client, capitals(["a"])).await, Origin::Miss);
}

#[tokio::test]
async fn a_model_that_is_unknown_or_fails_fails_the_request() {
    let (client, _) = connect(ServerOptions::default()).await;
    for (request, expected) in [
        (Infer::rows("other", ["a"]), Status::BadArgument),
        (Infer::rows("capitals", ["a"]).version("1"), Status::BadArgument),
        (Infer::rows("length", ["a", ""]), Status::UpstreamError),
    ] {
        let error = client.infer(&request).await.unwrap_err();
        assert_eq!(status(&error), Some(expected), "{error}");
    }
    let none: [&str; 0] = [];
    let error = client.infer(&Infer::rows("length", none)).await.unwrap_err();
    assert_eq!(error.to_string(), "invalid request: 0 rows; the range is 1 to 65536");
    let answer = client.infer(&Infer::rows("length", ["four"])).await.unwrap();
    assert_eq!(answer.rows[0].answer, Answer::Label(4));
    assert_eq!(client.classify(b"four").await.unwrap().label, 4, "the model of the listener");
}

#[tokio::test]
async fn a_row_of_1_mib_has_an_answer_of_4_kib() {
    let (client, calls) = connect(ServerOptions::default()).await;
    let row = vec![b'a'; 1 << 20];
    for expected in [Origin::Miss, Origin::Hit] {
        let answers = client.infer(&Infer::rows("capitals", [&row])).await.unwrap();
        assert_eq!(rows(&answers), [(vec![b'A'; 4096].into(), expected)]);
    }
    assert_eq!(calls.lock().unwrap().len(), 1);
    assert!(calls.lock().unwrap()[0][0] == row);
    // Many at once, so that frames arrive in pieces and behind each other.
    let many = (0..8u8).map(|i| {
        let (client, mut row) = (client.clone(), row.clone());
        row[1 << 19] = i;
        tokio::spawn(async move { client.infer(&Infer::rows("capitals", [&row])).await })
    });
    for call in many.collect::<Vec<_>>() {
        assert_eq!(rows(&call.await.unwrap().unwrap())[0].0, vec![b'A'; 4096]);
    }
}
