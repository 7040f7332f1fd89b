//! File formats that images come in. Each decoder trusts no header: what is allocated is bounded by the
//! bytes that are there and by a named limit.

pub(crate) mod bounded;
pub(crate) mod idx;
pub(crate) mod netpbm;
pub(crate) mod png;

#[cfg(test)]
mod hostile;
