//! Several services and listeners in one process, with one drain.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage::config::{
    AdminConfig, ClassifierConfig, Config, EngineConfig, GatewayConfig, ListenerConfig, MemoConfig,
    ModelConfig, PeerConfig, RemoteConfig, StoreConfig, StoreServer, TableConfig,
};
use afterimage::process::{ConfigError, Process};
use afterimage_cache::Capacity;
use afterimage_core::{Answer, ModelId, Origin};
use afterimage_gateway::GatewayOptions;
use afterimage_http::HttpOptions;
use afterimage_memo::store::RedisOptions;
use afterimage_memo::upstream::{Call, Function};
use afterimage_memo::{MemoOptions, Secret, Upstream};
use afterimage_wire::client::{ErrorKind, Infer};
use afterimage_wire::proto::{Role, stats::Stats};
use afterimage_wire::server::{Batch, Identity, Service, Token};
use afterimage_wire::{Client, ClientOptions, Status};
use tokio_util::bytes::Bytes;

fn listener() -> ListenerConfig {
    ListenerConfig::new("127.0.0.1:0".parse().unwrap())
}

fn memo(listeners: usize) -> MemoConfig {
    MemoConfig {
        listeners: (0..listeners).map(|_| listener()).collect(),
        options: MemoOptions::new(Secret::new([7; 32])),
        store: StoreConfig::Embedded,
        models: vec![ModelConfig::new("", ClassifierConfig::Embedded)],
    }
}

#[tokio::test]
async fn two_services_and_three_listeners_have_one_drain() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = folder.path().join("snapshot");
    let config = || Config {
        memo: Some(memo(2)),
        cache: vec![listener()],
        table: TableConfig {
            capacity: Capacity::Entries(1000),
            snapshot: Some(snapshot.clone()),
            ..TableConfig::default()
        },
        engine: EngineConfig { model: "raw".into(), threads: 1, ..EngineConfig::default() },
        ..Config::default()
    };
    let process = Process::start(config()).await.unwrap();
    let addresses = process.addresses().to_vec();
    let roles: Vec<Role> = addresses.iter().map(|(role, _)| *role).collect();
    assert_eq!(roles, [Role::Cache, Role::Memo, Role::Memo]);
    let connect =
        async |i: usize| Client::connect(addresses[i].1, ClientOptions::new()).await.unwrap();
    let (cache, one, other) = (connect(0).await, connect(1).await, connect(2).await);
    // One memo behind both listeners, and one table behind the memo and the cache service.
    let image = [7; 784];
    one.classify(&image).await.unwrap();
    other.classify(&image).await.unwrap();
    assert_eq!(other.admin().stats().await.unwrap().counter_value("hits"), 1);
    cache.cache().set(1, 10).unwrap();
    // The reply to a later request shows that the write has arrived.
    assert_eq!(cache.cache().get(1).await.unwrap(), Some(10));
    process.drain(Duration::from_secs(5)).await.unwrap();
    for (_, address) in addresses {
        let again = tokio::net::TcpStream::connect(address).await;
        assert!(again.is_err(), "{address} is still open");
    }

    // The snapshot has the entries of both services.
    let process = Process::start(config()).await.unwrap();
    let (_, address) = process.addresses()[0];
    let cache = Client::connect(address, ClientOptions::new()).await.unwrap();
    assert_eq!(cache.cache().get(1).await.unwrap(), Some(10));
    drop(cache);
    process.drain(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test]
async fn wrong_configurations_are_refused_by_name() {
    let refused = async |config| match Process::start(config).await {
        Err(error) => error.to_string(),
        Ok(_) => panic!("the configuration was accepted"),
    };
    assert!(matches!(Process::start(Config::default()).await, Err(ConfigError::NoListener)));
    let table =
        TableConfig { snapshot_every: Some(Duration::from_secs(1)), ..TableConfig::default() };
    let config = Config { cache: vec![listener()], table, ..Config::default() };
    assert_eq!(refused(config).await, "--snapshot-every needs --snapshot FILE");
    let mut small = listener();
    small.options.max_body = 15;
    let config = Config { cache: vec![small], ..Config::default() };
    assert_eq!(refused(config).await, "--max-body is 15 bytes; a cache write needs 16");
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = Config {
        memo: Some(memo(1)),
        cache: vec![ListenerConfig::new(taken.local_addr().unwrap())],
        ..Config::default()
    };
    assert!(refused(config).await.contains("the address is in use"));
}

#[tokio::test]
async fn a_page_whose_port_is_taken_is_optional_or_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = |optional| {
        let gateway = GatewayConfig {
            address: taken.local_addr().unwrap(),
            optional,
            options: GatewayOptions::default(),
            http: HttpOptions::default(),
            server: None,
        };
        let table = TableConfig { capacity: Capacity::Entries(1000), ..TableConfig::default() };
        let engine = EngineConfig { model: "raw".into(), threads: 1, ..EngineConfig::default() };
        Config { memo: Some(memo(1)), gateway: Some(gateway), table, engine, ..Config::default() }
    };
    let process = Process::start(config(true)).await.unwrap();
    assert_eq!(process.page(), None);
    process.drain(Duration::from_secs(5)).await.unwrap();
    assert!(matches!(Process::start(config(false)).await, Err(ConfigError::InUse(_))));
}

/// A classifier that never answers.
struct Silent {
    model: Arc<ModelId>,
    calls: Mutex<Vec<Call>>,
}

impl Upstream for Silent {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.model))
    }

    fn compute(&self, calls: Vec<Call>) {
        self.calls.lock().unwrap().extend(calls);
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test]
async fn a_drain_ends_at_its_timeout() {
    let mut memo = memo(1);
    let model = Arc::new(ModelId::labels([1; 32], None, 10));
    let silent = Silent { model, calls: Mutex::default() };
    memo.models = vec![ModelConfig::new("", ClassifierConfig::Own(Box::new(silent)))];
    memo.listeners[0].options.drain_timeout = Duration::from_secs(60);
    let table = TableConfig { capacity: Capacity::Entries(1000), ..TableConfig::default() };
    let config = Config { memo: Some(memo), table, ..Config::default() };
    let process = Process::start(config).await.unwrap();
    let (_, address) = process.addresses()[0];
    let options = ClientOptions::new().timeout(Duration::from_secs(1));
    let client = Client::connect(address, options).await.unwrap();
    let call = tokio::spawn(async move { client.classify(&[7]).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let start = Instant::now();
    process.drain(Duration::from_millis(100)).await.unwrap();
    let took = start.elapsed();
    // The listener alone would wait for the call in flight, a minute.
    assert!((Duration::from_millis(100)..Duration::from_secs(30)).contains(&took), "{took:?}");
    assert!(call.await.unwrap().is_err());
}

#[tokio::test]
async fn a_reload_replaces_the_token_for_new_connections() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "old").unwrap();
    let mut cache = listener();
    cache.options.token = Some(Token::read(&file).unwrap());
    let table = TableConfig { capacity: Capacity::Entries(1000), ..TableConfig::default() };
    let config = Config { cache: vec![cache], table, ..Config::default() };
    let process = Process::start(config).await.unwrap();
    let (_, address) = process.addresses()[0];
    let connect = async |token: &str| {
        Client::connect(address, ClientOptions::new().token(token).fail_fast(true)).await
    };
    let open = connect("old").await.unwrap();
    std::fs::write(&file, "new\n").unwrap();
    process.reload().unwrap();
    connect("new").await.unwrap();
    assert_eq!(connect("old").await.unwrap_err().kind(), ErrorKind::Denied);
    open.ping().await.unwrap();
    std::fs::remove_file(&file).unwrap();
    let error = process.reload().unwrap_err().to_string();
    assert!(error.ends_with("the token read before stays in use"), "{error}");
    connect("new").await.unwrap();
}

#[tokio::test]
async fn answers_of_bytes_outlive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let config = || {
        let capitals = Function::new(ModelId::bytes("capitals", [3; 32]), 1, |rows| {
            let answer = |row: &Bytes| Answer::Bytes(row.to_ascii_uppercase().into());
            Ok(rows.iter().map(answer).collect())
        });
        let table = TableConfig {
            capacity: Capacity::Entries(1000),
            snapshot: Some(folder.path().join("snapshot")),
            bytes: Some(8 << 20),
            ..TableConfig::default()
        };
        let classifier = ClassifierConfig::Own(Box::new(capitals));
        let memo = MemoConfig { models: vec![ModelConfig::new("", classifier)], ..memo(1) };
        Config { memo: Some(memo), table, ..Config::default() }
    };
    for origin in [Origin::Miss, Origin::Hit] {
        let process = Process::start(config()).await.unwrap();
        let (_, address) = process.addresses()[0];
        let client = Client::connect(address, ClientOptions::new()).await.unwrap();
        let request = Infer::rows("", ["one", "two"]);
        let answers = client.infer(&request).await.unwrap();
        let rows: Vec<_> = answers.rows.iter().map(|row| (&row.answer, row.origin)).collect();
        let [one, two] = ["ONE", "TWO"].map(|text| Answer::Bytes(text.into()));
        assert_eq!(rows, [(&one, origin), (&two, origin)]);
        drop(client);
        process.drain(Duration::from_secs(5)).await.unwrap();
    }
    assert!(folder.path().join("snapshot.bytes").exists());
}

/// A memo with a model that answers with the row in capitals, in this store.
fn memo_of_bytes(store: StoreConfig) -> Config {
    let capitals = Function::new(ModelId::bytes("capitals", [3; 32]), 1, |rows| {
        let answer = |row: &Bytes| Answer::Bytes(row.to_ascii_uppercase().into());
        Ok(rows.iter().map(answer).collect())
    });
    let classifier = ClassifierConfig::Own(Box::new(capitals));
    let memo = MemoConfig { store, models: vec![ModelConfig::new("", classifier)], ..memo(1) };
    Config { memo: Some(memo), ..Config::default() }
}

/// Two memos in processes of their own share answers of bytes through this store.
async fn share_bytes(server: StoreServer) {
    let start = async || {
        let lookup_budget = Duration::from_secs(1);
        let store = StoreConfig::Remote(RemoteConfig { server: server.clone(), lookup_budget });
        let process = Process::start(memo_of_bytes(store)).await.unwrap();
        let (_, address) = process.addresses()[0];
        (process, Client::connect(address, ClientOptions::new()).await.unwrap())
    };
    let ((one, first), (other, second)) = (start().await, start().await);
    let large = "x".repeat(300 << 10);
    let origin = async |client: &Client, row: &str| {
        let answers = client.infer(&Infer::rows("", [row])).await.unwrap();
        assert_eq!(answers.rows[0].answer, Answer::Bytes(row.to_ascii_uppercase().into()));
        answers.rows[0].origin
    };
    for row in ["a", &large] {
        // The first lookups may come before the connection.
        let start = Instant::now();
        while origin(&first, row).await != Origin::Hit {
            assert!(start.elapsed() < Duration::from_secs(30), "no hit of {} bytes", row.len());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let start = Instant::now();
        while origin(&second, row).await != Origin::Hit {
            assert!(start.elapsed() < Duration::from_secs(30), "not shared: {} bytes", row.len());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let misses = second.admin().stats().await.unwrap().counter_value("misses");
    assert!(misses <= 10, "{misses} misses in the second memo");
    drop((first, second));
    one.drain(Duration::from_secs(5)).await.unwrap();
    other.drain(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test]
async fn memos_share_answers_of_bytes_through_a_cache_service() {
    let capacity = Capacity::Entries(1000);
    let table = TableConfig { capacity, bytes: Some(64 << 20), ..TableConfig::default() };
    let config = Config { cache: vec![listener()], table, ..Config::default() };
    let cache = Process::start(config).await.unwrap();
    let (_, address) = cache.addresses()[0];
    share_bytes(StoreServer::Cache(address.to_string(), PeerConfig::default())).await;
    cache.drain(Duration::from_secs(5)).await.unwrap();
}

/// A Redis server, killed when it is dropped.
struct RedisServer(std::process::Child);

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The lines of the reply of a Redis server to this inline command.
fn redis_lines(port: u16, command: &str) -> Vec<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "{command}\r\nQUIT\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply.lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn memos_share_answers_of_bytes_through_redis() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = std::process::Command::new("redis-server");
    command.args(["--bind", "127.0.0.1", "--save", "", "--port", &port.to_string()]);
    let Ok(child) = command.stdout(std::process::Stdio::null()).spawn() else {
        use std::io::Write;
        let why = "redis-server is not installed";
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED memos_share_answers_of_bytes_through_redis: {why}"
        );
        return;
    };
    let _server = RedisServer(child);
    let redis = RedisOptions {
        prefix: "memos:".into(),
        ttl: Some(Duration::from_secs(3600)),
        ..RedisOptions::default()
    };
    share_bytes(StoreServer::Redis(format!("redis://127.0.0.1:{port}"), Box::new(redis))).await;
    // Each key and its length are lines of the reply; a key may contain line ends.
    let keys = redis_lines(port, "EVAL \"return #redis.call('KEYS','memos:*')\" 0");
    let all = redis_lines(port, "DBSIZE");
    assert_eq!(keys[0], all[0], "all keys have the prefix");
    let expiring = "EVAL \"local n = 0 for _, key in ipairs(redis.call('KEYS','*')) do \
        if redis.call('TTL', key) > 3000 then n = n + 1 end end return n\" 0";
    let expiring = redis_lines(port, expiring)[0].trim_start_matches(':').parse::<u32>().unwrap();
    assert!(expiring >= 2, "{expiring} keys of at least 2 answers have a time to live");
}

/// A service that counts the requests that it refuses.
struct Refuses;

impl Service for Refuses {
    fn identity(&self) -> Identity {
        Identity { digest: [9; 32], classes: 10, ..Identity::without_model(Role::Classifier) }
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for i in 0..batch.requests().len() {
            batch.error(i, Status::Overloaded, "planned");
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test]
async fn all_kinds_of_services_have_one_drain() {
    let http = || AdminConfig { address: listener().address, http: HttpOptions::default() };
    let gateway = GatewayConfig {
        address: listener().address,
        optional: false,
        options: GatewayOptions::default(),
        http: HttpOptions::default(),
        server: None,
    };
    let config = Config {
        memo: Some(memo(1)),
        cache: vec![listener()],
        classifier: vec![listener()],
        others: vec![(Box::new(Refuses), vec![listener()])],
        table: TableConfig { capacity: Capacity::Entries(1000), ..TableConfig::default() },
        engine: EngineConfig { model: "raw".into(), threads: 1, ..EngineConfig::default() },
        gateway: Some(gateway),
        admin: Some(http()),
        ..Config::default()
    };
    let process = Process::start(config).await.unwrap();
    let addresses = process.addresses().to_vec();
    let roles: Vec<Role> = addresses.iter().map(|(role, _)| *role).collect();
    assert_eq!(roles, [Role::Classifier, Role::Classifier, Role::Cache, Role::Memo]);
    let image = [7; 784];
    let connect =
        async |i: usize| Client::connect(addresses[i].1, ClientOptions::new()).await.unwrap();
    let (refuses, classifier) = (connect(0).await, connect(1).await);
    assert!(refuses.classify(&image).await.unwrap_err().to_string().contains("planned"));
    let label = classifier.classify(&image).await.unwrap().label;
    assert_eq!(connect(3).await.classify(&image).await.unwrap().label, label);
    let page = process.page().unwrap();
    let page = page.trim_start_matches("http://").trim_end_matches('/').parse().unwrap();
    let all: Vec<std::net::SocketAddr> = addresses.iter().map(|(_, address)| *address).collect();
    let all: Vec<_> = all.into_iter().chain([page, process.admin().unwrap()]).collect();
    for address in &all {
        tokio::net::TcpStream::connect(address).await.unwrap();
    }
    process.drain(Duration::from_secs(5)).await.unwrap();
    for address in all {
        assert!(tokio::net::TcpStream::connect(address).await.is_err(), "{address} is still open");
    }
}
