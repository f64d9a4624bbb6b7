//! `floodmark savepoint`: asks the process that runs a job for a savepoint, and waits for it.

use chrono::DateTime;
use floodmark_snapshot::{Env, savepoint::check_name};
use floodmark_worker::api::{SavepointOrder, SavepointView, Then};

use crate::{
    args::SavepointArgs,
    control::{Answer, Place, nobody_listens},
    display::bytes,
    exit::{Exit, Failure},
    job,
    screen::{Screen, print},
    waiting::{Waiting, order},
};

/// Takes the savepoint; prints its location.
pub(crate) fn savepoint(args: &SavepointArgs, screen: &Screen) -> Result<Exit, Failure> {
    let (job, manifest) = job::identify(&args.job)?;
    let storage = job::storage(args.storage.as_deref(), &manifest)?;
    let name = args.name.clone().unwrap_or_else(|| name_at(Env::system().clock.wall_ms()));
    check_name(&name).map_err(Failure::input)?;
    let then = match (args.stop, args.drain) {
        (_, true) => Then::Drain,
        (true, false) => Then::Stop,
        (false, false) => Then::Continue,
    };
    let what = format!("taking savepoint {name} of {job}");
    let waiting = Waiting::start(screen, what, "Ctrl-C stops waiting, not the savepoint");
    let interrupted =
        format!("no longer waiting; the job goes on taking savepoint {name}: see floodmark checkpoints list");
    let (place, asked) = (Place::of(&job, &storage), SavepointOrder { name: name.clone(), then });
    match order::<_, SavepointView>(&place, "/savepoints", &asked, waiting, interrupted)? {
        Answer::Is(made) => {
            let after = match then {
                Then::Continue => "the job goes on",
                Then::Stop => "the job stops",
                Then::Drain => "the job has drained, and stops",
            };
            eprintln!("savepoint {name}: {}, a copy of checkpoint {}; {after}", bytes(made.size), made.epoch);
            print(&format!("{}\n", made.location));
            Ok(Exit::Done)
        }
        Answer::Refused(reason) => {
            Err(Failure::new(Exit::JobFailed, format!("no savepoint {name} of {job}: {reason}")))
        }
        Answer::NobodyListens => Err(nobody_listens(
            &job,
            &storage,
            "a savepoint needs one. Run it (floodmark run), or start from a checkpoint instead: floodmark checkpoints list \
             shows what --restore takes",
        )),
    }
}

/// The name of a savepoint that nobody has named: the time in UTC, to the second.
fn name_at(wall_ms: i64) -> String {
    DateTime::from_timestamp_millis(wall_ms).unwrap_or_default().format("%Y-%m-%dT%H-%M-%S").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_made_of_the_time_can_be_a_savepoints() {
        assert_eq!(name_at(1_795_257_192_000), "2026-11-21T10-33-12");
        check_name(&name_at(1_795_257_192_000)).unwrap();
    }
}
