//! Responses with embeddings, row by row.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{BufMut, Bytes};

use super::request::{Format, Input, Request, text};
use crate::json::{self, Kind, Scanner};
use crate::oip::{Error, Reader, field};

/// The version of the stored form.
const VERSION: u8 = 1;

/// One embedding, and what the response says about it.
///
/// ```
/// # use afterimage_inference::embeddings::{Request, Row, parse_response};
/// # let request = Request::parse(br#"{"input": "a"}"#)?;
/// # let reply = br#"{"data": [{"index": 0, "embedding": [0.5]}]}"#;
/// let rows = parse_response(reply, &request)?;
/// assert_eq!(Row::from_bytes(rows[0].to_bytes())?, rows[0]);
/// # Ok::<(), afterimage_inference::oip::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Row {
    /// The model's name in the response.
    pub model: Option<String>,
    /// The embedding as 32-bit floats, little-endian.
    pub data: Bytes,
    /// The numbers as the server spelled them, if 32-bit floats do not hold their value.
    pub spelling: Option<Bytes>,
    /// Counts of tokens, by name, or `null`.
    pub usage: Vec<(String, Option<u64>)>,
    /// Whether the counts are this row's share of the counts of a batch. The shares of a batch add
    /// up to its counts.
    pub is_estimated: bool,
    /// Other fields of the response, but for its id and its time of creation.
    pub extras: Vec<(String, Bytes)>,
    /// Other fields of the embedding.
    pub item_extras: Vec<(String, Bytes)>,
}

/// Fields of one response that differ from call to call.
const NOT_STORED: [&str; 2] = ["id", "created"];

/// Reads the response to a request, and gives its rows in the order of the request's inputs.
///
/// # Errors
/// If the body is not understood in full, or if its indices are not those of the inputs. Forward it
/// unchanged, and do not store it.
pub fn parse_response(body: &[u8], request: &Request) -> Result<Vec<Row>, Error> {
    let mut scanner = Scanner::new(text(body)?);
    let mut model = None;
    let mut usage = Vec::new();
    let mut is_estimated = request.inputs.len() > 1;
    let mut extras = Vec::new();
    let mut items: Vec<Option<Item>> = request.inputs.iter().map(|_| None).collect();
    scanner.object(|scanner, key| {
        match (key, scanner.kind()?) {
            ("model", Kind::String) => model = Some(scanner.string()?.into_owned()),
            ("usage", Kind::Object) => scanner.object(|scanner, name| {
                // Another Afterimage in front of the server.
                if name == "estimated" && scanner.kind()? == Kind::Bool {
                    is_estimated |= scanner.bool()?;
                    return Ok(());
                }
                let count = if scanner.kind()? == Kind::Null {
                    scanner.null()?;
                    None
                } else {
                    let count = scanner.number()?.to_u64();
                    Some(count.ok_or_else(|| field("usage", "not a count"))?)
                };
                usage.push((name.to_owned(), count));
                Ok(())
            })?,
            ("data", _) => scanner.array(|scanner| {
                let (index, item) = Item::scan(scanner)?;
                let place = usize::try_from(index).ok().and_then(|index| items.get_mut(index));
                let place = place.ok_or_else(|| field("index", "not that of an input"))?;
                if place.replace(item).is_some() {
                    return Err(field("index", "twice"));
                }
                Ok(())
            })?,
            _ => {
                let mut value = Vec::new();
                scanner.copy_value(&mut value)?;
                if !NOT_STORED.contains(&key) {
                    extras.push((key.to_owned(), value.into()));
                }
            }
        }
        Ok(())
    })?;
    scanner.end()?;
    let shares = Shares::of(request);
    // A server that counts the tokens as they were sent counts those of each list.
    let counts: Option<Vec<u64>> = request.inputs.iter().map(Input::token_count).collect();
    let is_sum = |counts: &Vec<u64>| {
        usage.iter().all(|(_, count)| count.is_none_or(|count| count == counts.iter().sum::<u64>()))
    };
    let counts = counts.filter(|counts| !usage.is_empty() && is_sum(counts));
    is_estimated &= counts.is_none();
    let share = |count, row: usize| match &counts {
        Some(counts) => counts[row],
        None => shares.share(count, row),
    };
    let rows = items.into_iter().enumerate().map(|(row, item)| {
        let Item { data, spelling, extras: item_extras } =
            item.ok_or_else(|| field("data", "fewer embeddings than inputs"))?;
        let usage =
            usage.iter().map(|(name, count)| (name.clone(), count.map(|count| share(count, row))));
        Ok(Row {
            model: model.clone(),
            data,
            spelling,
            usage: usage.collect(),
            is_estimated,
            extras: extras.clone(),
            item_extras,
        })
    });
    rows.collect()
}

/// Writes a response with these rows, in this order. `None` if the rows differ in their model or in
/// other fields, and if there is no row.
///
/// Counts of tokens are the sums over the rows. If a count is an estimate, `usage` has the member
/// `"estimated": true`.
#[must_use]
pub fn render(rows: &[Row], format: Format) -> Option<Bytes> {
    let first = rows.first()?;
    if rows.iter().any(|row| row.model != first.model || row.extras != first.extras) {
        return None;
    }
    let len: usize = rows.iter().map(|row| row.data.len()).sum();
    let mut out = Vec::with_capacity(256 + 6 * len);
    out.push(b'{');
    for (name, value) in &first.extras {
        put_member(&mut out, name, value);
    }
    out.extend_from_slice(b"\"data\":[");
    for (index, row) in rows.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.push(b'{');
        for (name, value) in &row.item_extras {
            put_member(&mut out, name, value);
        }
        out.extend_from_slice(b"\"index\":");
        json::write_integer(&mut out, index);
        out.extend_from_slice(b",\"embedding\":");
        row.write(&mut out, format);
        out.push(b'}');
    }
    out.push(b']');
    if let Some(model) = &first.model {
        out.extend_from_slice(b",\"model\":");
        json::write_string(&mut out, model);
    }
    let names: Vec<&str> = first.usage.iter().map(|(name, _)| &**name).collect();
    let is_alike = |row: &Row| row.usage.iter().map(|(name, _)| &**name).eq(names.iter().copied());
    if !rows.iter().all(is_alike) {
        return None;
    }
    if !names.is_empty() {
        out.extend_from_slice(b",\"usage\":{");
        for (at, name) in names.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            json::write_string(&mut out, name);
            out.push(b':');
            let counts: Option<Vec<u64>> = rows.iter().map(|row| row.usage[at].1).collect();
            match counts {
                Some(counts) => {
                    let sum = counts.into_iter().fold(0, u64::saturating_add);
                    json::write_integer(&mut out, sum);
                }
                None => out.extend_from_slice(b"null"),
            }
        }
        if rows.iter().any(|row| row.is_estimated) {
            out.extend_from_slice(b",\"estimated\":true");
        }
        out.push(b'}');
    }
    out.push(b'}');
    Some(out.into())
}

fn put_member(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    json::write_string(out, name);
    out.push(b':');
    out.extend_from_slice(value);
    out.push(b',');
}

/// The greatest difference between the numbers of two stored rows, absolute and in relation to the
/// greatest number. `None` if they differ in anything else but the counts of tokens.
pub(crate) fn distance(one: &Bytes, two: &Bytes) -> Option<(f64, f64)> {
    let read = |bytes: &Bytes| Row::from_bytes(bytes.clone()).ok();
    let (one, two) = (read(one)?, read(two)?);
    let is_alike = one.model == two.model
        && one.extras == two.extras
        && one.item_extras == two.item_extras
        && one.data.len() == two.data.len();
    if !is_alike {
        return None;
    }
    crate::compare::distance(one.numbers()?.into_iter().zip(two.numbers()?), (0.0, 0.0))
}

/// An element of `data`.
struct Item {
    data: Bytes,
    spelling: Option<Bytes>,
    extras: Vec<(String, Bytes)>,
}

impl Item {
    fn scan(scanner: &mut Scanner<'_>) -> Result<(u64, Item), Error> {
        let (mut index, mut embedding) = (None, None);
        let mut extras = Vec::new();
        scanner.object(|scanner, key| {
            match (key, scanner.kind()?) {
                ("index", _) => index = scanner.number()?.to_u64(),
                ("embedding", Kind::String) => {
                    let data = BASE64.decode(&*scanner.string()?).ok();
                    let data = data.filter(|data| data.len() % 4 == 0);
                    let data = data.ok_or_else(|| field("embedding", "not base64 of floats"))?;
                    embedding = Some((Bytes::from(data), None));
                }
                ("embedding", _) => embedding = Some(scan_floats(scanner)?),
                _ => {
                    let mut value = Vec::new();
                    scanner.copy_value(&mut value)?;
                    extras.push((key.to_owned(), value.into()));
                }
            }
            Ok(())
        })?;
        let index = index.ok_or_else(|| field("index", "missing"))?;
        let (data, spelling) = embedding.ok_or_else(|| field("embedding", "missing"))?;
        Ok((index, Item { data, spelling, extras }))
    }
}

/// Reads a list of numbers: as 32-bit floats, and as text if these do not hold the numbers.
fn scan_floats(scanner: &mut Scanner<'_>) -> Result<(Bytes, Option<Bytes>), Error> {
    let mut data = Vec::new();
    let mut spelling: Vec<u8> = Vec::new();
    let mut is_spelled = false;
    scanner.array(|scanner| {
        let number = scanner.number()?;
        let value = number.to_f64();
        let narrow = value as f32;
        if !narrow.is_finite() {
            return Err(field("embedding", "a number is too large"));
        }
        // A client can distinguish 1 from 1.0.
        is_spelled |= number.integer || f64::from(narrow) != value;
        data.put_f32_le(narrow);
        if !spelling.is_empty() {
            spelling.push(b',');
        }
        spelling.extend_from_slice(number.text.as_bytes());
        Ok(())
    })?;
    Ok((data.into(), is_spelled.then(|| spelling.into())))
}

/// The shares of rows in the counts of a batch, by the length of their inputs.
struct Shares {
    /// The sum of the lengths before each row, and the sum of all.
    before: Vec<u64>,
}

impl Shares {
    fn of(request: &Request) -> Shares {
        let mut before = vec![0u64];
        for input in &request.inputs {
            let len = match input {
                Input::Text(text) => text.len(),
                Input::Tokens(tokens) => tokens.len(),
            };
            // Each input has at least the tokens that begin and end it.
            before.push(before.last().copied().unwrap_or(0) + len as u64 + 1);
        }
        Shares { before }
    }

    /// Differences of rounded sums, so that all shares add up to the count.
    fn share(&self, count: u64, row: usize) -> u64 {
        let all = u128::from(self.before[self.before.len() - 1]);
        let upto = |row: usize| u128::from(count) * u128::from(self.before[row]) / all;
        (upto(row + 1) - upto(row)) as u64
    }
}

impl Row {
    fn numbers(&self) -> Option<Vec<f64>> {
        match &self.spelling {
            Some(text) => {
                let text = str::from_utf8(text).ok()?;
                text.split(',').map(|number| number.parse().ok()).collect()
            }
            None => {
                let floats = self.data.as_chunks().0.iter();
                Some(floats.map(|bytes| f32::from_le_bytes(*bytes).into()).collect())
            }
        }
    }

    fn write(&self, out: &mut Vec<u8>, format: Format) {
        match (format, &self.spelling) {
            (Format::Base64, _) => {
                out.push(b'"');
                out.extend_from_slice(BASE64.encode(&self.data).as_bytes());
                out.push(b'"');
            }
            (Format::Float, Some(spelling)) => {
                out.push(b'[');
                out.extend_from_slice(spelling);
                out.push(b']');
            }
            (Format::Float, None) => {
                out.push(b'[');
                for (at, bytes) in self.data.as_chunks().0.iter().enumerate() {
                    if at > 0 {
                        out.push(b',');
                    }
                    json::write_float(out, f32::from_le_bytes(*bytes).into());
                }
                out.push(b']');
            }
        }
    }

    /// The stored form.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        let mut out = Vec::with_capacity(128 + self.data.len());
        let put = |out: &mut Vec<u8>, bytes: &[u8]| {
            out.put_u64_le(bytes.len() as u64);
            out.put_slice(bytes);
        };
        out.put_slice(&[VERSION, u8::from(self.is_estimated), u8::from(self.model.is_some())]);
        put(&mut out, self.model.as_deref().unwrap_or_default().as_bytes());
        out.push(u8::from(self.spelling.is_some()));
        put(&mut out, self.spelling.as_deref().unwrap_or_default());
        out.put_u64_le(self.usage.len() as u64);
        for (name, count) in &self.usage {
            put(&mut out, name.as_bytes());
            out.push(u8::from(count.is_some()));
            out.put_u64_le(count.unwrap_or(0));
        }
        for extras in [&self.extras, &self.item_extras] {
            out.put_u64_le(extras.len() as u64);
            for (name, value) in extras {
                put(&mut out, name.as_bytes());
                put(&mut out, value);
            }
        }
        put(&mut out, &self.data);
        out.into()
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// If it is damaged, or of another version.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, Error> {
        let mut reader = Reader::new(&bytes);
        if reader.byte()? != VERSION {
            return Err(Error::Stored);
        }
        let is_estimated = reader.byte()? != 0;
        let has_model = reader.byte()? != 0;
        let model = Some(reader.text()?).filter(|_| has_model);
        let is_spelled = reader.byte()? != 0;
        let spelling = Some(reader.blob()?).filter(|_| is_spelled);
        let mut usage = Vec::new();
        for _ in 0..reader.size()? {
            let name = reader.text()?;
            let has_count = reader.byte()? != 0;
            usage.push((name, Some(reader.number()?).filter(|_| has_count)));
        }
        let mut extras = || {
            let mut extras = Vec::new();
            for _ in 0..reader.size()? {
                extras.push((reader.text()?, reader.blob()?));
            }
            Ok::<_, Error>(extras)
        };
        let (extras, item_extras) = (extras()?, extras()?);
        let data = reader.blob()?;
        reader.end()?;
        if data.len() % 4 != 0 {
            return Err(Error::Stored);
        }
        Ok(Row { model, data, spelling, usage, is_estimated, extras, item_extras })
    }
}
