use std::collections::BTreeMap;

use super::*;

fn hash(key: u64) -> u64 {
    key.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn add(table: &mut Table, key: u64, n: i64) {
    let (slot, _) = table.slot(hash(key), &key.to_le_bytes());
    table.write_runs(&[slot], 0, |column, rows, _| {
        if let Column::Long(values) = column {
            let value = &mut values[rows[0] as usize];
            *value = Some(value.unwrap_or(0) + n);
        }
    });
}

fn contents(rows: &Rows) -> BTreeMap<u64, i64> {
    let key = |slot| u64::from_le_bytes(rows.key(slot).try_into().unwrap());
    let all: BTreeMap<_, _> =
        rows.slots().map(|slot| (key(slot), rows.long(slot as usize, 0).unwrap_or_default())).collect();
    assert_eq!(all.len(), rows.len());
    all
}

#[test]
fn a_snapshot_does_not_change_and_only_written_rows_are_copied() {
    let mut table = Table::new(vec![ColumnType::Long]);
    for key in 0..5000 {
        add(&mut table, key, 1);
    }
    let before = table.snapshot();
    for key in 0..10 {
        add(&mut table, key, 100);
    }
    add(&mut table, 9999, 1);
    let after = table.snapshot();
    assert_eq!((before.len(), contents(&before).values().sum::<i64>()), (5000, 5000));
    assert_eq!((after.len(), contents(&after).values().sum::<i64>()), (5001, 6001));
    let shared = before.chunks.iter().zip(&after.chunks).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
    assert_eq!((before.chunks.len(), shared), (5, 4), "only the last chunk was copied");
}

#[test]
fn places_are_used_again_once_no_snapshot_holds_them() {
    let mut table = Table::new(vec![ColumnType::Long]);
    for key in 0..10_000 {
        add(&mut table, key, 1);
    }
    for _ in 0..20 {
        let held = table.snapshot();
        for key in 0..10_000 {
            add(&mut table, key, 1);
        }
        let held = contents(&held);
        assert!(held.values().all(|n| *n == held[&0]));
    }
    assert_eq!(contents(table.rows()).values().sum::<i64>(), 210_000);
    assert!(table.rows.chunks.len() <= 25, "{} chunks for 10 chunks of rows", table.rows.chunks.len());
    let compacted = table.rows.chunks.len();
    table.compact(usize::MAX);
    assert_eq!(contents(table.rows()).values().sum::<i64>(), 210_000);
    assert!(table.rows.chunks.len() <= 10, "{} chunks, before {compacted}", table.rows.chunks.len());
    // Also if there never is a moment without a snapshot.
    let mut held = table.snapshot();
    for _ in 0..50 {
        (0..10_000).step_by(7).for_each(|key| add(&mut table, key, 1));
        held = table.snapshot();
    }
    assert_eq!(contents(&held), contents(table.rows()));
    assert!(table.rows.chunks.len() <= 30, "{} chunks", table.rows.chunks.len());
}

#[test]
fn equal_hashes_of_different_keys_have_rows_of_their_own() {
    let mut table = Table::new(vec![ColumnType::Long]);
    assert_eq!(table.slot(7, b"a"), (0, true));
    assert_eq!(table.slot(7, b"b"), (1, true));
    assert_eq!(table.slot(7, b"a"), (0, false));
    assert_eq!(table.rows().key(1), b"b");
    table.remove(0);
    assert_eq!((table.find(7, b"a"), table.find(7, b"b"), table.len()), (None, Some(1), 1));
    assert_eq!(table.slot(7, b"a longer key"), (0, true), "the place is used again");
    assert_eq!((table.rows().key(0), table.rows().long(0, 0)), (b"a longer key".as_slice(), None));
}

#[test]
fn rows_tell_in_which_interval_they_were_written() {
    let mut table = Table::new(vec![ColumnType::Long]);
    table.begin(1);
    (0..3000).for_each(|key| add(&mut table, key, 1));
    assert_eq!(table.begin(2), 3000);
    let held = table.snapshot();
    (0..3000).step_by(1000).for_each(|key| add(&mut table, key, 1));
    (0..3000).step_by(1000).for_each(|key| add(&mut table, key, 1));
    assert_eq!(table.begin(3), 3);
    let changed = |rows: &Rows, since| rows.changed_since(since).count();
    assert_eq!([0, 1, 2].map(|since| changed(table.rows(), since)), [3000, 3, 0]);
    assert_eq!([0, 1].map(|since| changed(&held, since)), [3000, 0]);
}

/// Random additions and removals with snapshots held for random times, against a map.
#[test]
fn a_table_is_a_map_whatever_is_held() {
    let mut random = 7_u64;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let mut table = Table::new(vec![ColumnType::Long]);
    let mut model: BTreeMap<u64, i64> = BTreeMap::new();
    let mut held: Vec<(Rows, BTreeMap<u64, i64>)> = Vec::new();
    for step in 0..60_000_u64 {
        let key = next(6000);
        match next(10) {
            0 if key < 100 => table.compact(500),
            0 | 1 => {
                if let Some(slot) = table.find(hash(key), &key.to_le_bytes()) {
                    table.remove(slot);
                }
                model.remove(&key);
            }
            _ => {
                add(&mut table, key, 1);
                *model.entry(key).or_default() += 1;
            }
        }
        if step % 1500 == 0 {
            held.push((table.snapshot(), model.clone()));
        }
        if held.len() > 3 {
            let (rows, of) = held.swap_remove(next(3) as usize);
            assert_eq!(contents(&rows), of);
        }
    }
    assert_eq!(contents(table.rows()), model);
}
