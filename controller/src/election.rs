//! Which of several controllers leads: the one that holds a Lease. Whoever loses it ends, so that nothing of it goes on.
//!
//! Two may lead for a moment (a pause, a clock that is off): that is no harm. Statuses are written only on top of the version that was
//! read, and every action may be done twice. The Lease keeps them from doing so for long.

use std::{sync::Mutex, sync::PoisonError, time::Duration};

use floodmark_snapshot::Env;
use futures::future::{Either, select};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ObjectMeta, PostParams},
};

/// Without a renewal for so long, another may take it.
const DURATION: Duration = Duration::from_secs(15);
/// From one renewal to the next.
const RENEW_EVERY: Duration = Duration::from_secs(3);
/// Without a renewal for so long, the leader ends.
const LOST_AFTER: Duration = Duration::from_secs(12);
/// From one look of who stands by to the next.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long the API server may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// Who stands for election.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Of the Lease.
    pub namespace: String,
    /// Of the Lease.
    pub name: String,
    /// By what name it holds the Lease: its pod's.
    pub identity: String,
}

/// See the header of this file.
pub struct Election {
    api: Api<Lease>,
    candidate: Candidate,
    env: Env,
    held: Mutex<Option<Lease>>,
}

/// A Lease that somebody else holds: what was seen of it, and since when.
#[derive(Debug, Default)]
struct Watched {
    version: Option<String>,
    since: Duration,
}

impl Election {
    /// Stands for election once [`Election::won`] is waited for.
    #[must_use]
    pub fn new(client: Client, candidate: Candidate, env: Env) -> Self {
        Self { api: Api::namespaced(client, &candidate.namespace), candidate, env, held: Mutex::default() }
    }

    /// Waits until this process leads.
    pub async fn won(&self) {
        let mut watched = Watched::default();
        loop {
            match self.try_take(&mut watched).await {
                Ok(Some(lease)) => {
                    self.hold(Some(lease));
                    return;
                }
                Ok(None) => {}
                Err(why) => tracing::warn!(lease = self.candidate.name, %why, "can't stand for election; tries again"),
            }
            self.env.runtime.sleep(LOOK_EVERY).await;
        }
    }

    /// Renews the Lease until it is lost; answers why it is.
    pub async fn lost(&self) -> String {
        let mut renewed = self.env.clock.monotonic();
        loop {
            self.env.runtime.sleep(RENEW_EVERY).await;
            let Some(lease) = self.held() else { return "the Lease was given back".to_owned() };
            let why = match self.write(self.renewed(lease)).await {
                Ok(lease) => {
                    self.hold(Some(lease));
                    renewed = self.env.clock.monotonic();
                    continue;
                }
                // Somebody has changed it: perhaps nobody who wants to lead.
                Err(Trouble::Overtaken) => match self.read().await {
                    Ok(Some(lease)) if holder(&lease) == self.candidate.identity => {
                        self.hold(Some(lease));
                        continue;
                    }
                    Ok(Some(lease)) => return format!("{} holds the Lease", holder(&lease)),
                    Ok(None) => return "the Lease is gone".to_owned(),
                    Err(why) => why,
                },
                Err(Trouble::Failed(why)) => why,
            };
            tracing::warn!(lease = self.candidate.name, %why, "can't renew the Lease; tries again");
            if self.env.clock.monotonic().saturating_sub(renewed) >= LOST_AFTER {
                return format!("the Lease could not be renewed within {LOST_AFTER:?}: {why}");
            }
        }
    }

    /// Lets another lead at once.
    pub async fn give_back(&self) {
        let Some(mut lease) = self.held() else { return };
        self.hold(None);
        if let Some(spec) = &mut lease.spec {
            (spec.holder_identity, spec.lease_duration_seconds) = (Some(String::new()), Some(1));
        }
        if let Err(trouble) = self.write(lease).await {
            tracing::warn!(lease = self.candidate.name, ?trouble, "can't give the Lease back; it expires");
        }
    }

    async fn try_take(&self, watched: &mut Watched) -> Result<Option<Lease>, String> {
        let now = self.env.clock.monotonic();
        let Some(lease) = self.read().await? else {
            let metadata = ObjectMeta { name: Some(self.candidate.name.clone()), ..ObjectMeta::default() };
            let lease = self.taken(Lease { metadata, spec: None });
            let created = self.in_time(self.api.create(&PostParams::default(), &lease)).await;
            return match created {
                Ok(lease) => Ok(Some(lease)),
                Err(Trouble::Overtaken) => Ok(None),
                Err(Trouble::Failed(why)) => Err(why),
            };
        };
        if watched.version != lease.resource_version() {
            *watched = Watched { version: lease.resource_version(), since: now };
        }
        let spec = lease.spec.as_ref();
        let seconds = spec.and_then(|s| s.lease_duration_seconds).and_then(|s| u64::try_from(s).ok());
        let duration = seconds.map_or(DURATION, Duration::from_secs);
        let own = holder(&lease) == self.candidate.identity;
        let free = holder(&lease).is_empty() || own || now.saturating_sub(watched.since) >= duration;
        if !free {
            return Ok(None);
        }
        match self.write(self.taken(lease)).await {
            Ok(lease) => Ok(Some(lease)),
            Err(Trouble::Overtaken) => Ok(None),
            Err(Trouble::Failed(why)) => Err(why),
        }
    }

    fn taken(&self, mut lease: Lease) -> Lease {
        let spec = lease.spec.get_or_insert_default();
        let anew = spec.holder_identity.as_deref() != Some(&*self.candidate.identity);
        *spec = LeaseSpec {
            holder_identity: Some(self.candidate.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            lease_transitions: Some(spec.lease_transitions.unwrap_or(0).saturating_add(i32::from(anew))),
            acquire_time: Some(self.time()),
            renew_time: Some(self.time()),
            ..LeaseSpec::default()
        };
        lease
    }

    fn renewed(&self, mut lease: Lease) -> Lease {
        lease.spec.get_or_insert_default().renew_time = Some(self.time());
        lease
    }

    fn time(&self) -> MicroTime {
        MicroTime(Timestamp::from_millisecond(self.env.clock.wall_ms()).unwrap_or_default())
    }

    fn held(&self) -> Option<Lease> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn hold(&self, lease: Option<Lease>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = lease;
    }

    async fn read(&self) -> Result<Option<Lease>, String> {
        match self.in_time(self.api.get_opt(&self.candidate.name)).await {
            Ok(lease) => Ok(lease),
            Err(Trouble::Overtaken) => Ok(None),
            Err(Trouble::Failed(why)) => Err(why),
        }
    }

    /// Writes a Lease, unless somebody else has changed it.
    async fn write(&self, mut lease: Lease) -> Result<Lease, Trouble> {
        lease.metadata.managed_fields = None;
        self.in_time(self.api.replace(&self.candidate.name, &PostParams::default(), &lease)).await
    }

    async fn in_time<T>(&self, request: impl Future<Output = kube::Result<T>>) -> Result<T, Trouble> {
        let request = std::pin::pin!(request);
        match select(request, self.env.runtime.sleep(ANSWER_WITHIN)).await {
            Either::Left((Ok(answer), _)) => Ok(answer),
            Either::Left((Err(kube::Error::Api(status)), _)) if status.code == 409 => Err(Trouble::Overtaken),
            Either::Left((Err(error), _)) => Err(Trouble::Failed(error.to_string())),
            Either::Right(_) => Err(Trouble::Failed(format!("no answer within {ANSWER_WITHIN:?}"))),
        }
    }
}

fn holder(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|s| s.holder_identity.as_deref()).unwrap_or_default()
}

/// Why a Lease was not written.
#[derive(Debug)]
enum Trouble {
    /// Somebody else has changed it.
    Overtaken,
    Failed(String),
}
