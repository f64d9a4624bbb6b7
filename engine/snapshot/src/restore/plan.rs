//! What a snapshot's state becomes in a job: which operators keep theirs, which begin empty, which state is lost, and what
//! can't be taken over at all. Pure: known before anything stops.

use std::fmt;

use crate::{Epoch, Error, Manifest, OperatorSnapshot, OperatorUid, Result, ShardKind, StateSchema};

/// An operator of the new plan, as far as its state goes.
#[derive(Clone, Debug)]
pub struct Taker {
    /// Its identity.
    pub uid: OperatorUid,
    /// What it is, in words.
    pub kind: String,
    /// The types of its state; `None` if it keeps none.
    pub schema: Option<StateSchema>,
}

/// What becomes of an operator's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is taken over.
    Kept,
    /// It is taken over; these columns begin empty, and those are lost.
    Changed {
        /// Columns that begin empty.
        added: Vec<String>,
        /// Columns whose state is lost.
        lost: Vec<String>,
    },
    /// The operator is new, and begins empty.
    New,
    /// Nobody takes the state over.
    Lost(String),
    /// The state does not fit.
    Refused(Vec<String>),
}

/// One operator of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its identity.
    pub uid: OperatorUid,
    /// What it is (or was), in words.
    pub kind: String,
    /// How much state there is, in words: `12004 rows, 3 splits`.
    pub amount: String,
    /// What becomes of it.
    pub fate: Fate,
}

/// A plan; prints as what `floodmark plan` shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatePlan {
    /// Which snapshot: `checkpoint 7 of default/hot/local`.
    pub snapshot: String,
    /// Why the snapshot as a whole doesn't fit.
    pub refused: Vec<String>,
    /// Operators of the snapshot, by uid; then the new ones.
    pub lines: Vec<Line>,
}

impl StatePlan {
    /// What `manifest` becomes in a job of these operators, whose plan has this `fingerprint`. Output staged up to `committed`
    /// is visible already, and needs nobody to take it.
    #[must_use]
    pub fn new(
        manifest: &Manifest,
        takers: &[Taker],
        fingerprint: &str,
        max_parallelism: u16,
        committed: Epoch,
    ) -> Self {
        let mut refused: Vec<String> = in_flight(manifest, fingerprint).into_iter().collect();
        if manifest.max_parallelism != max_parallelism {
            refused.push(format!(
                "maxParallelism is {max_parallelism}, but its keys were dealt out for {}: it can't change in a job's life",
                manifest.max_parallelism
            ));
        }
        let taker_of = |uid: &OperatorUid| takers.iter().find(|t| t.uid == *uid);
        let line = |uid: &OperatorUid, snapshot: &OperatorSnapshot| Line {
            uid: uid.clone(),
            kind: snapshot.kind.clone(),
            amount: amount(snapshot),
            fate: fate(snapshot, taker_of(uid), committed),
        };
        let mut lines: Vec<Line> = manifest.operators.iter().map(|(uid, snapshot)| line(uid, snapshot)).collect();
        let new = |t: &&Taker| t.schema.is_some() && !manifest.operators.contains_key(&t.uid);
        lines.extend(takers.iter().filter(new).map(|t| Line {
            uid: t.uid.clone(),
            kind: t.kind.clone(),
            amount: String::new(),
            fate: Fate::New,
        }));
        Self { snapshot: format!("checkpoint {} of {}", manifest.epoch, manifest.job), refused, lines }
    }

    /// Whether state is lost.
    #[must_use]
    pub fn loses(&self) -> bool {
        self.lines.iter().any(|l| match &l.fate {
            Fate::Lost(_) => true,
            Fate::Changed { lost, .. } => !lost.is_empty(),
            Fate::Kept | Fate::New | Fate::Refused(_) => false,
        })
    }

    /// Refuses what can't be restored, and a loss unless it is allowed.
    ///
    /// # Errors
    /// Names every operator whose state does not fit, why, and what to do.
    pub fn admit(&self, allow_dropped_state: bool) -> Result<()> {
        let mut problems = self.refused.clone();
        for Line { uid, fate, .. } in &self.lines {
            let lost = match fate {
                Fate::Kept | Fate::New => continue,
                Fate::Refused(reasons) => {
                    problems.extend(reasons.iter().map(|reason| format!("{uid}: {reason}")));
                    continue;
                }
                Fate::Lost(reason) => format!("{uid} {reason}"),
                Fate::Changed { lost, .. } if lost.is_empty() => continue,
                Fate::Changed { lost, .. } => format!("{uid} keeps {} no more", lost.join(", ")),
            };
            if !allow_dropped_state {
                problems.push(format!("{lost}; to give the state up set spec.restore.allowDroppedState: true"));
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::abort(format!(
            "{} does not fit this job (to start without state: --restore none; in a cluster, upgrade mode Stateless): {}",
            self.snapshot,
            problems.join("; ")
        )))
    }
}

/// Why rows in flight that a snapshot holds can't go on in a job of this plan; they can in the very one that they come from.
fn in_flight(manifest: &Manifest, fingerprint: &str) -> Option<String> {
    let rows: u64 = manifest.shards().filter(|s| s.kind == ShardKind::Channel).map(|s| s.rows).sum();
    (rows > 0 && manifest.plan != fingerprint).then(|| {
        format!(
            "it holds {rows} rows that were on their way between operators, and the job's plan is another now: run the job as \
             it was, and stop it with a savepoint, which leaves no rows on their way"
        )
    })
}

fn fate(snapshot: &OperatorSnapshot, taker: Option<&Taker>, committed: Epoch) -> Fate {
    let Some(taker) = taker else {
        let visible = |epoch: Option<Epoch>| epoch.is_some_and(|e| e <= committed);
        let pending = |s: &&crate::Shard| s.kind == ShardKind::Staged && !visible(s.epoch);
        let only_output = !snapshot.shards.is_empty() && snapshot.shards.iter().all(|s| s.kind == ShardKind::Staged);
        return match snapshot.shards.iter().filter(pending).map(|s| s.rows).sum::<u64>() {
            0 if only_output => Fate::Kept,
            0 => Fate::Lost(format!("({}) has state, but the job has no such operator any more", snapshot.kind)),
            rows => Fate::Lost(format!(
                "({}) has {rows} records to write, but the job has no such sink any more",
                snapshot.kind
            )),
        };
    };
    if taker.kind != snapshot.kind {
        return Fate::Refused(vec![format!("it was a {} and is now a {}", snapshot.kind, taker.kind)]);
    }
    let Some(schema) = &taker.schema else {
        let keeps = |kind: ShardKind| !matches!(kind, ShardKind::Channel | ShardKind::Staged);
        return if snapshot.shards.iter().any(|s| keeps(s.kind)) {
            Fate::Lost(format!("({}) keeps no state any more", snapshot.kind))
        } else {
            Fate::Kept
        };
    };
    // Rows on their way to an operator without state are all that stands of it.
    let stateless = snapshot.schema == StateSchema::default() && snapshot.splits.is_empty();
    if stateless && snapshot.shards.iter().all(|s| matches!(s.kind, ShardKind::Channel | ShardKind::Staged)) {
        return Fate::Kept;
    }
    let evolution = snapshot.schema.evolve(schema);
    if !evolution.refused.is_empty() {
        return Fate::Refused(evolution.refused);
    }
    if evolution.added.is_empty() && evolution.dropped.is_empty() {
        return Fate::Kept;
    }
    Fate::Changed { added: evolution.added, lost: evolution.dropped }
}

fn amount(snapshot: &OperatorSnapshot) -> String {
    let rows: u64 = snapshot.shards.iter().map(|s| s.rows).sum();
    let mut parts = Vec::new();
    if !snapshot.splits.is_empty() {
        parts.push(counted(snapshot.splits.len() as u64, "split"));
    }
    if rows > 0 || parts.is_empty() {
        parts.push(counted(rows, "row"));
    }
    parts.join(", ")
}

fn counted(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

impl Fate {
    fn symbol(&self) -> char {
        match self {
            Self::Kept => '=',
            Self::Changed { .. } => '~',
            Self::New => '+',
            Self::Lost(_) => '-',
            Self::Refused(_) => '!',
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {} {:<32} {:<18} ", self.fate.symbol(), self.uid.0, self.kind)?;
        match &self.fate {
            Fate::Kept => f.write_str(&self.amount),
            Fate::Changed { added, lost } => {
                f.write_str(&self.amount)?;
                if !added.is_empty() {
                    write!(f, "; begins empty: {}", added.join(", "))?;
                }
                if !lost.is_empty() {
                    write!(f, "; lost: {}", lost.join(", "))?;
                }
                Ok(())
            }
            Fate::New => f.write_str("begins empty"),
            Fate::Lost(_) => write!(f, "lost: {}", self.amount),
            Fate::Refused(reasons) => write!(f, "can't be restored: {}", reasons.join("; ")),
        }
    }
}

impl fmt::Display for StatePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.snapshot)?;
        self.refused.iter().try_for_each(|reason| writeln!(f, "  ! {reason}"))?;
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        let count = |symbol| self.lines.iter().filter(|l| l.fate.symbol() == symbol).count();
        write!(
            f,
            "{} kept, {} changed, {} new, {} lost, {} can't be restored",
            count('='),
            count('~'),
            count('+'),
            count('-'),
            count('!') + self.refused.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::{JobId, Shard, StateColumn};

    /// The fingerprint of the plan that the snapshot comes from.
    const PLAN: &str = "as it was";

    fn schema(values: &[&str]) -> StateSchema {
        let value = |name: &&str| StateColumn { name: (*name).to_owned(), data_type: "Int64".into(), optional: true };
        StateSchema { values: values.iter().map(value).collect(), ..StateSchema::from("aggregates") }
    }

    fn state(kind: &str, schema: StateSchema, shards: Vec<Shard>) -> OperatorSnapshot {
        OperatorSnapshot { kind: kind.into(), schema, parallelism: 1, splits: Vec::new(), shards }
    }

    fn shard(kind: ShardKind, rows: u64, epoch: u64) -> Shard {
        Shard { rows, epoch: Some(Epoch(epoch)), ..Shard::new("x", kind) }
    }

    fn manifest() -> Manifest {
        let keyed = |rows| vec![shard(ShardKind::Keyed, rows, 0)];
        let operators = [
            ("bids", state("kafka source", StateSchema::default(), Vec::new())),
            ("hot", state("window aggregate", schema(&["count", "sum"]), keyed(10))),
            ("joined", state("window join", schema(&[]), keyed(3))),
            ("old", state("group aggregate", schema(&["count"]), keyed(1))),
            ("out", state("kafka sink", StateSchema::default(), vec![shard(ShardKind::Staged, 7, 4)])),
        ];
        let job = JobId { namespace: "default".into(), name: "j".into(), uid: "local".into() };
        let operators = operators.map(|(uid, o)| (uid.into(), o)).into();
        Manifest { max_parallelism: 128, plan: PLAN.into(), operators, ..Manifest::new(job, Epoch(4)) }
    }

    fn taker(uid: &str, kind: &str, schema: Option<StateSchema>) -> Taker {
        Taker { uid: uid.into(), kind: kind.into(), schema }
    }

    fn check(takers: &[Taker], max_parallelism: u16, committed: u64, expected: Expect) {
        let plan = StatePlan::new(&manifest(), takers, PLAN, max_parallelism, Epoch(committed));
        let admitted = |allow| plan.admit(allow).map_or_else(|e| e.to_string(), |()| "admitted".to_owned());
        let text: String = plan.to_string().lines().map(|l| format!("{}\n", l.trim_end())).collect();
        expected.assert_eq(&format!("{text}{}\n{}\n", admitted(false), admitted(true)));
    }

    fn same() -> Vec<Taker> {
        vec![
            taker("bids", "kafka source", Some(StateSchema::default())),
            taker("hot", "window aggregate", Some(schema(&["count", "sum"]))),
            taker("joined", "window join", Some(schema(&[]))),
            taker("old", "group aggregate", Some(schema(&["count"]))),
            taker("out", "kafka sink", None),
        ]
    }

    #[test]
    fn the_same_job_keeps_everything() {
        check(
            &same(),
            128,
            0,
            expect![[r#"
            checkpoint 4 of default/j/local
              = bids                             kafka source       0 rows
              = hot                              window aggregate   10 rows
              = joined                           window join        3 rows
              = old                              group aggregate    1 row
              = out                              kafka sink         7 rows
            5 kept, 0 changed, 0 new, 0 lost, 0 can't be restored
            admitted
            admitted
        "#]],
        );
    }

    #[test]
    fn what_is_new_begins_empty_and_what_is_gone_is_lost_only_if_that_is_allowed() {
        let mut takers = same();
        takers[1].schema = Some(schema(&["count", "max"]));
        takers[3] = taker("new", "group aggregate", Some(schema(&["count"])));
        takers[4] = taker("other", "blackhole sink", None);
        check(
            &takers,
            128,
            3,
            expect![[r#"
                checkpoint 4 of default/j/local
                  = bids                             kafka source       0 rows
                  ~ hot                              window aggregate   10 rows; begins empty: max; lost: sum
                  = joined                           window join        3 rows
                  - old                              group aggregate    lost: 1 row
                  - out                              kafka sink         lost: 7 rows
                  + new                              group aggregate    begins empty
                2 kept, 1 changed, 1 new, 2 lost, 0 can't be restored
                checkpoint 4 of default/j/local does not fit this job (to start without state: --restore none; in a cluster, upgrade mode Stateless): hot keeps sum no more; to give the state up set spec.restore.allowDroppedState: true; old (group aggregate) has state, but the job has no such operator any more; to give the state up set spec.restore.allowDroppedState: true; out (kafka sink) has 7 records to write, but the job has no such sink any more; to give the state up set spec.restore.allowDroppedState: true
                admitted
            "#]],
        );
    }

    #[test]
    fn committed_output_needs_nobody_to_take_it() {
        check(
            &same()[..4],
            128,
            4,
            expect![[r#"
            checkpoint 4 of default/j/local
              = bids                             kafka source       0 rows
              = hot                              window aggregate   10 rows
              = joined                           window join        3 rows
              = old                              group aggregate    1 row
              = out                              kafka sink         7 rows
            5 kept, 0 changed, 0 new, 0 lost, 0 can't be restored
            admitted
            admitted
        "#]],
        );
    }

    #[test]
    fn what_does_not_fit_is_refused_whatever_is_allowed() {
        let mut takers = same();
        takers[1].kind = "group aggregate".into();
        takers[2].schema = Some("something else".into());
        takers[3].schema = None;
        check(
            &takers,
            64,
            0,
            expect![[r#"
            checkpoint 4 of default/j/local
              ! maxParallelism is 64, but its keys were dealt out for 128: it can't change in a job's life
              = bids                             kafka source       0 rows
              ! hot                              window aggregate   can't be restored: it was a window aggregate and is now a group aggregate
              ! joined                           window join        can't be restored: it was [aggregates] and is now [something else]
              - old                              group aggregate    lost: 1 row
              = out                              kafka sink         7 rows
            2 kept, 0 changed, 0 new, 1 lost, 3 can't be restored
            checkpoint 4 of default/j/local does not fit this job (to start without state: --restore none; in a cluster, upgrade mode Stateless): maxParallelism is 64, but its keys were dealt out for 128: it can't change in a job's life; hot: it was a window aggregate and is now a group aggregate; joined: it was [aggregates] and is now [something else]; old (group aggregate) keeps no state any more; to give the state up set spec.restore.allowDroppedState: true
            checkpoint 4 of default/j/local does not fit this job (to start without state: --restore none; in a cluster, upgrade mode Stateless): maxParallelism is 64, but its keys were dealt out for 128: it can't change in a job's life; hot: it was a window aggregate and is now a group aggregate; joined: it was [aggregates] and is now [something else]
        "#]],
        );
    }

    #[test]
    fn rows_in_flight_go_on_only_in_the_plan_that_they_come_from() {
        let admitted = |manifest: &Manifest, plan: &str| {
            let plan = StatePlan::new(manifest, &same(), plan, 128, Epoch(4));
            plan.admit(true).map_err(|e| e.to_string())
        };
        let mut manifest = manifest();
        assert_eq!(admitted(&manifest, "another"), Ok(()), "no rows, and so no matter which plan");
        let hot = manifest.operators.get_mut(&"hot".into()).unwrap();
        hot.shards.push(shard(ShardKind::Channel, 3, 4));
        assert_eq!(admitted(&manifest, PLAN), Ok(()));
        let error = admitted(&manifest, "another").unwrap_err();
        assert!(error.starts_with("checkpoint 4 of default/j/local does not fit this job"), "{error}");
        assert!(error.contains("it holds 3 rows that were on their way between operators"), "{error}");
        let text = StatePlan::new(&manifest, &same(), "another", 128, Epoch(4)).to_string();
        assert!(text.contains("\n  ! it holds 3 rows"), "{text}");
        assert!(text.ends_with("5 kept, 0 changed, 0 new, 0 lost, 1 can't be restored"), "{text}");
    }
}
