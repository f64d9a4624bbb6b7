//! Writes orders to a topic while a job reads it: gradually, so that kills fall into the middle of the work.
//!
//! Invariant: each order is in the topic once, and a shop's orders are in one partition in the order of their numbers, also
//! if the broker restarts meanwhile.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use rdkafka::{
    ClientConfig, ClientContext,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext},
};

use crate::events::{Order, Orders};

/// How long the last records may take to be acknowledged.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(120);
/// Sent between two looks at the clock.
const BURST: u64 = 500;
/// From here on, of a hundred, it only trickles until it is told to finish.
const HELD_BACK_FROM: u64 = 90;
/// How long it may take to notice that it is to finish.
const POLL: Duration = Duration::from_millis(50);
/// A trickle is this many times slower.
const TRICKLE: f64 = 20.0;

/// Writes records and remembers the first that was not delivered.
#[derive(Default)]
struct Deliveries {
    failed: Mutex<Option<KafkaError>>,
}

impl ClientContext for Deliveries {}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.clone());
        }
    }
}

/// A producer to explicit partitions that neither loses, repeats nor reorders.
pub struct Writer {
    producer: BaseProducer<Deliveries>,
    topic: String,
}

impl Writer {
    /// A producer for one topic.
    ///
    /// # Errors
    /// When the client can't be made.
    pub fn new(bootstrap: &str, topic: &str) -> Result<Self> {
        let producer = ClientConfig::new()
            .set("bootstrap.servers", bootstrap)
            .set("enable.idempotence", "true")
            .set("message.timeout.ms", "120000")
            .set("linger.ms", "5")
            .set("queue.buffering.max.messages", "200000")
            .create_with_context(Deliveries::default())
            .context("make a producer")?;
        Ok(Self { producer, topic: topic.to_owned() })
    }

    /// Writes a record; waits while the producer's queue is full.
    ///
    /// # Errors
    /// When this or an earlier one can't be delivered.
    pub fn write(&self, partition: i32, value: &[u8]) -> Result<()> {
        let mut record = BaseRecord::<(), [u8]>::to(&self.topic).partition(partition).payload(value);
        loop {
            match self.producer.send(record) {
                Ok(()) => break,
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) => {
                    self.producer.poll(Duration::from_millis(10));
                    record = again;
                }
                Err((error, _)) => return Err(error).with_context(|| format!("write to {}", self.topic)),
            }
        }
        self.producer.poll(Duration::ZERO);
        self.check()
    }

    /// Writes orders, each to its partition of `partitions`.
    ///
    /// # Errors
    /// When one can't be delivered.
    pub fn write_orders(&self, orders: impl Iterator<Item = Order>, partitions: i32) -> Result<u64> {
        let mut written = 0;
        for order in orders {
            self.write(order.partition(partitions), order.json().as_bytes())?;
            written += 1;
        }
        Ok(written)
    }

    /// Waits until all is acknowledged.
    ///
    /// # Errors
    /// When something isn't.
    pub fn flush(&self) -> Result<()> {
        self.producer.flush(FLUSH_TIMEOUT).with_context(|| format!("write to {}", self.topic))?;
        self.check()
    }

    fn check(&self) -> Result<()> {
        let failed = self.producer.context().failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.map_or(Ok(()), |error| Err(error).with_context(|| format!("write to {}", self.topic)))
    }
}

/// A thread that writes orders at a rate.
pub struct Feeder {
    thread: Option<JoinHandle<Result<()>>>,
    orders: Arc<Progress>,
}

#[derive(Default)]
struct Progress {
    sent: AtomicU64,
    released: AtomicBool,
    ended: AtomicBool,
    abandoned: AtomicBool,
}

impl Feeder {
    /// Starts to write the first `count` orders, `per_second` of them each second; the last tenth only when told to finish.
    ///
    /// # Errors
    /// When the producer can't be made.
    pub fn start(
        bootstrap: &str,
        topic: &str,
        partitions: i32,
        orders: Orders,
        count: u64,
        per_second: u64,
    ) -> Result<Self> {
        let writer = Writer::new(bootstrap, topic)?;
        let progress = Arc::<Progress>::default();
        let of_thread = progress.clone();
        let thread = std::thread::spawn(move || feed(&writer, partitions, orders, count, per_second, &of_thread));
        Ok(Self { thread: Some(thread), orders: progress })
    }

    /// Orders handed to the producer so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.orders.sent.load(Ordering::Relaxed)
    }

    /// Writes the rest as fast as it can, and waits until all is acknowledged.
    ///
    /// # Errors
    /// When something can't be delivered.
    pub fn finish(mut self) -> Result<()> {
        self.orders.released.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Writes no more, waits until all is acknowledged, and says how many orders that were.
    ///
    /// # Errors
    /// When something can't be delivered.
    pub fn end(mut self) -> Result<u64> {
        self.orders.ended.store(true, Ordering::Relaxed);
        self.join()?;
        Ok(self.sent())
    }

    fn join(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { bail!("the feeder has ended before") };
        thread.join().map_err(|_| anyhow!("the feeder panicked"))?
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.orders.abandoned.store(true, Ordering::Relaxed);
        // Whoever drops it has failed already, or has joined it.
        let _ = self.join();
    }
}

fn feed(
    writer: &Writer,
    partitions: i32,
    orders: Orders,
    count: u64,
    per_second: u64,
    progress: &Progress,
) -> Result<()> {
    let held_back_from = count / 100 * HELD_BACK_FROM;
    let (mut due, mut next) = (Instant::now(), 0);
    while next < count {
        if progress.abandoned.load(Ordering::Relaxed) {
            return Ok(());
        }
        if progress.ended.load(Ordering::Relaxed) {
            break;
        }
        let released = progress.released.load(Ordering::Relaxed);
        let trickles = next >= held_back_from;
        // The very last ones stay for the end.
        let wait = if trickles && next + BURST >= count { POLL } else { due.saturating_duration_since(Instant::now()) };
        if !released && !wait.is_zero() {
            sleep(wait.min(POLL));
            continue;
        }
        let burst = (next..count.min(next + BURST)).map(|n| orders.order(n));
        next += writer.write_orders(burst, partitions)?;
        progress.sent.store(next, Ordering::Relaxed);
        let slower = if trickles { TRICKLE } else { 1.0 };
        due += Duration::from_secs_f64(BURST as f64 / per_second as f64 * slower);
    }
    writer.flush()
}
