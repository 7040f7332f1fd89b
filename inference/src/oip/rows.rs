//! Rows: a request cut along its first dimension, and a response put together from rows.
//!
//! A row is a request whose inputs have 1 as their first dimension, so its key does not depend on
//! the batch that it came in.

use bytes::Bytes;
use smallvec::SmallVec;

use super::key::{Head, KeyParts};
use super::tensor::Tensor;
use super::{Datatype, Request, Response};

/// Where the rows of a tensor end in its data and in its spelling.
#[derive(Clone, Debug)]
enum Cuts {
    /// Each row has this number of bytes.
    Even(usize),
    /// The end of each row in the data, and in the spelling without its comma.
    At { data: Vec<usize>, spelling: Option<Vec<usize>> },
}

impl Cuts {
    /// The cuts of a tensor into `rows` rows; `None` if its first dimension is another.
    fn of(tensor: &Tensor, rows: usize) -> Option<Cuts> {
        if rows == 0 || tensor.shape.first() != Some(&(rows as u64)) {
            return None;
        }
        let even = tensor.data.len() / rows;
        if tensor.datatype.size().is_some() && tensor.spelling.is_none() {
            return (even * rows == tensor.data.len()).then_some(Cuts::Even(even));
        }
        let data = if tensor.datatype == Datatype::Bytes {
            let elements = tensor.elements()?;
            let each = elements.len() / rows;
            if each == 0 {
                vec![0; rows]
            } else {
                elements.chunks(each).filter_map(|row| row.last()).map(|range| range.end).collect()
            }
        } else {
            (1..=rows).map(|row| row * even).collect()
        };
        let spelling = match &tensor.spelling {
            None => None,
            Some(text) => {
                let each = even / tensor.datatype.size()?;
                let commas = text.iter().enumerate().filter(|(_, byte)| **byte == b',');
                let ends = commas.map(|(at, _)| at).chain([text.len()]);
                Some(ends.skip(each.checked_sub(1)?).step_by(each).collect::<Vec<_>>())
            }
        };
        let is_whole = data.len() == rows && data.last() == Some(&tensor.data.len());
        let is_spelled = spelling.as_ref().is_none_or(|ends| ends.len() == rows);
        (is_whole && is_spelled).then_some(Cuts::At { data, spelling })
    }

    /// The data and the spelling of one row.
    fn row(&self, tensor: &Tensor, row: usize) -> (Bytes, Option<Bytes>) {
        match self {
            Cuts::Even(len) => (tensor.data.slice(row * len..(row + 1) * len), None),
            Cuts::At { data, spelling } => {
                let start = if row == 0 { 0 } else { data[row - 1] };
                let bytes = tensor.data.slice(start..data[row]);
                let spelling = spelling.as_ref().zip(tensor.spelling.as_ref());
                let spelling = spelling.map(|(ends, text)| {
                    let start = if row == 0 { 0 } else { ends[row - 1] + 1 };
                    text.slice(start..ends[row])
                });
                (bytes, spelling)
            }
        }
    }
}

/// The rows of a request.
///
/// ```
/// use afterimage_inference::oip::Request;
///
/// let batch = r#"{"inputs": [
///     {"name": "x", "datatype": "INT32", "shape": [3, 2], "data": [1, 2, 3, 4, 1, 2]}]}"#;
/// let one = r#"{"inputs": [
///     {"name": "x", "datatype": "INT32", "shape": [1, 2], "data": [3, 4]}]}"#;
/// let batch = Request::parse(batch.into(), None)?;
/// let one = Request::parse(one.into(), None)?;
///
/// let rows = batch.split_rows().expect("one input has one first dimension");
/// assert_eq!(rows.len(), 3);
/// assert_eq!(rows.key_bytes(0), rows.key_bytes(2));
/// assert_eq!(rows.key_bytes(1), one.key_bytes());
/// assert_eq!(rows.select(&[1]), one);
/// # Ok::<(), afterimage_inference::oip::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rows {
    request: Request,
    len: usize,
    cuts: SmallVec<[Cuts; 4]>,
    /// The head of each row's key, if all rows have the same.
    head: Option<Bytes>,
}

impl Rows {
    pub(super) fn of(request: &Request) -> Option<Rows> {
        let len = usize::try_from(*request.inputs.first()?.shape.first()?).ok()?;
        let cuts: Option<SmallVec<[Cuts; 4]>> =
            request.inputs.iter().map(|input| Cuts::of(input, len)).collect();
        let cuts = cuts?;
        let is_even = cuts.iter().all(|cuts| matches!(cuts, Cuts::Even(_)));
        let mut rows = Rows { request: request.clone(), len, cuts, head: None };
        if is_even {
            rows.head = Some(rows.key_parts(0).head);
        }
        Some(rows)
    }

    /// The number of rows, at least 1.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "there is at least one row")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The request.
    #[must_use]
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// The key of one row: that of a request with this row alone.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn key_parts(&self, row: usize) -> KeyParts {
        assert!(row < self.len, "row {row} of {}", self.len);
        let mut head = match &self.head {
            Some(_) => None,
            None => Some(Head::write(&self.request, Some(1))),
        };
        let mut data = SmallVec::new();
        for (at, (input, cuts)) in self.request.inputs.iter().zip(&self.cuts).enumerate() {
            let (bytes, spelling) = cuts.row(input, row);
            if let Some(head) = &mut head {
                head.set_lengths(at, bytes.len(), spelling.as_ref().map_or(0, Bytes::len));
            }
            data.push(bytes);
            data.extend(spelling);
        }
        let head = head.map(|head| head.bytes.into()).or_else(|| self.head.clone());
        KeyParts { head: head.unwrap_or_default(), data }
    }

    /// [`key_parts`](Self::key_parts) as one sequence of bytes.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn key_bytes(&self, row: usize) -> Bytes {
        self.key_parts(row).concat()
    }

    /// The request for these rows, in this order. Everything else stays, the id included.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn select(&self, rows: &[usize]) -> Request {
        let mut request = self.request.clone();
        for (input, cuts) in request.inputs.iter_mut().zip(&self.cuts) {
            let parts: Vec<_> = rows.iter().map(|row| cuts.row(input, *row)).collect();
            input.shape[0] = rows.len() as u64;
            (input.data, input.spelling) = match &parts[..] {
                [one] => one.clone(),
                parts => {
                    let spelled = input.spelling.is_some();
                    let spelling = parts.iter().map(|part| part.1.as_deref().unwrap_or_default());
                    let spelling = spelled.then(|| join(spelling, b","));
                    (join(parts.iter().map(|part| &part.0[..]), b""), spelling)
                }
            };
        }
        request
    }
}

/// The parts in one piece, with a separator between them.
fn join<'a>(parts: impl Iterator<Item = &'a [u8]>, separator: &[u8]) -> Bytes {
    let mut joined = Vec::new();
    for (at, part) in parts.enumerate() {
        if at > 0 {
            joined.extend_from_slice(separator);
        }
        joined.extend_from_slice(part);
    }
    joined.into()
}

pub(super) fn split(response: &Response, rows: usize) -> Option<Vec<Response>> {
    if response.outputs.is_empty() {
        return None;
    }
    let cuts: Option<Vec<Cuts>> =
        response.outputs.iter().map(|output| Cuts::of(output, rows)).collect();
    let cuts = cuts?;
    let row = |row: usize| {
        let mut response = response.clone();
        for (output, cuts) in response.outputs.iter_mut().zip(&cuts) {
            (output.data, output.spelling) = cuts.row(output, row);
            output.shape[0] = 1;
        }
        response
    };
    Some((0..rows).map(row).collect())
}

pub(super) fn assemble<'a>(rows: impl IntoIterator<Item = &'a Response>) -> Option<Response> {
    let rows: Vec<&Response> = rows.into_iter().collect();
    let (first, rest) = rows.split_first()?;
    let mut response = Response { id: None, ..(*first).clone() };
    if rest.iter().any(|row| !is_alike(first, row)) {
        return None;
    }
    if rest.is_empty() {
        return Some(response);
    }
    for (at, output) in response.outputs.iter_mut().enumerate() {
        let parts = || rows.iter().map(move |row| &row.outputs[at]);
        let sizes = parts().map(|part| part.shape[0]);
        output.shape[0] = sizes.into_iter().try_fold(0u64, u64::checked_add)?;
        output.data = join(parts().map(|part| &part.data[..]), b"");
        output.spelling = parts().any(|part| part.spelling.is_some()).then(|| {
            let spellings: Vec<Bytes> = parts().map(spelling).collect();
            join(spellings.iter().map(|part| &part[..]), b",")
        });
    }
    Some(response)
}

/// The spelling of a tensor of floats, or that which a server would give it.
fn spelling(tensor: &Tensor) -> Bytes {
    tensor.spelling.clone().unwrap_or_else(|| {
        let mut text = Vec::new();
        tensor.write_numbers(&mut text);
        text.into()
    })
}

/// The greatest difference between the numbers of two responses, absolute and in relation to the
/// greatest number of its tensor. `None` if they differ in anything else.
pub(super) fn distance(one: &Response, two: &Response) -> Option<(f64, f64)> {
    if !is_alike(one, two) {
        return None;
    }
    let mut outputs = one.outputs.iter().zip(&two.outputs);
    outputs.try_fold((0.0, 0.0), |greatest, (one, two)| {
        if one.shape != two.shape {
            return None;
        }
        if one.data == two.data && one.spelling == two.spelling {
            return Some(greatest);
        }
        crate::compare::distance(one.numbers()?.into_iter().zip(two.numbers()?), greatest)
    })
}

/// Whether two responses differ only in the first dimension, the data and the id.
fn is_alike(one: &Response, two: &Response) -> bool {
    let is_alike = |(one, two): (&Tensor, &Tensor)| {
        let tails = one.shape.split_first().zip(two.shape.split_first());
        one.name == two.name
            && one.datatype == two.datatype
            && one.parameters == two.parameters
            && one.extras == two.extras
            && tails.is_some_and(|(one, two)| one.1 == two.1)
    };
    one.model == two.model
        && one.version == two.version
        && one.parameters == two.parameters
        && one.extras == two.extras
        && one.outputs.len() == two.outputs.len()
        && one.outputs.iter().zip(&two.outputs).all(is_alike)
}
