//! A report as a table that people can read.

use std::fmt;

use super::{Report, Settings, Summary};
use crate::format::{duration, grouped, number};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings { addr, target, access, mode, population, .. } = &self.settings;
        let Settings { connections, threads, depth, seed, .. } = &self.settings;
        writeln!(f, "{target} at {addr} ({}, {})", self.server.service, self.server.name)?;
        let population = grouped(*population);
        writeln!(f, "{access} over {population}, {mode} loop, seed {seed}")?;
        writeln!(f, "connections {connections}, depth {depth}, threads {threads}")?;
        writeln!(f)?;
        let rate = self.throughput_per_s;
        writeln!(f, "throughput  {} requests/s over {:.3} s", number(rate), self.measured_s)?;
        if let Some(due) = self.settings.rate_per_s {
            writeln!(f, "due         {} requests/s", number(due))?;
        }
        if let Some(ratio) = self.hit_ratio {
            writeln!(f, "hit ratio   {:.2} %", ratio * 100.0)?;
        }
        let shares: Vec<String> = self
            .generator
            .cpu_share
            .iter()
            .map(|share| format!("{:.0} %", share * 100.0))
            .collect();
        let each = self.generator.cpu_ns_per_request;
        writeln!(f, "generator   {} of a core, {each:.1} ns per request", shares.join(", "))?;
        if self.settings.rate_per_s.is_some() {
            let late = duration(self.generator.late_p99_ns);
            writeln!(f, "            sent late by its own fault: {late} (p99)")?;
        }
        writeln!(
            f,
            "requests    {} sent, {} answered, {} failed, {} timed out, {} lost",
            self.sent, self.answered, self.failed, self.timed_out, self.lost
        )?;
        writeln!(
            f,
            "            {} skipped, {} late, {} out of range",
            self.skipped, self.late, self.out_of_range
        )?;
        if self.writes > 0 {
            writeln!(f, "writes      {} sent, {} confirmed", self.writes, self.writes_confirmed)?;
        }
        for (status, count) in &self.errors {
            writeln!(f, "error       {status}: {count}")?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "{:<22}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>12}",
            "latency", "p50", "p90", "p99", "p99.9", "p99.99", "max", "count"
        )?;
        row(f, "from due", &self.latency_from_due)?;
        row(f, "from sent", &self.latency_from_sent)?;
        for (outcome, latency) in &self.outcomes {
            row(f, &format!("  {} from due", outcome.name()), &latency.from_due)?;
            row(f, &format!("  {} from sent", outcome.name()), &latency.from_sent)?;
        }
        if self.generator_is_the_limit() {
            writeln!(f, "\nThe load generator was the bottleneck: the server may be faster.")?;
        }
        if self.server.window > 0 && self.settings.depth as u64 > u64::from(self.server.window) {
            let window = self.server.window;
            writeln!(f, "\nThe server accepts {window} requests in flight per connection.")?;
        }
        let problems = self.problems();
        if !problems.is_empty() {
            writeln!(f, "\nProblems:")?;
        }
        for problem in problems {
            writeln!(f, "  {problem}")?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, summary: &Summary) -> fmt::Result {
    let Summary { p50_ns, p90_ns, p99_ns, p999_ns, p9999_ns, max_ns, count, .. } = *summary;
    write!(f, "{name:<22}")?;
    for ns in [p50_ns, p90_ns, p99_ns, p999_ns, p9999_ns, max_ns] {
        write!(f, "{:>10}", duration(ns))?;
    }
    writeln!(f, "{count:>12}")
}
