//! The operator on a real cluster: `make e2e`. Each job's output is held against an independent answer.
//!
//! `stage` sets a scene, `operator` is the controller and the nodes as their administrator sees them; the rest are scenarios.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use serde_json::Value;

mod administration;
mod figures;
mod lifecycle;
mod losses;
mod many;
mod operator;
mod savepoints;
mod secrecy;
#[path = "../servers/mod.rs"]
mod servers;
mod stage;

/// The text at a JSON pointer; empty if there is none.
fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}
