//! The descriptions of all metrics, from the crates that count them.

use afterimage_core::Metric;

/// The descriptions of all crates, in the order of a report.
const METRICS: [&[Metric]; 7] = [
    afterimage_cache::metrics::METRICS,
    afterimage_memo::metrics::METRICS,
    afterimage_classifier::metrics::METRICS,
    afterimage_inference::metrics::METRICS,
    afterimage_jobs::metrics::METRICS,
    afterimage_streams::metrics::METRICS,
    afterimage_wire::server::metrics::METRICS,
];

/// All metrics that services report.
pub(crate) fn all() -> impl Iterator<Item = &'static Metric> + Clone {
    METRICS.iter().copied().flatten()
}

/// The metric of this name.
pub(crate) fn find(name: &str) -> Option<&'static Metric> {
    all().find(|metric| metric.has_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::stats::catalog::SECTIONS;

    #[test]
    fn each_metric_has_its_own_name_and_a_known_section() {
        let mut names: Vec<&str> = all().map(|metric| metric.name).collect();
        // A classifier's replicas have its name and a number.
        names.retain(|&name| name != "classifier");
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len() + 2, all().count());
        assert_eq!(names.len(), count);
        for Metric { name, section, help, label, .. } in all() {
            let is_known = SECTIONS.contains(section) || ["", "Latency"].contains(section);
            assert!(is_known, "{name}: unknown section {section:?}");
            assert!(!label.is_empty() && help.starts_with(char::is_uppercase), "{name}: {help:?}");
        }
    }
}
