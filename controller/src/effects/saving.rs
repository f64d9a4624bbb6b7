//! Savepoint objects: sees what there is of one, has [`savepoints`](crate::savepoints) decide, and does what the plan says.

use std::collections::{BTreeMap, BTreeSet};

use floodmark_crds::{
    DeletionPolicy, ReportPhase, Savepoint, SavepointSpec, StorageStatus, StreamJob, StreamJobSpec, Timestamp,
};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use super::{
    Operator, Round, Turn,
    access::Removing,
    answering::Ask,
    cache::{Cache, Holds, JobKey, Kind, Known, SavepointKey},
    cluster::EffectError,
    outside::{Access, Removed, Reply, SavepointFound},
};
use crate::{
    lifecycle::Asked,
    objects,
    savepoints::{Action, Answer, FINALIZER, JobSeen, Question, Seen, decide, due},
};

/// What there is of a Savepoint.
fn seen(cache: &Cache, savepoint: &Savepoint, answers: BTreeMap<Question, Asked<Answer>>, now: Timestamp) -> Seen {
    let namespace = savepoint.namespace().unwrap_or_default();
    let key = JobKey { namespace: namespace.clone(), base: objects::base(&savepoint.spec.job) };
    let known = cache.known(&key);
    let job = known.and_then(|k| k.job.as_ref()).filter(|job| job.metadata.deletion_timestamp.is_none());
    let scheduled = savepoint.spec.schedule.as_ref();
    let made = savepoint.metadata.creation_timestamp.as_ref().map_or(now, Timestamp::from);
    let before = savepoint.status.as_ref().and_then(|s| s.time).unwrap_or(made);
    Seen {
        due: scheduled.map(|schedule| due(schedule, before)),
        children: scheduled.map(|_| cache.children_of(savepoint)).unwrap_or_default(),
        needed: scheduled.map(|_| needed(cache, &namespace)).unwrap_or_default(),
        job: known.zip(job).map(|(known, job)| job_seen(known, job)),
        savepoint: savepoint.clone(),
        answers,
        now,
    }
}

fn job_seen(known: &Known, job: &StreamJob) -> JobSeen {
    let checkpoints = &job.spec.checkpoints;
    let run = job.status.as_ref().and_then(|s| s.run.as_ref()).map(|r| r.number);
    let lease = known.thing(Kind::Lease, &objects::base(&job.name_any())).filter(|l| l.owner == job.uid());
    let report = lease.and_then(|l| match &l.holds {
        Holds::Lease(seen) => seen.report.as_ref(),
        _ => None,
    });
    let running = run.filter(|run| report.is_some_and(|r| r.run == *run && r.phase == ReportPhase::Running));
    JobSeen {
        running,
        storage: StorageStatus {
            location: checkpoints.storage.clone().unwrap_or_default(),
            job_uid: job.uid().unwrap_or_default(),
            secret_name: checkpoints.credentials.as_ref().map(|c| c.secret_name.clone()),
        },
    }
}

/// Names and locations that jobs of a namespace start from, or may have to go back to.
fn needed(cache: &Cache, namespace: &str) -> BTreeSet<String> {
    let jobs = cache.jobs().filter(|job| job.namespace().as_deref() == Some(namespace));
    let words = jobs.flat_map(|job| {
        let status = job.status.clone().unwrap_or_default();
        let operation = status.operation.into_iter();
        let operation = operation.flat_map(|o| [o.savepoint, o.to.map(|r| r.restore), o.from.map(|r| r.restore)]);
        let runs = [status.run, status.stable_run].map(|run| run.map(|r| r.restore));
        let others = [job.spec.restore.from.clone(), status.suspended_with];
        operation.chain(runs).chain(others).flatten().collect::<Vec<_>>()
    });
    words.collect()
}

/// `spec.checkpoints.storage` of the job, as it was.
fn location_of(storage: &StorageStatus) -> Option<String> {
    Some(storage.location.clone()).filter(|location| !location.is_empty())
}

/// As much of a job as is needed to find its files: it may be gone.
fn owner_of(savepoint: &Savepoint, storage: &StorageStatus) -> Result<StreamJob, EffectError> {
    let failed = |e: serde_json::Error| EffectError::Failed { what: "name the job".to_owned(), why: e.to_string() };
    let spec: StreamJobSpec = serde_json::from_value(json!({ "sql": "" })).map_err(failed)?;
    let mut job = StreamJob::new(&savepoint.spec.job, spec);
    job.metadata.namespace = savepoint.namespace();
    job.metadata.uid = Some(storage.job_uid.clone());
    Ok(job)
}

impl Operator {
    /// One look at a Savepoint, one decision, and what follows.
    pub(super) async fn savepoint_round(&self, key: &SavepointKey) -> Result<Round, EffectError> {
        let Some(savepoint) = self.cluster.cache().savepoint(key) else { return Ok(Round::Gone) };
        let uid = savepoint.uid().unwrap_or_default();
        let storage = savepoint.status.as_ref().and_then(|s| s.storage.as_ref());
        if let Some(storage) = storage.filter(|_| savepoint.spec.on_delete == DeletionPolicy::Delete) {
            let leaving = savepoint.metadata.deletion_timestamp.is_some();
            self.keep_access(&key.namespace, storage.secret_name.as_deref(), leaving).await;
        }
        let answers = {
            let mut questions = self.savepoint_questions();
            questions.tidy_savepoint(&savepoint);
            questions.of(&uid)
        };
        let seen = seen(&self.cluster.cache(), &savepoint, answers, self.now());
        let plan = decide(&seen);
        let SavepointKey { namespace, name } = key;
        let writes = plan.status.is_some();
        if let Some(status) = plan.status {
            let written = Savepoint { status: Some(*status), ..(*savepoint).clone() };
            self.cluster.write_status(&written).await?;
        }
        for note in plan.notes {
            tracing::info!(%namespace, savepoint = %name, "{}: {}", note.reason, note.message);
            self.note(&*savepoint, note);
        }
        if writes {
            for other in self.concerned(&Turn::Savepoint(key.clone())) {
                // What was written here is no news to the watch. Whoever takes it ends with this process only.
                let _ = self.turns.send(other).await;
            }
            return Ok(Round::Again);
        }
        let mut again = false;
        for action in &plan.actions {
            tracing::info!(%namespace, savepoint = %name, ?action);
            self.do_for_savepoint(&savepoint, action).await?;
            again |= !matches!(action, Action::Ask(_));
        }
        Ok(if again { Round::Again } else { Round::Rest(plan.wake) })
    }

    async fn do_for_savepoint(&self, savepoint: &Savepoint, action: &Action) -> Result<(), EffectError> {
        let finalizers = savepoint.finalizers().iter().cloned();
        match action {
            Action::AddFinalizer => {
                let finalizers: Vec<_> = finalizers.chain([FINALIZER.to_owned()]).collect();
                self.cluster.write_finalizers(savepoint, &finalizers).await
            }
            Action::RemoveFinalizer => {
                let finalizers: Vec<_> = finalizers.filter(|f| f != FINALIZER).collect();
                self.cluster.write_finalizers(savepoint, &finalizers).await?;
                self.savepoint_questions().forget(&savepoint.uid().unwrap_or_default());
                self.drop_access();
                Ok(())
            }
            Action::Create { name } => {
                self.cluster.create_savepoint(&child(savepoint, name)).await?;
                self.is_concerned(savepoint, name).await;
                Ok(())
            }
            Action::Delete { name } => {
                let namespace = savepoint.namespace().unwrap_or_default();
                let child = SavepointKey { namespace, name: name.clone() };
                let uid = self.cluster.cache().savepoint(&child).and_then(|child| child.uid());
                if let Some(uid) = uid {
                    self.cluster.delete_savepoint(&child, &uid).await?;
                    self.is_concerned(savepoint, name).await;
                }
                Ok(())
            }
            Action::Ask(question) => {
                let Some(uid) = savepoint.uid() else { return Ok(()) };
                if self.savepoint_questions().begin(&uid, question) {
                    let (namespace, name) = (savepoint.namespace().unwrap_or_default(), savepoint.name_any());
                    let key = SavepointKey { namespace, name };
                    // Whoever asks them ends with this process only.
                    let _ = self.asks.send(Ask::Savepoint { key, uid, question: question.clone() }).await;
                }
                Ok(())
            }
        }
    }

    /// What was written here is no news to the watch: whose turn it is because of it is said here.
    async fn is_concerned(&self, of: &Savepoint, name: &str) {
        let (namespace, name) = (of.namespace().unwrap_or_default(), name.to_owned());
        // Whoever takes it ends with this process only.
        let _ = self.turns.send(Turn::Savepoint(SavepointKey { namespace, name })).await;
    }

    /// Asks, and notes the answer.
    pub(super) async fn answer_savepoint(&self, key: &SavepointKey, uid: &str, question: &Question) {
        let savepoint = self.cluster.cache().savepoint(key).filter(|s| s.uid().as_deref() == Some(uid));
        let answer = match &savepoint {
            Some(savepoint) => self.take_or_remove(savepoint, question).await,
            None => Answer::Unknown("the Savepoint is gone".to_owned()),
        };
        let (kind, told) = match &answer {
            Answer::Taken { .. } | Answer::Removed => ("yes", String::new()),
            Answer::Failed(why) | Answer::OutOfReach(why) => ("no", why.clone()),
            Answer::Unknown(why) => ("unknown", why.clone()),
        };
        let asked = if matches!(question, Question::Take { .. }) { "savepoint" } else { "remove-savepoint" };
        self.metrics.answered(asked, kind);
        tracing::info!(namespace = %key.namespace, savepoint = %key.name, ?question, answer = kind, why = %told, "answered");
        self.savepoint_questions().end(uid, question, answer, self.now());
    }

    async fn take_or_remove(&self, savepoint: &Savepoint, question: &Question) -> Answer {
        let Some(storage) = savepoint.status.as_ref().and_then(|s| s.storage.clone()) else {
            return Answer::Unknown("its status does not say where it is".to_owned());
        };
        let asked = async {
            let job = owner_of(savepoint, &storage)?;
            match question {
                Question::Take { run, name, .. } => self.take(savepoint, &job, &storage, *run, name).await,
                Question::Remove { name } => self.remove(&job, &storage, name).await,
            }
        };
        asked.await.unwrap_or_else(|error: EffectError| Answer::Unknown(error.to_string()))
    }

    async fn storage_of(
        &self,
        job: &StreamJob,
        storage: &StorageStatus,
    ) -> Result<Result<Access, String>, EffectError> {
        let secret = storage.secret_name.as_deref();
        self.access_to(&job.namespace().unwrap_or_default(), location_of(storage), secret).await
    }

    /// Has the job take a savepoint, unless it is there already.
    async fn take(
        &self,
        savepoint: &Savepoint,
        owner: &StreamJob,
        storage: &StorageStatus,
        run: u64,
        name: &str,
    ) -> Result<Answer, EffectError> {
        let key = JobKey::of(owner);
        let job = self.cluster.cache().job(&key).filter(|job| job.uid() == owner.uid());
        let (mut why, mut refused) = ("the job does not run".to_owned(), false);
        if let Some(job) = job.filter(|_| run > 0) {
            let Ok(_permit) = self.orders.acquire().await else {
                return Ok(Answer::Unknown("the controller stops".to_owned()));
            };
            let within = job.spec.upgrade.timeout.get();
            match self.order(&job, run, "/savepoints", json!({ "name": name }), within).await? {
                Ok(order) => match self.outside.order(order).await {
                    Reply::Done(body) => {
                        let number = |field: &str| body.get(field).and_then(serde_json::Value::as_u64).unwrap_or(0);
                        let location = body.get("location").and_then(serde_json::Value::as_str).unwrap_or_default();
                        let (location, epoch, size) = (location.to_owned(), number("epoch"), number("size"));
                        return Ok(Answer::Taken { location, epoch, size });
                    }
                    Reply::Refused(because) => (why, refused) = (because, true),
                    Reply::Lost(because) => why = because,
                },
                Err(because) => why = because,
            }
        }
        tracing::debug!(savepoint = %savepoint.name_any(), %why, "is looked for in storage");
        // It may have been made for an order whose answer was lost.
        let Ok(_permit) = self.lookups.acquire().await else {
            return Ok(Answer::Unknown("the controller stops".to_owned()));
        };
        let found = match self.storage_of(owner, storage).await? {
            Ok(access) => self.outside.savepoint(owner, name, &access).await,
            Err(because) => Err(because),
        };
        Ok(match found {
            Ok(Some(SavepointFound { location, epoch, size, .. })) => Answer::Taken { location, epoch, size },
            Ok(None) | Err(_) if refused => Answer::Failed(why),
            Ok(None) => Answer::Unknown(why),
            Err(because) => Answer::Unknown(format!("{why}; and whether it is there nobody knows: {because}")),
        })
    }

    async fn remove(&self, job: &StreamJob, storage: &StorageStatus, name: &str) -> Result<Answer, EffectError> {
        let Ok(_permit) = self.lookups.acquire().await else {
            return Ok(Answer::Unknown("the controller stops".to_owned()));
        };
        let (namespace, location) = (job.namespace().unwrap_or_default(), location_of(storage));
        let Removing { access, remembered } =
            match self.access_to_remove(&namespace, location, storage.secret_name.as_deref()).await? {
                Ok(removing) => removing,
                Err(why) => return Ok(Answer::OutOfReach(why)),
            };
        Ok(match self.outside.remove_savepoint(job, name, &access).await {
            Removed::All => Answer::Removed,
            Removed::OutOfReach(why) => Answer::OutOfReach(why),
            Removed::Refused(why) if remembered => Answer::OutOfReach(why),
            Removed::Refused(why) => Answer::Failed(why),
            Removed::NotYet(why) => Answer::Unknown(why),
        })
    }
}

/// The Savepoint that a schedule makes. What becomes of its files is as the schedule says.
fn child(schedule: &Savepoint, name: &str) -> Savepoint {
    let on_delete: DeletionPolicy = schedule.spec.on_delete;
    let SavepointSpec { job, retain, .. } = schedule.spec.clone();
    let mut child = Savepoint::new(name, SavepointSpec { job, schedule: None, retain, on_delete });
    child.metadata.namespace = schedule.namespace();
    child.metadata.owner_references = schedule.controller_owner_ref(&()).map(|owner| vec![owner]);
    child
}
