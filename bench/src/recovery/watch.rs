//! Reads the job's output as it becomes visible, and notes when: a consumer of committed records on a thread of its own.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use serde_json::Value;

/// The broker answers at the latest after this long: how exact the clock is.
const WAIT_MS: &str = "5";
const POLL: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(10);
/// Records that are remembered: those of many recoveries.
const SEEN_MAX: usize = 4_000_000;

/// Ends with its owner.
pub(crate) struct Watch {
    /// When each record was seen, and the event that it tells of.
    seen: Arc<Mutex<Vec<(Instant, u64)>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches a topic from its present end on; field `field` of the records' values names an event.
    pub(crate) fn start(bootstrap: &str, topic: &str, partitions: i32, field: &'static str) -> Result<Self> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", bootstrap)
            .set("group.id", "floodmark-bench")
            .set("isolation.level", "read_committed")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", WAIT_MS)
            .create()
            .context("make a consumer")?;
        let mut assignment = TopicPartitionList::new();
        for partition in 0..partitions {
            let (_, end) = consumer.fetch_watermarks(topic, partition, PATIENCE)?;
            assignment.add_partition_offset(topic, partition, Offset::Offset(end))?;
        }
        consumer.assign(&assignment)?;
        let (seen, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let thread = thread::spawn({
            let (seen, stop) = (seen.clone(), stop.clone());
            move || read(&consumer, field, &seen, &stop)
        });
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// When the first record was seen, after `start`, of an event that is `wanted`.
    pub(crate) fn first_since(&self, start: Instant, wanted: impl Fn(u64) -> bool) -> Option<Instant> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let from = seen.partition_point(|(at, _)| *at < start);
        seen.drain(..from);
        seen.iter().find(|(_, event)| wanted(*event)).map(|(at, _)| *at)
    }

    /// When each record after `start` was seen, and the event that it tells of.
    pub(crate) fn since(&self, start: Instant) -> Vec<(Instant, u64)> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let from = seen.partition_point(|(at, _)| *at < start);
        seen.drain(..from);
        seen.clone()
    }
}

fn read(consumer: &BaseConsumer, field: &str, seen: &Mutex<Vec<(Instant, u64)>>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let Some(Ok(message)) = consumer.poll(POLL) else { continue };
        let at = Instant::now();
        let value = message.payload().and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok());
        let Some(event) = value.and_then(|value| value[field].as_u64()) else { continue };
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() < SEEN_MAX {
            seen.push((at, event));
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}
