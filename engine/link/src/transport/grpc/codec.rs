//! Packets as `FlightData` on the wire.
//!
//! What comes in is decoded by prost, which cuts the body out of the receive buffer without a copy. What the opener of a
//! stream sends (the rows) is encoded here: piece by piece into gRPC's own buffer, which is the one copy that gRPC needs.
//! Any Arrow Flight implementation reads it: the fields' numbers are those of `FlightData` and `FlightDescriptor`.

use arrow_flight::{FlightData, FlightDescriptor};
use bytes::{BufMut, Bytes};
use tonic::{
    Status,
    codec::{Codec, EncodeBuf, Encoder},
};
use tonic_prost::{ProstCodec, ProstDecoder};

use crate::transport::{Opening, Packet};

/// `FlightData`'s fields.
const DESCRIPTOR: u64 = 1;
const HEADER: u64 = 2;
const METADATA: u64 = 3;
const BODY: u64 = 1000;
/// `FlightDescriptor`'s fields, and the value of its type that says that a command follows.
const DESCRIPTOR_TYPE: u64 = 1;
const DESCRIPTOR_COMMAND: u64 = 2;
const COMMAND: u64 = 2;
/// Bytes that keys and lengths of all fields take at most.
pub(super) const FRAMING_BYTES_MAX: usize = 64;

/// What the opener of a stream sends: once the opening, then packets.
#[derive(Debug)]
pub(super) enum Outbound {
    Opening(Opening),
    Packet(Packet),
}

/// Of the opener of a stream.
#[derive(Debug, Default)]
pub(super) struct FlightCodec;

impl Codec for FlightCodec {
    type Encode = Outbound;
    type Decode = FlightData;
    type Encoder = FlightEncoder;
    type Decoder = ProstDecoder<FlightData>;

    fn encoder(&mut self) -> Self::Encoder {
        FlightEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<FlightData, FlightData>::default().decoder()
    }
}

#[derive(Debug)]
pub(super) struct FlightEncoder;

impl Encoder for FlightEncoder {
    type Item = Outbound;
    type Error = Status;

    fn encode(&mut self, item: Outbound, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        match item {
            Outbound::Opening(opening) => {
                to.reserve(opening.purpose.len() + opening.hello.len() + FRAMING_BYTES_MAX);
                put_opening(to, &opening);
            }
            Outbound::Packet(packet) => {
                to.reserve(packet.weight() + FRAMING_BYTES_MAX);
                put_packet(to, &packet);
            }
        }
        Ok(())
    }
}

fn put_opening(to: &mut impl BufMut, opening: &Opening) {
    let mut descriptor = Vec::with_capacity(opening.purpose.len() + FRAMING_BYTES_MAX);
    put_varint(&mut descriptor, DESCRIPTOR_TYPE << 3);
    put_varint(&mut descriptor, COMMAND);
    put_field(&mut descriptor, DESCRIPTOR_COMMAND, &[opening.purpose.as_bytes()]);
    put_field(to, DESCRIPTOR, &[descriptor]);
    put_field(to, BODY, std::slice::from_ref(&opening.hello));
}

fn put_packet(to: &mut impl BufMut, packet: &Packet) {
    put_field(to, HEADER, std::slice::from_ref(&packet.header));
    put_field(to, METADATA, std::slice::from_ref(&packet.metadata));
    put_field(to, BODY, &packet.body);
}

/// A field of bytes; none if it is empty.
fn put_field<P: AsRef<[u8]>>(to: &mut impl BufMut, field: u64, pieces: &[P]) {
    let length: usize = pieces.iter().map(|p| p.as_ref().len()).sum();
    if length > 0 {
        put_varint(to, field << 3 | 2);
        put_varint(to, length as u64);
        pieces.iter().for_each(|p| to.put_slice(p.as_ref()));
    }
}

fn put_varint(to: &mut impl BufMut, mut value: u64) {
    while value >= 0x80 {
        to.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    to.put_u8(value as u8);
}

/// What the acceptor of a stream sends: encoded by prost. The body is copied together if it is in pieces.
pub(super) fn flight_data(mut packet: Packet) -> FlightData {
    FlightData {
        flight_descriptor: None,
        data_header: std::mem::take(&mut packet.header),
        app_metadata: std::mem::take(&mut packet.metadata),
        data_body: packet.into_body(),
    }
}

pub(super) fn packet(data: FlightData) -> Packet {
    let body = if data.data_body.is_empty() { Vec::new() } else { vec![data.data_body] };
    Packet { metadata: data.app_metadata, header: data.data_header, body }
}

/// The opening that the first message of a stream is, if it is one.
pub(super) fn opening(data: FlightData) -> Option<Opening> {
    let FlightDescriptor { cmd, .. } = data.flight_descriptor?;
    let purpose = String::from_utf8(Vec::from(cmd)).ok()?;
    let hello: Bytes = data.data_body;
    Some(Opening { purpose, hello })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `FlightData` by the rules of the protocol, as somebody else's decoder would: field number and bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let varint = |bytes: &mut &[u8]| {
            let (mut value, mut shift) = (0_u64, 0);
            loop {
                let (first, rest) = bytes.split_first().unwrap();
                *bytes = rest;
                value |= u64::from(first & 0x7f) << shift;
                shift += 7;
                if first & 0x80 == 0 {
                    return value;
                }
            }
        };
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let value = varint(&mut bytes);
            match key & 7 {
                0 => all.push((key >> 3, vec![value as u8])),
                2 => {
                    let (field, rest) = bytes.split_at(value as usize);
                    bytes = rest;
                    all.push((key >> 3, field.to_vec()));
                }
                other => panic!("wire type {other}"),
            }
        }
        all
    }

    #[test]
    fn packets_and_openings_have_the_fields_of_flight_data() {
        let body = vec![Bytes::from(vec![1; 300]), Bytes::new(), Bytes::from(vec![2; 300])];
        let packet = Packet { metadata: b"meta".as_slice().into(), header: b"head".as_slice().into(), body };
        let mut bytes = Vec::new();
        put_packet(&mut bytes, &packet);
        assert!(bytes.len() <= packet.weight() + FRAMING_BYTES_MAX);
        let whole = [vec![1; 300], vec![2; 300]].concat();
        assert_eq!(fields(&bytes), [(2, b"head".to_vec()), (3, b"meta".to_vec()), (1000, whole)]);

        let mut bytes = Vec::new();
        put_opening(&mut bytes, &Opening { purpose: "control".into(), hello: b"{}".as_slice().into() });
        let all = fields(&bytes);
        assert_eq!(all[1], (1000, b"{}".to_vec()));
        assert_eq!((all[0].0, fields(&all[0].1)), (1, vec![(1, vec![2]), (2, b"control".to_vec())]));
    }
}
