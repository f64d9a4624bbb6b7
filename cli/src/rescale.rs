//! `floodmark rescale`: asks the process that runs a job to go on at another parallelism, and waits until it does.

use floodmark_worker::api::{RescaleOrder, RescaledView};

use crate::{
    args::RescaleArgs,
    control::{Answer, Place, nobody_listens},
    exit::{Exit, Failure},
    job,
    screen::Screen,
    waiting::{Waiting, order},
};

/// Rescales the job; says on standard error what has been done.
pub(crate) fn rescale(args: &RescaleArgs, screen: &Screen) -> Result<Exit, Failure> {
    let (job, manifest) = job::identify(&args.job)?;
    let storage = job::storage(args.storage.as_deref(), &manifest)?;
    let n = args.parallelism;
    let what = format!("bringing {job} to parallelism {n}");
    let waiting = Waiting::start(screen, what, "Ctrl-C stops waiting, not the job's change");
    let interrupted =
        format!("no longer waiting; the job goes on to parallelism {n}: floodmark status shows whether it is there");
    let place = Place::of(&job, &storage);
    match order(&place, "/rescale", &RescaleOrder { parallelism: n }, waiting, interrupted)? {
        Answer::Is(done) => {
            eprintln!("{}", said(&done));
            Ok(Exit::Done)
        }
        Answer::Refused(reason) => {
            Err(Failure::new(Exit::JobFailed, format!("{job} is not brought to parallelism {n}: {reason}")))
        }
        Answer::NobodyListens => Err(nobody_listens(
            &job,
            &storage,
            &format!("start it at that parallelism instead: floodmark run --parallelism {n}"),
        )),
    }
}

fn said(done: &RescaledView) -> String {
    let RescaledView { from, to, epoch } = done;
    match epoch {
        Some(epoch) => format!("parallelism {from} -> {to}: the job goes on from checkpoint {epoch}"),
        None if from == to => format!("the job runs at parallelism {to} already"),
        None => format!("parallelism {from} -> {to}"),
    }
}

#[cfg(test)]
mod tests {
    use floodmark_snapshot::Epoch;

    use super::*;

    #[test]
    fn what_was_done_is_said_in_a_line() {
        let done = |from, to, epoch: Option<u64>| said(&RescaledView { from, to, epoch: epoch.map(Epoch) });
        assert_eq!(done(2, 4, Some(9)), "parallelism 2 -> 4: the job goes on from checkpoint 9");
        assert_eq!(done(4, 4, None), "the job runs at parallelism 4 already");
    }
}
