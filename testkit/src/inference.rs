//! Random inference requests as plain values, with encoders of their own: an oracle for the codecs
//! of `afterimage-inference`.

use serde_json::Value as Json;

/// Draws numbers. A test seeds a generator; a fuzz target reads its input.
pub type Draw<'a> = &'a mut dyn FnMut() -> u64;

/// A request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Call {
    /// The id.
    pub id: Option<String>,
    /// Parameters, by name.
    pub parameters: Vec<(String, Parameter)>,
    /// Inputs.
    pub inputs: Vec<Input>,
    /// Requested outputs: the name, and the number of classes or 0.
    pub outputs: Vec<(String, i64)>,
}

/// The value of a parameter.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the types of JSON")]
pub enum Parameter {
    Bool(bool),
    Int(i64),
    Double(f64),
    Text(String),
}

/// An input.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// The name.
    pub name: String,
    /// The datatype's name.
    pub datatype: &'static str,
    /// The shape.
    pub shape: Vec<u64>,
    /// The elements.
    pub elements: Vec<Element>,
    /// Parameters, by name.
    pub parameters: Vec<(String, Parameter)>,
}

/// An element of a tensor.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the kinds of datatypes")]
pub enum Element {
    Bool(bool),
    Int(i128),
    /// The bits of a float of 16, 32 or 64 bits.
    Float(u64),
    Bytes(Vec<u8>),
}

/// Datatypes, and the bits of one element; 0 for strings of bytes.
const DATATYPES: [(&str, u32); 14] = [
    ("BOOL", 8),
    ("UINT8", 8),
    ("UINT16", 16),
    ("UINT32", 32),
    ("UINT64", 64),
    ("INT8", 8),
    ("INT16", 16),
    ("INT32", 32),
    ("INT64", 64),
    ("FP16", 16),
    ("BF16", 16),
    ("FP32", 32),
    ("FP64", 64),
    ("BYTES", 0),
];

fn bits(datatype: &str) -> u32 {
    DATATYPES.iter().find(|known| known.0 == datatype).unwrap().1
}

fn below(draw: Draw<'_>, bound: usize) -> usize {
    (draw() % bound as u64) as usize
}

fn text(draw: Draw<'_>) -> String {
    let length = below(draw, 5);
    let letters = ['a', 'b', '"', '\\', '\n', '\u{1}', 'é', '😀', ',', '[', '0', '-', ' '];
    (0..length).map(|_| letters[below(draw, letters.len())]).collect()
}

fn parameter(draw: Draw<'_>) -> Parameter {
    match below(draw, 5) {
        0 => Parameter::Bool(draw() & 1 == 0),
        1 => Parameter::Int(draw().cast_signed() >> below(draw, 63)),
        // Exact in every reader.
        2 => Parameter::Double(f64::from(draw() as i16) / 8.0 + 0.0625),
        3 => Parameter::Int(i64::from(draw() as u8)),
        _ => Parameter::Text(text(draw)),
    }
}

fn element(draw: Draw<'_>, datatype: &str) -> Element {
    let raw = match below(draw, 4) {
        0 => draw(),
        1 => draw() % 3,
        2 => u64::MAX >> (draw() % 64),
        _ => u64::from(draw() as u16) << (draw() % 49),
    };
    match datatype {
        "BOOL" => Element::Bool(raw & 1 == 0),
        "BYTES" => {
            Element::Bytes(if raw % 16 == 0 { vec![0xff, 0x80] } else { text(draw).into_bytes() })
        }
        "FP16" | "BF16" => Element::Float(raw & 0xffff),
        "FP32" => {
            let value = f32::from_bits(raw as u32);
            // JSON has one NaN.
            Element::Float((if value.is_nan() { f32::NAN } else { value }).to_bits().into())
        }
        "FP64" => {
            // Few digits, so that all readers of JSON agree.
            let value = f64::from(raw as i32) / 16.0;
            let word = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0];
            Element::Float(if raw % 9 == 0 { word[below(draw, 4)] } else { value }.to_bits())
        }
        _ => {
            let bits = bits(datatype);
            let shifted = raw << (64 - bits);
            Element::Int(if datatype.starts_with('U') {
                (shifted >> (64 - bits)).into()
            } else {
                (shifted.cast_signed() >> (64 - bits)).into()
            })
        }
    }
}

fn input(draw: Draw<'_>, name: String, rows: Option<u64>) -> Input {
    let datatype = DATATYPES[below(draw, DATATYPES.len())].0;
    let rank = below(draw, 4);
    let mut shape: Vec<u64> = (0..rank).map(|_| [1, 2, 3, 0, 4, 1][below(draw, 6)]).collect();
    if let Some(rows) = rows {
        shape.insert(0, rows);
    }
    let count = shape.iter().product::<u64>();
    let elements = (0..count).map(|_| element(draw, datatype)).collect();
    let parameters = if below(draw, 3) == 0 {
        vec![("content_type".to_owned(), Parameter::Text(text(draw)))]
    } else {
        Vec::new()
    };
    Input { name, datatype, shape, elements, parameters }
}

impl Call {
    /// A random request. With `rows`, all inputs have this number as their first dimension.
    pub fn random(draw: Draw<'_>, rows: Option<u64>) -> Call {
        let inputs =
            (0..1 + below(draw, 3)).map(|at| input(draw, format!("x{at}"), rows)).collect();
        let names = ["scale", "top k", "é", "\"", "headers"];
        let parameters =
            names[..below(draw, 6)].iter().map(|name| ((*name).to_owned(), parameter(draw)));
        let parameters = parameters.collect();
        let outputs = (0..below(draw, 3)).map(|at| (format!("y{at}"), below(draw, 3) as i64));
        let outputs = outputs.collect();
        let id = (below(draw, 2) == 0).then(|| format!("id {}", draw()));
        Call { id, parameters, inputs, outputs }
    }

    /// Changes one thing that can change the answer, and names it.
    pub fn mutate(&mut self, draw: Draw<'_>) -> &'static str {
        loop {
            let at = below(draw, self.inputs.len());
            let input = &mut self.inputs[at];
            match below(draw, 12) {
                0 | 1 if !input.elements.is_empty() => {
                    let at = below(draw, input.elements.len());
                    let new = element(draw, input.datatype);
                    if new != input.elements[at] {
                        input.elements[at] = new;
                        return "an element";
                    }
                }
                2 => {
                    input.name.push('!');
                    return "the name of an input";
                }
                3 => {
                    input.shape.push(1);
                    return "the rank";
                }
                4 if input.shape.len() > 1 && input.shape[0] != input.shape[1] => {
                    input.shape.swap(0, 1);
                    return "the order of dimensions";
                }
                5 => {
                    // Equal bytes of another datatype.
                    let (one, two) = [
                        ("FP16", "BF16"),
                        ("BF16", "FP16"),
                        ("BOOL", "UINT8"),
                        ("UINT8", "INT8"),
                        ("INT8", "UINT8"),
                    ][below(draw, 5)];
                    let small = |element: &mut Element| match element {
                        Element::Bool(flag) => *element = Element::Int((*flag).into()),
                        Element::Int(value) => *value &= 0x7f,
                        _ => {}
                    };
                    if input.datatype == one {
                        input.datatype = two;
                        let is_same = input.elements.iter().all(|element| {
                            !matches!(element, Element::Int(value) if !(0..=0x7f).contains(value))
                        });
                        input.elements.iter_mut().for_each(small);
                        return if is_same { "the datatype" } else { "datatype and elements" };
                    }
                }
                6 => {
                    input.parameters.push(("another".to_owned(), parameter(draw)));
                    return "a parameter of an input";
                }
                7 => {
                    self.parameters.push(("another".to_owned(), parameter(draw)));
                    return "a parameter";
                }
                8 if !self.parameters.is_empty() => {
                    let at = below(draw, self.parameters.len());
                    let new = parameter(draw);
                    if new != self.parameters[at].1 {
                        self.parameters[at].1 = new;
                        return "the value of a parameter";
                    }
                }
                9 => {
                    self.outputs.push(("z".to_owned(), 0));
                    return "the requested outputs";
                }
                10 if !self.outputs.is_empty() => {
                    self.outputs[0].1 += 1;
                    return "the number of classes";
                }
                11 if self.inputs.len() > 1 => {
                    self.inputs.swap(0, 1);
                    return "the order of inputs";
                }
                _ => {}
            }
        }
    }

    /// The body as JSON, with random spellings; `None` if JSON cannot hold the elements.
    pub fn json(&self, draw: Draw<'_>) -> Option<Vec<u8>> {
        let inputs: Option<Vec<String>> =
            self.inputs.iter().map(|input| input.json(draw)).collect();
        Some(self.object(&inputs?, None, draw))
    }

    /// The body with binary tensors, and the length of its JSON.
    pub fn binary(&self, draw: Draw<'_>) -> (Vec<u8>, usize) {
        let inputs: Vec<String> = self
            .inputs
            .iter()
            .map(|input| {
                let size = Parameter::Int(input.bytes().len() as i64);
                let mut parameters = input.parameters.clone();
                parameters.push(("binary_data_size".to_owned(), size));
                let mut members = input.members();
                members.push(format!("\"parameters\":{}", object(&parameters)));
                shuffled(members, draw)
            })
            .collect();
        let mut body = self.object(&inputs, Some(draw() & 1 == 0), draw);
        let json_len = body.len();
        self.inputs.iter().for_each(|input| body.extend(input.bytes()));
        (body, json_len)
    }

    fn object(&self, inputs: &[String], binary: Option<bool>, draw: Draw<'_>) -> Vec<u8> {
        let mut members = vec![format!("\"inputs\":[{}]", inputs.join(" ,"))];
        if let Some(id) = &self.id {
            members.push(format!("\"id\":{}", quoted(id, draw)));
        }
        let mut parameters = self.parameters.clone();
        if let Some(binary) = binary {
            parameters.push(("binary_data_output".to_owned(), Parameter::Bool(binary)));
        }
        if draw() & 1 == 0 {
            parameters.reverse();
            parameters.push(("priority".to_owned(), Parameter::Int(below(draw, 9) as i64)));
        }
        members.push(format!("\"parameters\" : {}", object(&parameters)));
        if !self.outputs.is_empty() {
            let outputs: Vec<String> = self
                .outputs
                .iter()
                .map(|(name, classes)| {
                    let mut parameters = Vec::new();
                    if *classes > 0 {
                        parameters.push(("classification".to_owned(), Parameter::Int(*classes)));
                    }
                    if draw() & 1 == 0 {
                        parameters
                            .push(("binary_data".to_owned(), Parameter::Bool(draw() & 1 == 0)));
                    }
                    format!(
                        "{{\"name\":{},\"parameters\":{}}}",
                        quoted(name, draw),
                        object(&parameters)
                    )
                })
                .collect();
            members.push(format!("\"outputs\":[{}]", outputs.join(",")));
        }
        shuffled(members, draw).into_bytes()
    }

    /// The message of gRPC, with typed or raw contents; `None` if typed contents cannot hold the
    /// elements.
    pub fn grpc(&self, typed: bool, draw: Draw<'_>) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        field(&mut out, 1, b"model");
        if let Some(id) = &self.id {
            field(&mut out, 3, id.as_bytes());
        }
        map(&mut out, 4, &self.parameters);
        if draw() & 1 == 0 {
            map(&mut out, 4, &[("timeout".to_owned(), Parameter::Int(below(draw, 9) as i64))]);
        }
        for input in &self.inputs {
            let mut message = Vec::new();
            field(&mut message, 1, input.name.as_bytes());
            field(&mut message, 2, input.datatype.as_bytes());
            if draw() & 1 == 0 {
                let mut packed = Vec::new();
                input.shape.iter().for_each(|size| varint(&mut packed, *size));
                field(&mut message, 3, &packed);
            } else {
                for size in &input.shape {
                    varint(&mut message, 3 << 3);
                    varint(&mut message, *size);
                }
            }
            map(&mut message, 4, &input.parameters);
            if typed {
                field(&mut message, 5, &input.contents(draw)?);
            }
            field(&mut out, 5, &message);
        }
        for (name, classes) in &self.outputs {
            let mut message = Vec::new();
            field(&mut message, 1, name.as_bytes());
            if *classes > 0 {
                map(&mut message, 2, &[("classification".to_owned(), Parameter::Int(*classes))]);
            }
            field(&mut out, 6, &message);
        }
        if !typed {
            self.inputs.iter().for_each(|input| field(&mut out, 7, &input.bytes()));
        }
        Some(out)
    }

    /// The request of one row of this one.
    pub fn row(&self, row: usize) -> Call {
        let mut call = self.clone();
        for input in &mut call.inputs {
            let each = input.elements.len() / input.shape[0] as usize;
            input.elements = input.elements[row * each..(row + 1) * each].to_vec();
            input.shape[0] = 1;
        }
        call
    }
}

impl Input {
    /// The elements as binary data.
    pub fn bytes(&self) -> Vec<u8> {
        let size = bits(self.datatype) as usize / 8;
        let mut out = Vec::new();
        for element in &self.elements {
            match element {
                Element::Bool(flag) => out.push((*flag).into()),
                Element::Int(value) => out.extend(&value.to_le_bytes()[..size]),
                Element::Float(bits) => out.extend(&bits.to_le_bytes()[..size]),
                Element::Bytes(bytes) => {
                    out.extend((bytes.len() as u32).to_le_bytes());
                    out.extend(bytes);
                }
            }
        }
        out
    }

    fn members(&self) -> Vec<String> {
        vec![
            format!("\"name\":{}", Json::from(self.name.clone())),
            format!("\"datatype\":\"{}\"", self.datatype),
            format!("\"shape\":{:?}", self.shape),
        ]
    }

    fn json(&self, draw: Draw<'_>) -> Option<String> {
        if self.datatype.ends_with("F16") || self.datatype == "FP16" {
            return None;
        }
        let elements: Option<Vec<String>> =
            self.elements.iter().map(|element| self.spell(element, draw)).collect();
        let elements = elements?;
        let data = if draw() & 1 == 0 || self.shape.len() < 2 {
            format!("[{}]", elements.join(" , "))
        } else {
            nest(&elements, &self.shape)
        };
        let mut members = self.members();
        members.push(format!("\"data\":{data}"));
        if !self.parameters.is_empty() {
            members.push(format!("\"parameters\":{}", object(&self.parameters)));
        }
        Some(shuffled(members, draw))
    }

    fn spell(&self, element: &Element, draw: Draw<'_>) -> Option<String> {
        Some(match element {
            Element::Bool(flag) => flag.to_string(),
            Element::Int(value) => value.to_string(),
            Element::Bytes(bytes) => quoted(str::from_utf8(bytes).ok()?, draw),
            Element::Float(bits) => {
                let value = match self.datatype {
                    "FP32" => f64::from(f32::from_bits(*bits as u32)),
                    _ => f64::from_bits(*bits),
                };
                if value.is_nan() {
                    "NaN".to_owned()
                } else if value.is_infinite() {
                    if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
                } else if value == value.trunc()
                    && value.abs() < 1e15
                    && value != 0.0
                    && draw() & 1 == 0
                {
                    format!("{}", value as i64)
                } else {
                    // `{:e}` always has an exponent, so that -0e0 is a float.
                    if draw() & 1 == 0 { format!("{value:?}") } else { format!("{value:e}") }
                }
            }
        })
    }

    fn contents(&self, draw: Draw<'_>) -> Option<Vec<u8>> {
        let number = match self.datatype {
            "BOOL" => 1,
            "INT8" | "INT16" | "INT32" => 2,
            "INT64" => 3,
            "UINT8" | "UINT16" | "UINT32" => 4,
            "UINT64" => 5,
            "FP32" => 6,
            "FP64" => 7,
            "BYTES" => 8,
            _ => return None,
        };
        let mut out = Vec::new();
        let mut packed = Vec::new();
        let unpacked = draw() & 1 == 0;
        for element in &self.elements {
            let target = if unpacked { &mut out } else { &mut packed };
            match element {
                Element::Bytes(bytes) => field(&mut out, 8, bytes),
                Element::Bool(_) | Element::Int(_) => {
                    let value = match element {
                        Element::Bool(flag) => u64::from(*flag),
                        Element::Int(value) => *value as u64,
                        _ => 0,
                    };
                    if unpacked {
                        varint(target, number << 3);
                    }
                    varint(target, value);
                }
                Element::Float(bits) => {
                    let size = if number == 6 { 4 } else { 8 };
                    if unpacked {
                        varint(target, number << 3 | if number == 6 { 5 } else { 1 });
                    }
                    target.extend(&bits.to_le_bytes()[..size]);
                }
            }
        }
        if !packed.is_empty() {
            field(&mut out, number, &packed);
        }
        Some(out)
    }
}

fn nest(elements: &[String], shape: &[u64]) -> String {
    let Some((size, inner)) = shape.split_first() else { return elements.concat() };
    let each = elements.len().checked_div(*size as usize).unwrap_or(0);
    let lists = (0..*size as usize).map(|at| nest(&elements[at * each..(at + 1) * each], inner));
    format!("[{}]", lists.collect::<Vec<_>>().join(","))
}

fn object(parameters: &[(String, Parameter)]) -> String {
    let members = parameters.iter().map(|(name, value)| {
        let value = match value {
            Parameter::Bool(flag) => flag.to_string(),
            Parameter::Int(value) => value.to_string(),
            Parameter::Double(value) => format!("{value:?}"),
            Parameter::Text(text) => Json::from(text.clone()).to_string(),
        };
        format!("{}: {value}", Json::from(name.clone()))
    });
    format!("{{{}}}", members.collect::<Vec<_>>().join(","))
}

/// A JSON string, sometimes with all its characters escaped.
fn quoted(text: &str, draw: Draw<'_>) -> String {
    if draw() & 3 != 0 {
        return Json::from(text).to_string();
    }
    let units = text.encode_utf16().map(|unit| format!("\\u{unit:04X}"));
    format!("\"{}\"", units.collect::<String>())
}

fn shuffled(mut members: Vec<String>, draw: Draw<'_>) -> String {
    for at in (1..members.len()).rev() {
        members.swap(at, below(draw, at + 1));
    }
    let space = ["", " ", "\n\t"][below(draw, 3)];
    format!("{{{space}{}{space}}}", members.join(&format!("{space},{space}")))
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn field(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    varint(out, number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn map(out: &mut Vec<u8>, number: u64, parameters: &[(String, Parameter)]) {
    for (name, value) in parameters {
        let mut message = Vec::new();
        match value {
            Parameter::Bool(flag) => message.extend([1 << 3, u8::from(*flag)]),
            Parameter::Int(value) => {
                message.push(2 << 3);
                varint(&mut message, value.cast_unsigned());
            }
            Parameter::Text(text) => field(&mut message, 3, text.as_bytes()),
            Parameter::Double(value) => {
                message.push(4 << 3 | 1);
                message.extend(value.to_le_bytes());
            }
        }
        let mut entry = Vec::new();
        field(&mut entry, 1, name.as_bytes());
        field(&mut entry, 2, &message);
        field(out, number, &entry);
    }
}
