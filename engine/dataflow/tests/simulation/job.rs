//! Small jobs: which tasks there are, how they are joined, and what must come out of them. Rows are `[key, seq, time, path]`:
//! each split counts its own keys up, and the path says through which tasks and ports a row has come.

use std::collections::BTreeMap;

use floodmark_dataflow::Exchange;

/// Number of key groups.
pub(crate) const MAX_PARALLELISM: u16 = 16;
/// Keys of one split.
const KEYS: i64 = 3;

pub(crate) type Row = [i64; 4];

/// Linear congruential; good enough to shuffle a schedule, and the same for ever.
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

/// What the head of a task's chain does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// Reads splits of these many rows.
    Source,
    /// Holds a few batches back.
    Buffer,
    /// Remembers what it has seen of each key.
    Keyed,
    /// Holds rows back until their window closes.
    Window,
}

#[derive(Clone, Debug)]
pub(crate) struct Edge {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) port: usize,
    pub(crate) exchange: Exchange,
}

/// A job: tasks in topological order.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) heads: Vec<Head>,
    pub(crate) edges: Vec<Edge>,
    /// Rows of each split of each source task; empty for other tasks.
    pub(crate) splits: Vec<Vec<i64>>,
}

/// Row number `n` of a split.
pub(crate) fn row(task: usize, split: usize, n: i64) -> Row {
    [(task * 100 + split) as i64 * 10 + n % KEYS, n / KEYS, n, path(1, task, 0)]
}

/// The path of a row behind `task`, which it has entered through `port`.
pub(crate) fn path(before: i64, task: usize, port: usize) -> i64 {
    before * 32 + (port * 16 + task) as i64
}

/// A way from a source to a task.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) source: usize,
    /// Whether rows of a key stay in order on it: batches that are dealt out in turn lose theirs.
    pub(crate) ordered: bool,
}

impl Job {
    pub(crate) fn inputs(&self, task: usize) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |e| e.to == task)
    }

    pub(crate) fn is_sink(&self, task: usize) -> bool {
        self.edges.iter().all(|e| e.from != task)
    }

    /// All ways through each task, by the path of rows behind it.
    pub(crate) fn ways(&self) -> Vec<BTreeMap<i64, Way>> {
        let mut all: Vec<BTreeMap<i64, Way>> = Vec::new();
        for (task, head) in self.heads.iter().enumerate() {
            let mut here = BTreeMap::new();
            if *head == Head::Source {
                here.insert(path(1, task, 0), Way { source: task, ordered: true });
            }
            for edge in self.inputs(task) {
                for (before, way) in &all[edge.from] {
                    let ordered = way.ordered && edge.exchange != Exchange::Rebalance;
                    here.insert(path(*before, task, edge.port), Way { ordered, ..*way });
                }
            }
            all.push(here);
        }
        all
    }

    /// Fails unless `rows` is what sink `task` must have written: every row of every source once for each way that leads
    /// here, in order for each key where the way keeps order.
    pub(crate) fn check(&self, task: usize, rows: &[Row]) {
        let mut got: BTreeMap<(i64, i64), Vec<i64>> = BTreeMap::new();
        for [key, seq, _, path] in rows {
            got.entry((*path, *key)).or_default().push(*seq);
        }
        let mut expected: BTreeMap<(i64, i64), Vec<i64>> = BTreeMap::new();
        for (path, way) in &self.ways()[task] {
            for (split, rows) in self.splits[way.source].iter().enumerate() {
                for [key, seq, ..] in (0..*rows).map(|n| row(way.source, split, n)) {
                    expected.entry((*path, key)).or_default().push(seq);
                    if let Some(got) = got.get_mut(&(*path, key)).filter(|_| !way.ordered) {
                        got.sort_unstable();
                    }
                }
            }
        }
        assert_eq!(got, expected, "what sink {task} wrote, by path and key");
    }

    /// A random job of two to four tasks.
    pub(crate) fn random(random: &mut Random) -> Self {
        let tasks = 2 + random.below(3);
        let mut job = Self { heads: Vec::new(), edges: Vec::new(), splits: Vec::new() };
        for task in 0..tasks {
            if task == 0 || (task + 1 < tasks && random.one_in(4)) {
                job.heads.push(Head::Source);
                let lengths = [0, 4, 15, 40];
                job.splits.push((0..1 + random.below(4)).map(|_| random.pick(&lengths)).collect());
                continue;
            }
            job.splits.push(Vec::new());
            let any = [Exchange::Hash(vec![0]), Exchange::Hash(vec![0]), Exchange::Rebalance, Exchange::Forward];
            let first = Edge { from: random.below(task), to: task, port: 0, exchange: random.pick(&any) };
            let mut second = Edge { from: random.below(task), port: random.below(2), ..first.clone() };
            second.exchange = random.pick(&any);
            if second.from == first.from {
                second.port = 1;
            }
            job.edges.push(first);
            if random.one_in(2) {
                job.edges.push(second);
            }
            let keyed = job.inputs(task).all(|e| e.exchange == Exchange::Hash(vec![0]));
            job.heads.push(if keyed { random.pick(&[Head::Keyed, Head::Window]) } else { Head::Buffer });
        }
        job
    }

    /// A parallelism for each task: tasks that forward to each other have the same.
    pub(crate) fn parallelism(&self, random: &mut Random, max: usize) -> Vec<u32> {
        let mut group: Vec<usize> = (0..self.heads.len()).collect();
        for edge in self.edges.iter().filter(|e| e.exchange == Exchange::Forward) {
            let (from, to) = (group[edge.from], group[edge.to]);
            group.iter_mut().filter(|g| **g == to).for_each(|g| *g = from);
        }
        let of_group: Vec<u32> = group.iter().map(|_| 1 + random.below(max) as u32).collect();
        group.iter().map(|g| of_group[*g]).collect()
    }
}
