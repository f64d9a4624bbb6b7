//! Which spec a run has: the name of a revision. Pure.

use floodmark_crds::{DesiredState, StreamJobSpec, UpgradeSpec};
use serde_json::Value as Json;
use xxhash_rust::xxh3::xxh3_64;

/// The name of a spec's revision: the same for specs that differ only in what is acted upon while a job runs.
///
/// Fields that a later version adds don't change the names of specs that leave them out.
#[must_use]
pub fn name(spec: &StreamJobSpec) -> String {
    let mut json = serde_json::to_value(kept(spec)).unwrap_or_default();
    drop_defaults(&mut json);
    // Of a map with sorted keys: the order of fields in the type is no matter.
    let sorted = sorted(json).to_string();
    format!("{:010x}", xxh3_64(sorted.as_bytes()) >> 24)
}

/// The spec with what is no part of its revision set to the same for all.
#[must_use]
pub fn kept(spec: &StreamJobSpec) -> StreamJobSpec {
    let mut spec = spec.clone();
    spec.parallelism = 1;
    spec.desired_state = DesiredState::default();
    spec.upgrade = UpgradeSpec::default();
    spec.restart_nonce = None;
    spec.restore.from = None;
    spec.restore.nonce = None;
    spec.checkpoints.on_delete = floodmark_crds::DeletionPolicy::default();
    spec
}

/// Takes out what a spec that says nothing has.
fn drop_defaults(json: &mut Json) {
    let nothing: Result<StreamJobSpec, _> = serde_json::from_value(serde_json::json!({"sql": ""}));
    let nothing = nothing.ok().and_then(|spec| serde_json::to_value(kept(&spec)).ok()).unwrap_or_default();
    drop_equal(json, &nothing);
}

fn drop_equal(json: &mut Json, from: &Json) {
    let (Json::Object(fields), Json::Object(defaults)) = (json, from) else { return };
    fields.retain(|name, value| defaults.get(name) != Some(value));
    for (name, value) in fields {
        if let Some(default) = defaults.get(name) {
            drop_equal(value, default);
        }
    }
}

fn sorted(json: Json) -> Json {
    match json {
        Json::Object(fields) => {
            let mut fields: Vec<_> = fields.into_iter().map(|(name, value)| (name, sorted(value))).collect();
            fields.sort_by(|a, b| a.0.cmp(&b.0));
            Json::Object(fields.into_iter().collect())
        }
        Json::Array(items) => Json::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(yaml: &str) -> StreamJobSpec {
        serde_yaml::from_str(yaml).unwrap()
    }

    #[test]
    fn only_what_needs_a_start_makes_another_revision() {
        let plain = name(&spec("sql: a"));
        for same in [
            "{sql: a, parallelism: 3}",
            "{sql: a, desiredState: Suspended, restartNonce: 1, upgrade: {mode: Stateless}}",
            "{sql: a, restore: {from: x, nonce: 2}, checkpoints: {onDelete: Delete}}",
            "{sql: a, maxParallelism: 128, checkpoints: {interval: 10s}, worker: {slots: 1}}",
        ] {
            assert_eq!(name(&spec(same)), plain, "{same}");
        }
        let others = [
            "sql: b",
            "{sql: a, maxParallelism: 64}",
            "{sql: a, restore: {allowDroppedState: true}}",
            "{sql: a, image: x}",
        ];
        for other in others {
            assert_ne!(name(&spec(other)), plain, "{other}");
        }
    }

    #[test]
    fn names_stay() {
        // They are in clusters: a change here restarts every job.
        assert_eq!(name(&spec("sql: a")), "e96da61fd5");
    }
}
