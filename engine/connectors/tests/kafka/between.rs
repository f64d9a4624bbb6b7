//! Stands between clients and a broker, and can have the broker say of its cluster that it has no brokers: as one does that
//! the controller has lost sight of, with whom nothing is wrong otherwise.
//!
//! Clients talk to it alone, since it puts itself into the broker's place where the brokers are listed, and has nobody told
//! which of them coordinates a group.

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

/// The request that asks for brokers and topics, and from which version on its answer has the layout that is read here.
const METADATA: u16 = 3;
const FLEXIBLE_FROM: u16 = 9;
/// The request that asks for a coordinator.
const FIND_COORDINATOR: u16 = 10;

/// See the header of this file. Its threads end with the connections.
pub(super) struct Between(Arc<Shared>);

struct Shared {
    broker: String,
    port: u16,
    hides: AtomicBool,
    hidden: AtomicU32,
}

impl Between {
    /// Listens for clients of the broker at this address.
    pub(super) fn start(broker: &str) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let (hides, hidden) = (AtomicBool::new(false), AtomicU32::new(0));
        let shared = Arc::new(Shared { broker: broker.to_owned(), port, hides, hidden });
        let of_thread = shared.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = of_thread.clone();
                // A client whose connection breaks makes another.
                thread::spawn(move || shared.serve(client));
            }
        });
        Ok(Self(shared))
    }

    /// Where clients find it.
    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.0.port)
    }

    /// From now on there are no brokers.
    pub(super) fn hide(&self) {
        self.0.hides.store(true, Ordering::SeqCst);
    }

    /// The broker is back.
    pub(super) fn show(&self) {
        self.0.hides.store(false, Ordering::SeqCst);
    }

    /// How often somebody was told that there are none.
    pub(super) fn hidden(&self) -> u32 {
        self.0.hidden.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn serve(self: Arc<Self>, client: TcpStream) -> io::Result<()> {
        let broker = TcpStream::connect(&self.broker)?;
        client.set_nodelay(true)?;
        broker.set_nodelay(true)?;
        // Which answers are about the cluster.
        let asked = Arc::new(Mutex::new(BTreeSet::new()));
        let (mut from, mut to, asking) = (client.try_clone()?, broker.try_clone()?, asked.clone());
        thread::spawn(move || -> io::Result<()> {
            while let Ok(request) = frame(&mut from) {
                let (kind, version) = (short(&request), short(&request[2..]));
                if kind == METADATA {
                    assert!(version >= FLEXIBLE_FROM, "an old client");
                    asking.lock().unwrap().insert(request[4..8].to_vec());
                }
                if kind != FIND_COORDINATOR {
                    send(&mut to, &request)?;
                }
            }
            to.shutdown(Shutdown::Both)
        });
        let (mut from, mut to) = (broker, client);
        while let Ok(mut answer) = frame(&mut from) {
            if asked.lock().unwrap().remove(&answer[..4]) {
                answer = self.changed(&answer);
            }
            send(&mut to, &answer)?;
        }
        to.shutdown(Shutdown::Both)
    }

    /// An answer about the cluster, with this in the place of each broker, or without any.
    fn changed(&self, answer: &[u8]) -> Vec<u8> {
        // Correlation id, no tags, throttle time; then the brokers.
        let (mut out, mut rest) = (answer[..9].to_vec(), &answer[9..]);
        let mut brokers = Vec::new();
        let count = number(&mut rest) - 1;
        for _ in 0..count {
            // Id, host, port, rack, no tags.
            brokers.extend(part(&mut rest, 4));
            for field in ["host", "rack"] {
                // Lengths of text are one more than they say, none for no text.
                let length = rest[0];
                assert!(length < 128, "a long {field}");
                brokers.extend(part(&mut rest, 1 + usize::from(length.saturating_sub(1))));
                if field == "host" {
                    part(&mut rest, 4);
                    brokers.extend(u32::from(self.port).to_be_bytes());
                }
            }
            assert_eq!(rest[0], 0, "tags");
            brokers.extend(part(&mut rest, 1));
        }
        if self.hides.load(Ordering::SeqCst) {
            out.push(1);
            self.hidden.fetch_add(1, Ordering::SeqCst);
        } else {
            out.push(count + 1);
            out.extend(brokers);
        }
        out.extend(rest);
        out
    }
}

fn short(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn part<'a>(rest: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (part, after) = rest.split_at(length);
    *rest = after;
    part
}

/// A number that takes one byte.
fn number(rest: &mut &[u8]) -> u8 {
    let number = part(rest, 1)[0];
    assert!(number < 128, "a large number");
    number
}

fn frame(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    from.read_exact(&mut frame)?;
    Ok(frame)
}

fn send(to: &mut TcpStream, frame: &[u8]) -> io::Result<()> {
    let length = (frame.len() as u32).to_be_bytes();
    to.write_all(&[&length, frame].concat())
}
