//! `floodmark-bench exchange`: what a channel between two processes carries and costs, against one between two tasks of a
//! process; and that one that stands still holds up no other, and no more memory than its bound.
//!
//! Both ends are in this process, so processor time is that of both. The receiver looks at every batch, not at its rows.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use async_trait::async_trait;
use floodmark_dataflow::{
    Batch, Frame,
    channel::{CHANNEL_BYTES_MAX, Inbox, Refused, Sender, Signal},
};
use floodmark_link::{
    exchange::{self, ChannelId, Exchange, WINDOW_BYTES},
    tls::{Authority, CERTIFICATE_LIFETIME, Role, Subject},
    transport::{
        Acceptors, Listening, Transport,
        grpc::{Duplex, GrpcTransport, Handshake, Settings},
    },
};
use floodmark_snapshot::{Attempt, Env, JobId};
use serde_json::json;
use tokio::{net::TcpStream, runtime::Runtime};

use crate::{
    report::{Figure, Report, Spread, rounded},
    rows::{cpu_seconds_of, memory_of},
};

pub(crate) const ABOUT: &str = "\
Sends batches of 8,192 rows of 100 bytes, with the hashes of their keys, from a thread to a thread: over a channel within the process, \
over loopback in the clear (to know what TLS costs; the program never does that), and over loopback with mutual TLS, over one channel and \
over four into one inbox. CPU-seconds are those of both ends.

Then one channel of two between the same processes is not read: what the other carries meanwhile, and how many bytes the one that stands \
still has taken in. The bound is 1 MiB and a frame at each end. At last 64 channels stand still: by how much the process grows.";

const OF: &str = "exchange";
const ROWS: usize = 8192;
/// Channels that stand still at once.
const STALLED: u32 = 64;
/// How long a channel that nobody reads is given to fill.
const FILLS_WITHIN: Duration = Duration::from_secs(5);
/// What buffers of HTTP/2, TLS and sockets may add for each channel that stands still, and what the rest of the process may.
const NETWORK_BYTES_MAX: u64 = 256 << 10;
const PROCESS_BYTES_MAX: u64 = 16 << 20;
/// A channel beside one that stands still may be so much slower than alone before it counts as held up.
const SLOWER_MAX: f64 = 2.0;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Batches per channel and run
    #[arg(long, default_value_t = 2500, value_parser = clap::value_parser!(u32).range(1..))]
    batches: u32,
    /// Runs of each; the middle one is told
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
}

impl Args {
    /// What a run without a command takes.
    pub(crate) fn moderate() -> Self {
        Self { batches: 1000, repeat: 3 }
    }
}

fn subject() -> Subject {
    let job = JobId { namespace: "default".into(), name: "figures".into(), uid: "local".into() };
    Subject { job, role: Role::Worker }
}

/// Trusts everybody, and hides nothing.
struct Plain;

#[async_trait]
impl Handshake for Plain {
    async fn connect(&self, stream: TcpStream, _: Role) -> floodmark_snapshot::Result<(Box<dyn Duplex>, Subject)> {
        Ok((Box::new(stream), subject()))
    }

    async fn accept(&self, stream: TcpStream) -> floodmark_snapshot::Result<(Box<dyn Duplex>, Subject)> {
        Ok((Box::new(stream), subject()))
    }
}

/// Three numbers and a text: 100 bytes a row, with the text's offset.
fn batch(number: usize) -> Result<Batch> {
    let numbers = |factor: i64| Arc::new((0..ROWS as i64).map(|r| r * factor).collect::<Int64Array>()) as ArrayRef;
    let texts: StringArray = (0..ROWS).map(|r| Some(format!("{:072}", r * 31 + number))).collect();
    let columns = [("a", numbers(1)), ("b", numbers(7)), ("c", numbers(13)), ("t", Arc::new(texts) as _)];
    let hashes = (0..ROWS as u64).map(|r| r.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
    Ok(Batch { rows: RecordBatch::try_from_iter(columns)?, hashes: Some(hashes) })
}

/// One end of a channel with the signal of its task.
struct Writer {
    sender: Sender,
    signal: Arc<Signal>,
}

impl Writer {
    /// Sends a frame; waits for room. False if the receiver has gone.
    fn send(&self, mut frame: Frame) -> bool {
        loop {
            match self.sender.try_send(frame) {
                Ok(()) => return true,
                Err(Refused::Full(back)) => frame = back,
                Err(Refused::Closed) => return false,
            }
            self.signal.wait(None);
        }
    }

    fn send_all(&self, batches: &[Batch], count: u32) {
        let rows = (0..count as usize).map(|number| Frame::Batch(batches[number % batches.len()].clone()));
        // A receiver that has gone shows in what it has counted.
        let _ = rows.chain([Frame::End]).all(|frame| self.send(frame));
    }

    /// Sends as much as the channel takes in while nobody reads: its bytes.
    fn fill(&self, batch: &Batch) -> u64 {
        let (weight, mut sent, mut last) = (batch.weight() as u64, 0, Instant::now());
        let begun = Instant::now();
        // What has come through the network makes room again for a while.
        while last.elapsed() < FILLS_WITHIN / 10 && begun.elapsed() < FILLS_WITHIN {
            if self.sender.try_send(Frame::Batch(batch.clone())).is_ok() {
                (sent, last) = (sent + weight, Instant::now());
            } else {
                self.signal.wait(Some(FILLS_WITHIN / 100));
            }
        }
        sent
    }
}

#[derive(Default)]
struct Received {
    rows: u64,
    bytes: u64,
}

/// Reads until every channel has ended.
fn receive(mut inbox: Inbox, signal: &Signal) -> Received {
    let (mut received, mut open) = (Received::default(), inbox.channels());
    while open > 0 {
        match inbox.try_recv(|_| false) {
            Some((_, Frame::Batch(batch))) => {
                received.rows += batch.len() as u64;
                received.bytes += batch.weight() as u64;
            }
            Some((_, Frame::End)) => open -= 1,
            Some(_) => {}
            None => signal.wait(None),
        }
    }
    received
}

/// Two processes' ends of the exchange, both in this one.
struct Remote {
    sending: Arc<Exchange>,
    receiving: Arc<Exchange>,
    listening: Box<dyn Listening>,
    channels: u32,
    lost: Arc<AtomicBool>,
}

const ATTEMPT: Attempt = Attempt(1);

impl Remote {
    fn start(runtime: &Runtime, transport: impl Fn() -> Result<GrpcTransport>) -> Result<Self> {
        let (env, lost) = (Env::system(), Arc::<AtomicBool>::default());
        let exchange = |transport: Arc<dyn Transport>| {
            let lost = lost.clone();
            Exchange::new(env.clone(), transport, Arc::new(move |_| lost.store(true, Ordering::Relaxed)))
        };
        let (here, there): (Arc<dyn Transport>, Arc<dyn Transport>) = (Arc::new(transport()?), Arc::new(transport()?));
        let (sending, receiving) = (exchange(here), exchange(there.clone()));
        let acceptors = Acceptors::default().with(exchange::PURPOSE, Arc::new(receiving.clone()));
        let address = SocketAddr::from(([127, 0, 0, 1], 0)).to_string();
        let listening = runtime.block_on(there.listen(&address.as_str().into(), Arc::new(acceptors)));
        let listening = listening.map_err(|e| anyhow!("{e}"))?;
        for exchange in [&sending, &receiving] {
            exchange.begin(ATTEMPT).map_err(|e| anyhow!("{e}"))?;
        }
        Ok(Self { sending, receiving, listening, channels: 0, lost })
    }

    fn channel(&mut self, inbox: &mut Inbox) -> Result<Writer> {
        self.channels += 1;
        let id = ChannelId { attempt: ATTEMPT, edge: 0, from: self.channels, to: 0 };
        self.receiving.expect(id, inbox.channel(Arc::default())).map_err(|e| anyhow!("{e}"))?;
        let signal = Arc::<Signal>::default();
        let sender = self.sending.connect(id, self.listening.endpoint(), signal.clone());
        Ok(Writer { sender: sender.map_err(|e| anyhow!("{e}"))?, signal })
    }

    fn end(self, runtime: &Runtime) -> Result<()> {
        ensure!(!self.lost.load(Ordering::Relaxed), "a channel was lost");
        for exchange in [&self.sending, &self.receiving] {
            exchange.stop(ATTEMPT);
        }
        runtime.block_on(self.listening.close());
        Ok(())
    }
}

/// What one run over channels came to.
struct Run {
    rows: u64,
    bytes: u64,
    seconds: f64,
    cpu_seconds: f64,
}

fn run(
    batches: &[Batch],
    count: u32,
    channels: u32,
    mut connect: impl FnMut(&mut Inbox) -> Result<Writer>,
) -> Result<Run> {
    let reader = Arc::<Signal>::default();
    let mut inbox = Inbox::new(reader.clone());
    let writers = (0..channels).map(|_| connect(&mut inbox)).collect::<Result<Vec<_>>>()?;
    let pid = std::process::id().to_string();
    let cpu = || cpu_seconds_of(&pid).context("read the process's time");
    let (begun, before) = (Instant::now(), cpu()?);
    let received = thread::scope(|scope| {
        for writer in &writers {
            scope.spawn(move || writer.send_all(batches, count));
        }
        receive(inbox, &reader)
    });
    let (seconds, cpu_seconds) = (begun.elapsed().as_secs_f64(), cpu()? - before);
    let expected = u64::from(count) * u64::from(channels) * ROWS as u64;
    ensure!(received.rows == expected, "{} rows of {expected} have arrived", received.rows);
    Ok(Run { rows: received.rows, bytes: received.bytes, seconds, cpu_seconds })
}

/// Tells of the middle one of several runs.
fn tell(report: &mut Report, way: &str, channels: u32, runs: &[Run]) {
    let setting = format!("{way}, {channels} channel{}", if channels == 1 { "" } else { "s" });
    let spread = |of: fn(&Run) -> f64| Spread::of(runs.iter().map(of));
    for (what, values, unit) in [
        ("throughput", spread(|r| r.rows as f64 / 1e6 / r.seconds), "M rows/s"),
        ("bytes", spread(|r| r.bytes as f64 / 1e6 / r.seconds), "MB/s"),
        ("CPU of both ends", spread(|r| r.cpu_seconds / (r.rows as f64 / 1e6)), "s/M rows"),
    ] {
        if let Some(values) = values {
            report.add(Figure::median(OF, &setting, what, &values, unit));
        }
    }
    for run in runs {
        report.run(json!({
            "exchange": setting, "rows": run.rows, "bytes": run.bytes, "seconds": rounded(run.seconds),
            "cpuSeconds": rounded(run.cpu_seconds),
        }));
    }
}

pub(crate) fn bench(args: &Args, report: &mut Report) -> Result<()> {
    let batches = (0..16).map(batch).collect::<Result<Vec<_>>>()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let _entered = runtime.enter();
    report.doing("exchange: a channel within a process");
    for channels in [1, 4] {
        let local = |inbox: &mut Inbox| {
            let signal = Arc::<Signal>::default();
            Ok(Writer { sender: inbox.channel(signal.clone()), signal })
        };
        let runs =
            (0..args.repeat).map(|_| run(&batches, args.batches, channels, local)).collect::<Result<Vec<_>>>()?;
        tell(report, "one process", channels, &runs);
    }
    let authority = Authority::new(Env::system().clock).map_err(|e| anyhow!("{e}"))?;
    let mutual = || {
        let identity = authority.identity(&subject(), CERTIFICATE_LIFETIME).map_err(|e| anyhow!("{e}"))?;
        Ok(GrpcTransport::new(Env::system(), Arc::new(Arc::new(identity)), Settings::default()))
    };
    let plain = || Ok(GrpcTransport::with_handshake(Env::system(), Arc::new(Plain), Settings::default()));
    let ways: [(&str, &dyn Fn() -> Result<GrpcTransport>); 2] =
        [("loopback in the clear", &plain), ("loopback, mutual TLS", &mutual)];
    for (way, transport) in ways {
        report.doing(&format!("exchange: {way}"));
        for channels in [1, 4] {
            let mut remote = Remote::start(&runtime, transport)?;
            let connect = |remote: &mut Remote| run(&batches, args.batches, channels, |inbox| remote.channel(inbox));
            let runs = (0..args.repeat).map(|_| connect(&mut remote)).collect::<Result<Vec<_>>>()?;
            remote.end(&runtime)?;
            tell(report, way, channels, &runs);
        }
    }
    report.doing("exchange: channels that stand still");
    stalled(args, &runtime, &mutual, &batches, report)?;
    grown(&runtime, &mutual, &batches, report)
}

/// What a channel that stands still may hold: its bound and a frame at each end.
fn bound(batch: &Batch) -> u64 {
    (CHANNEL_BYTES_MAX + WINDOW_BYTES + 2 * batch.weight()) as u64
}

/// One channel of two is not read.
fn stalled(
    args: &Args,
    runtime: &Runtime,
    transport: &dyn Fn() -> Result<GrpcTransport>,
    batches: &[Batch],
    report: &mut Report,
) -> Result<()> {
    let frame = batches.first().context("no batch")?;
    let mut remote = Remote::start(runtime, transport)?;
    let alone = run(batches, args.batches, 1, |inbox| remote.channel(inbox))?;
    let mut unread = Inbox::new(Arc::default());
    let still = remote.channel(&mut unread)?;
    let held = still.fill(frame);
    let beside = run(batches, args.batches, 1, |inbox| remote.channel(inbox))?;
    ensure!(held <= bound(frame), "a channel that nobody reads has taken in {held} bytes, and may {}", bound(frame));
    ensure!(held >= CHANNEL_BYTES_MAX as u64, "a channel that nobody reads has taken in only {held} bytes");
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let setting = "mutual TLS, one of two is not read";
    report.add(Figure::new(OF, setting, "held by it at both ends", mib(held), "MiB").at_most(mib(bound(frame))));
    let slower = beside.seconds / alone.seconds;
    report.add(Figure::new(OF, setting, "time of the other against alone", slower, "x").at_most(SLOWER_MAX));
    // Whoever stands still is there until then: one that goes before its end is lost.
    remote.end(runtime)
}

/// By how much the process grows when many channels stand still.
fn grown(
    runtime: &Runtime,
    transport: &dyn Fn() -> Result<GrpcTransport>,
    batches: &[Batch],
    report: &mut Report,
) -> Result<()> {
    let frame = batches.first().context("no batch")?;
    let pid = std::process::id().to_string();
    let resident = || memory_of(&pid).map(|m| m.0).context("read the process's memory");
    let mut remote = Remote::start(runtime, transport)?;
    // Once round, so that what is made once is there.
    run(batches, 100, 1, |inbox| remote.channel(inbox))?;
    let before = resident()?;
    let mut unread = Inbox::new(Arc::default());
    let writers = (0..STALLED).map(|_| remote.channel(&mut unread)).collect::<Result<Vec<_>>>()?;
    let held: u64 = thread::scope(|scope| {
        let filling: Vec<_> = writers.iter().map(|writer| scope.spawn(|| writer.fill(frame))).collect();
        filling.into_iter().map(|f| f.join().unwrap_or_default()).sum()
    });
    let most = resident()?.saturating_sub(before);
    let bound_of_all = u64::from(STALLED) * (bound(frame) + NETWORK_BYTES_MAX) + PROCESS_BYTES_MAX;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let setting = format!("mutual TLS, {STALLED} channels are not read");
    let most_held = u64::from(STALLED) * bound(frame);
    ensure!(held <= most_held, "channels that nobody reads have taken in {held} bytes, and may {most_held}");
    report.add(Figure::new(OF, &setting, "held by them at both ends", mib(held), "MiB").at_most(mib(most_held)));
    report.add(Figure::new(OF, &setting, "growth of both ends", mib(most), "MiB").at_most(mib(bound_of_all)));
    remote.end(runtime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_rows_arrive_and_what_stands_still_is_bounded() -> Result<()> {
        let mut report = Report::default();
        bench(&Args { batches: 20, repeat: 1 }, &mut report)
    }
}
