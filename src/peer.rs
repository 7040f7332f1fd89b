//! Connections to other services: a cache service, and the classifiers of a memo.

use std::sync::Arc;
use std::time::Duration;

use afterimage_inference::{LabelEndpoint, ModelUrl, Replica, TargetError};
use afterimage_memo::Upstream;
use afterimage_memo::pool::{Endpoint, Pool, PoolOptions, Target};
use afterimage_wire::client::Expect;
use afterimage_wire::proto::header::MAX_LARGE_BODY;
use afterimage_wire::server::Token;
use afterimage_wire::tls::{ClientTls, TlsError};
use afterimage_wire::{Client, ClientOptions};

use crate::net;

/// Bytes of the largest reply about labels. A `Welcome` and the labels of a batch need 4 KiB at
/// most; a classifier of labels, or a cache service, that announces more is disconnected.
const MAX_LABEL_BODY: u32 = 64 << 10;

/// How to connect to another service.
#[derive(Clone, Debug, Default)]
pub struct PeerConfig {
    /// The token that it requires.
    pub token: Option<Token>,
    /// TLS; certificates are reloaded when their files change.
    pub tls: Option<ClientTls>,
}

impl PeerConfig {
    /// Options of the connections to these addresses.
    pub(crate) fn options<A: AsRef<str>>(
        &self,
        expect: Expect,
        addresses: &[A],
    ) -> Result<ClientOptions, TlsError> {
        let flag = match expect {
            Expect::Cache => "--store-token-file",
            _ => "--classifier-token-file",
        };
        let mut options = upstream_options(expect);
        let mut addresses = addresses.iter().map(AsRef::as_ref);
        if let Some(tls) = &self.tls {
            addresses.clone().try_for_each(|address| tls.name_for(net::host(address)).map(drop))?;
            tokio::spawn(tls.keep_current());
            options = options.tls(tls.clone());
        }
        if let Some(token) = &self.token {
            options = options.token(&token.secret()[..]);
            let remote = addresses.find(|address| !net::is_local(address));
            if let (None, Some(address)) = (&self.tls, remote) {
                tracing::warn!("{flag}: the token is sent to {address} unencrypted; use TLS");
            }
        }
        Ok(options)
    }
}

/// Options of the memo's upstream connections: a request fails at once without a connection, and
/// attempts to reconnect are at most half a second apart.
fn upstream_options(expect: Expect) -> ClientOptions {
    ClientOptions::new()
        .expect(expect)
        .fail_fast(true)
        .backoff(Duration::from_millis(20), Duration::from_millis(500))
        .max_in_flight(16_384)
        .max_queued_bytes(64 << 20)
        .max_body(match expect {
            // The server of a model of bytes says so in its `Welcome`.
            Expect::Classify => MAX_LARGE_BODY,
            _ => MAX_LABEL_BODY,
        })
        .max_label_body(MAX_LABEL_BODY)
}

/// What computes the answers of a memo.
#[derive(Default)]
pub enum ClassifierConfig {
    /// The built-in classifier of the process.
    #[default]
    Embedded,
    /// Classifiers in other processes.
    Remote(ReplicasConfig),
    /// A model with labels at model servers of the Open Inference Protocol.
    Servers(ServersConfig),
    /// An upstream that the program brings.
    Own(Box<dyn Upstream>),
}

impl ClassifierConfig {
    /// Whether it is the classifier of the process.
    pub(crate) fn is_embedded(&self) -> bool {
        matches!(self, ClassifierConfig::Embedded)
    }
}

/// Equal classifiers in other processes.
#[derive(Clone, Debug)]
pub struct ReplicasConfig {
    /// Their addresses, HOST:PORT. Each address of a name is a classifier.
    pub addresses: Vec<String>,
    /// How to connect to them.
    pub peer: PeerConfig,
    /// Time limits and retries.
    pub options: PoolOptions,
    /// The interval of DNS lookups of the names. The default is 10 s.
    pub resolve_every: Duration,
}

impl ReplicasConfig {
    /// Classifiers at these addresses, with default options.
    pub fn new(addresses: Vec<String>) -> Self {
        ReplicasConfig {
            addresses,
            peer: PeerConfig::default(),
            options: PoolOptions::default(),
            resolve_every: Duration::from_secs(10),
        }
    }

    /// The pool of the classifiers. It connects in the background.
    pub(crate) fn start(self) -> Result<Box<dyn Upstream>, TlsError> {
        let ReplicasConfig { addresses, peer, options, resolve_every } = self;
        let client = peer.options(Expect::Classify, &addresses)?;
        let connect = move |address, name: &str| {
            let mut options = client.clone();
            // A certificate names the host, not the address that DNS gives.
            options.tls = options.tls.map(|tls| tls.or_server_name(net::host(name)));
            Client::connect_lazy(address, options)
        };
        let targets = addresses.into_iter().map(Target).collect();
        let resolve = Target::system_resolver();
        Ok(Box::new(Pool::at(targets, options, resolve_every, Box::new(connect), resolve)))
    }
}

/// Equal model servers, and their model.
#[derive(Clone, Debug)]
pub struct ServersConfig {
    /// The model at each server.
    pub urls: Vec<ModelUrl>,
    /// TLS for `https`.
    pub tls: Option<ClientTls>,
    /// Time limits and retries.
    pub options: PoolOptions,
}

impl ServersConfig {
    /// The pool of the servers. `reloaded` is called when one has loaded the model again.
    pub(crate) fn start(
        self,
        reloaded: impl Fn() + Clone + Send + Sync + 'static,
    ) -> Result<Box<dyn Upstream>, TargetError> {
        let ServersConfig { urls, tls, options } = self;
        if let Some(tls) = &tls {
            tokio::spawn(tls.keep_current());
        }
        let endpoint = |url: &ModelUrl| {
            let replica = Replica::new(url.target.clone(), tls.clone())?;
            let endpoint: Arc<dyn Endpoint> = LabelEndpoint::start(url, replica, reloaded.clone());
            Ok(endpoint)
        };
        let endpoints = urls.iter().map(endpoint).collect::<Result<Vec<_>, TargetError>>()?;
        Ok(Box::new(Pool::of_endpoints(endpoints, options)))
    }
}
