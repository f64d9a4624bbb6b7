//! Which worker runs which subtasks. Pure.
//!
//! A *slice* is one subtask of each task, those of the same index: what is chained by forward exchanges stays together, and a
//! slot runs one slice. So a job needs as many slots as its parallelism.
//!
//! Invariant: a slice stays where it is as long as its worker is there and has room, because its state is there, too.

use std::collections::BTreeMap;

use crate::words::WorkerId;

/// The worker of each slice, by its index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Placement(pub(super) Vec<WorkerId>);

impl Placement {
    /// Where a subtask runs.
    pub(super) fn of(&self, index: u32) -> Option<WorkerId> {
        self.0.get(index as usize).copied()
    }
}

/// Spreads `parallelism` slices over workers with so many slots each: a slice stays where `before` has it; the others go one by
/// one to the worker with the most free slots. Without any, to the worker with the fewest slices for its slots, if `crowd`
/// allows it. `None` if there are too few slots, or no workers.
pub(super) fn place(
    parallelism: u32,
    slots: &BTreeMap<WorkerId, u32>,
    before: &Placement,
    crowd: bool,
) -> Option<Placement> {
    let mut used: BTreeMap<WorkerId, u32> = slots.keys().map(|w| (*w, 0)).collect();
    let stays = |index: u32, used: &mut BTreeMap<WorkerId, u32>| {
        let worker = before.of(index).filter(|w| slots.get(w).is_some_and(|all| used[w] < *all))?;
        *used.get_mut(&worker)? += 1;
        Some(worker)
    };
    let kept: Vec<Option<WorkerId>> = (0..parallelism).map(|index| stays(index, &mut used)).collect();
    let mut place = |kept: Option<WorkerId>| {
        if kept.is_some() {
            return kept;
        }
        let free = |w: &WorkerId| slots[w].saturating_sub(used[w]);
        // The first of those with the most.
        let most = slots.keys().filter(|w| free(w) > 0).max_by_key(|w| (free(w), std::cmp::Reverse(**w)));
        let least = || slots.keys().min_by_key(|w| (u64::from(used[w]) << 32) / u64::from(slots[w].max(1)));
        let worker = *most.or_else(|| crowd.then(least).flatten())?;
        *used.get_mut(&worker)? += 1;
        Some(worker)
    };
    kept.into_iter().map(&mut place).collect::<Option<Vec<_>>>().map(Placement)
}

/// Moves slices to free slots, one by one from the worker with the fewest to the one with the most, as long as that makes a
/// difference. `None` if it makes none, or if some slice has no worker.
pub(super) fn even_out(slots: &BTreeMap<WorkerId, u32>, present: &Placement) -> Option<Placement> {
    let mut free: BTreeMap<WorkerId, i64> = slots.iter().map(|(w, all)| (*w, i64::from(*all))).collect();
    for worker in &present.0 {
        *free.get_mut(worker)? -= 1;
    }
    let mut placement = present.clone();
    // Each slice moves at most once: the least free slots never become fewer.
    for _ in 0..present.0.len() {
        let (least, few) = placement.0.iter().map(|w| (*w, free[w])).min_by_key(|(w, free)| (*free, *w))?;
        let (most, many) = free.iter().map(|(w, f)| (*w, *f)).max_by_key(|(w, f)| (*f, std::cmp::Reverse(*w)))?;
        if many <= 0 || many < few + 2 {
            break;
        }
        let last = placement.0.iter().rposition(|w| *w == least)?;
        placement.0[last] = most;
        *free.get_mut(&least)? += 1;
        *free.get_mut(&most)? -= 1;
    }
    (placement != *present).then_some(placement)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(slots: &[(u32, u32)]) -> BTreeMap<WorkerId, u32> {
        slots.iter().map(|(id, slots)| (WorkerId(*id), *slots)).collect()
    }

    fn placed(parallelism: u32, slots: &[(u32, u32)], before: &[u32], crowd: bool) -> Option<Vec<u32>> {
        let before = Placement(before.iter().map(|id| WorkerId(*id)).collect());
        let placement = place(parallelism, &workers(slots), &before, crowd)?;
        Some(placement.0.into_iter().map(|w| w.0).collect())
    }

    #[test]
    fn slices_are_spread_first_and_fill_up_then() {
        assert_eq!(placed(2, &[(1, 2), (2, 2), (3, 2)], &[], false), Some(vec![1, 2]));
        assert_eq!(placed(6, &[(1, 2), (2, 2), (3, 2)], &[], false), Some(vec![1, 2, 3, 1, 2, 3]));
        assert_eq!(placed(3, &[(1, 1), (2, 4)], &[], false), Some(vec![2, 2, 2]));
        assert_eq!(placed(5, &[(1, 1), (2, 4)], &[], false), Some(vec![2, 2, 2, 1, 2]));
    }

    #[test]
    fn too_few_slots_are_said_so() {
        assert_eq!(placed(5, &[(1, 2), (2, 2)], &[], false), None);
        assert_eq!(placed(1, &[], &[], true), None);
        assert_eq!(placed(1, &[(1, 0)], &[], false), None);
    }

    #[test]
    fn only_what_is_lost_moves_to_a_spare_or_else_to_survivors() {
        assert_eq!(placed(4, &[(1, 2), (3, 2)], &[1, 2, 1, 2], false), Some(vec![1, 3, 1, 3]));
        assert_eq!(placed(4, &[(1, 2), (4, 2), (5, 2)], &[1, 2, 1, 2], false), Some(vec![1, 4, 1, 5]));
        assert_eq!(placed(3, &[(1, 1), (3, 1)], &[1, 2, 3], true), Some(vec![1, 1, 3]));
        assert_eq!(placed(6, &[(1, 2), (3, 2)], &[1, 2, 3, 1, 2, 3], true), Some(vec![1, 1, 3, 1, 3, 3]));
    }

    #[test]
    fn slices_move_to_free_slots_only_if_that_spreads_them_better() {
        let evened = |slots: &[(u32, u32)], present: &[u32]| {
            let present = Placement(present.iter().map(|id| WorkerId(*id)).collect());
            even_out(&workers(slots), &present).map(|p| p.0.into_iter().map(|w| w.0).collect::<Vec<_>>())
        };
        // A worker that comes back, behind a crowded one and behind one that was only full.
        assert_eq!(evened(&[(1, 1), (3, 1), (4, 1)], &[1, 1, 3]), Some(vec![1, 4, 3]));
        assert_eq!(evened(&[(1, 2), (3, 2), (4, 2)], &[1, 1, 3, 3]), Some(vec![1, 4, 3, 3]));
        assert_eq!(evened(&[(1, 2), (2, 2)], &[1, 1, 1, 1]), Some(vec![1, 1, 2, 2]));
        assert_eq!(evened(&[(1, 4), (2, 4)], &[1, 1, 1, 1]), Some(vec![1, 1, 2, 2]));
        // Nothing is free, or nothing is gained.
        assert_eq!(evened(&[(1, 1), (3, 1)], &[1, 1, 3]), None);
        assert_eq!(evened(&[(1, 2), (2, 2)], &[1, 1, 2]), None);
        assert_eq!(evened(&[(1, 2), (2, 1)], &[1, 1]), None);
        assert_eq!(evened(&[(1, 4)], &[1, 1]), None);
        assert_eq!(evened(&[(1, u32::MAX)], &[1, 1, 1]), None);
        // What is lost is not for this to place.
        assert_eq!(evened(&[(1, 2)], &[1, 2]), None);
        assert_eq!(evened(&[(1, 2)], &[]), None);
    }

    #[test]
    fn a_change_of_parallelism_moves_as_little_as_it_can() {
        assert_eq!(placed(4, &[(1, 2), (2, 2)], &[1, 2], false), Some(vec![1, 2, 1, 2]));
        assert_eq!(placed(3, &[(1, 2), (2, 2)], &[1, 2, 1, 2], false), Some(vec![1, 2, 1]));
        assert_eq!(placed(3, &[(1, 1), (2, 2)], &[1, 1, 2], false), Some(vec![1, 2, 2]), "its slots have become fewer");
    }
}
