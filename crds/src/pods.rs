//! What a job says of its pods. Pure.

#![allow(unreachable_pub, reason = "the schema's derive repeats each struct, with its `pub`, inside a function")]

use std::{borrow::Cow, collections::BTreeMap};

use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value as Json};

/// The pods that run a job's subtasks.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerSpec {
    /// Subtasks of each task that one pod runs side by side. There are as many pods as parallelism needs.
    #[serde(default = "default_slots")]
    #[schemars(range(min = 1, max = 1_024))]
    pub slots: u32,

    /// Pods beyond those that parallelism needs: one that is there already takes over from one that dies, sooner than a new
    /// one could start.
    #[serde(default)]
    #[schemars(range(max = 1_024))]
    pub spares: u32,

    /// What each pod asks for and may use.
    #[serde(default)]
    pub resources: Resources,

    /// What is added to the pods; see the field of the same name of `coordinator`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_template: Option<PodTemplate>,
}

/// The pod that coordinates a job.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CoordinatorSpec {
    /// Whether a second pod stands by, which takes over at once when the first one dies.
    #[serde(default)]
    pub standby: bool,

    /// What each pod asks for and may use.
    #[serde(default)]
    pub resources: Resources,

    /// What is added to the pods: a pod template as in a Deployment. Maps are merged, and lists of things with names by their
    /// names (the container is called `floodmark`, the volume that is its working folder `work`); `tolerations` and `envFrom` are
    /// added to; other lists replace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_template: Option<PodTemplate>,
}

/// Computing resources of a container.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What it is sure to get, such as `{cpu: "1", memory: 1Gi}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, Quantity>,

    /// What it never gets more than.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, Quantity>,
}

/// An amount as Kubernetes writes it: `500m`, `2`, `1Gi`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Quantity(pub String);

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match Json::deserialize(deserializer)? {
            Json::String(text) => text,
            Json::Number(number) => number.to_string(),
            _ => String::new(),
        };
        let digits = text.trim_start_matches(['+', '-']).trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let unit = digits.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '+');
        if digits.len() == text.len() || !unit || digits.len() > 4 {
            return Err(de::Error::custom(format!("'{text}' is no quantity; write one such as 500m, 2 or 1Gi")));
        }
        Ok(Self(text))
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let pattern = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$";
        json_schema!({
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": true,
            "pattern": pattern,
        })
    }
}

/// A variable of the job's processes: for the options of tables, as `${NAME}`.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.value) != has(self.valueFrom)").message("give either value or valueFrom"))]
#[serde(rename_all = "camelCase")]
pub struct EnvVar {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,

    /// Its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,

    /// Where its value is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_from: Option<EnvSource>,
}

/// Where a variable's value is.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.secretKeyRef) != has(self.configMapKeyRef)")
    .message("give either secretKeyRef or configMapKeyRef"))]
#[serde(rename_all = "camelCase")]
pub struct EnvSource {
    /// A key of a Secret in the job's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeyRef>,

    /// A key of a ConfigMap in the job's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyRef>,
}

/// A key of a Secret or ConfigMap.
#[derive(JsonSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyRef {
    /// The object's name.
    #[schemars(length(min = 1))]
    pub name: String,
    /// The key in it.
    #[schemars(length(min = 1))]
    pub key: String,
}

/// Fields of a pod template, taken as they are: the API server judges them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PodTemplate(pub Map<String, Json>);

impl JsonSchema for PodTemplate {
    fn schema_name() -> Cow<'static, str> {
        "PodTemplate".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
    }
}

impl Default for WorkerSpec {
    fn default() -> Self {
        Self { slots: default_slots(), spares: 0, resources: Resources::default(), pod_template: None }
    }
}

impl WorkerSpec {
    /// Pods for a job of this parallelism.
    #[must_use]
    pub fn pods(&self, parallelism: u32) -> u32 {
        parallelism.div_ceil(self.slots.max(1)).saturating_add(self.spares)
    }
}

fn default_slots() -> u32 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_numbers_with_units() {
        for (yaml, text) in [("2", "2"), ("500m", "500m"), ("1Gi", "1Gi"), ("0.5", "0.5"), ("'1e3'", "1e3")] {
            assert_eq!(serde_yaml::from_str::<Quantity>(yaml).unwrap().0, text);
        }
        for wrong in ["much", "''", "1 Gi", "[1]", "1Gibibytes"] {
            let error = serde_yaml::from_str::<Quantity>(wrong).unwrap_err().to_string();
            assert!(error.contains("is no quantity"), "{wrong}: {error}");
        }
    }

    #[test]
    fn there_are_pods_enough_for_every_subtask() {
        let pods = |slots, spares, parallelism| WorkerSpec { slots, spares, ..WorkerSpec::default() }.pods(parallelism);
        assert_eq!((pods(1, 0, 3), pods(2, 0, 3), pods(2, 1, 4), pods(8, 0, 1)), (3, 2, 3, 1));
    }
}
