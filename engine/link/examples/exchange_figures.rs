//! What a channel between two processes costs, against one between two tasks of a process.
//!
//! `cargo run --release -p floodmark-link --example exchange_figures`: batches of 8,192 rows of 100 bytes with the hashes of
//! their keys, from a thread to a thread: over a local channel, over loopback in the clear, over loopback with mutual TLS.
//! Both ends are in one process, so the processor time is that of both. The receiver looks at every batch, not at its rows.

#![allow(clippy::disallowed_methods, reason = "a measurement")]

use std::{
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use arrow::{
    array::{Array, ArrayRef, Int64Array, RecordBatch, StringArray},
    buffer::Buffer,
};
use async_trait::async_trait;
use floodmark_dataflow::{
    Batch, Frame,
    channel::{Inbox, Refused, Sender, Signal},
};
use floodmark_link::{
    exchange::{self, ChannelId, Exchange},
    tls::{Authority, CERTIFICATE_LIFETIME, Role, Subject},
    transport::{
        Acceptors, Transport,
        grpc::{Duplex, GrpcTransport, Handshake, Settings},
    },
};
use floodmark_snapshot::{Attempt, Env, JobId};
use nix::sys::resource::{UsageWho, getrusage};
use tokio::{net::TcpStream, runtime::Runtime};

const ROWS: usize = 8192;
const BATCHES: usize = 2500;
const ROUNDS: usize = 3;

fn subject() -> Subject {
    let job = JobId { namespace: "default".into(), name: "figures".into(), uid: "local".into() };
    Subject { job, role: Role::Worker }
}

/// Trusts everybody, and hides nothing: to know what TLS costs.
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

fn send(sender: &Sender, signal: &Signal, batches: &[Batch]) {
    let rows = (0..BATCHES).map(|number| Frame::Batch(batches[number % batches.len()].clone()));
    for mut frame in rows.chain([Frame::End]) {
        loop {
            match sender.try_send(frame) {
                Ok(()) => break,
                Err(Refused::Full(back)) => frame = back,
                Err(Refused::Closed) => return,
            }
            signal.wait(None);
        }
    }
}

/// Bytes of a batch that were copied out of the message in which they came: those that do not lie where the texts lie.
fn copied(batch: &Batch) -> usize {
    let owner = |buffer: &Buffer| buffer.data_ptr();
    let texts = batch.rows.column(3).to_data();
    let message = owner(&texts.buffers()[1]);
    let columns = batch.rows.columns().iter().map(|c| c.to_data());
    let buffers: Vec<Buffer> = columns.flat_map(|c| c.buffers().to_vec()).collect();
    let hashes = batch.hashes.as_ref().map_or(0, |h| h.len() * 8);
    buffers.iter().filter(|b| owner(b) != message).map(Buffer::len).sum::<usize>() + hashes
}

struct Received {
    rows: usize,
    copied: usize,
    weight: usize,
}

fn receive(mut inbox: Inbox, signal: &Signal) -> Received {
    let mut received = Received { rows: 0, copied: 0, weight: 0 };
    let mut open = inbox.channels();
    while open > 0 {
        match inbox.try_recv(|_| false) {
            Some((_, Frame::Batch(batch))) => {
                received.rows += batch.len();
                received.copied += copied(&batch);
                received.weight += batch.weight();
            }
            Some((_, Frame::End)) => open -= 1,
            Some(_) => {}
            None => signal.wait(None),
        }
    }
    received
}

fn processor_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    Ok(Duration::from_secs_f64(seconds(usage.user_time()) + seconds(usage.system_time())))
}

/// Where the senders of a measurement come from: as many channels into this inbox.
type Connect<'a> = &'a mut dyn FnMut(&mut Inbox, Arc<Signal>) -> Result<Sender>;

#[derive(Clone, Copy)]
enum Way {
    Local,
    Remote,
}

fn measure(way: Way, name: &str, channels: usize, batches: &[Batch], connect: Connect<'_>) -> Result<()> {
    for _ in 0..ROUNDS {
        let reader = Arc::new(Signal::default());
        let mut inbox = Inbox::new(reader.clone());
        let mut senders = Vec::new();
        for _ in 0..channels {
            let signal = Arc::new(Signal::default());
            senders.push((connect(&mut inbox, signal.clone())?, signal));
        }
        let (begun, processor) = (Instant::now(), processor_time()?);
        let received = thread::scope(|scope| {
            for (sender, signal) in &senders {
                scope.spawn(move || send(sender, signal, batches));
            }
            receive(inbox, &reader)
        });
        let (took, processor) = (begun.elapsed().as_secs_f64(), (processor_time()? - processor).as_secs_f64());
        let millions = received.rows as f64 / 1e6;
        let copied = match way {
            // The batches are those that were sent.
            Way::Local => String::new(),
            Way::Remote => format!("; copied on arrival {} bytes a batch", received.copied / (BATCHES * channels)),
        };
        println!(
            "{name:28} {channels} channel(s): {:7.2} M rows/s {:6.0} MB/s {:7.3} CPU-s per M rows{copied}",
            millions / took,
            received.weight as f64 / 1e6 / took,
            processor / millions,
        );
    }
    Ok(())
}

fn exchange(env: &Env, transport: Arc<dyn Transport>) -> Arc<Exchange> {
    Exchange::new(env.clone(), transport, Arc::new(|lost| eprintln!("lost: {lost:?}")))
}

fn measure_remote(
    runtime: &Runtime,
    name: &str,
    handshake: impl Fn() -> Result<GrpcTransport>,
    batches: &[Batch],
) -> Result<()> {
    let env = Env::system();
    let sending = exchange(&env, Arc::new(handshake()?));
    let transport: Arc<dyn Transport> = Arc::new(handshake()?);
    let receiving = exchange(&env, transport.clone());
    let acceptors = Acceptors::default().with(exchange::PURPOSE, Arc::new(receiving.clone()));
    let address = SocketAddr::from(([127, 0, 0, 1], 0)).to_string();
    let listening = runtime.block_on(transport.listen(&address.as_str().into(), Arc::new(acceptors)))?;
    let mut next = 0;
    for exchange in [&sending, &receiving] {
        exchange.begin(Attempt(1))?;
    }
    for channels in [1, 4] {
        measure(Way::Remote, name, channels, batches, &mut |inbox, task| {
            next += 1;
            let id = ChannelId { attempt: Attempt(1), edge: 0, from: next, to: 0 };
            receiving.expect(id, inbox.channel(Arc::default()))?;
            Ok(sending.connect(id, listening.endpoint(), task)?)
        })?;
    }
    for exchange in [&sending, &receiving] {
        exchange.stop(Attempt(1));
    }
    runtime.block_on(listening.close());
    Ok(())
}

fn main() -> Result<()> {
    let batches = (0..16).map(batch).collect::<Result<Vec<_>>>()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let _entered = runtime.enter();
    println!("{} rows a batch, {} bytes", ROWS, batches.first().context("no batch")?.weight());
    for channels in [1, 4] {
        measure(Way::Local, "local channel", channels, &batches, &mut |inbox, task| Ok(inbox.channel(task)))?;
    }
    let plain = || Ok(GrpcTransport::with_handshake(Env::system(), Arc::new(Plain), Settings::default()));
    measure_remote(&runtime, "loopback, in the clear", plain, &batches)?;
    let authority = Authority::new(Env::system().clock)?;
    let mutual = || {
        let identity = authority.identity(&subject(), CERTIFICATE_LIFETIME)?;
        Ok(GrpcTransport::new(Env::system(), Arc::new(Arc::new(identity)), Settings::default()))
    };
    measure_remote(&runtime, "loopback, mutual TLS", mutual, &batches)
}
