//! Late rows after a restore from subtasks that had come differently far: as happens behind barriers that overtake.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use arrow::array::{ArrayRef, Int64Array, TimestampMillisecondArray, UInt32Array};
use floodmark_dataflow::{
    Batch, Exchange, JobGraph, Operator, Output, RestoredShard, SubtaskContext, TaskId, graph::NodeKind,
    hash::hash_keys, source::Polled,
};
use floodmark_snapshot::{KeyGroup, KeyGroupRange, TimestampMs};

use super::harness::{context_of, planned, shards_of, show};

const MAX_PARALLELISM: u16 = 128;

/// A key of each third of the key groups, and of each half: what 2 subtasks own, and what 3.
struct Keys {
    /// Of the earlier subtask 0: of the new subtasks 0 and 1 of three.
    first: [i64; 2],
    /// Of the earlier subtask 1: of the new subtasks 1 and 2 of three.
    second: [i64; 2],
}

impl Keys {
    /// `before`: what rows are exchanged by before the key.
    fn new(before: &[ArrayRef]) -> Self {
        let key = |of_two: u32, of_three: u32| {
            let both = |k: &i64| {
                let columns = [before, &[Arc::new(Int64Array::from(vec![*k])) as ArrayRef]].concat();
                let group = KeyGroup::of(hash_keys(&columns, 1).unwrap()[0], MAX_PARALLELISM);
                (group.subtask(2, MAX_PARALLELISM), group.subtask(3, MAX_PARALLELISM)) == (of_two, of_three)
            };
            (0..).find(both).unwrap()
        };
        Self { first: [key(0, 0), key(0, 1)], second: [key(1, 1), key(1, 2)] }
    }

    fn all(&self) -> [i64; 4] {
        [self.first[0], self.first[1], self.second[0], self.second[1]]
    }
}

/// The stateful operator of a job, at some parallelism, and the operators before it, in one subtask.
struct Subtasks {
    query: String,
    contexts: Vec<SubtaskContext>,
    operators: Vec<Box<dyn Operator>>,
}

impl Subtasks {
    fn new(query: &str, parallelism: u32) -> Self {
        let graph = job(query, "");
        let (_, factory) = stateful(&graph);
        let contexts: Vec<_> = (0..parallelism).map(|index| context_of(index, parallelism)).collect();
        let operators = contexts.iter().map(|context| factory.create(context).unwrap()).collect();
        Self { query: query.to_owned(), contexts, operators }
    }

    /// A row of each of these keys at a time, in seconds.
    fn rows(&mut self, keys: &[i64], at: i64) {
        let rows: Vec<String> =
            keys.iter().map(|k| format!(r#"{{"k": {k}, "at": "1970-01-01T00:00:{at:02}"}}"#)).collect();
        let graph = job(&self.query, &rows.join("\n"));
        let (task, _) = stateful(&graph);
        let parallelism = self.operators.len() as u32;
        for edge in graph.edges.iter().filter(|e| e.to == task) {
            let Exchange::Hash(columns) = &edge.exchange else { panic!("rows come by their keys") };
            for batch in output(&graph, edge.from) {
                let keys: Vec<ArrayRef> = columns.iter().map(|c| batch.rows.column(*c).clone()).collect();
                let hashes = hash_keys(&keys, batch.len()).unwrap();
                for (index, operator) in (0..).zip(&mut self.operators) {
                    let owned = KeyGroupRange::of_subtask(index, parallelism, MAX_PARALLELISM);
                    let mine = |row: &u32| owned.contains(KeyGroup::of(hashes[*row as usize], MAX_PARALLELISM));
                    let mine: Vec<u32> = (0..batch.len() as u32).filter(mine).collect();
                    if !mine.is_empty() {
                        let hashes = Some(mine.iter().map(|row| hashes[*row as usize]).collect());
                        let rows = arrow::compute::take_record_batch(&batch.rows, &UInt32Array::from(mine)).unwrap();
                        let mine = Batch { rows, hashes };
                        operator.process(edge.port, mine, &mut Output::default()).unwrap();
                    }
                }
            }
        }
    }

    /// Event time reaches this in a subtask. Answers with what that makes it emit.
    fn watermark(&mut self, index: usize, watermark: TimestampMs) -> Vec<String> {
        let mut out = Output::default();
        self.operators[index].on_watermark(watermark, &mut out).unwrap();
        let mut rows: Vec<String> = out.take().iter().flat_map(|b| show("", &b.rows)).collect();
        rows.sort();
        rows
    }

    /// And in all.
    fn watermarks(&mut self, watermark: TimestampMs) -> Vec<String> {
        let mut rows: Vec<String> = (0..self.operators.len()).flat_map(|i| self.watermark(i, watermark)).collect();
        rows.sort();
        rows
    }

    /// New subtasks, restored from a snapshot of these.
    fn restored(&mut self, parallelism: u32) -> Self {
        let shards: Vec<RestoredShard> =
            (0..).zip(&mut self.operators).flat_map(|(index, o)| shards_of(&mut **o, index)).collect();
        let mut new = Self::new(&self.query, parallelism);
        for operator in &mut new.operators {
            operator.restore(shards.clone()).unwrap();
            operator.restored().unwrap();
        }
        new
    }

    fn late(&self) -> u64 {
        self.contexts.iter().map(|c| c.metrics.late.load(Ordering::Relaxed)).sum()
    }
}

/// A job that reads a table `t` of keys and times.
fn job(query: &str, rows: &str) -> JobGraph {
    let table = format!(
        "CREATE TABLE t (k BIGINT, at TIMESTAMP(3), WATERMARK FOR at AS at)
         WITH ('connector' = 'rows', 'rows' = '{rows}');"
    );
    planned(&format!("{table}{query}")).unwrap_or_else(|e| panic!("{e}"))
}

fn stateful(graph: &JobGraph) -> (TaskId, Arc<dyn floodmark_dataflow::OperatorFactory>) {
    let (task, node) = graph.nodes().find(|(_, n)| n.state_schema.is_some()).unwrap();
    let NodeKind::Operator(factory) = &node.node else { panic!("{} is no operator", node.uid) };
    (task, factory.clone())
}

/// All that a source task emits.
fn output(graph: &JobGraph, task: TaskId) -> Vec<Batch> {
    let chain = &graph.vertices[task.0].chain;
    let NodeKind::Source(source) = &chain[0].node else { panic!("task {task} reads nothing") };
    let mut reader = source.factory.open(Vec::new(), &context_of(0, 1)).unwrap();
    let mut batches = Vec::new();
    while let Polled::Batch { rows, .. } = reader.poll(Duration::ZERO).unwrap() {
        batches.push(Batch::new(source.compute.as_ref().map_or(rows.clone(), |c| c(rows).unwrap())));
    }
    for node in &chain[1..] {
        let NodeKind::Operator(factory) = &node.node else { panic!("{} is no operator", node.uid) };
        let mut operator = factory.create(&context_of(0, 1)).unwrap();
        let mut out = Output::default();
        batches.into_iter().for_each(|batch| operator.process(0, batch, &mut out).unwrap());
        operator.flush(&mut out).unwrap();
        batches = out.take();
    }
    batches
}

/// Rows of windows as the operator emits them: of each of the keys, so many rows between these seconds.
fn counts(windows: &[(&[i64], u32, [u32; 2])]) -> Vec<String> {
    let of = |(keys, n, [start, end]): &(&[i64], u32, [u32; 2])| {
        keys.iter().map(|k| format!(" +I {k} 00:00:{start:02}.000 00:00:{end:02}.000 {n}")).collect::<Vec<_>>()
    };
    let mut rows: Vec<String> = windows.iter().flat_map(of).collect();
    rows.sort();
    rows
}

fn counted(window: &str) -> String {
    format!(
        "CREATE TABLE o (k BIGINT, n BIGINT, en TIMESTAMP(3)) WITH ('connector' = 'rows');
         INSERT INTO o SELECT k, count(*), window_end FROM TABLE({window}) GROUP BY k, window_start, window_end"
    )
}

/// Two subtasks, with rows of all keys at 12 and 22 seconds: event time is at 25 s in the first, at 15 s in the second.
fn apart(query: &str, keys: &Keys) -> (Subtasks, Vec<String>) {
    let mut two = Subtasks::new(query, 2);
    two.rows(&keys.all(), 12);
    two.rows(&keys.all(), 22);
    let mut emitted = two.watermark(0, 25_000);
    emitted.extend(two.watermark(1, 15_000));
    assert_eq!(two.late(), 0);
    (two, emitted)
}

/// The ways from two subtasks to others; each is a restore, and the last has the rows fire.
const WAYS: [&[u32]; 6] = [&[2], &[1], &[3], &[1, 3], &[3, 1], &[3, 2, 1]];

#[test]
fn a_row_is_late_where_its_window_has_fired_and_nowhere_else() {
    let keys = Keys::new(&[]);
    let tumbling = counted("TUMBLE(TABLE t, DESCRIPTOR(at), INTERVAL '10' SECOND)");
    for way in WAYS {
        let (mut subtasks, emitted) = apart(&tumbling, &keys);
        assert_eq!(emitted, counts(&[(&keys.first, 1, [10, 20])]));
        for (restores, parallelism) in (1..).zip(way) {
            subtasks = subtasks.restored(*parallelism);
            subtasks.rows(&keys.all(), 11);
            assert_eq!(subtasks.late(), 2, "rows of [10, 20) of the keys where it has fired, {way:?} at {parallelism}");
            subtasks.rows(&keys.all(), 21);
            // An input that was idle begins anew, and does not tell more than was known.
            assert_eq!(subtasks.watermarks(14_000), [""; 0]);
            assert_eq!(subtasks.watermarks(16_000 + restores), [""; 0]);
            subtasks.rows(&keys.all(), 9);
            assert_eq!(subtasks.late(), 2 + 4, "{way:?} at {parallelism}");
        }
        let n = 1 + way.len() as u32;
        // The second half's window fires, the first half's not again.
        assert_eq!(subtasks.watermarks(25_500), counts(&[(&keys.second, n, [10, 20])]), "{way:?}");
        subtasks.rows(&keys.all(), 11);
        assert_eq!(subtasks.late(), 2 + 4 + 4, "all alike");
        assert_eq!(subtasks.watermarks(60_000), counts(&[(&keys.all(), n, [20, 30])]), "{way:?}");
    }
}

#[test]
fn windows_that_share_slices_fire_once_for_each_key() {
    let keys = Keys::new(&[]);
    let hopping = counted("HOP(TABLE t, DESCRIPTOR(at), INTERVAL '10' SECOND, INTERVAL '20' SECOND)");
    for way in WAYS {
        let (mut subtasks, emitted) = apart(&hopping, &keys);
        assert_eq!(emitted, counts(&[(&keys.first, 1, [0, 20])]));
        for parallelism in way {
            subtasks = subtasks.restored(*parallelism);
            // Of [0, 20) a row comes too late where it has fired; of [10, 30) it does not.
            subtasks.rows(&keys.all(), 11);
            assert_eq!(subtasks.late(), 0);
            subtasks.rows(&keys.all(), 7);
            assert_eq!(subtasks.late(), 2);
        }
        let n = way.len() as u32;
        assert_eq!(subtasks.watermarks(25_500), counts(&[(&keys.second, 1 + 2 * n, [0, 20])]), "{way:?}");
        let all = keys.all();
        assert_eq!(subtasks.watermarks(60_000), counts(&[(&all, 2 + n, [10, 30]), (&all, 1, [20, 40])]), "{way:?}");
    }
}

#[test]
fn rows_to_be_joined_are_late_where_their_window_has_been_joined() {
    // A join exchanges rows by their window, too: by the one of the rows that come late.
    let window = [10_000, 20_000].map(|t| Arc::new(TimestampMillisecondArray::from(vec![t])) as ArrayRef);
    let keys = Keys::new(&window);
    let window = "TABLE(TUMBLE(TABLE t, DESCRIPTOR(at), INTERVAL '10' SECOND))";
    let joined = format!(
        "CREATE TABLE o (k BIGINT, n BIGINT, en TIMESTAMP(3)) WITH ('connector' = 'rows');
         INSERT INTO o SELECT l.k, l.k - r.k, l.window_end FROM {window} l JOIN {window} r
         ON l.window_start = r.window_start AND l.window_end = r.window_end AND l.k = r.k"
    );
    // The output's columns are those of both sides: what counts is how many pairs there are of each key and window.
    let pairs = |rows: &[String], k: i64| rows.iter().filter(|row| row.starts_with(&format!(" +I {k} "))).count();
    for way in WAYS {
        let (mut subtasks, emitted) = apart(&joined, &keys);
        assert_eq!(keys.all().map(|k| pairs(&emitted, k)), [1, 1, 0, 0], "{emitted:?}");
        for parallelism in way {
            subtasks = subtasks.restored(*parallelism);
            subtasks.rows(&keys.all(), 11);
            assert_eq!(subtasks.late(), 2 * 2, "on both sides, {way:?} at {parallelism}");
            assert_eq!(subtasks.watermarks(14_000), [""; 0]);
        }
        let n = 1 + way.len();
        let emitted = subtasks.watermarks(25_500);
        assert_eq!(keys.all().map(|k| pairs(&emitted, k)), [0, 0, n * n, n * n], "{way:?}");
        let emitted = subtasks.watermarks(60_000);
        assert_eq!(keys.all().map(|k| pairs(&emitted, k)), [1; 4], "{way:?}");
    }
}
