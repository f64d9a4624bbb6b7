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

impl Cluster {
    /// Writes a note down, or counts it once more.
    pub(super) async fn write_note(&self, note: &NoteOf, instance: &str, counts: &mut Counts) {
        if let Err(error) = self.try_write_note(note, instance, counts).await {
            tracing::warn!(%error, reason = note.note.reason, "an event could not be written");
        }
    }

    async fn try_write_note(&self, note: &NoteOf, instance: &str, counts: &mut Counts) -> Result<(), EffectError> {
        let event = note.event(instance);
        let name = event.name_any();
        let api = self.api::<Event>(note.about.namespace.as_deref().unwrap_or_default());
        let create = async {
            match api.create(&PostParams::default(), &event).await {
                Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(false),
                other => other.map(|_| true),
            }
        };
        if self.request(|| format!("create Event {name}"), create).await? {
            return Ok(());
        }
        let count = counts.again(&name);
        let series = json!({"series": {"count": count, "lastObservedTime": micro_time(note.at)}});
        let (params, body) = (PatchParams::default(), Patch::Merge(series));
        self.request(|| format!("patch Event {name}"), api.patch(&name, &params, &body)).await.map(drop)
    }
}
