//! `afterimage models`: the models behind a proxy, and what the proxy knows about them.

use std::fmt::Write as _;
use std::time::Duration;

use afterimage_inference::{Replica, Target};
use anyhow::{Context, bail};
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HeaderValue};
use serde::Deserialize;

use crate::args::ClientArgs;
use crate::format::{grouped, long_time};
use crate::{print, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage models
  afterimage models http://127.0.0.1:7480 --json

The proxy needs a page: afterimage proxy http://triton:8000 --rows auto --http 127.0.0.1:7480

Verdicts: rows (all rows equal to the bit), within (differences up to the operator's limit),
within offered (rounding above the limit; --rows within=LIMIT accepts it), whole (rows depend on
their batch), unknown (too few probes so far).")]
pub(crate) struct Args {
    /// Page of the proxy: the address of its --http flag.
    #[arg(value_name = "URL", default_value = "http://127.0.0.1:7480")]
    url: Target,

    /// Print JSON.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Deserialize)]
struct Reply {
    #[serde(default)]
    proxied: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    name: String,
    version: Option<String>,
    refusal: Option<String>,
    rows: Rows,
    epoch: u64,
    changed: Option<Changed>,
    canaries: Option<usize>,
    calls: u64,
    hits: u64,
    asked_rows: u64,
    row_hits: u64,
}

#[derive(Deserialize)]
struct Rows {
    mode: String,
    limit: Option<f64>,
    verdict: String,
    probes: u32,
    audits: u32,
    compared: u64,
    disagreements: u64,
    greatest_difference: Option<f64>,
}

#[derive(Deserialize)]
struct Changed {
    ago_s: u64,
    why: String,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (token, mut headers) = (args.client.token()?, HeaderMap::new());
    if !token.is_empty() {
        let value = [b"Bearer ", &token[..]].concat();
        let value = HeaderValue::from_bytes(&value).context("--token-file")?;
        headers.insert(AUTHORIZATION, value);
    }
    let shown = args.url.to_string();
    let (status, body) = serving::runtime(1)?.block_on(async {
        let tls = args.client.tls_to(&args.url.host_port())?;
        if args.url.is_secure() && tls.is_none() {
            bail!("{shown} needs --tls, with --tls-ca FILE for a private CA");
        }
        let page = Replica::new(args.url, tls)?;
        page.get_with("/v1/models", headers).await.map_err(|error| {
            anyhow::anyhow!("{shown}: {error}; start the proxy with --http to have a page")
        })
    })?;
    if !status.is_success() {
        bail!("{shown}/v1/models answered {status}");
    }
    if args.json {
        let value: serde_json::Value = serde_json::from_slice(&body)?;
        return print::json(&serde_json::to_string_pretty(&value["proxied"])?);
    }
    let reply: Reply = serde_json::from_slice(&body)
        .with_context(|| format!("{shown} is not the page of a proxy"))?;
    if reply.proxied.is_empty() {
        return print::text("no client has asked for a model yet\n");
    }
    print::text(&reply.proxied.iter().map(text).collect::<Vec<_>>().join("\n"))
}

/// One model as a few lines.
fn text(model: &Model) -> String {
    let mut out = model.name.clone();
    if let Some(version) = &model.version {
        let _ = write!(out, ", version {version}");
    }
    let mut line = |name: &str, value: String| {
        let _ = write!(out, "\n  {name:<9} {value}");
    };
    let rows = &model.rows;
    if let Some(reason) = &model.refusal {
        line("stored", format!("no: {reason}"));
    }
    let mode = match rows.limit {
        Some(limit) => format!("{}={limit:e}", rows.mode),
        None => rows.mode.clone(),
    };
    line(
        "rows",
        match &*rows.mode {
            "whole" => "batches are answered whole (mode whole, no probes)".to_owned(),
            _ => format!("{} (mode {mode})", rows.verdict),
        },
    );
    if rows.mode != "whole" {
        let apart = match rows.greatest_difference {
            Some(greatest) if greatest > 0.0 => format!(", greatest difference {greatest:.1e}"),
            Some(_) => String::new(),
            None => ", not only in numbers".to_owned(),
        };
        line(
            "evidence",
            format!(
                "{} probes, {} audits, {} rows compared, {} disagreements{apart}",
                rows.probes,
                rows.audits,
                grouped(rows.compared),
                grouped(rows.disagreements),
            ),
        );
    }
    line(
        "epoch",
        match &model.changed {
            Some(Changed { ago_s, why }) => {
                format!("{}, since {}: {why}", model.epoch, long_time(Duration::from_secs(*ago_s)))
            }
            None => format!("{}, no change seen", model.epoch),
        },
    );
    line(
        "canaries",
        match model.canaries {
            Some(count) => count.to_string(),
            None => "none: the model gives several answers to one question".to_owned(),
        },
    );
    let share = 100.0 * model.row_hits as f64 / model.asked_rows.max(1) as f64;
    line(
        "hits",
        format!(
            "{} of {} calls, {} of {} rows ({share:.1} %)",
            grouped(model.hits),
            grouped(model.calls),
            grouped(model.row_hits),
            grouped(model.asked_rows),
        ),
    );
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_a_few_lines() {
        let json = r#"{"name": "magika", "version": "1", "refusal": null, "rows": {"mode": "auto",
            "limit": null, "verdict": "within offered", "probes": 16, "audits": 0, "compared": 72,
            "disagreements": 40, "greatest_difference": 2.4e-7}, "epoch": 2, "changed": {"ago_s": 9,
            "why": "another answer to a known question"}, "canaries": 4, "calls": 30, "hits": 10,
            "asked_rows": 240, "row_hits": 80}"#;
        let model: Model = serde_json::from_str(json).unwrap();
        let text = text(&model);
        for part in [
            "magika, version 1\n",
            "rows      within offered (mode auto)\n",
            "16 probes, 0 audits, 72 rows compared, 40 disagreements, greatest difference 2.4e-7\n",
            "another answer to a known question\n",
            "10 of 30 calls, 80 of 240 rows (33.3 %)\n",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }
}
