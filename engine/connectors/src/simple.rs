//! Sinks without a store: `blackhole` counts and forgets, `print` shows each row.

use std::{io::Write, sync::Arc};

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::{Int8Type, SchemaRef},
    util::display::{ArrayFormatter, FormatOptions},
};
use floodmark_dataflow::{
    Batch, Operator, Output, Port, RowKind, SubtaskContext,
    connector::{Connector, PlanContext, SinkInput, TableDef, TableError},
    metrics::add,
    sink::{Committer, SinkFactory, SinkNode},
    source::SourceFactory,
};
use floodmark_snapshot::{Epoch, Error, Result};

use crate::options::Options;

/// `'connector' = 'blackhole'`.
pub(crate) struct Blackhole;

/// `'connector' = 'print'`.
pub(crate) struct Print;

fn sink_only(name: &str) -> TableError {
    TableError::table(format!("connector '{name}' can be written to, not read from"))
}

impl Connector for Blackhole {
    fn name(&self) -> &'static str {
        "blackhole"
    }

    fn source(&self, _: &TableDef, _: &SchemaRef, _: &PlanContext) -> Result<Arc<dyn SourceFactory>, TableError> {
        Err(sink_only("blackhole"))
    }

    fn sink(&self, table: &TableDef, _: &SinkInput, _: &PlanContext) -> Result<SinkNode, TableError> {
        Options::new(table, &[], &[])?;
        Ok(Arc::new(Plain { kind: "blackhole sink", make: |context| Box::new(Swallow(context.clone())) }))
    }
}

impl Connector for Print {
    fn name(&self) -> &'static str {
        "print"
    }

    fn source(&self, _: &TableDef, _: &SchemaRef, _: &PlanContext) -> Result<Arc<dyn SourceFactory>, TableError> {
        Err(sink_only("print"))
    }

    fn sink(&self, table: &TableDef, input: &SinkInput, _: &PlanContext) -> Result<SinkNode, TableError> {
        Options::new(table, &[], &[])?;
        Ok(if input.changelog {
            Arc::new(Plain { kind: "print sink", make: |c| Box::new(Show { context: c.clone(), changelog: true }) })
        } else {
            Arc::new(Plain { kind: "print sink", make: |c| Box::new(Show { context: c.clone(), changelog: false }) })
        })
    }
}

struct Plain {
    kind: &'static str,
    make: fn(&SubtaskContext) -> Box<dyn Operator>,
}

impl SinkFactory for Plain {
    fn kind(&self) -> String {
        self.kind.to_owned()
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn create(&self, context: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok((self.make)(context))
    }

    fn committer(&self, _: u32, _: &str) -> Result<Option<Box<dyn Committer>>> {
        Ok(None)
    }

    fn visible(&self, _: u32, _: &str) -> Result<Option<Epoch>> {
        Ok(None)
    }
}

struct Swallow(SubtaskContext);

impl Operator for Swallow {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        add(&self.0.metrics.rows_out, batch.len() as u64);
        Ok(())
    }
}

struct Show {
    context: SubtaskContext,
    changelog: bool,
}

impl Operator for Show {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        let text = lines(&batch.rows, self.changelog)?;
        // A terminal that has gone away is no reason to lose a job.
        let _ = std::io::stdout().lock().write_all(text.as_bytes());
        add(&self.context.metrics.rows_out, batch.len() as u64);
        Ok(())
    }
}

/// `+I[1, a]`, a row a line.
fn lines(rows: &RecordBatch, changelog: bool) -> Result<String> {
    let failed = |e| Error::abort(format!("print rows: {e}"));
    let options = FormatOptions::new().with_null("null").with_timestamp_format(Some("%Y-%m-%d %H:%M:%S%.f"));
    let (kinds, values) = match rows.columns().split_last() {
        Some((kinds, values)) if changelog => (Some(kinds.as_primitive::<Int8Type>()), values),
        _ => (None, rows.columns()),
    };
    let formatters: Vec<_> =
        values.iter().map(|c| ArrayFormatter::try_new(c, &options)).collect::<Result<_, _>>().map_err(failed)?;
    let mut text = String::new();
    for row in 0..rows.num_rows() {
        text += kinds.map_or("+I", |k| RowKind::from_i8(k.value(row)).symbol());
        text.push('[');
        for (i, formatter) in formatters.iter().enumerate() {
            if i > 0 {
                text += ", ";
            }
            formatter.value(row).write(&mut text).map_err(failed)?;
        }
        text += "]\n";
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int8Array, Int64Array, StringArray};

    use super::*;

    #[test]
    fn a_row_is_printed_with_its_kind() {
        let numbers: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None]));
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
        let kinds: ArrayRef = Arc::new(Int8Array::from(vec![1, 2]));
        let plain = RecordBatch::try_from_iter([("n", numbers), ("t", texts)]).unwrap();
        assert_eq!(lines(&plain, false).unwrap(), "+I[1, a]\n+I[null, b]\n");
        let numbers = plain.column(0).clone();
        let changes = RecordBatch::try_from_iter([("n", numbers), ("$kind", kinds)]).unwrap();
        assert_eq!(lines(&changes, true).unwrap(), "-U[1]\n+U[null]\n");
    }
}
