//! A job in several processes, each in a network of its own, from Kafka to Kafka with checkpoints on S3: exactly once under
//! `kill -9`, processes that stand still, and networks that are cut, of workers as of the coordinator; and what was cut off for
//! long and comes back writes nothing that anybody sees.
//!
//! `FLOODMARK_FAULTS` sets how many faults there are, `FLOODMARK_SEED` draws others: faults come at moments of real time, so a
//! seed gives the same faults, not the same run. `FLOODMARK_CUT_SECONDS` sets how long zombies are cut off.

#![allow(clippy::disallowed_methods, reason = "these tests drive real processes in real time")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use floodmark_testkit::Cut;
use floodmark_tests::{
    events::{Draw, Orders},
    job::Run,
};

mod servers;

use servers::world::{FENCED, Fault, POLL, Peers, What, World, setting};

/// Faults that begin before all are undone and the job must get on.
const FAULTS_A_ROUND: usize = 9;
/// Longer than heartbeats, connections, requests and cancelled tasks are waited for, if not as long as in earnest: a minute.
const CUT_SECONDS: u64 = 20;
/// In which every subtask of a sink has begun a transaction: several checkpoints.
const TRANSACTIONS_BEGIN: Duration = Duration::from_secs(2);
/// In which a new attempt has come to the opening of its outputs.
const OPENS_BEGIN: Duration = Duration::from_millis(1_500);
/// How long whoever comes back may take until it has been refused: as long as the client library keeps a connection on which nothing
/// comes, and then some.
const REFUSED_WITHIN: Duration = Duration::from_secs(150);

#[test]
fn a_hundred_faults_of_processes_and_networks_neither_lose_nor_repeat_a_row() -> Result<()> {
    let (faults, seed) = (setting("FLOODMARK_FAULTS", 100)?, setting("FLOODMARK_SEED", 21)?);
    println!("FLOODMARK_FAULTS={faults} FLOODMARK_SEED={seed}");
    let mut world = World::new("faults")?;
    let crew = world.crew()?;
    let (orders, count) = (Orders { seed, ..Orders::default() }, 3_000 * faults);
    let feeder = world.scenario.feeder(orders, count, 2_500)?;
    let mut draw = Draw::new(seed);
    let (mut done, mut recoveries) = (0, Vec::new());
    world.gets_on()?;
    while done < faults {
        for _ in 0..FAULTS_A_ROUND {
            let well = world.well();
            if !well.is_empty() {
                let member = well[draw.below(well.len() as u64) as usize];
                let fault = Fault::draw(&mut draw, world.members[member].role);
                world.begin(member, fault)?;
                done += 1;
            }
            world.tend_for(Duration::from_millis(draw.below(700)))?;
        }
        while world.well().len() < world.members.len() {
            world.tend_for(POLL)?;
        }
        let took = world.gets_on()?.as_millis();
        world.says(format!("new output {took} ms after the last of {done} faults was over"));
        recoveries.push(took);
    }
    recoveries.sort_unstable();
    world.says(format!(
        "{done} faults, {} orders by then; from the end of a round of faults to new output: median {} ms, worst {} ms; \
         ended by themselves: {:?}",
        feeder.sent(),
        recoveries[recoveries.len() / 2],
        recoveries[recoveries.len() - 1],
        world.ends
    ));
    feeder.finish()?;
    world.finish(crew, orders, count)
}

/// How often a process has said that the broker, or the storage, has refused what it wanted to write.
fn refusals(run: &Option<Run>) -> usize {
    run.as_ref().map_or(0, |run| run.log().lines().filter(|line| line.contains("a newer run of this job")).count())
}

#[test]
fn a_worker_that_is_cut_off_for_long_and_healed_writes_nothing_that_is_seen() -> Result<()> {
    let cut_for = Duration::from_secs(setting("FLOODMARK_CUT_SECONDS", CUT_SECONDS)?);
    let mut world = World::new("zombie-worker")?;
    let crew = world.crew()?;
    let (orders, count) = (Orders { seed: 22, ..Orders::default() }, 200_000);
    let feeder = world.scenario.feeder(orders, count, 2_500)?;
    world.gets_on()?;
    let zombie = world.busy_worker(crew)?;
    // First only from the broker, so that its transactions stand still in the middle; then from all.
    world.cut(zombie, Cut::Both, Peers::Broker)?;
    world.tend_for(TRANSACTIONS_BEGIN)?;
    world.cut(zombie, Cut::Both, Peers::All)?;
    world.says("the worker is cut off");
    world.tend_for(cut_for)?;
    let meanwhile = world.gets_on()?;
    world.says(format!("the others get on: {} ms for a checkpoint", meanwhile.as_millis()));
    assert_eq!(refusals(&world.members[zombie].run), 0, "somebody has refused what never arrived");
    world.members[zombie].place.heal()?;
    let took = world.until("refused", REFUSED_WITHIN, |world| Ok(refusals(&world.members[zombie].run) > 0))?;
    world.says(format!("what the worker still wrote was refused {} ms after it was healed", took.as_millis()));
    let zombie = world.members[zombie].run.as_mut().context("it does not run")?;
    ensure!(zombie.is_running()?, "the worker has not come back: {}", zombie.log());
    world.gets_on()?;
    feeder.finish()?;
    world.finish(crew, orders, count)
}

/// A worker that is given up while it takes over the identities of its sinks' subtasks does so in the end, and so fences those
/// to whom the subtasks have gone. Only the log says whether somebody newer runs the job.
#[test]
fn outputs_that_are_taken_over_late_by_a_worker_of_an_earlier_attempt_do_not_end_the_job() -> Result<()> {
    let mut world = World::new("late-open")?;
    let crew = world.crew()?;
    let (orders, count) = (Orders { seed: 24, ..Orders::default() }, 200_000);
    let feeder = world.scenario.feeder(orders, count, 2_500)?;
    world.gets_on()?;
    for zombie in crew.workers() {
        world.cut(zombie, Cut::Both, Peers::Broker)?;
        // Another dies: what runs begins anew, and the zombie's subtasks wait for the broker.
        let victim = crew.workers().find(|w| *w != zombie).context("there are several")?;
        world.begin(victim, Fault { what: What::Kill, lasts: Duration::from_millis(200) })?;
        world.tend_for(OPENS_BEGIN)?;
        world.cut(zombie, Cut::Both, Peers::Coordinators)?;
        let took = world.gets_on()?;
        world.says(format!("others get on {} ms after {} was cut off", took.as_millis(), world.members[zombie].name));
        world.members[zombie].place.heal()?;
        world.tend_for(OPENS_BEGIN)?;
        world.gets_on()?;
    }
    feeder.finish()?;
    world.finish(crew, orders, count)
}

#[test]
fn a_coordinator_with_its_workers_that_is_cut_off_for_long_and_healed_is_refused_everything() -> Result<()> {
    let cut_for = Duration::from_secs(setting("FLOODMARK_CUT_SECONDS", CUT_SECONDS)?);
    let mut world = World::new("zombie-crew")?;
    let old = world.crew()?;
    let (orders, count) = (Orders { seed: 23, ..Orders::default() }, 200_000);
    let feeder = world.scenario.feeder(orders, count, 2_500)?;
    world.gets_on()?;
    // They reach each other, but no server: for all they know, the job is theirs, and servers are slow. The broker goes first, so
    // that transactions stand still in the middle.
    world.retire(old.members());
    for peers in [Peers::Broker, Peers::Storage] {
        for member in old.members() {
            world.cut(member, Cut::Both, peers)?;
        }
        world.tend_for(TRANSACTIONS_BEGIN)?;
    }
    let epoch = world.log()?.last_epoch();
    world.says(format!("the crew is cut off, at checkpoint {epoch}"));
    let new = world.crew()?;
    world.gets_on()?;
    world.says("another crew gets on");
    world.tend_for(cut_for)?;
    for member in old.members() {
        world.members[member].place.heal()?;
    }
    world.says("the old crew is healed");
    let coordinator =
        world.members[old.coordinator()].run.take().context("the old coordinator has ended before it was healed")?;
    let ended = coordinator.wait(REFUSED_WITHIN)?;
    ended.refused(FENCED, &["fenced"])?;
    world.says(format!("the old coordinator: {}", ended.log.lines().last().unwrap_or_default()));
    world.until("refused", REFUSED_WITHIN, |world| Ok(old.workers().any(|w| refusals(&world.members[w].run) > 0)))?;
    world.gets_on()?;
    feeder.finish()?;
    world.finish(new, orders, count)
}
