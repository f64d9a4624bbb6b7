//! A row's key in the database: where it belongs, then itself. Pure.
//!
//! ```text
//! key = key group: u16, namespace: i64 with its sign flipped, key: bytes        big-endian
//! ```
//! So rows of one key group lie together (a change of parallelism moves ranges), and in it those of one namespace, in order.

use floodmark_snapshot::KeyGroup;

/// Bytes before the key itself.
const PREFIX: usize = 10;

/// Appends the database's key of a row.
pub(crate) fn write(out: &mut Vec<u8>, group: KeyGroup, namespace: i64, key: &[u8]) {
    out.extend_from_slice(&group.0.to_be_bytes());
    out.extend_from_slice(&((namespace as u64) ^ (1 << 63)).to_be_bytes());
    out.extend_from_slice(key);
}

/// The least key of a namespace in a key group.
pub(crate) fn first(group: KeyGroup, namespace: i64) -> Vec<u8> {
    let mut key = Vec::with_capacity(PREFIX);
    write(&mut key, group, namespace, &[]);
    key
}

/// A bound above all keys of a namespace in a key group.
pub(crate) fn end(group: KeyGroup, namespace: i64) -> Vec<u8> {
    match namespace.checked_add(1) {
        Some(next) => first(group, next),
        None => group_end(group),
    }
}

/// The least key of a key group.
pub(crate) fn group_start(group: KeyGroup) -> Vec<u8> {
    group.0.to_be_bytes().to_vec()
}

/// A bound above all keys of a key group.
pub(crate) fn group_end(group: KeyGroup) -> Vec<u8> {
    // A key group is less than their number, which is a u16 too: there is always a next one.
    group.0.saturating_add(1).to_be_bytes().to_vec()
}

/// The key group of a key of the database, or of a bound below keys; `None` if it is none of ours.
pub(crate) fn group_of(bytes: &[u8]) -> Option<KeyGroup> {
    bytes.first_chunk().map(|group| KeyGroup(u16::from_be_bytes(*group)))
}

/// The last key group below or at a key of the database, or below the bound behind a key group; `None` if it is none of ours.
pub(crate) fn group_up_to(bytes: &[u8]) -> Option<KeyGroup> {
    let group = group_of(bytes)?;
    Some(if bytes.len() == 2 { KeyGroup(group.0.saturating_sub(1)) } else { group })
}

/// Takes a database's key apart; `None` if it is none of ours.
pub(crate) fn parse(bytes: &[u8]) -> Option<(KeyGroup, i64, &[u8])> {
    let (group, rest) = bytes.split_first_chunk::<2>()?;
    let (namespace, key) = rest.split_first_chunk::<8>()?;
    Some((KeyGroup(u16::from_be_bytes(*group)), (u64::from_be_bytes(*namespace) ^ (1 << 63)) as i64, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_group_then_namespace_then_key_and_come_back() {
        let mut all = Vec::new();
        for group in [0, 1, 255, 256, u16::MAX - 1] {
            for namespace in [i64::MIN, -1, 0, 1, 255, i64::MAX] {
                for key in [b"".as_slice(), b"\0", b"a", b"\xff\xff\xff"] {
                    all.push((KeyGroup(group), namespace, key));
                }
            }
        }
        let written: Vec<Vec<u8>> = all
            .iter()
            .map(|(group, namespace, key)| {
                let mut out = Vec::new();
                write(&mut out, *group, *namespace, key);
                assert!(first(*group, *namespace) <= out && out < end(*group, *namespace));
                assert!(group_start(*group) <= out && out < group_end(*group));
                out
            })
            .collect();
        assert!(written.is_sorted());
        let read: Vec<_> = written.iter().filter_map(|k| parse(k)).collect();
        assert_eq!(read, all);
        assert_eq!(parse(b"short"), None);
        assert!(written.iter().zip(&all).all(|(key, (group, ..))| group_of(key) == Some(*group)));
        assert_eq!(group_up_to(&first(KeyGroup(7), 0)), Some(KeyGroup(7)));
        assert_eq!(group_up_to(&group_end(KeyGroup(7))), Some(KeyGroup(7)));
        assert_eq!(group_of(b""), None);
    }
}
