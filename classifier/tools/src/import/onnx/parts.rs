//! Count of the parts of a file, before any part is decoded: an empty message takes two bytes in
//! the file and a hundred in memory.

/// Most messages, texts and integers in a file. 65,535 labels and as many counts of vectors are far
/// below it, and a hundred bytes for each are acceptable.
pub(super) const MAX_PARTS: usize = 1 << 20;

/// The kinds of fields that take more space in memory than in the file.
enum Field {
    Text,
    Integers,
    Message(Fields),
}

type Fields = &'static [(u64, Field)];

/// The repeated fields of `proto.rs`.
const MODEL: Fields = &[(7, Field::Message(GRAPH))];
const GRAPH: Fields = &[
    (1, Field::Message(NODE)),
    (5, Field::Message(TENSOR)),
    (11, Field::Message(VALUE)),
    (12, Field::Message(VALUE)),
];
const NODE: Fields = &[(1, Field::Text), (2, Field::Text), (5, Field::Message(ATTRIBUTE))];
const ATTRIBUTE: Fields = &[(5, Field::Message(TENSOR)), (8, Field::Integers), (9, Field::Text)];
const TENSOR: Fields =
    &[(1, Field::Integers), (5, Field::Integers), (7, Field::Integers), (11, Field::Integers)];
const VALUE: Fields = &[(2, Field::Message(TYPE))];
const TYPE: Fields = &[(1, Field::Message(TENSOR_TYPE))];
const TENSOR_TYPE: Fields = &[(2, Field::Message(SHAPE))];
const SHAPE: Fields = &[(1, Field::Message(&[]))];

/// The number of parts in the bytes of a model; `None` if they are not a message. A group, which no
/// ONNX file has, is not counted as a message.
pub(super) fn parts(bytes: &[u8]) -> Option<usize> {
    of_message(bytes, MODEL)
}

fn of_message(mut bytes: &[u8], fields: Fields) -> Option<usize> {
    let mut parts = 0;
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let (inside, integers) = match key & 7 {
            0 => varint(&mut bytes).map(|_| (&[][..], 1))?,
            1 => (bytes.split_off(..8)?, 0),
            2 => {
                let len = usize::try_from(varint(&mut bytes)?).ok()?;
                let inside = bytes.split_off(..len)?;
                // A packed integer takes at least one byte.
                (inside, len)
            }
            5 => (bytes.split_off(..4)?, 0),
            _ => return None,
        };
        parts += match fields.iter().find(|(number, _)| *number == key >> 3) {
            None => 0,
            Some((_, Field::Text)) => 1,
            Some((_, Field::Integers)) => integers,
            Some((_, Field::Message(fields))) => 1 + of_message(inside, fields)?,
        };
    }
    Some(parts)
}

/// Removes an integer with seven bits in each byte from the front.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::super::proto::*;
    use super::*;

    #[test]
    fn parts_are_messages_texts_and_integers() {
        let attribute = AttributeProto { ints: vec![7, 0, 300], ..AttributeProto::default() };
        let node = NodeProto {
            input: vec!["X".to_owned()],
            output: vec!["label".to_owned(), "scores".to_owned()],
            op_type: "SVMClassifier".to_owned(),
            attribute: vec![attribute.clone(), attribute],
        };
        let dim = [0, 4].map(|dim_value| DimensionProto { dim_value }).to_vec();
        let tensor_type = Some(TensorTypeProto { shape: Some(ShapeProto { dim }) });
        let input =
            ValueInfoProto { name: "X".to_owned(), r#type: Some(TypeProto { tensor_type }) };
        let graph = GraphProto {
            node: vec![node],
            initializer: vec![TensorProto::default()],
            input: vec![input],
            output: vec![ValueInfoProto::default()],
        };
        let model = ModelProto { graph: Some(graph), ..ModelProto::default() };
        // The graph; its node with three names, two attributes and six integers; a constant; the
        // input with a type, a tensor type, a shape and two dimensions; the output.
        assert_eq!(parts(&model.encode_to_vec()), Some(1 + (1 + 3 + 2 + 6) + 1 + 6 + 1));
        assert_eq!(parts(&[]), Some(0));
    }

    #[test]
    fn packed_integers_count_each() {
        // ModelProto { graph { node { attribute { ints: [1, 2, 3] } } } }, packed.
        let file = [0x3a, 9, 0x0a, 7, 0x2a, 5, 0x42, 3, 1, 2, 3];
        let model = ModelProto::decode(&file[..]).unwrap();
        assert_eq!(model.graph.unwrap().node[0].attribute[0].ints, [1, 2, 3]);
        assert_eq!(parts(&file), Some(3 + 3));
    }

    #[test]
    fn what_is_cut_short_or_a_group_is_no_message() {
        for bytes in [
            &[0x80][..],
            &[0x3a, 5, 0],
            &[0x0d, 0, 0, 0],
            &[0x09, 0, 0, 0],
            &[0x3b, 0x3c],
            &[0x3a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            &[0xff; 11],
        ] {
            assert_eq!(parts(bytes), None, "{bytes:?}");
        }
    }
}
