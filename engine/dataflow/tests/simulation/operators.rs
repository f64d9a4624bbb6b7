//! The source, operators and sink of the simulated jobs. They check what they see: a row that comes twice, too late or out of
//! order fails the run at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use arrow::{
    array::{AsArray, Int64Array},
    datatypes::Int64Type,
    record_batch::RecordBatch,
};
use bytes::Bytes;
use floodmark_dataflow::{
    Barrier, Batch, Operator, Output, PendingShard, Port, RestoredShard, StateSnapshot, WATERMARK_MIN,
    hash::hash_keys,
    source::{Polled, Source},
};
use floodmark_snapshot::{Epoch, KeyGroup, KeyGroupRange, Result, ShardKind, SplitState, TimestampMs};
use serde_json::json;

use crate::job::{MAX_PARALLELISM, Random, Row, Way, path, row};

/// How long a window is, in rows of a split.
const WINDOW: i64 = 7;

pub(crate) fn batch(rows: &[Row]) -> RecordBatch {
    let column = |c: usize| Arc::new(rows.iter().map(|r| r[c]).collect::<Int64Array>()) as _;
    RecordBatch::try_from_iter([("key", column(0)), ("seq", column(1)), ("time", column(2)), ("path", column(3))])
        .unwrap()
}

pub(crate) fn rows(batch: &RecordBatch) -> Vec<Row> {
    let column = |c: usize| batch.column(c).as_primitive::<Int64Type>().values().clone();
    let [key, seq, time, path] = [column(0), column(1), column(2), column(3)];
    (0..batch.num_rows()).map(|i| [key[i], seq[i], time[i], path[i]]).collect()
}

fn group(key: i64) -> KeyGroup {
    let column: arrow::array::ArrayRef = Arc::new(Int64Array::from(vec![key]));
    KeyGroup::of(hash_keys(&[column], 1).unwrap()[0], MAX_PARALLELISM)
}

/// Reads a share of a source's splits, now and then nothing.
pub(crate) struct Counter {
    pub(crate) task: usize,
    pub(crate) splits: Vec<CounterSplit>,
    pub(crate) random: Random,
    /// The last checkpoint whose completion it was told.
    pub(crate) completed: Epoch,
}

pub(crate) struct CounterSplit {
    pub(crate) number: usize,
    pub(crate) next: i64,
    pub(crate) end: i64,
    pub(crate) finished: bool,
}

impl Source for Counter {
    fn poll(&mut self, _: Duration) -> Result<Polled> {
        if self.splits.iter().all(|s| s.finished) {
            return Ok(Polled::Exhausted);
        }
        let i = self.random.below(self.splits.len());
        let up_to = 1 + self.random.below(4) as i64;
        let split = &mut self.splits[i];
        if split.finished || self.random.one_in(4) {
            return Ok(Polled::Pending);
        }
        if split.next == split.end {
            split.finished = true;
            return Ok(Polled::SplitFinished { split: i });
        }
        let to = (split.next + up_to).min(split.end);
        let read: Vec<Row> = (split.next..to).map(|n| row(self.task, split.number, n)).collect();
        split.next = to;
        Ok(Polled::Batch { split: i, rows: batch(&read) })
    }

    fn positions(&self) -> Result<Vec<SplitState>> {
        let state = |s: &CounterSplit| SplitState {
            split: s.number.to_string(),
            position: json!(s.next),
            watermark: None,
            finished: s.finished,
        };
        Ok(self.splits.iter().map(state).collect())
    }

    fn on_completed(&mut self, epoch: Epoch, positions: &[SplitState]) -> Result<()> {
        assert!(epoch > self.completed, "{epoch} completes after {}", self.completed);
        self.completed = epoch;
        for (position, split) in positions.iter().zip(&self.splits) {
            assert!(position.position.as_i64().unwrap() <= split.next, "split {} was not read so far", split.number);
        }
        Ok(())
    }
}

/// Which checkpoints an operator was told the end of.
#[derive(Default)]
pub(crate) struct Notices {
    ended: BTreeSet<Epoch>,
    pub(crate) aborted: usize,
}

impl Notices {
    fn aborted(&mut self, epoch: Epoch) {
        assert!(self.ended.insert(epoch), "the end of checkpoint {epoch} was told twice");
        self.aborted += 1;
    }

    fn completed(&mut self, epoch: Epoch) {
        assert!(self.ended.insert(epoch), "the end of checkpoint {epoch} was told twice");
    }
}

/// Notices of all operators of a run.
pub(crate) type AllNotices = Arc<Mutex<BTreeMap<(usize, u32), Notices>>>;

/// The place of an operator, and where it tells of the notices that it gets.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) task: usize,
    pub(crate) index: u32,
    pub(crate) owned: KeyGroupRange,
    pub(crate) ways: Arc<BTreeMap<i64, Way>>,
    pub(crate) notices: AllNotices,
}

impl Place {
    /// Rows as they are behind this task.
    fn enter(&self, port: Port, batch: &Batch) -> Vec<Row> {
        rows(&batch.rows).into_iter().map(|[k, s, t, p]| [k, s, t, path(p, self.task, port)]).collect()
    }

    fn told(&self, tell: impl Fn(&mut Notices)) {
        tell(self.notices.lock().unwrap().entry((self.task, self.index)).or_default());
    }
}

fn shard(kind: ShardKind, groups: Option<KeyGroupRange>, rows: &[Row]) -> PendingShard {
    let bytes = Bytes::from(serde_json::to_vec(rows).unwrap());
    PendingShard::new(kind, groups, rows.len() as u64, Box::new(|| Ok(bytes)))
}

fn emit(rows: &[Row], out: &mut Output) {
    out.emit(Batch::new(batch(rows)));
}

/// Holds up to three batches back, until a barrier or a watermark.
pub(crate) struct Buffer {
    pub(crate) place: Place,
    pub(crate) held: Vec<Vec<Row>>,
}

impl Operator for Buffer {
    fn process(&mut self, port: Port, batch: Batch, out: &mut Output) -> Result<()> {
        self.held.push(self.place.enter(port, &batch));
        if self.held.len() > 3 { self.flush(out) } else { Ok(()) }
    }

    fn on_watermark(&mut self, _: TimestampMs, out: &mut Output) -> Result<()> {
        self.flush(out)
    }

    fn flush(&mut self, out: &mut Output) -> Result<()> {
        self.held.drain(..).for_each(|rows| emit(&rows, out));
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        assert!(self.held.is_empty(), "a snapshot before the flush");
        Ok(StateSnapshot::default())
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.place.told(|n| n.completed(epoch));
        Ok(())
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.place.told(|n| n.aborted(epoch));
        Ok(())
    }
}

/// Passes rows on, and remembers all that it has seen: none may come twice, or out of order.
pub(crate) struct Keyed {
    pub(crate) place: Place,
    pub(crate) seen: BTreeMap<(i64, i64), BTreeSet<i64>>,
}

impl Operator for Keyed {
    fn process(&mut self, port: Port, batch: Batch, out: &mut Output) -> Result<()> {
        let rows = self.place.enter(port, &batch);
        assert!(batch.hashes.is_some(), "a hash exchange brings hashes, also from a snapshot");
        for row @ [key, seq, _, path] in &rows {
            assert!(self.place.owned.contains(group(*key)), "{row:?} came to the wrong subtask");
            let seen = self.seen.entry((*path, *key)).or_default();
            assert!(seen.insert(*seq), "{row:?} came twice");
            let in_order = !self.place.ways[path].ordered || seen.len() as i64 == seq + 1;
            assert!(in_order, "{row:?} came out of order, behind {:?}", seen.last());
        }
        emit(&rows, out);
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let rows: Vec<Row> =
            self.seen.iter().flat_map(|((path, key), seen)| seen.iter().map(|s| [*key, *s, 0, *path])).collect();
        Ok(StateSnapshot::of(vec![shard(ShardKind::Keyed, Some(self.place.owned), &rows)]))
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        for shard in shards.iter().filter(|s| s.shard.kind == ShardKind::Keyed) {
            let rows: Vec<Row> = serde_json::from_slice(shard.file().unwrap()).unwrap();
            for [key, seq, _, path] in rows.into_iter().filter(|r| self.place.owned.contains(group(r[0]))) {
                self.seen.entry((path, key)).or_default().insert(seq);
            }
        }
        Ok(())
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.place.told(|n| n.completed(epoch));
        Ok(())
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.place.told(|n| n.aborted(epoch));
        Ok(())
    }
}

/// Holds rows back until their window closes. None may come late.
pub(crate) struct Window {
    pub(crate) place: Place,
    pub(crate) held: BTreeSet<(i64, i64, i64, i64)>,
    pub(crate) watermark: TimestampMs,
}

impl Window {
    pub(crate) fn new(place: Place) -> Self {
        Self { place, held: BTreeSet::new(), watermark: WATERMARK_MIN }
    }
}

impl Operator for Window {
    fn process(&mut self, port: Port, batch: Batch, _: &mut Output) -> Result<()> {
        for row @ [key, seq, time, path] in self.place.enter(port, &batch) {
            let end = (time / WINDOW + 1) * WINDOW;
            assert!(end - 1 > self.watermark, "{row:?} came late: the watermark is {}", self.watermark);
            assert!(self.held.insert((time, key, seq, path)), "{row:?} came twice");
        }
        Ok(())
    }

    fn on_watermark(&mut self, watermark: TimestampMs, out: &mut Output) -> Result<()> {
        // After a restore event time comes from further back.
        if watermark > self.watermark {
            self.watermark = watermark;
            let open = |time: i64| (time / WINDOW + 1) * WINDOW - 1 > watermark;
            let due: Vec<Row> =
                self.held.iter().take_while(|r| !open(r.0)).map(|(t, k, s, p)| [*k, *s, *t, *p]).collect();
            self.held.retain(|r| open(r.0));
            emit(&due, out);
        }
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let mut rows: Vec<Row> = vec![[0, 0, self.watermark, -1]];
        rows.extend(self.held.iter().map(|(t, k, s, p)| [*k, *s, *t, *p]));
        Ok(StateSnapshot::of(vec![shard(ShardKind::Keyed, Some(self.place.owned), &rows)]))
    }

    fn restore(&mut self, shards: Vec<RestoredShard>) -> Result<()> {
        let mut least: Option<TimestampMs> = None;
        for shard in shards.iter().filter(|s| s.shard.kind == ShardKind::Keyed) {
            for [key, seq, time, path] in serde_json::from_slice::<Vec<Row>>(shard.file().unwrap()).unwrap() {
                if path == -1 {
                    least = Some(least.map_or(time, |l| l.min(time)));
                } else if self.place.owned.contains(group(key)) {
                    self.held.insert((time, key, seq, path));
                }
            }
        }
        self.watermark = least.unwrap_or(WATERMARK_MIN);
        Ok(())
    }

    fn on_completed(&mut self, epoch: Epoch) -> Result<()> {
        self.place.told(|n| n.completed(epoch));
        Ok(())
    }

    fn on_aborted(&mut self, epoch: Epoch) -> Result<()> {
        self.place.told(|n| n.aborted(epoch));
        Ok(())
    }
}

/// Stages rows until the next barrier.
#[derive(Default)]
pub(crate) struct Stage(pub(crate) Vec<Row>);

impl Operator for Stage {
    fn process(&mut self, _: Port, batch: Batch, _: &mut Output) -> Result<()> {
        self.0.extend(rows(&batch.rows));
        Ok(())
    }

    fn snapshot(&mut self, _: &Barrier) -> Result<StateSnapshot> {
        let staged = std::mem::take(&mut self.0);
        Ok(StateSnapshot::of(vec![shard(ShardKind::Staged, None, &staged)]))
    }
}
