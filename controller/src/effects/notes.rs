//! What people are told of an object: events. One that says the same again is counted, not repeated.
//!
//! They are a courtesy: one that can't be written is logged, and nothing waits for it.

use std::collections::HashMap;

use floodmark_crds::Timestamp;
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff,
};
use kube::{
    Resource, ResourceExt as _,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    core::Status,
};
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

use super::cluster::{Cluster, EffectError};
use crate::{lifecycle::Note, objects::MANAGER};

/// Longest text of an event, characters.
const TEXT_MAX: usize = 1_000;
/// Longest part of the object's name in the event's.
const NAME_MAX: usize = 200;
/// Events whose repetitions are counted.
const COUNTS_MAX: usize = 4_096;
/// Notes that wait to be written. Beyond it they are dropped.
pub(super) const NOTES_MAX: usize = 1_024;

/// A note about an object.
#[derive(Debug)]
pub(super) struct NoteOf {
    pub(super) about: ObjectReference,
    pub(super) note: Note,
    pub(super) at: Timestamp,
}

impl NoteOf {
    pub(super) fn new<K: Resource<DynamicType = ()>>(object: &K, note: Note, at: Timestamp) -> Self {
        // The whole status would not fit, and nobody needs it here.
        Self { about: object.object_ref(&()), note, at }
    }

    fn name(&self) -> String {
        let Note { warning, reason, message } = &self.note;
        let uid = self.about.uid.as_deref().unwrap_or_default();
        let same = xxh3_64(format!("{uid}\n{warning}\n{reason}\n{message}").as_bytes());
        let object: String = self.about.name.as_deref().unwrap_or_default().chars().take(NAME_MAX).collect();
        format!("{}.{same:016x}", object.trim_end_matches(['.', '-']))
    }

    fn event(&self, instance: &str) -> Event {
        let Note { warning, reason, message } = &self.note;
        Event {
            metadata: ObjectMeta {
                name: Some(self.name()),
                namespace: self.about.namespace.clone(),
                ..ObjectMeta::default()
            },
            type_: Some(if *warning { "Warning" } else { "Normal" }.to_owned()),
            reason: Some((*reason).to_owned()),
            action: Some((*reason).to_owned()),
            note: Some(message.chars().take(TEXT_MAX).collect()),
            regarding: Some(self.about.clone()),
            reporting_controller: Some(MANAGER.to_owned()),
            reporting_instance: Some(instance.to_owned()),
            event_time: Some(micro_time(self.at)),
            ..Event::default()
        }
    }
}

/// How often the same was said again by this process.
#[derive(Debug, Default)]
pub(super) struct Counts(HashMap<String, i32>);

impl Counts {
    /// One more; the event itself is the first.
    fn again(&mut self, name: &str) -> i32 {
        if self.0.len() >= COUNTS_MAX {
            self.0.clear();
        }
        let count = self.0.entry(name.to_owned()).or_insert(1);
        *count = count.saturating_add(1);
        *count
    }
}

fn micro_time(at: Timestamp) -> MicroTime {
    MicroTime(jiff::Timestamp::from_millisecond(at.millis()).unwrap_or_default())
}

/// What an API server calls it when nothing new may be in a namespace, because it is being removed.
const TERMINATING: &str = "NamespaceTerminating";

/// What became of an event.
enum Created {
    Yes,
    /// It was written before.
    Already,
    /// There is no place for it: its namespace goes.
    Nowhere,
}

impl Cluster {
    /// Writes a note down, or counts it once more. What is left behind in the end must be told, also of a namespace that goes: then
    /// it is told in `namespace`, of the pod `instance` there.
    pub(super) async fn write_note(&self, note: &NoteOf, namespace: &str, instance: &str, counts: &mut Counts) {
        let written = match self.try_write_note(&note.event(instance), note.at, counts).await {
            Ok(false) if note.note.warning => {
                let event = elsewhere(note, namespace, instance);
                self.try_write_note(&event, note.at, counts).await
            }
            other => other,
        };
        if let Err(error) = written {
            let Note { reason, message, .. } = &note.note;
            tracing::warn!(%error, %reason, %message, "an event could not be written");
        }
    }

    /// Answers whether there was a place for it.
    async fn try_write_note(&self, event: &Event, at: Timestamp, counts: &mut Counts) -> Result<bool, EffectError> {
        let name = event.name_any();
        let api = self.api::<Event>(event.metadata.namespace.as_deref().unwrap_or_default());
        let create = async {
            match api.create(&PostParams::default(), event).await {
                Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(Created::Already),
                Err(kube::Error::Api(status)) if is_terminating(&status) => Ok(Created::Nowhere),
                other => other.map(|_| Created::Yes),
            }
        };
        match self.request(|| format!("create Event {name}"), create).await? {
            Created::Yes => return Ok(true),
            Created::Nowhere => return Ok(false),
            Created::Already => {}
        }
        let count = counts.again(&name);
        let series = json!({"series": {"count": count, "lastObservedTime": micro_time(at)}});
        let (params, body) = (PatchParams::default(), Patch::Merge(series));
        self.request(|| format!("patch Event {name}"), api.patch(&name, &params, &body)).await.map(|_| true)
    }
}

/// Whether nothing can be created in a namespace, because it goes or has gone.
fn is_terminating(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.is_not_found() || causes.map(|cause| cause.reason.as_str()).any(|reason| reason == TERMINATING)
}

/// A note about an object, told of the controller.
fn elsewhere(note: &NoteOf, namespace: &str, instance: &str) -> Event {
    let mut event = note.event(instance);
    let of = |field: &Option<String>| field.clone().unwrap_or_default();
    let about = format!("{} {}/{}: ", of(&note.about.kind), of(&note.about.namespace), of(&note.about.name));
    event.note = event.note.map(|text| (about + &text).chars().take(TEXT_MAX).collect());
    event.metadata.namespace = Some(namespace.to_owned());
    event.regarding = Some(ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(namespace.to_owned()),
        name: Some(instance.to_owned()),
        ..ObjectReference::default()
    });
    event.related = Some(note.about.clone());
    event
}
