//! A Kafka-like log: transactional producers that fence each other by epoch, transactions that stay open until somebody
//! aborts them, and a reader that sees committed records only.
//!
//! A call changes the broker at one moment or not at all. Invariant: records of a transaction are visible all together, with
//! its marker, or never.

use std::collections::BTreeMap;

use floodmark_snapshot::Epoch;

use crate::executor::Pid;

/// The identity under which a subtask of a sink writes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ProducerId {
    /// Its job's number: another job fences nobody of this one.
    pub(crate) job: u32,
    /// The sink's.
    pub(crate) uid: String,
    pub(crate) index: u32,
}

/// A process, and the number of its attempt.
pub(crate) type Writer = (Pid, u64);

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A newer producer holds the identity.
    Fenced,
    /// The transaction is over: the broker has aborted it.
    NoTransaction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Committed,
    Aborted,
}

#[derive(Default)]
struct Producer {
    epoch: u64,
    open: Option<usize>,
    marker: Option<(String, Epoch)>,
}

/// See the header of this file.
#[derive(Default)]
pub(crate) struct Broker {
    producers: BTreeMap<ProducerId, Producer>,
    /// Records in the order in which they were written, each with its transaction.
    log: Vec<(usize, String)>,
    transactions: Vec<Fate>,
    /// Who has written outside of transactions, by the number of what stands for one.
    writers: BTreeMap<usize, Writer>,
    pub(crate) fenced: u64,
}

impl Broker {
    /// Takes the identity over: whoever held it is fenced, what it left open is aborted. Answers with the producer's epoch.
    pub(crate) fn init(&mut self, id: &ProducerId) -> u64 {
        let producer = self.producers.entry(id.clone()).or_default();
        producer.epoch += 1;
        if let Some(open) = producer.open.take() {
            self.transactions[open] = Fate::Aborted;
        }
        producer.epoch
    }

    fn holder(&mut self, id: &ProducerId, epoch: u64) -> Result<&mut Producer, Refusal> {
        match self.producers.get_mut(id) {
            Some(producer) if producer.epoch == epoch => Ok(producer),
            Some(_) | None => {
                self.fenced += 1;
                Err(Refusal::Fenced)
            }
        }
    }

    /// Writes records in a transaction that stays open. Answers with its number.
    pub(crate) fn write(&mut self, id: &ProducerId, epoch: u64, records: Vec<String>) -> Result<usize, Refusal> {
        let number = self.transactions.len();
        let producer = self.holder(id, epoch)?;
        let left = producer.open.replace(number);
        if let Some(left) = left {
            self.transactions[left] = Fate::Aborted;
        }
        self.transactions.push(Fate::Open);
        self.log.extend(records.into_iter().map(|r| (number, r)));
        Ok(number)
    }

    /// Commits the transaction together with its marker.
    pub(crate) fn commit(
        &mut self,
        id: &ProducerId,
        epoch: u64,
        number: usize,
        marker: (String, Epoch),
    ) -> Result<(), Refusal> {
        let producer = self.holder(id, epoch)?;
        if producer.open != Some(number) {
            return Err(Refusal::NoTransaction);
        }
        producer.open = None;
        producer.marker = Some(marker);
        self.transactions[number] = Fate::Committed;
        Ok(())
    }

    /// The broker gives up a transaction that has been open for too long.
    pub(crate) fn time_out(&mut self, id: &ProducerId, number: usize) {
        if let Some(producer) = self.producers.get_mut(id).filter(|p| p.open == Some(number)) {
            producer.open = None;
            // The broker fences whoever left it open.
            producer.epoch += 1;
            self.transactions[number] = Fate::Aborted;
        }
    }

    /// Records outside of any transaction.
    pub(crate) fn append(&mut self, writer: Writer, records: Vec<String>) {
        let number = self.transactions.len();
        self.writers.insert(number, writer);
        self.transactions.push(Fate::Committed);
        self.log.extend(records.into_iter().map(|r| (number, r)));
    }

    /// The marker of a producer, if it is of this history.
    pub(crate) fn marker_of(&self, id: &ProducerId, history: &str) -> Option<Epoch> {
        self.producers.get(id)?.marker.as_ref().filter(|(of, _)| of == history).map(|(_, epoch)| *epoch)
    }

    /// The same, whoever's producer it is.
    pub(crate) fn marker_in(&self, uid: &str, index: u32, history: &str) -> Option<Epoch> {
        self.of_subtask(uid, index).filter_map(|id| self.marker_of(id, history)).max()
    }

    /// Whether a transaction of this subtask is open, of whichever job.
    pub(crate) fn is_open(&self, uid: &str, index: u32) -> bool {
        self.of_subtask(uid, index).any(|id| self.producers[id].open.is_some())
    }

    fn of_subtask<'a>(&'a self, uid: &'a str, index: u32) -> impl Iterator<Item = &'a ProducerId> {
        self.producers.keys().filter(move |id| id.uid == uid && id.index == index)
    }

    /// Whether anybody writes in transactions.
    pub(crate) fn stages(&self) -> bool {
        !self.producers.is_empty()
    }

    /// What a committed reader sees.
    pub(crate) fn committed(&self) -> Vec<String> {
        let visible = |t: usize| self.transactions[t] == Fate::Committed;
        self.log.iter().filter(|(t, _)| visible(*t)).map(|(_, record)| record.clone()).collect()
    }

    /// What the last attempt of process `pid` has written outside of transactions.
    pub(crate) fn written_by(&self, pid: Pid) -> Vec<String> {
        let last = self.writers.values().filter(|(by, _)| *by == pid).max();
        self.log
            .iter()
            .filter(|(t, _)| last.is_some() && self.writers.get(t) == last)
            .map(|(_, record)| record.clone())
            .collect()
    }

    /// Records of transactions that did not come to be.
    pub(crate) fn hidden(&self) -> usize {
        self.log.iter().filter(|(t, _)| self.transactions[*t] != Fate::Committed).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_producer_that_was_taken_over_is_fenced_and_what_it_left_open_is_never_seen() {
        let mut broker = Broker::default();
        let id = ProducerId { job: 1, uid: "sink".to_owned(), index: 0 };
        let marker = |epoch| ("h".to_owned(), Epoch(epoch));
        let old = broker.init(&id);
        let open = broker.write(&id, old, vec!["a".into()]).unwrap();
        let new = broker.init(&id);
        assert_eq!(broker.commit(&id, old, open, marker(1)), Err(Refusal::Fenced));
        let own = broker.write(&id, new, vec!["b".into()]).unwrap();
        assert!(broker.committed().is_empty());
        assert_eq!(broker.commit(&id, new, own, marker(2)), Ok(()));
        assert_eq!(broker.committed(), ["b"]);
        assert_eq!((broker.marker_of(&id, "h"), broker.marker_of(&id, "other")), (Some(Epoch(2)), None));
        assert_eq!((broker.marker_in("sink", 0, "h"), broker.marker_in("sink", 1, "h")), (Some(Epoch(2)), None));
        let other = ProducerId { job: 2, ..id.clone() };
        broker.init(&other);
        assert_eq!(broker.marker_of(&other, "h"), None);
        assert!(!broker.is_open("sink", 0));
        let late = broker.write(&id, new, vec!["c".into()]).unwrap();
        assert!(broker.is_open("sink", 0));
        broker.time_out(&id, late);
        assert_eq!(broker.commit(&id, new, late, marker(3)), Err(Refusal::Fenced));
        assert_eq!((broker.committed().len(), broker.hidden()), (1, 2));
    }
}
