//! What a job reads from and writes to: Kafka, files on any object store, generators, and sinks for looking and measuring.
//!
//! Each connector is a folder or file of its own behind [`floodmark_dataflow::connector::Connector`]; [`mod@format`] turns
//! records into rows and back; [`options`] reads a table's `WITH (…)` list. [`all`] is the registry.

use std::sync::Arc;

use floodmark_dataflow::connector::Connectors;

mod datagen;
#[cfg(test)]
mod declarations;
pub mod files;
pub mod format;
pub mod kafka;
pub mod nexmark;
mod options;
mod pace;
mod simple;
mod stripes;

/// Every connector there is.
#[must_use]
pub fn all() -> Connectors {
    Connectors::default()
        .with(Arc::new(files::Files))
        .with(Arc::new(kafka::Kafka { upsert: false }))
        .with(Arc::new(kafka::Kafka { upsert: true }))
        .with(Arc::new(nexmark::Nexmark))
        .with(Arc::new(datagen::Datagen))
        .with(Arc::new(simple::Blackhole))
        .with(Arc::new(simple::Print))
}
