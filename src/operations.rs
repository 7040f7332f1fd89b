//! Metrics and readiness of a process, for its operators.

use std::pin::Pin;
use std::sync::Arc;

use afterimage_core::Metric;
use afterimage_gateway::{Operated, Pending, Source};
use afterimage_inference::Proxy;
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Service, metrics as server};

use crate::metrics;

/// The services of a process.
pub(crate) struct Operations {
    pub(crate) services: Vec<Arc<dyn Service>>,
    pub(crate) proxy: Option<Proxy>,
    /// The memo in another process that a gateway of its own is in front of.
    pub(crate) remote: Option<Arc<dyn Source>>,
}

impl Operated for Operations {
    fn stats(&self) -> Pending<'_, Vec<Stats>> {
        Box::pin(async {
            let mut all = statistics(&self.services);
            if let Some(proxy) = &self.proxy {
                let mut stats = Stats::default();
                stats.text(&server::SERVICE, "proxy");
                proxy.stats(&mut stats);
                all.push(stats);
            }
            if let Some(remote) = &self.remote {
                all.extend(remote.stats().await?);
            }
            Ok(all)
        })
    }

    fn describe(&self, name: &str) -> Option<&'static Metric> {
        metrics::find(name)
    }

    fn obstacle(&self) -> Pin<Box<dyn Future<Output = Option<String>> + Send + '_>> {
        Box::pin(async {
            for service in &self.services {
                let identity = service.identity();
                if identity.service == Role::Memo && identity.digest == [0; 32] {
                    return Some("the memo has not reached its classifier yet".to_owned());
                }
            }
            if let Some(remote) = &self.remote
                && let Err(failure) = remote.ready().await
            {
                return Some(failure.text.to_string());
            }
            let proxy = self.proxy.as_ref()?;
            let problems = proxy.check().await;
            // With several servers, one is enough.
            let are_all = problems.len() >= proxy.replicas();
            are_all.then(|| problems.into_iter().next()).flatten()
        })
    }
}

/// The statistics of services, as each would send them.
pub(crate) fn statistics(services: &[Arc<dyn Service>]) -> Vec<Stats> {
    let of = |service: &Arc<dyn Service>| {
        let mut stats = Stats::default();
        stats.text(&server::SERVICE, service.identity().service.to_string());
        service.stats(&mut stats);
        stats
    };
    services.iter().map(of).collect()
}
