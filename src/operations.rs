//! Metrics and readiness of a process, for its operators.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use afterimage_core::Metric;
use afterimage_gateway::{Operated, Pending, Source};
use afterimage_inference::Proxy;
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::server::{Service, metrics as server};

use crate::metrics;

/// The services of a process.
pub(crate) struct Operations {
    pub(crate) services: Vec<Served>,
    pub(crate) proxy: Option<Proxy>,
    pub(crate) started: Instant,
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
                stats.counter(&server::UPTIME, self.started.elapsed().as_millis() as u64);
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
            for Served { service, .. } in &self.services {
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

/// Writes the statistics of one listener into a report.
pub(crate) type ListenerStats = Arc<dyn Fn(&mut Stats) + Send + Sync>;

/// A service of the process, with its listeners.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) service: Arc<dyn Service>,
    pub(crate) listeners: Vec<ListenerStats>,
}

/// The statistics of services, as each would send them to a client.
pub(crate) fn statistics(services: &[Served]) -> Vec<Stats> {
    let of = |served: &Served| {
        let mut stats = Stats::default();
        stats.text(&server::SERVICE, served.service.identity().service.to_string());
        for (name, value) in total(&served.listeners).entries {
            stats.push(&name, value);
        }
        served.service.stats(&mut stats);
        stats
    };
    services.iter().map(of).collect()
}

/// The statistics of all listeners of a service in one report: the longest uptime, and sums.
fn total(listeners: &[ListenerStats]) -> Stats {
    let mut total = Stats::default();
    for listener in listeners {
        let mut stats = Stats::default();
        listener(&mut stats);
        for (name, value) in stats.entries {
            let before = total.entries.iter_mut().find(|(known, _)| *known == name);
            match (before.map(|(_, before)| before), value) {
                (None, value) => total.entries.push((name, value)),
                (Some(Value::Counter(before)), Value::Counter(value)) => {
                    let is_time = name == server::UPTIME.name;
                    *before = if is_time { value.max(*before) } else { *before + value };
                }
                (Some(Value::Gauge(before)), Value::Gauge(value)) => *before += value,
                (Some(_), _) => {}
            }
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_of_a_service_are_summed() {
        let listener = |uptime, accepted, open| {
            Arc::new(move |stats: &mut Stats| {
                stats.counter(&server::UPTIME, uptime);
                stats.counter(&server::ACCEPTED, accepted);
                stats.gauge(&server::OPEN, open);
            }) as ListenerStats
        };
        let total = total(&[listener(50, 3, 1), listener(40, 4, 2)]);
        assert_eq!(total.counter_value(server::UPTIME.name), 50);
        assert_eq!(total.counter_value(server::ACCEPTED.name), 7);
        assert_eq!(total.get(server::OPEN.name), Some(&Value::Gauge(3)));
    }
}
