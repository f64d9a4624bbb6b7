//! What the job reads and writes: numbered events of three splits, a few in each batch, and topics with transactions.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Duration};

use arrow::{
    array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch},
    compute::cast,
    datatypes::{DataType, Float64Type, Int8Type, Int64Type, SchemaRef, TimeUnit},
};
use floodmark_corruption::world::{STAGED, SharedTopic, Topic, Writer};
use floodmark_dataflow::{
    Barrier, Batch, Operator, Output, PendingShard, Port, RowKind, StateSnapshot, SubtaskContext,
    connector::{Connector, Connectors, PlanContext, SinkInput, TableDef, TableError},
    sink::{Committer, SinkFactory, SinkNode},
    source::{Polled, Source, SourceFactory},
};
use floodmark_snapshot::{Epoch, Error, Result, ShardKind, SplitState, block::BlockWriter};
use serde_json::json;

/// Splits of the source.
const SPLITS: i64 = 3;
/// Events of all splits.
pub(crate) const EVENTS: i64 = 480;
/// Events of a batch.
const BATCH: usize = 8;

/// A field of an event: a pure function of the event's number.
pub(crate) fn field(number: i64, name: &str) -> i64 {
    match name {
        "number" => number,
        "shop" => (number * 7 + number / 11) % 9,
        "amount" => number * 37 % 101,
        "delivery" => i64::from(number % 4 == 0),
        // A tenth of a second apart, a little out of order, and no two at the same time.
        "at" => 1_000_000_000 + number * 100 + number * 13 % 7 * 51,
        other => panic!("events have no field {other}"),
    }
}

/// The topics by their tables.
pub(crate) type Topics = BTreeMap<String, SharedTopic>;

/// Topics as a set has them.
pub(crate) fn topics_of(json: &serde_json::Value) -> Topics {
    let tables = json.as_object().unwrap().iter();
    tables.map(|(table, topic)| (table.clone(), SharedTopic::of(Topic::from_json(topic).unwrap()))).collect()
}

/// The connectors `numbered` and `topic`. The source says `pauses` times that there is nothing before each batch.
pub(crate) fn connectors(topics: &Topics, pauses: u32) -> Connectors {
    Connectors::default().with(Arc::new(Numbered { pauses })).with(Arc::new(TopicConnector(topics.clone())))
}

struct Numbered {
    pauses: u32,
}

impl Connector for Numbered {
    fn name(&self) -> &'static str {
        "numbered"
    }

    fn source(
        &self,
        _: &TableDef,
        projection: &SchemaRef,
        _: &PlanContext,
    ) -> Result<Arc<dyn SourceFactory>, TableError> {
        Ok(Arc::new(Events { pauses: self.pauses, schema: projection.clone() }))
    }

    fn sink(&self, _: &TableDef, _: &SinkInput, _: &PlanContext) -> Result<SinkNode, TableError> {
        Err(TableError::table("numbered events can only be read"))
    }
}

struct Events {
    pauses: u32,
    schema: SchemaRef,
}

impl SourceFactory for Events {
    fn kind(&self) -> String {
        "numbered source".to_owned()
    }

    fn bounded(&self) -> bool {
        true
    }

    fn splits(&self, restored: &[SplitState]) -> Result<Vec<SplitState>> {
        let fresh = |s: i64| SplitState { split: s.to_string(), position: json!(s), watermark: None, finished: false };
        Ok(if restored.is_empty() { (0..SPLITS).map(fresh).collect() } else { restored.to_vec() })
    }

    fn open(&self, splits: Vec<SplitState>, _: &SubtaskContext) -> Result<Box<dyn Source>> {
        Ok(Box::new(Reader { splits, turn: 0, pauses: self.pauses, paused: 0, schema: self.schema.clone() }))
    }
}

struct Reader {
    splits: Vec<SplitState>,
    turn: usize,
    pauses: u32,
    paused: u32,
    schema: SchemaRef,
}

impl Source for Reader {
    fn poll(&mut self, _: Duration) -> Result<Polled> {
        let count = self.splits.len();
        let Some(split) = (1..=count).map(|i| (self.turn + i) % count).find(|s| !self.splits[*s].finished) else {
            return Ok(Polled::Exhausted);
        };
        if self.paused < self.pauses {
            self.paused += 1;
            return Ok(Polled::Pending);
        }
        (self.paused, self.turn) = (0, split);
        let state = &mut self.splits[split];
        let next = state.position.as_i64().ok_or_else(|| Error::corrupt("a position that is no number"))?;
        let numbers: Vec<i64> = (next..EVENTS).step_by(SPLITS as usize).take(BATCH).collect();
        let Some(last) = numbers.last() else {
            state.finished = true;
            return Ok(Polled::SplitFinished { split });
        };
        state.position = json!(last + SPLITS);
        let column = |f: &arrow::datatypes::FieldRef| -> ArrayRef {
            let values: Int64Array = numbers.iter().map(|n| Some(field(*n, f.name()))).collect();
            cast(&values, f.data_type()).unwrap()
        };
        let columns = self.schema.fields().iter().map(column).collect();
        let rows = RecordBatch::try_new(self.schema.clone(), columns).map_err(|e| Error::abort(e.to_string()))?;
        Ok(Polled::Batch { split, rows })
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        Ok(self.splits.clone())
    }
}

struct TopicConnector(Topics);

impl Connector for TopicConnector {
    fn name(&self) -> &'static str {
        "topic"
    }

    fn source(&self, _: &TableDef, _: &SchemaRef, _: &PlanContext) -> Result<Arc<dyn SourceFactory>, TableError> {
        Err(TableError::table("a topic can only be written"))
    }

    fn sink(&self, table: &TableDef, input: &SinkInput, _: &PlanContext) -> Result<SinkNode, TableError> {
        let topic = self.0.get(&table.name).cloned().ok_or_else(|| TableError::table("there is no such topic"))?;
        Ok(Arc::new(TopicSink { topic, changelog: input.changelog }))
    }
}

struct TopicSink {
    topic: SharedTopic,
    changelog: bool,
}

impl SinkFactory for TopicSink {
    fn kind(&self) -> String {
        "topic sink".to_owned()
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn create(&self, _: &SubtaskContext) -> Result<Box<dyn Operator>> {
        Ok(Box::new(Stage { changelog: self.changelog, lines: String::new(), rows: 0 }))
    }

    fn committer(&self, index: u32, history: &str) -> Result<Option<Box<dyn Committer>>> {
        Ok(Some(Box::new(Writer { topic: self.topic.clone(), index, history: history.to_owned() })))
    }

    fn visible(&self, index: u32, history: &str) -> Result<Option<Epoch>> {
        Ok(self.topic.lock().markers.get(&(history.to_owned(), index)).copied())
    }
}

/// Stages a line per row: its kind, and its columns as numbers.
struct Stage {
    changelog: bool,
    lines: String,
    rows: u64,
}

impl Operator for Stage {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        let (kinds, columns) = match batch.rows.columns().split_last() {
            Some((kinds, columns)) if self.changelog => (Some(kinds.as_primitive::<Int8Type>()), columns),
            _ => (None, batch.rows.columns()),
        };
        for row in 0..batch.rows.num_rows() {
            self.lines += kinds.map_or("+I", |k| RowKind::from_i8(k.value(row)).symbol());
            for column in columns {
                let _ = write!(self.lines, " {}", shown(column, row));
            }
            self.lines.push('\n');
            self.rows += 1;
        }
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let (lines, rows) = (std::mem::take(&mut self.lines), std::mem::take(&mut self.rows));
        if rows == 0 {
            return Ok(StateSnapshot::default());
        }
        let encode = move || {
            let mut blocks = BlockWriter::new(STAGED);
            blocks.push(lines.as_bytes())?;
            Ok(blocks.finish())
        };
        Ok(StateSnapshot::of(vec![PendingShard::new(ShardKind::Staged, None, rows, Box::new(encode))]))
    }
}

fn shown(column: &ArrayRef, row: usize) -> String {
    if column.is_null(row) {
        return "null".to_owned();
    }
    match column.data_type() {
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).to_string(),
        DataType::Float64 => column.as_primitive::<Float64Type>().value(row).to_string(),
        DataType::Timestamp(TimeUnit::Millisecond, None) => {
            let numbers = cast(column, &DataType::Int64).unwrap();
            numbers.as_primitive::<Int64Type>().value(row).to_string()
        }
        other => panic!("a column of type {other}"),
    }
}
