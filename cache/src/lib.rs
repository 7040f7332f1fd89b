//! A bounded, set-associative hash table from 64-bit keys to 64-bit values, and its service.
