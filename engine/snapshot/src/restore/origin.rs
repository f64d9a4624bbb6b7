//! What a start is asked to go on from: the words of whoever starts the job, held against what its log says. Pure.
//!
//! Invariant: the same words, said again, never take a job back.

use super::Reference;
use crate::log::LogState;

/// What a start goes on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// The job's own newest intact checkpoint; nothing, if it has no past. A job that has finished has nothing left to do.
    Own,
    /// Nothing, whatever checkpoints there are.
    Nothing,
    /// This snapshot, and no other.
    From(&'a Reference),
}

/// Tells one start of a job from another: what it was told to begin at counts once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartId {
    /// The start of this process, by whatever it is known. Others that name the same snapshot go on with it; what begins with
    /// nothing is each process's own.
    Process(String),
    /// The run of a job that has this number, whichever process runs it: the next one begins anew, with the same words too.
    Run(u64),
}

impl StartId {
    /// How the log remembers what such a start was told to begin at.
    #[must_use]
    pub fn asked(&self, reference: &Reference) -> String {
        match (self, reference) {
            (Self::Run(number), reference) => format!("{reference} (run {number})"),
            (Self::Process(process), Reference::Nothing) => format!("{reference} ({process})"),
            (Self::Process(_), named) => named.to_string(),
        }
    }
}

impl<'a> Origin<'a> {
    /// What a start of a job means that is told to begin at `restore`. `initial` is what it begins at if that is
    /// [`Reference::Latest`] and the job has no past.
    #[must_use]
    pub fn of_start(restore: &'a Reference, initial: Option<&'a Reference>, start: &StartId, state: &LogState) -> Self {
        let wanted = match (restore, initial) {
            (Reference::Latest, Some(initial)) if !state.has_history() => initial,
            (wanted, _) => wanted,
        };
        match Self::of(wanted) {
            Self::Own => Self::Own,
            // It has begun there: now it goes on, after a failure too, and not back again.
            _ if state.asked == Some(start.asked(wanted)) && !state.retained.is_empty() => Self::Own,
            origin => origin,
        }
    }

    /// What a name means by itself, whatever the job did before.
    #[must_use]
    pub fn of(reference: &'a Reference) -> Self {
        match reference {
            Reference::Latest => Self::Own,
            Reference::Nothing => Self::Nothing,
            Reference::Checkpoint(_) | Reference::Savepoint(_) | Reference::Location(_) => Self::From(reference),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Epoch, JobId, Manifest, log::Retained};

    /// A job's past, as far as a start looks at it: `retained`, `abandoned` or `damaged`; and what it was asked for last.
    fn past(words: &str) -> LogState {
        let mut state = LogState::default();
        let job = JobId { namespace: "n".into(), name: "j".into(), uid: "u".into() };
        let checkpoint = Retained { seq: 1, manifest: Manifest::new(job, Epoch(1)), from: None };
        for word in words.split_whitespace() {
            match word {
                "retained" => state.retained.push(checkpoint.clone()),
                "abandoned" => state.abandoned.push(checkpoint.clone()),
                "damaged" => state.damaged.push(crate::log::Damaged { seq: 1, reason: "cut".into() }),
                asked => state.asked = Some(asked.replace('_', " ")),
            }
        }
        state
    }

    fn shown(origin: Origin<'_>) -> String {
        match origin {
            Origin::Own => "own".to_owned(),
            Origin::Nothing => "nothing".to_owned(),
            Origin::From(reference) => reference.to_string(),
        }
    }

    #[test]
    fn a_start_means_the_same_wherever_it_is_looked_up() {
        // --restore, spec.restore.from, the past, what it comes to
        let cases = [
            ("latest", "", "", "own"),
            ("latest", "", "retained", "own"),
            ("latest", "", "retained base", "own"),
            ("latest", "base", "", "base"),
            ("latest", "none", "", "nothing"),
            ("latest", "latest", "", "own"),
            ("latest", "base", "retained", "own"),
            ("latest", "base", "abandoned", "own"),
            ("latest", "base", "damaged", "own"),
            ("none", "", "", "nothing"),
            ("none", "base", "retained", "nothing"),
            ("none", "", "retained none", "nothing"),
            ("none", "", "retained none_(p)", "own"),
            ("none", "", "retained none_(q)", "nothing"),
            ("none", "", "abandoned none_(p)", "nothing"),
            ("7", "", "", "7"),
            ("7", "base", "", "7"),
            ("7", "", "retained", "7"),
            ("7", "", "retained 7", "own"),
            ("7", "", "retained 8", "7"),
            ("7", "", "abandoned 7", "7"),
            ("base", "", "retained base", "own"),
            ("base", "", "damaged base", "base"),
            ("/kept/base", "", "retained base", "/kept/base"),
            ("/kept/base", "", "retained /kept/base", "own"),
            ("/kept/base/", "", "retained /kept/base", "own"),
        ];
        for (restore, initial, words, expected) in cases {
            let (wanted, state) = (restore.parse().unwrap(), past(words));
            let initial = (!initial.is_empty()).then(|| initial.parse().unwrap());
            let origin = Origin::of_start(&wanted, initial.as_ref(), &StartId::Process("p".into()), &state);
            assert_eq!(shown(origin), expected, "{restore}, {initial:?}, past: {words}");
        }
    }

    #[test]
    fn a_run_begins_once_where_it_was_told_to() {
        for words in ["none", "7", "base"] {
            let wanted: Reference = words.parse().unwrap();
            let of_run =
                |number, state: &LogState| shown(Origin::of_start(&wanted, None, &StartId::Run(number), state));
            let begun = past(&format!("retained {words}_(run_3)"));
            assert_eq!(of_run(3, &begun), "own");
            let anew = if words == "none" { "nothing" } else { words };
            assert_eq!((of_run(4, &begun), of_run(3, &past("retained"))), (anew.to_owned(), anew.to_owned()));
        }
    }

    #[test]
    fn a_name_by_itself_knows_no_past() {
        for (name, expected) in [("latest", "own"), ("none", "nothing"), ("7", "7"), ("a", "a"), ("/a", "/a")] {
            let reference = name.parse().unwrap();
            assert_eq!(shown(Origin::of(&reference)), expected);
        }
    }
}
