//! What both rooms put around what they send: a checksum and a number.
//!
//! ```text
//! metadata = crc32c: u32, kind: u8, number: u64, fields    (little-endian)
//! ```
//! The checksum covers the rest of the metadata, the header and the body: Arrow's decoder alone would take damaged bytes.
//! Numbers count up from 0 in each direction of a stream. Invariant: what is opened is what was sealed, in order, each once.

use bytes::{BufMut, Bytes, BytesMut};
use floodmark_snapshot::{Error, Result};

use crate::transport::{PACKET_BYTES_MAX, Packet};

/// Bytes before the fields.
const PREFIX: usize = 4 + 1 + 8;

/// Numbers and seals packets that go out.
#[derive(Debug, Default)]
pub(crate) struct Sealer {
    next: u64,
}

/// Opens packets that come in.
#[derive(Debug, Default)]
pub(crate) struct Opener {
    next: u64,
}

/// What was sealed.
pub(crate) struct Opened {
    pub(crate) kind: u8,
    pub(crate) fields: Bytes,
    pub(crate) header: Bytes,
    pub(crate) body: Bytes,
}

impl Sealer {
    /// # Errors
    /// `Abort` when the packet is too long.
    pub(crate) fn seal(&mut self, kind: u8, fields: &[u8], header: Bytes, body: Vec<Bytes>) -> Result<Packet> {
        let mut metadata = BytesMut::with_capacity(PREFIX + fields.len());
        metadata.put_u32_le(0);
        metadata.put_u8(kind);
        metadata.put_u64_le(self.next);
        metadata.put_slice(fields);
        let crc = checksum(&metadata[4..], &header, &body);
        metadata[..4].copy_from_slice(&crc.to_le_bytes());
        let packet = Packet { metadata: metadata.freeze(), header, body };
        if packet.weight() > PACKET_BYTES_MAX {
            return Err(Error::abort(format!(
                "send {} bytes at once: no more than {PACKET_BYTES_MAX} can be",
                packet.weight()
            )));
        }
        self.next += 1;
        Ok(packet)
    }
}

impl Opener {
    /// # Errors
    /// `Corrupt` when the packet is not what was sealed, or not the next.
    pub(crate) fn open(&mut self, mut packet: Packet) -> Result<Opened> {
        let metadata = std::mem::take(&mut packet.metadata);
        let header = std::mem::take(&mut packet.header);
        let Some((crc, rest)) = metadata.split_first_chunk::<4>() else { return Err(damaged("it has no checksum")) };
        if checksum(rest, &header, &packet.body) != u32::from_le_bytes(*crc) {
            return Err(damaged("its checksum does not fit"));
        }
        let Some((&kind, rest)) = rest.split_first() else { return Err(damaged("it has no kind")) };
        let Some((number, _)) = rest.split_first_chunk::<8>() else { return Err(damaged("it has no number")) };
        let number = u64::from_le_bytes(*number);
        if number != self.next {
            return Err(Error::corrupt(format!("message {number} came where message {} was due", self.next)));
        }
        self.next += 1;
        Ok(Opened { kind, fields: metadata.slice(PREFIX..), header, body: packet.into_body() })
    }
}

fn checksum(metadata: &[u8], header: &[u8], body: &[Bytes]) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(metadata), header);
    body.iter().fold(crc, |crc, piece| crc32c::crc32c_append(crc, piece))
}

fn damaged(why: &str) -> Error {
    Error::corrupt(format!("a message is damaged: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(sealer: &mut Sealer) -> Packet {
        sealer
            .seal(7, b"fields", Bytes::from_static(b"header"), vec![b"bo".as_slice().into(), b"dy".as_slice().into()])
            .unwrap()
    }

    #[test]
    fn what_is_opened_is_what_was_sealed() {
        let (mut sealer, mut opener) = (Sealer::default(), Opener::default());
        for _ in 0..3 {
            let opened = opener.open(sealed(&mut sealer)).unwrap();
            assert_eq!((opened.kind, &opened.fields[..]), (7, &b"fields"[..]));
            assert_eq!((&opened.header[..], &opened.body[..]), (&b"header"[..], &b"body"[..]));
        }
    }

    #[test]
    fn no_message_comes_twice_or_out_of_order() {
        let mut sealer = Sealer::default();
        let packets = [0; 3].map(|_| sealed(&mut sealer));
        for order in [[0, 0], [0, 2], [1, 0]] {
            let mut opener = Opener::default();
            let refused = order.iter().map(|i| opener.open(packets[*i].clone())).find_map(Result::err);
            assert!(refused.is_some_and(|e| e.to_string().contains("was due")), "{order:?}");
        }
    }

    #[test]
    fn every_bit_counts() {
        let packet = sealed(&mut Sealer::default());
        let parts = [&packet.metadata, &packet.header, &packet.body[0], &packet.body[1]];
        for (part, bytes) in parts.iter().enumerate() {
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.to_vec();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let damaged = Bytes::from(damaged);
                let mut packet = packet.clone();
                match part {
                    0 => packet.metadata = damaged,
                    1 => packet.header = damaged,
                    _ => packet.body[part - 2] = damaged,
                }
                assert!(Opener::default().open(packet).is_err(), "part {part}, bit {bit}");
            }
        }
        for length in 0..packet.metadata.len() {
            let short = Packet { metadata: packet.metadata.slice(..length), ..packet.clone() };
            assert!(Opener::default().open(short).is_err(), "{length} bytes of metadata");
        }
    }
}
