//! File formats that images come in. Each decoder trusts no header: what is allocated is bounded by
//! the bytes that are there and by a named limit.

pub mod bounded;
pub mod idx;
pub mod netpbm;
pub mod png;

#[cfg(test)]
mod hostile;
