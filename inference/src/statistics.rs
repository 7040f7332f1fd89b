//! The proxy's hits in the server's own statistics: `cache_hit` of Triton's statistics extension.
//!
//! Everything else in a reply stays as the server wrote it.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;

use crate::json::{self, Kind, Scanner};
use crate::models::Models;
use crate::oip::protobuf::{Message, Payload, put_len, put_varint};
use crate::oip::{Error, field};

/// The gRPC call for statistics.
pub(crate) const GRPC_PATH: &str = "/inference.GRPCInferenceService/ModelStatistics";

/// Whether this path is that of statistics over HTTP.
pub(crate) fn is_path(path: &str) -> bool {
    path == "/v2/models/stats" || (path.starts_with("/v2/models/") && path.ends_with("/stats"))
}

/// The hits of one version of a model since the proxy knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hits {
    name: String,
    /// `None` for a server without versions.
    version: Option<String>,
    count: u64,
    nanos: u64,
}

impl Hits {
    /// The hits of all models that have some.
    pub(crate) fn of(models: &Models) -> Vec<Hits> {
        let known = models.known();
        let hits = known.iter().map(|model| {
            let path = &*model.path;
            let (name, version) = match path.split_once("/versions/") {
                Some((name, version)) => (name, Some(version.to_owned())),
                None => (path, model.version()),
            };
            let (count, nanos) = (&model.tally.hits, &model.tally.hit_nanos);
            let (count, nanos) = (count.load(Relaxed), nanos.load(Relaxed));
            Hits { name: name.to_owned(), version, count, nanos }
        });
        hits.filter(|hits| hits.count > 0).collect()
    }

    /// Count and nanoseconds of one version of a model.
    fn sum(all: &[Hits], name: &str, version: &str) -> Option<[u64; 2]> {
        let is_it = |hits: &&Hits| {
            hits.name == name && hits.version.as_deref().is_none_or(|known| known == version)
        };
        all.iter()
            .filter(is_it)
            .map(|hits| [hits.count, hits.nanos])
            .reduce(|a, b| [a[0].saturating_add(b[0]), a[1].saturating_add(b[1])])
    }
}

/// The statistics as JSON, with these hits added. `None` if the text is not understood, or if it
/// has no model with hits.
pub(crate) fn add_to_json(text: &str, hits: &[Hits]) -> Option<Vec<u8>> {
    let edits = edits(text, hits).ok().filter(|edits| !edits.is_empty())?;
    let (mut out, mut at) = (Vec::with_capacity(text.len() + 64), 0);
    for (range, value) in edits {
        out.extend_from_slice(&text.as_bytes()[at..range.start]);
        json::write_integer(&mut out, value);
        at = range.end;
    }
    out.extend_from_slice(&text.as_bytes()[at..]);
    Some(out)
}

/// The numbers to replace, in their order.
fn edits(text: &str, hits: &[Hits]) -> Result<Vec<(Range<usize>, u64)>, Error> {
    let mut scanner = Scanner::new(text);
    let mut edits = Vec::new();
    scanner.object(|scanner, key| match key {
        "model_stats" => scanner.array(|scanner| {
            let (mut name, mut version) = (String::new(), String::new());
            let mut found = None;
            scanner.object(|scanner, key| {
                match (key, scanner.kind()?) {
                    ("name", Kind::String) => name = scanner.string()?.into_owned(),
                    ("version", Kind::String) => version = scanner.string()?.into_owned(),
                    ("inference_stats", Kind::Object) => scanner.object(|scanner, key| {
                        match key {
                            "cache_hit" => found = Some(durations(scanner)?),
                            _ => skip(scanner)?,
                        }
                        Ok(())
                    })?,
                    _ => skip(scanner)?,
                }
                Ok(())
            })?;
            if let (Some(found), Some(more)) = (found, Hits::sum(hits, &name, &version)) {
                edits.extend(found.into_iter().map(|(range, member, value)| {
                    (range, u64::saturating_add(value, more[member]))
                }));
            }
            Ok(())
        }),
        _ => skip(scanner),
    })?;
    scanner.end()?;
    Ok(edits)
}

/// The places of `count` and `ns` in a duration, their number in [`Hits::sum`], and their values.
fn durations(scanner: &mut Scanner<'_>) -> Result<Vec<(Range<usize>, usize, u64)>, Error> {
    let mut found = Vec::new();
    scanner.object(|scanner, key| {
        let member = match key {
            "count" => 0,
            "ns" => 1,
            _ => return skip(scanner),
        };
        let number = scanner.number()?;
        let end = scanner.offset();
        let value = number.to_u64().ok_or_else(|| field("cache_hit", "not a count"))?;
        found.push((end - number.text.len()..end, member, value));
        Ok(())
    })?;
    Ok(found)
}

fn skip(scanner: &mut Scanner<'_>) -> Result<(), Error> {
    scanner.copy_value(&mut Vec::new())
}

/// Field numbers of `ModelStatisticsResponse` and of the messages in it.
const MODEL_STATS: u64 = 1;
const NAME: u64 = 1;
const VERSION: u64 = 2;
const INFERENCE_STATS: u64 = 6;
const CACHE_HIT: u64 = 7;
const COUNT: u64 = 1;
const NS: u64 = 2;

/// The message `ModelStatisticsResponse` with these hits added. `None` if it is not understood, or
/// if it has no model with hits.
pub(crate) fn add_to_message(body: &Bytes, hits: &[Hits]) -> Option<Vec<u8>> {
    let mut is_changed = false;
    let out = rewrite(Message::new(body), MODEL_STATS, &mut |model| {
        let (mut name, mut version) = (None, None);
        let mut names = model.clone();
        while let Some((number, payload, _)) = names.next()? {
            match number {
                NAME => names.text(payload, &mut name)?,
                VERSION => names.text(payload, &mut version)?,
                _ => {}
            }
        }
        let (name, version) = (name.unwrap_or_default(), version.unwrap_or_default());
        let Some(more) = Hits::sum(hits, &name, &version) else { return Ok(None) };
        is_changed = true;
        rewrite(model, INFERENCE_STATS, &mut |stats| {
            rewrite(stats, CACHE_HIT, &mut |duration| add(duration, more).map(Some)).map(Some)
        })
        .map(Some)
    });
    out.ok().filter(|_| is_changed)
}

/// A message whose field `number` is replaced. An absent field counts as an empty message. `edit`
/// returns `None` for a field that stays.
fn rewrite<'a>(
    mut message: Message<'a>,
    number: u64,
    edit: &mut dyn FnMut(Message<'a>) -> Result<Option<Vec<u8>>, Error>,
) -> Result<Vec<u8>, Error> {
    let (mut out, mut is_there) = (Vec::new(), false);
    while let Some((found, payload, bytes)) = message.next()? {
        let edited = match payload {
            Payload::Len(_) if found == number => {
                is_there = true;
                edit(message.inner(payload)?)?
            }
            _ => None,
        };
        match edited {
            Some(edited) => put_len(&mut out, number, &edited),
            None => out.extend_from_slice(message.bytes(bytes)),
        }
    }
    // The list of models is the one field that can be absent for a reason.
    if !is_there
        && number != MODEL_STATS
        && let Some(edited) = edit(message)?
    {
        put_len(&mut out, number, &edited);
    }
    Ok(out)
}

/// A duration with more counts and nanoseconds.
fn add(mut duration: Message<'_>, more: [u64; 2]) -> Result<Vec<u8>, Error> {
    let (mut sums, mut others) = (more, Vec::new());
    while let Some((number, payload, bytes)) = duration.next()? {
        match (number, payload) {
            (COUNT, Payload::Varint(value)) => sums[0] = sums[0].saturating_add(value),
            (NS, Payload::Varint(value)) => sums[1] = sums[1].saturating_add(value),
            _ => others.extend_from_slice(duration.bytes(bytes)),
        }
    }
    let mut out = Vec::new();
    for (number, value) in [(COUNT, sums[0]), (NS, sums[1])] {
        put_varint(&mut out, number << 3);
        put_varint(&mut out, value);
    }
    out.extend_from_slice(&others);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits() -> Vec<Hits> {
        let hits = |version: Option<&str>, count| Hits {
            name: "m".into(),
            version: version.map(str::to_owned),
            count,
            nanos: 100 * count,
        };
        vec![hits(Some("1"), 5), hits(Some("2"), 7), hits(Some("1"), 1)]
    }

    #[test]
    fn hits_are_added_to_json_and_all_else_stays() {
        let text = r#"{"model_stats": [ {"name":"other","version":"1","inference_stats":{"cache_hit":{"count":1,"ns":2}}},
            {"name":"m","version":"1","inference_stats":{"success":{"count":9,"ns":1e3},
             "cache_hit":{"ns" : 40,"count":3},"x":null}, "last": 1.50}],"more":[]}"#;
        let found = String::from_utf8(add_to_json(text, &hits()).unwrap()).unwrap();
        let expected = text.replace(r#""ns" : 40,"count":3"#, r#""ns" : 640,"count":9"#);
        assert_eq!(found, expected);
        assert_eq!(add_to_json(text, &[]), None);
        assert_eq!(add_to_json(r#"{"error": "unknown"}"#, &hits()), None);
        assert_eq!(add_to_json("no JSON", &hits()), None);
    }

    #[test]
    fn hits_are_added_to_the_message_and_all_else_stays() {
        let model = |name: &str, duration: Option<&[u8]>| {
            let (mut stats, mut model) = (Vec::new(), Vec::new());
            put_len(&mut stats, 1, &[8, 9]);
            if let Some(duration) = duration {
                put_len(&mut stats, CACHE_HIT, duration);
            }
            put_len(&mut stats, 8, &[8, 1]);
            put_len(&mut model, NAME, name.as_bytes());
            put_len(&mut model, VERSION, b"1");
            put_len(&mut model, INFERENCE_STATS, &stats);
            put_len(&mut model, 99, b"unknown");
            model
        };
        let message = |models: &[Vec<u8>]| {
            let mut out = Vec::new();
            models.iter().for_each(|model| put_len(&mut out, MODEL_STATS, model));
            Bytes::from(out)
        };
        let body = message(&[model("other", None), model("m", Some(&[8, 3, 16, 40]))]);
        let found = add_to_message(&body, &hits()).unwrap();
        // 3 + 6 calls, and 40 + 600 ns.
        let expected = message(&[model("other", None), model("m", Some(&[8, 9, 16, 0x80, 5]))]);
        assert_eq!(Bytes::from(found), expected);
        let body = message(&[model("m", None)]);
        let found = Bytes::from(add_to_message(&body, &hits()).unwrap());
        assert!(found.windows(4).any(|part| part == [8, 6, 16, 0xd8]), "6 calls, and 600 ns");
        assert_eq!(add_to_message(&message(&[model("other", None)]), &hits()), None);
        assert_eq!(add_to_message(&Bytes::from_static(b"\xff"), &hits()), None);
    }
}
