//! What can happen to a file: one byte, a cut, a byte too many, a tail, nothing left, another file in its place. Pure.

use std::fmt;

use bytes::Bytes;

use crate::world::Objects;

/// The patterns that bytes are flipped with: one bit at each end, and all.
pub const FLIPS: [u8; 3] = [0x01, 0x80, 0xFF];

/// What happens to one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// A byte is another.
    Flipped {
        /// Which.
        at: usize,
        /// The bits that change.
        mask: u8,
    },
    /// The file ends too early.
    Cut {
        /// Bytes left.
        len: usize,
    },
    /// There is one byte more.
    Inserted {
        /// Before which.
        at: usize,
        /// Its value.
        byte: u8,
    },
    /// Something stands behind the end.
    Tail(&'static [u8]),
    /// It is gone.
    Removed,
    /// It has the bytes of another file.
    Replaced(String),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flipped { at, mask } => write!(f, "byte {at} ^ {mask:#04x}"),
            Self::Cut { len } => write!(f, "cut to {len} bytes"),
            Self::Inserted { at, byte } => write!(f, "a byte {byte:#04x} more before byte {at}"),
            Self::Tail(tail) => write!(f, "a tail of {} bytes", tail.len()),
            Self::Removed => f.write_str("removed"),
            Self::Replaced(by) => write!(f, "replaced by {by}"),
        }
    }
}

impl Damage {
    /// The bytes that are left of these; `None` if no file is.
    #[must_use]
    pub fn of(&self, bytes: &Bytes, objects: &Objects) -> Option<Bytes> {
        let mut changed = bytes.to_vec();
        match self {
            Self::Flipped { at, mask } => changed[*at] ^= mask,
            Self::Cut { len } => changed.truncate(*len),
            Self::Inserted { at, byte } => changed.insert(*at, *byte),
            Self::Tail(tail) => changed.extend_from_slice(tail),
            Self::Removed => return None,
            Self::Replaced(by) => return objects.get(by).cloned(),
        }
        Some(changed.into())
    }

    /// A storage in which this has happened to a file.
    #[must_use]
    pub fn to(&self, path: &str, objects: &Objects) -> Objects {
        let mut damaged = objects.clone();
        match objects.get(path).and_then(|bytes| self.of(bytes, objects)) {
            Some(bytes) => damaged.insert(path.to_owned(), bytes),
            None => damaged.remove(path),
        };
        damaged
    }
}

/// What happens to the bytes at one place of a file: flips, a cut, and a byte more (of two values, so that one of them differs
/// from the byte that was there).
pub fn at_byte(bytes: &Bytes, at: usize) -> impl Iterator<Item = Damage> {
    let byte = bytes[at].wrapping_add(1);
    let flips = FLIPS.into_iter().map(move |mask| Damage::Flipped { at, mask });
    flips.chain([Damage::Cut { len: at }, Damage::Inserted { at, byte }])
}

/// What happens to a file as a whole.
#[must_use]
pub fn to_the_whole() -> Vec<Damage> {
    vec![Damage::Removed, Damage::Tail(b"\n"), Damage::Tail(b"\0"), Damage::Tail(b"{\"more\":true}\n")]
}

/// Places spread over a file of this many bytes: its ends, and others between them.
#[must_use]
pub fn places(len: usize, count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = [0, 4, 5, 13].into_iter().chain((1..=count).map(|i| i * len / (count + 1))).collect();
    places.extend([len.saturating_sub(13), len.saturating_sub(2), len.saturating_sub(1)]);
    places.retain(|at| *at < len);
    places.sort_unstable();
    places.dedup();
    places
}
