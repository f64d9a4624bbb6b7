//! Finds out what a job's operation has to know, and has jobs and storage do what it wants. Each question is bounded in time, and
//! may be asked again: whoever has lost the answer gets the same.

use std::time::Duration;

use floodmark_crds::{RunStatus, StreamJob};
use futures::future::{Either, select};
use kube::ResourceExt as _;
use serde_json::json;

use super::{
    Operator, Turn,
    access::{Removing, secret_of},
    cache::{Holds, JobKey, Kind, SavepointKey},
    cluster::EffectError,
    observe::RestoreFrom,
    outside::{Order, Removed, Reply},
};
use crate::{
    lifecycle::{Answer, Question},
    objects::{self, check_storage, run_objects, secret_name},
    savepoints,
};

/// How long a question to storage may take.
const STORAGE_WITHIN: Duration = Duration::from_secs(60);
/// Questions to storage at the same time: each may plan SQL.
pub(super) const LOOKUPS_MAX: usize = 8;
/// Orders to coordinators at the same time. They wait, mostly.
pub(super) const ORDERS_MAX: usize = 256;
/// The key of a run's Secret that lets its coordinator obey.
const TOKEN: &str = "token";

/// A question to be asked, and whom it is about.
#[derive(Debug)]
pub(super) enum Ask {
    Job { key: JobKey, uid: String, question: Question },
    Savepoint { key: SavepointKey, uid: String, question: savepoints::Question },
}

impl Operator {
    /// Asks, and notes the answer: whose turn it is then.
    pub(super) async fn answer(&self, ask: Ask) -> Turn {
        match ask {
            Ask::Job { key, uid, question } => {
                self.answer_job(&key, &uid, &question).await;
                Turn::Job(key)
            }
            Ask::Savepoint { key, uid, question } => {
                self.answer_savepoint(&key, &uid, &question).await;
                Turn::Savepoint(key)
            }
        }
    }

    async fn answer_job(&self, key: &JobKey, uid: &str, question: &Question) {
        let job = self.cluster.cache().job(key).filter(|job| job.uid().as_deref() == Some(uid));
        let answer = match &job {
            Some(job) => self.find_out(job, question).await,
            None => Answer::Unknown("the job is gone".to_owned()),
        };
        let (kind, why) = match &answer {
            Answer::Yes => ("yes", ""),
            Answer::No(why) => ("no", why.as_str()),
            Answer::Unknown(why) => ("unknown", why.as_str()),
        };
        self.metrics.answered(name(question), kind);
        tracing::info!(namespace = %key.namespace, job = %key.base, %question, answer = kind, %why, "answered");
        self.questions().end(uid, question, answer, self.now());
    }

    async fn find_out(&self, job: &StreamJob, question: &Question) -> Answer {
        let upgrade = job.spec.upgrade.timeout.get();
        let (permits, within) = match question {
            Question::Fits { .. } | Question::DeleteState => (&self.lookups, STORAGE_WITHIN),
            Question::StopWithSavepoint { .. } | Question::Rescale { .. } => (&self.orders, upgrade),
        };
        let Ok(_permit) = permits.acquire().await else {
            return Answer::Unknown("the controller stops".to_owned());
        };
        let asked = std::pin::pin!(async {
            match question {
                Question::Fits { revision, restore } => self.fits(job, revision, restore).await,
                Question::StopWithSavepoint { run, name } => self.stop(job, *run, name, within).await,
                Question::Rescale { run, parallelism } => self.rescale(job, *run, *parallelism, within).await,
                Question::DeleteState => self.delete_state(job).await,
            }
        });
        match select(asked, self.cluster.env.runtime.sleep(within)).await {
            Either::Left((Ok(answer), _)) => answer,
            Either::Left((Err(error), _)) => Answer::Unknown(error.to_string()),
            Either::Right(_) => Answer::Unknown(format!("no answer within {within:?}")),
        }
    }

    async fn fits(&self, job: &StreamJob, revision: &str, restore: &str) -> Result<Answer, EffectError> {
        let mut of = job.clone();
        of.spec = self.spec_of(job, revision).await?;
        let to = job.status.as_ref().and_then(|s| s.operation.as_ref()).and_then(|o| o.to.clone());
        let run = to.unwrap_or_else(|| RunStatus { number: 1, parallelism: 1, ..RunStatus::default() });
        of.spec.parallelism = run.parallelism;
        let objects = run_objects(job, &of.spec, &run, &self.defaults);
        if let Err(unrenderable) = objects.and_then(|objects| check_storage(&of.spec, &objects)) {
            return Ok(Answer::No(unrenderable.to_string()));
        }
        of.spec.restore.from = match self.restore_from(job) {
            RestoreFrom::Nothing => None,
            RestoreFrom::At(location) => Some(location),
            RestoreFrom::NotYet(why) => return Ok(Answer::Unknown(why)),
            RestoreFrom::Never(why) => return Ok(Answer::No(why)),
        };
        Ok(match self.access(&of).await? {
            Ok(access) => self.outside.fits(&of, restore, &access).await,
            Err(why) => Answer::Unknown(why),
        })
    }

    async fn exists(&self, job: &StreamJob, name: &str) -> Result<Answer, EffectError> {
        let access = match self.access(job).await? {
            Ok(access) => access,
            Err(why) => return Ok(Answer::Unknown(why)),
        };
        Ok(match self.outside.savepoint(job, name, &access).await {
            Ok(Some(_)) => Answer::Yes,
            Ok(None) => Answer::No(format!("there is no savepoint {name}")),
            Err(why) => Answer::Unknown(why),
        })
    }

    async fn stop(&self, job: &StreamJob, run: u64, name: &str, within: Duration) -> Result<Answer, EffectError> {
        let order = match self.order(job, run, "/stop", json!({ "savepoint": name }), within).await? {
            Ok(order) => order,
            Err(why) => return Ok(Answer::Unknown(why)),
        };
        let (why, refused) = match self.outside.order(order).await {
            Reply::Done(_) => return Ok(Answer::Yes),
            Reply::Refused(why) => (why, true),
            Reply::Lost(why) => (why, false),
        };
        // It may have been made for an order whose answer was lost.
        match self.exists(job, name).await? {
            Answer::Yes => Ok(Answer::Yes),
            Answer::No(_) if refused => Ok(Answer::No(why)),
            Answer::No(_) | Answer::Unknown(_) => Ok(Answer::Unknown(why)),
        }
    }

    async fn rescale(
        &self,
        job: &StreamJob,
        run: u64,
        parallelism: u32,
        within: Duration,
    ) -> Result<Answer, EffectError> {
        let body = json!({ "parallelism": parallelism });
        let order = match self.order(job, run, "/rescale", body, within).await? {
            Ok(order) => order,
            Err(why) => return Ok(Answer::Unknown(why)),
        };
        Ok(match self.outside.order(order).await {
            Reply::Done(_) => Answer::Yes,
            Reply::Refused(why) => Answer::No(why),
            Reply::Lost(why) => Answer::Unknown(why),
        })
    }

    /// An order to the coordinator of a run; why not, if none leads.
    pub(super) async fn order(
        &self,
        job: &StreamJob,
        run: u64,
        path: &'static str,
        body: serde_json::Value,
        within: Duration,
    ) -> Result<Result<Order, String>, EffectError> {
        let report = {
            let cache = self.cluster.cache();
            let name = objects::base(&job.name_any());
            let lease = cache.known(&JobKey::of(job)).and_then(|k| k.thing(Kind::Lease, &name));
            match lease.map(|l| &l.holds) {
                Some(Holds::Lease(seen)) => seen.report.clone().filter(|r| r.run == run),
                _ => None,
            }
        };
        let Some(to) = report.map(|r| r.http).filter(|http| !http.is_empty()) else {
            return Ok(Err(format!("no coordinator of run {run} has said where it answers")));
        };
        let name = secret_name(job, run);
        let secret = self.cluster.secret(&job.namespace().unwrap_or_default(), &name).await?;
        let token = secret.and_then(|s| s.data).and_then(|mut data| data.remove(TOKEN));
        let Some(token) = token.and_then(|t| String::from_utf8(t.0).ok()) else {
            return Ok(Err(format!("Secret {name}, with what the coordinator obeys to, is not there")));
        };
        Ok(Ok(Order { to, token, path, body, within }))
    }

    async fn delete_state(&self, job: &StreamJob) -> Result<Answer, EffectError> {
        let (namespace, location) = (job.namespace().unwrap_or_default(), job.spec.checkpoints.storage.clone());
        let Removing { access, remembered } = match self.access_to_remove(&namespace, location, secret_of(job)).await? {
            Ok(removing) => removing,
            // Nobody can, and the object must not stay for ever.
            Err(why) => return Ok(Answer::No(why)),
        };
        Ok(match self.outside.remove_state(job, &access).await {
            Removed::All => Answer::Yes,
            Removed::OutOfReach(why) => Answer::No(why),
            Removed::Refused(why) if remembered => Answer::No(why),
            Removed::Refused(why) | Removed::NotYet(why) => Answer::Unknown(why),
        })
    }
}

/// A question in a word, for metrics.
fn name(question: &Question) -> &'static str {
    match question {
        Question::Fits { .. } => "fits",
        Question::StopWithSavepoint { .. } => "stop",
        Question::Rescale { .. } => "rescale",
        Question::DeleteState => "delete-state",
    }
}
