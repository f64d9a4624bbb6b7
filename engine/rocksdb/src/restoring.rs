//! Starts a state from the shards of a checkpoint.
//!
//! The files of one earlier subtask are a *piece* ([`crate::piece`]): a database as it was at the barrier. If there is one piece
//! and it has exactly our key groups, it becomes ours as it is. Otherwise the piece that has most of our key groups becomes ours
//! without the rows of others (what is theirs is told to be removed, and goes with the next compactions), and our rows in the
//! other pieces are read out in order, written to files and taken in as those.
//! Invariant: a row of others' key groups is never read, nor counted. Our own ones are read only if they are copied, or if the
//! checkpoint does not say how many there are ([`crate::stored`]).

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
};

use floodmark_snapshot::{Context, Error, KeyGroup, KeyGroupRange, Result, ShardKind};
use floodmark_state::{KeyGroupWatermarks, RestoredShard, watermarks::RestoredWatermarks};
use rocksdb::WriteBatch;

use crate::{
    checkpoint,
    database::{self, Database, PLACE},
    files::Files,
    folder::failed,
    key,
    lineage::Lineage,
    neutral,
    piece::{Checked, Piece},
    row::Form,
    state::State,
    stored::{Counts, Stored},
};

/// What has been taken in so far.
#[derive(Default)]
pub(crate) struct Restoring {
    pieces: BTreeMap<u32, Piece>,
    pub(crate) watermarks: RestoredWatermarks,
}

impl State {
    /// Takes in a shard.
    pub(crate) fn take_in(&mut self, shard: &RestoredShard) -> Result<()> {
        let taken = match shard.shard.kind {
            ShardKind::RocksDb => self.take_file(shard),
            ShardKind::Keyed => neutral::take_in(self, shard),
            ShardKind::Split | ShardKind::Union | ShardKind::Broadcast | ShardKind::Channel | ShardKind::Staged => {
                Err(Error::abort("it holds no keyed state"))
            }
        };
        taken.context_with(|| format!("restore {}", shard.shard.path))
    }

    fn take_file(&mut self, shard: &RestoredShard) -> Result<()> {
        let subtask = shard.shard.subtask;
        let at = self.database.folder().path().join(format!("piece-{subtask}"));
        let piece = match self.restoring.pieces.entry(subtask) {
            Entry::Occupied(piece) => piece.into_mut(),
            Entry::Vacant(place) => place.insert(Piece::new(at)?),
        };
        piece.take(&shard.shard, shard.file()?)
    }

    /// Makes a state of what has been taken in.
    pub(crate) fn finish_restore(&mut self) -> Result<KeyGroupWatermarks> {
        let Restoring { mut pieces, mut watermarks } = std::mem::take(&mut self.restoring);
        let mut complete = Vec::with_capacity(pieces.len());
        while let Some((subtask, piece)) = pieces.pop_first() {
            let checked = piece.complete(self.spec.key_groups).and_then(|piece| self.check_columns(piece));
            let checked = checked.context_with(|| format!("restore the files of subtask {subtask}"))?;
            watermarks.shard(subtask, 0, Some(checked.key_groups), checked.meta.watermarks.clone());
            complete.push(checked);
        }
        // The one that has most of what is ours becomes ours; what is ours of the others is copied.
        let ours = |piece: &Checked| piece.key_groups.common(&self.spec.key_groups);
        let most = complete.iter().enumerate().filter_map(|(at, piece)| Some((at, ours(piece)?)));
        // In its folder are the pieces: it goes last.
        let mut _before = None;
        if self.spaces.is_empty()
            && let Some((at, ours)) = most.max_by_key(|(_, ours)| ours.last.0 - ours.first.0)
            && complete[at].meta.timed == self.form.timed
        {
            _before = Some(self.adopt(complete.swap_remove(at), ours)?);
        }
        complete.into_iter().try_for_each(|piece| self.import(piece))?;
        Ok(watermarks.within(self.spec.key_groups))
    }

    fn check_columns(&self, piece: Checked) -> Result<Checked> {
        let ours = checkpoint::columns(&self.spec, &self.form);
        if piece.meta.columns == ours {
            return Ok(piece);
        }
        Err(Error::abort(format!(
            "its rows consist of ({}), and now of ({}): RocksDB's files can't follow such a change; start from a savepoint, \
             which can",
            piece.meta.columns.join(", "),
            ours.join(", ")
        )))
    }

    /// Goes on with a piece: as it is if it has just our key groups, else with the rows of those that are ours. Answers with the
    /// database that there was before.
    fn adopt(&mut self, piece: Checked, ours: KeyGroupRange) -> Result<Database> {
        let Checked { folder: from, key_groups, meta, shards, whole } = piece;
        let folder = self.process.database_folder(&self.spec)?;
        let place = folder.path().join(PLACE);
        fs::rename(from.path(), &place).map_err(|e| failed("rename to", &place, &e))?;
        let database = Database::new(self.process.clone(), self.spec.subtask.to_string(), folder);
        database.open()?;
        let before = std::mem::replace(&mut self.database, database);
        self.outgoing = Default::default();
        self.frozen = 0;
        let as_it_is = whole && key_groups == self.spec.key_groups;
        if as_it_is && self.spec.reuse_restored {
            let mut lineage = Lineage::restored(shards);
            meta.files.iter().for_each(|file| lineage.check(file));
            *checkpoint::lock(&self.lineage) = lineage;
        }
        let namespaces = if as_it_is { meta.namespaces } else { self.clip(&meta.namespaces, ours)? };
        self.add_stored(&namespaces);
        Ok(before)
    }

    /// Removes all rows but those of some key groups, by and by, and answers how many these are.
    fn clip(&mut self, all: &BTreeMap<i64, Stored>, ours: KeyGroupRange) -> Result<BTreeMap<i64, Stored>> {
        let (start, end) = (key::group_start(ours.first), key::group_end(ours.last));
        let mut others = WriteBatch::default();
        others.delete_range(&key::group_start(KeyGroup(0)), &start);
        others.delete_range(&end, &key::group_end(KeyGroup(u16::MAX)));
        self.outgoing.send_job(&self.database, database::write_job(others))?;
        match all.iter().map(|(namespace, stored)| Some((*namespace, stored.within(ours)?))).collect() {
            Some(known) => Ok(known),
            None => self.count(ours),
        }
    }

    fn count(&self, ours: KeyGroupRange) -> Result<BTreeMap<i64, Stored>> {
        let mut counts = Counts::none(ours);
        self.database.scan(&key::group_start(ours.first), key::group_end(ours.last), |row_key, _| {
            let (group, namespace, _) = key::parse(row_key).ok_or_else(neutral::not_ours)?;
            counts.add(group, namespace);
            Ok(true)
        })?;
        Ok(counts.finish())
    }

    /// Takes our rows out of a piece.
    fn import(&mut self, piece: Checked) -> Result<()> {
        let Some(common) = piece.key_groups.common(&self.spec.key_groups) else { return Ok(()) };
        let old = database::open_to_read(&self.process.shared, piece.folder.path())?;
        let mut files = Files::new(self);
        let (old_form, now) = (Form { types: self.form.types.clone(), timed: piece.meta.timed }, self.now());
        let mut value = Vec::new();
        let (start, end) = (key::group_start(common.first), key::group_end(common.last));
        database::scan(&old, &start, end, |row_key, old_value| {
            let (group, namespace, _) = key::parse(row_key).ok_or_else(neutral::not_ours)?;
            let same = old_form.timed == self.form.timed;
            if !same {
                old_form.convert(old_value, &self.form, now, &mut value)?;
            }
            let value = if same { old_value } else { &value[..] };
            files.put(
                (group, namespace),
                |out| out.extend_from_slice(row_key),
                |out| {
                    out.extend_from_slice(value);
                    Ok(())
                },
            )?;
            files.cut_if_full()?;
            Ok(true)
        })?;
        self.ingest(files)
    }
}
