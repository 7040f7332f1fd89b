//! Metrics and readiness of a process, for its operators.

use std::pin::Pin;
use std::sync::Arc;

use afterimage_core::Metric;
use afterimage_gateway::Operated;
use afterimage_inference::Proxy;
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Service, metrics};

use crate::cmd::stats::catalog;

/// The services of a process.
pub(crate) struct Operations {
    pub(crate) services: Vec<Arc<dyn Service>>,
    pub(crate) proxy: Option<Proxy>,
}

impl Operated for Operations {
    fn stats(&self) -> Vec<Stats> {
        let mut all = statistics(&self.services);
        if let Some(proxy) = &self.proxy {
            let mut stats = Stats::default();
            stats.text(&metrics::SERVICE, "proxy");
            proxy.stats(&mut stats);
            all.push(stats);
        }
        all
    }

    fn describe(&self, name: &str) -> Option<&'static Metric> {
        catalog::find(name)
    }

    fn obstacle(&self) -> Pin<Box<dyn Future<Output = Option<String>> + Send + '_>> {
        Box::pin(async {
            for service in &self.services {
                let identity = service.identity();
                if identity.service == Role::Memo && identity.digest == [0; 32] {
                    return Some("the memo has not reached its classifier yet".to_owned());
                }
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
        stats.text(&metrics::SERVICE, service.identity().service.to_string());
        service.stats(&mut stats);
        stats
    };
    services.iter().map(of).collect()
}
