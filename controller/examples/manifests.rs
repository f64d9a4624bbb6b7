//! Reads manifests from standard input, as `helm template` writes them, and judges them as a strict cluster would: known kinds,
//! no unknown fields, no pod beyond the *restricted* profile, and a controller that may give coordinators what they need.
//!
//! `helm template charts/floodmark | cargo run -p floodmark-controller --example manifests`

use std::{io::Read, process::ExitCode};

use anyhow::{Context, Result, bail};
use floodmark_controller::objects::{Defaults, job_objects, restricted};
use floodmark_crds::StreamJob;
use k8s_openapi::{
    api::{
        admissionregistration::v1::ValidatingWebhookConfiguration,
        apps::v1::Deployment,
        core::v1::{ConfigMap, Pod, Service, ServiceAccount},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
        rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value as Json;

/// Whose types are not ours.
const OTHERS: [&str; 2] = ["ServiceMonitor", "PodMonitor"];

fn main() -> Result<ExitCode> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("read standard input")?;
    let mut problems = Vec::new();
    let (mut pods, mut rights) = (0, Vec::new());
    for document in serde_yaml::Deserializer::from_str(&text) {
        let object = Json::deserialize(document).context("read a document")?;
        if object.is_null() {
            continue;
        }
        let kind = object["kind"].as_str().context("a document has no kind")?;
        let name = format!("{kind} {}", object["metadata"]["name"].as_str().unwrap_or("without a name"));
        let mut found = unknown_fields(kind, &object).with_context(|| name.clone())?;
        let pod = match kind {
            "Deployment" => Some(&object["spec"]["template"]["spec"]),
            "Pod" => Some(&object["spec"]),
            _ => None,
        };
        if let Some(pod) = pod {
            pods += 1;
            found.extend(restricted::violations(pod));
        }
        if matches!(kind, "Role" | "ClusterRole") {
            rights.push(serde_json::from_value::<Vec<PolicyRule>>(object["rules"].clone())?);
        }
        problems.extend(found.into_iter().map(|problem| format!("{name}: {problem}")));
    }
    if pods == 0 {
        bail!("there is no pod among these manifests");
    }
    // Nobody can give away what he may not do himself: one role has all that coordinators are given.
    let given =
        job_objects(&StreamJob::new("job", serde_json::from_str(r#"{"sql": "a"}"#)?), None, &Defaults::default());
    let given = given.role.rules.unwrap_or_default();
    if !rights.iter().any(|held| given.iter().all(|rule| covers(held, rule))) {
        problems.push("no role lets the controller give coordinators what they may do".to_owned());
    }
    for problem in &problems {
        eprintln!("{problem}");
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn unknown_fields(kind: &str, object: &Json) -> Result<Vec<String>> {
    match kind {
        "ClusterRole" => ignored::<ClusterRole>(object),
        "ClusterRoleBinding" => ignored::<ClusterRoleBinding>(object),
        "ConfigMap" => ignored::<ConfigMap>(object),
        "CustomResourceDefinition" => ignored::<CustomResourceDefinition>(object),
        "Deployment" => ignored::<Deployment>(object),
        "NetworkPolicy" => ignored::<NetworkPolicy>(object),
        "Pod" => ignored::<Pod>(object),
        "PodDisruptionBudget" => ignored::<PodDisruptionBudget>(object),
        "Role" => ignored::<Role>(object),
        "RoleBinding" => ignored::<RoleBinding>(object),
        "Service" => ignored::<Service>(object),
        "ServiceAccount" => ignored::<ServiceAccount>(object),
        "ValidatingWebhookConfiguration" => ignored::<ValidatingWebhookConfiguration>(object),
        other if OTHERS.contains(&other) => Ok(Vec::new()),
        _ => bail!("nobody knows this kind here: add it to controller/examples/manifests.rs"),
    }
}

fn ignored<T: DeserializeOwned>(object: &Json) -> Result<Vec<String>> {
    let mut unknown = Vec::new();
    let _: T = serde_ignored::deserialize(object, |path| unknown.push(format!("{path} is no field that is known")))?;
    Ok(unknown)
}

/// Whether one of these rules allows all that another does.
fn covers(held: &[PolicyRule], wanted: &PolicyRule) -> bool {
    let all_in = |wanted: &Option<Vec<String>>, held: &Option<Vec<String>>| {
        wanted.iter().flatten().all(|word| held.iter().flatten().any(|h| h == word))
    };
    held.iter().any(|rule| {
        rule.resource_names.is_none()
            && all_in(&wanted.api_groups, &rule.api_groups)
            && all_in(&wanted.resources, &rule.resources)
            && wanted.verbs.iter().all(|verb| rule.verbs.contains(verb))
    })
}
