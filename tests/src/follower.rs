//! A thread that reads a topic as those do who see only what is committed: how many records there are, and when they came.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};

/// From one look at whether to end to the next.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Records that come so close together came at the same time.
const TOGETHER: Duration = Duration::from_millis(5);

/// See the header of this file. Ends when dropped.
pub struct Follower {
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// When records came, and how many there were by then.
    arrivals: Mutex<Vec<(Instant, u64)>>,
    ended: AtomicBool,
}

impl Follower {
    /// Reads a topic of so many partitions from its beginning on.
    ///
    /// # Errors
    /// When the consumer can't be made.
    pub fn start(bootstrap: &str, topic: &str, partitions: i32) -> Result<Self> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", bootstrap)
            .set("group.id", "follower")
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_committed")
            .set("fetch.wait.max.ms", "20")
            .create()
            .context("make a consumer")?;
        let mut all = TopicPartitionList::new();
        for partition in 0..partitions {
            all.add_partition_offset(topic, partition, Offset::Beginning)?;
        }
        consumer.assign(&all)?;
        let shared = Arc::<Shared>::default();
        let of_thread = shared.clone();
        let thread = std::thread::spawn(move || follow(&consumer, &of_thread));
        Ok(Self { thread: Some(thread), shared })
    }

    /// Records so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.arrivals(|all| all.last().map_or(0, |(_, count)| *count))
    }

    /// The longest time without a record that then lasted, or that began between then and now.
    #[must_use]
    pub fn longest_silence(&self, since: Instant) -> Duration {
        self.arrivals(|all| {
            let before = all.partition_point(|(at, _)| *at <= since);
            let mut last = all[..before].last().map_or(since, |(at, _)| *at);
            let mut longest = Duration::ZERO;
            for at in all[before..].iter().map(|(at, _)| *at).chain([Instant::now()]) {
                longest = longest.max(at - last);
                last = at;
            }
            longest
        })
    }

    fn arrivals<T>(&self, ask: impl FnOnce(&[(Instant, u64)]) -> T) -> T {
        ask(&self.shared.arrivals.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn follow(consumer: &BaseConsumer, shared: &Shared) {
    while !shared.ended.load(Ordering::Relaxed) {
        let Some(Ok(_)) = consumer.poll(LOOK_EVERY) else { continue };
        let now = Instant::now();
        let mut arrivals = shared.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        let count = arrivals.last().map_or(0, |(_, count)| *count) + 1;
        match arrivals.last_mut() {
            Some((at, before)) if now - *at < TOGETHER => *before = count,
            _ => arrivals.push((now, count)),
        }
    }
}
