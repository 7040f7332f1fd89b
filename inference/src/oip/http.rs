//! The HTTP encoding: JSON, and binary tensors behind it.

use bytes::Bytes;

use super::tensor::{self, Direction, Form, Tensor};
use super::{
    Datatype, Encoded, Encoding, Error, Extra, OutputEncoding, Parameters, Request,
    RequestedOutput, Response, Value, field,
};
use crate::json::{self, Kind, Scanner};

/// The JSON of a body, and the bytes of the tensors behind it.
fn divide(body: &Bytes, json_len: Option<usize>) -> Result<(&str, Bytes), Error> {
    let len = json_len.unwrap_or(body.len());
    // 0 means that the body is one tensor without JSON.
    if len == 0 || len > body.len() {
        return Err(Error::Json { offset: body.len(), expected: "JSON of the stated length" });
    }
    let json = str::from_utf8(&body[..len]);
    let json =
        json.map_err(|error| Error::Json { offset: error.valid_up_to(), expected: "UTF-8" })?;
    Ok((json, body.slice(len..)))
}

pub(super) fn parse_request(body: &Bytes, json_len: Option<usize>) -> Result<Request, Error> {
    let (json, mut binary) = divide(body, json_len)?;
    let mut scanner = Scanner::new(json);
    let mut request = Request::default();
    let mut has_inputs = false;
    scanner.object(|scanner, key| {
        let kind = scanner.kind()?;
        match key {
            "id" if kind == Kind::Null => scanner.null()?,
            "id" => request.id = Some(scanner.string()?.into_owned()),
            "model_name" if kind == Kind::String => {
                request.model = Some(scanner.string()?.into_owned());
            }
            "parameters" if kind == Kind::Object => {
                request.parameters = Parameters::scan(scanner)?;
            }
            "inputs" => {
                has_inputs = true;
                scanner.array(|scanner| {
                    let input = scan_tensor(scanner, &mut binary, Direction::Request)?;
                    request.inputs.push(input);
                    Ok(())
                })?;
            }
            "outputs" if kind == Kind::Array => {
                scanner.array(|scanner| {
                    request.outputs.push(scan_output(scanner)?);
                    Ok(())
                })?;
                if request.outputs.is_empty() {
                    request.extras.push(Extra::Json(key.to_owned(), Bytes::from_static(b"[]")));
                }
            }
            _ => request.extras.push(scan_extra(scanner, key)?),
        }
        Ok(())
    })?;
    scanner.end()?;
    if !has_inputs {
        return Err(field("inputs", "missing"));
    }
    finish(&mut request.extras, &binary)?;
    request.binary_output = take_bool(&mut request.parameters, "binary_data_output")?;
    check_names(request.inputs.iter().map(|input| &*input.name))?;
    check_names(request.outputs.iter().map(|output| &*output.name))?;
    Ok(request)
}

pub(super) fn parse_response(body: &Bytes, json_len: Option<usize>) -> Result<Response, Error> {
    let (json, mut binary) = divide(body, json_len)?;
    let mut scanner = Scanner::new(json);
    let mut response = Response::default();
    let mut has_outputs = false;
    scanner.object(|scanner, key| {
        let kind = scanner.kind()?;
        match key {
            "id" if kind == Kind::Null => scanner.null()?,
            "id" => response.id = Some(scanner.string()?.into_owned()),
            "model_name" if kind == Kind::String => {
                response.model = Some(scanner.string()?.into_owned());
            }
            "model_version" if kind == Kind::String => {
                response.version = Some(scanner.string()?.into_owned());
            }
            "parameters" if kind == Kind::Object => {
                response.parameters = Parameters::scan(scanner)?;
            }
            "outputs" => {
                has_outputs = true;
                scanner.array(|scanner| {
                    let output = scan_tensor(scanner, &mut binary, Direction::Response)?;
                    response.outputs.push(output);
                    Ok(())
                })?;
            }
            _ => response.extras.push(scan_extra(scanner, key)?),
        }
        Ok(())
    })?;
    scanner.end()?;
    if !has_outputs {
        return Err(field("outputs", "missing"));
    }
    finish(&mut response.extras, &binary)?;
    check_names(response.outputs.iter().map(|output| &*output.name))?;
    Ok(response)
}

/// Checks that the tensors used all binary data, and orders the unknown fields.
fn finish(extras: &mut [Extra], binary: &Bytes) -> Result<(), Error> {
    order(extras);
    if binary.is_empty() {
        Ok(())
    } else {
        Err(field("binary_data_size", "bytes follow the last tensor"))
    }
}

/// Orders unknown fields of one object by name. The order of a message's own fields has no meaning.
fn order(extras: &mut [Extra]) {
    extras.sort_by(|one, two| match (one, two) {
        (Extra::Json(one, _), Extra::Json(two, _)) => one.cmp(two),
        _ => std::cmp::Ordering::Equal,
    });
}

pub(super) fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), Error> {
    let mut names: smallvec::SmallVec<[&str; 8]> = names.collect();
    names.sort_unstable();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(field("name", "two tensors have the same name"));
    }
    Ok(())
}

fn scan_extra(scanner: &mut Scanner<'_>, key: &str) -> Result<Extra, Error> {
    let mut value = Vec::new();
    scanner.copy_value(&mut value)?;
    Ok(Extra::Json(key.to_owned(), value.into()))
}

fn take_bool(parameters: &mut Parameters, name: &'static str) -> Result<Option<bool>, Error> {
    match parameters.take(name) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(_) => Err(field(name, "not a boolean")),
    }
}

/// Reads an input or an output, and takes its binary data.
fn scan_tensor(
    scanner: &mut Scanner<'_>,
    binary: &mut Bytes,
    direction: Direction,
) -> Result<Tensor, Error> {
    let (mut name, mut datatype, mut shape) = (None, None, None);
    let mut parameters = Parameters::default();
    let mut extras = Vec::new();
    let mut data = None;
    // The data, if it comes before the shape and the datatype.
    let mut early: Option<Scanner<'_>> = None;
    scanner.object(|scanner, key| {
        let kind = scanner.kind()?;
        match key {
            "name" => name = Some(scanner.string()?.into_owned()),
            "datatype" => {
                let known = Datatype::named(&scanner.string()?);
                datatype = Some(known.ok_or_else(|| field("datatype", "unknown"))?);
            }
            "shape" => {
                let mut sizes = smallvec::SmallVec::<[u64; 4]>::new();
                scanner.array(|scanner| {
                    let number = scanner.number()?;
                    let size = number.to_i64().and_then(|size| u64::try_from(size).ok());
                    let size = size.filter(|_| !number.negative);
                    sizes.push(size.ok_or_else(|| field("shape", "not a list of sizes"))?);
                    Ok(())
                })?;
                shape = Some(sizes);
            }
            "parameters" if kind == Kind::Object => parameters = Parameters::scan(scanner)?,
            "data" => match (datatype, &shape) {
                (Some(datatype), Some(shape)) => {
                    data = Some(Tensor::scan_data(scanner, datatype, shape, direction)?);
                }
                _ => {
                    early = Some(scanner.clone());
                    scanner.copy_value(&mut Vec::new())?;
                }
            },
            _ => extras.push(scan_extra(scanner, key)?),
        }
        Ok(())
    })?;
    order(&mut extras);
    let name = name.ok_or_else(|| field("name", "missing"))?;
    let datatype = datatype.ok_or_else(|| field("datatype", "missing"))?;
    let shape = shape.ok_or_else(|| field("shape", "missing"))?;
    if let Some(mut scanner) = early {
        data = Some(Tensor::scan_data(&mut scanner, datatype, &shape, direction)?);
    }
    let size = parameters.take("binary_data_size");
    let form = if size.is_some() { Form::Binary } else { Form::Json };
    let (data, spelling) = match (data, size) {
        (Some(data), None) => data,
        (None, Some(size)) => {
            let size = size.as_size().filter(|size| *size <= binary.len());
            let size = size.ok_or_else(|| field("binary_data_size", "not within the body"))?;
            tensor::check_len(datatype, &shape, size)?;
            (binary.split_to(size), None)
        }
        (None, None) if is_shared(&parameters) => (Bytes::new(), None),
        (None, None) => return Err(field("data", "missing")),
        (Some(_), Some(_)) => return Err(field("data", "both JSON and binary")),
    };
    Ok(Tensor { name, datatype, shape, parameters, extras, data, spelling, form })
}

/// Whether a tensor is in shared memory. Such a request is never stored.
pub(super) fn is_shared(parameters: &Parameters) -> bool {
    parameters.get("shared_memory_region").is_some()
}

fn scan_output(scanner: &mut Scanner<'_>) -> Result<RequestedOutput, Error> {
    let mut name = None;
    let mut parameters = Parameters::default();
    let mut extras = Vec::new();
    scanner.object(|scanner, key| {
        let kind = scanner.kind()?;
        match key {
            "name" => name = Some(scanner.string()?.into_owned()),
            "parameters" if kind == Kind::Object => parameters = Parameters::scan(scanner)?,
            _ => extras.push(scan_extra(scanner, key)?),
        }
        Ok(())
    })?;
    order(&mut extras);
    let name = name.ok_or_else(|| field("name", "missing"))?;
    let binary = take_bool(&mut parameters, "binary_data")?;
    Ok(RequestedOutput { name, parameters, extras, binary })
}

/// Writes a JSON object member by member.
struct Object<'a>(&'a mut Vec<u8>);

impl<'a> Object<'a> {
    fn begin(out: &'a mut Vec<u8>) -> Self {
        out.push(b'{');
        Object(out)
    }

    fn text(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            json::write_string(self.0, key);
            self.0.push(b':');
            json::write_string(self.0, value);
            self.0.push(b',');
        }
    }

    /// `None` if a field has no JSON form.
    fn extras(&mut self, extras: &[Extra]) -> Option<()> {
        for extra in extras {
            let Extra::Json(key, value) = extra else { return None };
            json::write_string(self.0, key);
            self.0.push(b':');
            self.0.extend_from_slice(value);
            self.0.push(b',');
        }
        Some(())
    }

    fn end(self) {
        if self.0.last() == Some(&b',') {
            self.0.pop();
        }
        self.0.push(b'}');
    }
}

pub(super) fn write_request(request: &Request, encoding: Encoding) -> Option<Encoded> {
    let mut out = Vec::with_capacity(512);
    let mut binary: smallvec::SmallVec<[&Bytes; 4]> = smallvec::SmallVec::new();
    // gRPC knows these names as ordinary parameters.
    if request.parameters.get("binary_data_output").is_some()
        || request.inputs.iter().any(|input| input.parameters.get("binary_data_size").is_some())
        || request.outputs.iter().any(|output| output.parameters.get("binary_data").is_some())
    {
        return None;
    }
    let mut object = Object::begin(&mut out);
    object.text("id", request.id.as_deref());
    object.text("model_name", request.model.as_deref());
    let option = request.binary_output.map(|binary| ("binary_data_output", Value::Bool(binary)));
    request.parameters.write_member(object.0, option);
    object.0.extend_from_slice(b"\"inputs\":[");
    for (at, input) in request.inputs.iter().enumerate() {
        if at > 0 {
            object.0.push(b',');
        }
        let is_binary = match encoding {
            Encoding::AsReceived => input.form != Form::Json,
            Encoding::Json => false,
            Encoding::Binary => input.spelling.is_none(),
        };
        let is_binary = is_binary || !input.fits_json(Direction::Request);
        write_tensor(object.0, input, is_binary)?;
        binary.extend(is_binary.then_some(&input.data));
    }
    object.0.extend_from_slice(b"],");
    if !request.outputs.is_empty() {
        object.0.extend_from_slice(b"\"outputs\":[");
        for (at, output) in request.outputs.iter().enumerate() {
            if at > 0 {
                object.0.push(b',');
            }
            let mut object = Object::begin(object.0);
            object.text("name", Some(&output.name));
            let option = output.binary.map(|binary| ("binary_data", Value::Bool(binary)));
            output.parameters.write_member(object.0, option);
            object.extras(&output.extras)?;
            object.end();
        }
        object.0.extend_from_slice(b"],");
    }
    object.extras(&request.extras)?;
    object.end();
    Some(append(out, &binary))
}

pub(super) fn write_response(
    response: &Response,
    id: Option<&str>,
    wanted: &OutputEncoding,
) -> Option<Encoded> {
    let len: usize = response.outputs.iter().map(|output| output.data.len()).sum();
    let mut out = Vec::with_capacity(512 + len);
    let mut binary: smallvec::SmallVec<[&Bytes; 4]> = smallvec::SmallVec::new();
    let mut object = Object::begin(&mut out);
    object.text("id", id);
    object.text("model_name", response.model.as_deref());
    object.text("model_version", response.version.as_deref());
    response.parameters.write_member(object.0, None);
    object.extras(&response.extras)?;
    object.0.extend_from_slice(b"\"outputs\":[");
    for (at, output) in response.outputs.iter().enumerate() {
        if at > 0 {
            object.0.push(b',');
        }
        let is_binary = wanted.is_binary(&output.name);
        if !is_binary && !output.fits_json(Direction::Response) {
            return None;
        }
        write_tensor(object.0, output, is_binary)?;
        binary.extend(is_binary.then_some(&output.data));
    }
    object.0.push(b']');
    object.end();
    Some(append(out, &binary))
}

fn write_tensor(out: &mut Vec<u8>, tensor: &Tensor, is_binary: bool) -> Option<()> {
    let mut object = Object::begin(out);
    tensor.write_head(object.0);
    let shared = is_shared(&tensor.parameters);
    let size = (is_binary && !shared).then(|| Value::Uint(tensor.data.len() as u64));
    tensor.parameters.write_member(object.0, size.map(|size| ("binary_data_size", size)));
    object.extras(&tensor.extras)?;
    if !is_binary && !shared {
        object.0.extend_from_slice(b"\"data\":");
        tensor.write_data(object.0);
    }
    object.end();
    Some(())
}

/// The body of JSON and binary tensors. Without bytes behind the JSON, servers send no length.
fn append(mut json: Vec<u8>, binary: &[&Bytes]) -> Encoded {
    let len: usize = binary.iter().map(|data| data.len()).sum();
    let json_len = (len > 0).then_some(json.len());
    json.reserve_exact(len);
    binary.iter().for_each(|data| json.extend_from_slice(data));
    Encoded { body: json.into(), json_len }
}
