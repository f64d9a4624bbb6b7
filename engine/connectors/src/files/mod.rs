//! `'connector' = 'files'`: lines of NDJSON or CSV in files on local disk or S3, read bounded or followed as they grow; and a
//! sink that publishes a file per subtask and checkpoint, exactly once.

mod sink;
mod source;

use std::{sync::Arc, time::Duration};

use arrow::datatypes::SchemaRef;
use floodmark_dataflow::{
    connector::{Connector, Guarantee, PlanContext, SinkInput, TableDef, TableError},
    sink::SinkNode,
    source::SourceFactory,
};
use floodmark_snapshot::{Error, Result};
use tokio::runtime::{Builder, Runtime};

use self::{sink::FilesSink, source::FilesSource};
use crate::{
    format::{BadRecords, FORMAT_OPTIONS, Format},
    options::Options,
};

/// See the header of this file.
pub struct Files;

/// A runtime in which the calling thread waits for storage. Sources and committers have threads of their own to wait in.
pub(crate) struct Blocking(Option<Runtime>);

impl Blocking {
    /// Waits for a future. Not inside of another runtime.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.0.as_ref().expect("the runtime is taken only when this is dropped").block_on(future)
    }
}

/// It may be dropped anywhere: also where an attempt is given up before it has run, inside of another runtime.
impl Drop for Blocking {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// See [`Blocking`].
pub(crate) fn blocking() -> Result<Blocking> {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.map(|r| Blocking(Some(r))).map_err(|e| Error::abort(format!("start a runtime for storage: {e}")))
}

impl Connector for Files {
    fn name(&self) -> &'static str {
        "files"
    }

    fn source(
        &self,
        table: &TableDef,
        projection: &SchemaRef,
        _: &PlanContext,
    ) -> Result<Arc<dyn SourceFactory>, TableError> {
        let own = ["path", "mode", "poll-interval"];
        let known: Vec<&str> = own.into_iter().chain(FORMAT_OPTIONS).chain(BadRecords::OPTIONS).collect();
        let options = Options::new(table, &known, &[])?;
        let following = options.choice("mode", &[("bounded", false), ("following", true)])?;
        let interval = options.duration("poll-interval")?.unwrap_or(Duration::from_millis(500));
        let format = Format::of(&options, "format")?;
        format.check_read(&table.schema, projection)?;
        Ok(Arc::new(FilesSource {
            path: options.required("path")?.to_owned(),
            format,
            bad: BadRecords::of(&options)?,
            following: following.then_some(interval),
            declared: table.schema.clone(),
            projection: projection.clone(),
            known: Arc::default(),
        }))
    }

    fn sink(&self, table: &TableDef, input: &SinkInput, context: &PlanContext) -> Result<SinkNode, TableError> {
        let known: Vec<&str> = ["path"].into_iter().chain(FORMAT_OPTIONS).collect();
        let options = Options::new(table, &known, &[])?;
        if input.changelog {
            return Err(TableError::table(
                "connector 'files' takes insertions only, and the query updates rows it has written; \
                 use connector 'upsert-kafka', or a windowed aggregate",
            ));
        }
        let format = Format::of(&options, "format")?;
        format.check(&table.schema)?;
        Ok(Arc::new(FilesSink {
            path: options.required("path")?.to_owned(),
            format,
            columns: table.schema.fields().iter().map(|f| f.name().clone()).collect(),
            exactly_once: context.guarantee == Guarantee::ExactlyOnce,
        }))
    }
}
