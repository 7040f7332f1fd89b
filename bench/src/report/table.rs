//! A report as a table that people can read.

use std::fmt;

use super::{Report, Settings, Summary};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings { addr, target, access, mode, population, .. } = &self.settings;
        let Settings { connections, threads, depth, seed, .. } = &self.settings;
        writeln!(f, "{target} at {addr} ({}, {})", self.server.service, self.server.name)?;
        writeln!(f, "{access} over {population}, {mode} loop, seed {seed}")?;
        writeln!(f, "connections {connections}, depth {depth}, threads {threads}")?;
        writeln!(f)?;
        let rate = self.throughput_per_s;
        writeln!(f, "throughput  {} requests/s over {:.3} s", Count(rate), self.measured_s)?;
        if let Some(due) = self.settings.rate_per_s {
            writeln!(f, "due         {} requests/s", Count(due))?;
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
        writeln!(f, "generator   {} of a core, {each:.1} ns a request", shares.join(", "))?;
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
            writeln!(f, "\nThe generator was the bottleneck: the server may be faster than this.")?;
        }
        if self.server.window > 0 && self.settings.depth as u64 > u64::from(self.server.window) {
            let window = self.server.window;
            writeln!(f, "\nThe server works on {window} requests of a connection at once.")?;
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

/// A latency in three or four digits and a unit.
pub(crate) fn duration(ns: u64) -> String {
    let value = ns as f64;
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} µs", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", value / 1e6),
        _ => format!("{:.2} s", value / 1e9),
    }
}

/// A number with its thousands apart.
pub(crate) struct Count(pub(crate) f64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:.0}", self.0);
        let mut out = String::with_capacity(digits.len() + digits.len() / 3);
        for (i, digit) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                out.push(' ');
            }
            out.push(digit);
        }
        f.write_str(&out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_in_few_digits() {
        assert_eq!(duration(999), "999 ns");
        assert_eq!(duration(1_500), "1.5 µs");
        assert_eq!(duration(200_000_000), "200.00 ms");
        assert_eq!(duration(61_000_000_000), "61.00 s");
        assert_eq!(Count(1_234_567.4).to_string(), "1 234 567");
        assert_eq!(Count(999.0).to_string(), "999");
    }
}
