//! Which data files are uploaded already, and may be named again. A pure state machine; no I/O.
//!
//! A checkpoint may name again exactly what the newest completed one names: nothing else is sure to be kept. So files of a
//! checkpoint that is still under way are uploaded a second time by the next, and those of an aborted one are never named.
//! Invariant: whatever order completions and aborts come in, a reused shard is one of a completed checkpoint.

use std::collections::{BTreeMap, HashMap, HashSet};

use floodmark_snapshot::{Epoch, Shard, manifest::ShardStatus};

use crate::meta::DataFile;

/// Shards by the name of their file.
type Files = HashMap<String, Shard>;

/// See the header of this file.
#[derive(Debug, Default)]
pub(crate) struct Lineage {
    newest: Epoch,
    known: Files,
    under_way: BTreeMap<Epoch, Files>,
    /// Checksums of files that were read before. A name stands for the same bytes as long as the database lives.
    checked: HashMap<String, DataFile>,
}

impl Lineage {
    /// A lineage that goes on from a restored checkpoint.
    pub(crate) fn restored(shards: impl IntoIterator<Item = Shard>) -> Self {
        let known = shards.into_iter().filter_map(|s| Some((s.name.clone()?, s))).collect();
        Self { known, ..Self::default() }
    }

    /// A file whose checksum is known.
    pub(crate) fn checked(&self, name: &str) -> Option<DataFile> {
        self.checked.get(name).cloned()
    }

    /// Remembers a file's checksum.
    pub(crate) fn check(&mut self, file: &DataFile) {
        self.checked.insert(file.name.clone(), file.clone());
    }

    /// Forgets the checksums of files that are none of these.
    pub(crate) fn keep_checked(&mut self, files: &[DataFile]) {
        let names: HashSet<&str> = files.iter().map(|f| f.name.as_str()).collect();
        self.checked.retain(|name, _| names.contains(name.as_str()));
    }

    /// A checkpoint begins.
    pub(crate) fn begin(&mut self, epoch: Epoch) {
        self.under_way.insert(epoch, Files::new());
    }

    /// The shard of a file that checkpoint `epoch` needs, if it need not be uploaded.
    pub(crate) fn reuse(&mut self, epoch: Epoch, file: &str) -> Option<Shard> {
        let shard = Shard { status: ShardStatus::Reused, ..self.known.get(file)?.clone() };
        self.under_way.get_mut(&epoch)?.insert(file.to_owned(), shard.clone());
        Some(shard)
    }

    /// Checkpoint `epoch` has uploaded a file. Without consequence if the checkpoint was given up meanwhile.
    pub(crate) fn uploaded(&mut self, epoch: Epoch, shard: &Shard) {
        if let (Some(files), Some(name)) = (self.under_way.get_mut(&epoch), &shard.name) {
            files.insert(name.clone(), shard.clone());
        }
    }

    /// Checkpoint `epoch` is complete.
    pub(crate) fn completed(&mut self, epoch: Epoch) {
        let Some(files) = self.under_way.remove(&epoch) else { return };
        if epoch >= self.newest {
            (self.newest, self.known) = (epoch, files);
        }
    }

    /// Checkpoint `epoch` is given up.
    pub(crate) fn aborted(&mut self, epoch: Epoch) {
        self.under_way.remove(&epoch);
    }
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::ShardKind;

    use super::*;

    /// Runs steps, and answers with what each checkpoint named again: `3: a@1`.
    fn check(steps: &str, expected: &[&str]) {
        let mut lineage = Lineage::default();
        let mut seen = Vec::new();
        for step in steps.split(", ") {
            let words: Vec<&str> = step.split(' ').collect();
            let epoch = Epoch(words[1].parse().unwrap());
            match words[0] {
                "take" => {
                    lineage.begin(epoch);
                    for file in &words[2..] {
                        match lineage.reuse(epoch, file) {
                            Some(shard) => seen.push(format!("{epoch}: {}", shard.path)),
                            None => upload(&mut lineage, epoch, file),
                        }
                    }
                }
                "late" => upload(&mut lineage, epoch, words[2]),
                "complete" => lineage.completed(epoch),
                "abort" => lineage.aborted(epoch),
                other => panic!("{other}"),
            }
        }
        assert_eq!(seen, expected, "{steps}");
    }

    fn upload(lineage: &mut Lineage, epoch: Epoch, file: &str) {
        let shard = Shard::new(format!("{file}@{epoch}"), ShardKind::RocksDb);
        lineage.uploaded(epoch, &Shard { name: Some(file.to_owned()), ..shard });
    }

    #[test]
    fn only_what_the_newest_completed_checkpoint_names_is_named_again() {
        check(
            "take 1 a b, complete 1, take 2 a b c, complete 2, take 3 b c",
            &["2: a@1", "2: b@1", "3: b@1", "3: c@2"],
        );
        check("take 1 a, take 2 a, complete 1, complete 2, take 3 a", &["3: a@2"]);
        check("take 1 a, take 2 a, complete 2, complete 1, take 3 a", &["3: a@2"]);
        check("take 1 a, take 2 a, abort 1, take 3 a, complete 2, take 4 a", &["4: a@2"]);
        check("take 1 a, abort 1, late 1 a, complete 1, take 2 a", &[]);
        check("take 1 a, complete 1, take 2 a b, abort 2, take 3 a b", &["2: a@1", "3: a@1"]);
    }
}
