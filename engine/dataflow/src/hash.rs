//! The hash of a key: stable over versions, machines and back ends, because it decides where state lives.
//!
//! It is computed over *values*, column by column, never over an encoding that a library may change. Golden values are in
//! the tests: a change of them would send every key of every retained checkpoint to the wrong subtask.
