//! The known fields of a request, and what each of them is for.
//!
//! A field that is not in the table is part of the key. A test changes each field of the table, and
//! checks that the key changes if and only if the role says so.

/// Where a field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the request.
    Request,
    /// In the request's parameters.
    RequestParameter,
    /// In an input.
    Input,
    /// In an input's parameters.
    InputParameter,
    /// In a requested output.
    Output,
    /// In a requested output's parameters.
    OutputParameter,
}

/// What a field does to the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It is part of the key.
    Key,
    /// It names the request and does not change the answer.
    Id,
    /// It selects an encoding.
    Transport,
    /// It selects the time and the order of execution.
    Scheduling,
    /// It makes the request one of a sequence: never stored.
    Sequence,
    /// It refers to memory that the request does not contain: never stored.
    SharedMemory,
    /// It asks for a stream of responses: never stored.
    Stream,
}

/// A known field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Where it is.
    pub place: Place,
    /// Its name.
    pub name: &'static str,
    /// What it does to the key.
    pub role: Role,
}

const fn known(place: Place, name: &'static str, role: Role) -> Field {
    Field { place, name, role }
}

/// The known fields.
pub const FIELDS: &[Field] = &[
    known(Place::Request, "id", Role::Id),
    known(Place::Request, "model_name", Role::Key),
    known(Place::Request, "parameters", Role::Key),
    known(Place::Request, "inputs", Role::Key),
    known(Place::Request, "outputs", Role::Key),
    known(Place::RequestParameter, "binary_data_output", Role::Transport),
    known(Place::RequestParameter, "priority", Role::Scheduling),
    known(Place::RequestParameter, "timeout", Role::Scheduling),
    known(Place::RequestParameter, "sequence_id", Role::Sequence),
    known(Place::RequestParameter, "sequence_start", Role::Sequence),
    known(Place::RequestParameter, "sequence_end", Role::Sequence),
    known(Place::RequestParameter, "triton_enable_empty_final_response", Role::Stream),
    known(Place::Input, "name", Role::Key),
    known(Place::Input, "datatype", Role::Key),
    known(Place::Input, "shape", Role::Key),
    known(Place::Input, "parameters", Role::Key),
    known(Place::Input, "data", Role::Key),
    known(Place::InputParameter, "binary_data_size", Role::Transport),
    known(Place::InputParameter, "shared_memory_region", Role::SharedMemory),
    known(Place::InputParameter, "shared_memory_offset", Role::SharedMemory),
    known(Place::InputParameter, "shared_memory_byte_size", Role::SharedMemory),
    known(Place::Output, "name", Role::Key),
    known(Place::Output, "parameters", Role::Key),
    known(Place::OutputParameter, "binary_data", Role::Transport),
    known(Place::OutputParameter, "classification", Role::Key),
    known(Place::OutputParameter, "shared_memory_region", Role::SharedMemory),
    known(Place::OutputParameter, "shared_memory_offset", Role::SharedMemory),
    known(Place::OutputParameter, "shared_memory_byte_size", Role::SharedMemory),
];

/// The role of a field: [`Role::Key`] for an unknown one.
pub(crate) fn role(place: Place, name: &str) -> Role {
    let found = FIELDS.iter().find(|field| field.place == place && field.name == name);
    found.map_or(Role::Key, |field| field.role)
}
