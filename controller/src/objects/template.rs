//! A job's own pod template over ours. Pure.
//!
//! Maps are merged; lists of things that are told apart by a field are merged by it, as Kubernetes itself does it with patches;
//! `tolerations` and `envFrom` are added to; other lists replace ours. `null` takes a field away. Invariant: what is no pod
//! template ends as an error with its path, and nothing of a template is dropped silently.

use floodmark_crds::PodTemplate;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};

use super::Unrenderable;

/// Lists of things, and the field by which they are told apart.
const KEYED: [(&str, &str); 10] = [
    ("containers", "name"),
    ("initContainers", "name"),
    ("volumes", "name"),
    ("env", "name"),
    ("imagePullSecrets", "name"),
    ("resourceClaims", "name"),
    ("volumeMounts", "mountPath"),
    ("volumeDevices", "devicePath"),
    ("ports", "containerPort"),
    ("hostAliases", "ip"),
];
/// Those of them that say one of several things: theirs takes the place of ours as a whole.
const WHOLE: [&str; 2] = ["volumes", "env"];
/// Fields of which a probe has one.
const ONE_OF: [&str; 4] = ["exec", "grpc", "httpGet", "tcpSocket"];
const TOLERATIONS: &str = "tolerations";
const ENV_FROM: &str = "envFrom";

/// `theirs` over `ours`. `path` is where theirs stands in the job.
pub(super) fn merged(
    ours: &PodTemplateSpec,
    theirs: &PodTemplate,
    path: &str,
) -> Result<PodTemplateSpec, Unrenderable> {
    let theirs = Json::Object(theirs.0.clone());
    strictly::<PodTemplateSpec>(&theirs, path)?;
    let mut whole = serde_json::to_value(ours).map_err(|e| Unrenderable::new(path, e))?;
    if let (Json::Object(whole), Json::Object(theirs)) = (&mut whole, theirs) {
        merge(whole, theirs, path)?;
    }
    strictly(&whole, path)
}

/// Reads a value of which every field is known.
fn strictly<T: DeserializeOwned>(value: &Json, path: &str) -> Result<T, Unrenderable> {
    let mut unknown = None;
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let read = serde_ignored::deserialize(tracked, |at| {
        unknown.get_or_insert_with(|| at.to_string());
    });
    let read = read.map_err(|e: serde_json::Error| {
        let at = track.path().to_string();
        Unrenderable::new(if at == "." { path.to_owned() } else { format!("{path}.{at}") }, e)
    })?;
    match unknown {
        None => Ok(read),
        Some(at) => {
            let message = "no such field is known of pods; correct its name, or take it out";
            Err(Unrenderable::new(in_brackets(path, &at), message))
        }
    }
}

/// `spec.?.containers.0.imag` as it is written everywhere else.
fn in_brackets(path: &str, at: &str) -> String {
    at.split('.').filter(|part| *part != "?").fold(path.to_owned(), |path, part| {
        let index = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if index { format!("{path}[{part}]") } else { format!("{path}.{part}") }
    })
}

fn merge(ours: &mut Map<String, Json>, theirs: Map<String, Json>, path: &str) -> Result<(), Unrenderable> {
    if ONE_OF.iter().any(|field| theirs.get(*field).is_some_and(|value| !value.is_null())) {
        ours.retain(|field, _| !ONE_OF.contains(&field.as_str()) || theirs.contains_key(field));
    }
    for (field, value) in theirs {
        let path = format!("{path}.{field}");
        match (ours.get_mut(&field), value) {
            (_, Json::Null) => {
                ours.remove(&field);
            }
            (Some(Json::Object(ours)), Json::Object(theirs)) => merge(ours, theirs, &path)?,
            (present, Json::Array(theirs)) => {
                let before = present.and_then(Json::as_array_mut).map(std::mem::take).unwrap_or_default();
                ours.insert(field.clone(), Json::Array(list(&field, before, theirs, &path)?));
            }
            (_, value) => {
                ours.insert(field, value);
            }
        }
    }
    Ok(())
}

fn list(field: &str, mut ours: Vec<Json>, theirs: Vec<Json>, path: &str) -> Result<Vec<Json>, Unrenderable> {
    if field == TOLERATIONS {
        // One without a key is about every taint.
        ours.retain(|our| theirs.iter().all(|their| their.get("key").is_some_and(|key| Some(key) != our.get("key"))));
    }
    if field == TOLERATIONS || field == ENV_FROM {
        ours.extend(theirs);
        return Ok(ours);
    }
    let Some((_, key)) = KEYED.iter().find(|(list, _)| *list == field) else { return Ok(theirs) };
    for (i, theirs) in theirs.into_iter().enumerate() {
        let path = format!("{path}[{i}]");
        let Some(name) = theirs.get(*key).filter(|name| !name.is_null()).cloned() else {
            return Err(Unrenderable::new(format!("{path}.{key}"), "is missing: by it one is told from the others"));
        };
        match (ours.iter_mut().find(|our| our.get(*key) == Some(&name)), theirs) {
            (Some(Json::Object(ours)), Json::Object(theirs)) if !WHOLE.contains(&field) => merge(ours, theirs, &path)?,
            (Some(ours), theirs) => *ours = theirs,
            (None, theirs) => ours.push(theirs),
        }
    }
    Ok(ours)
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(ours: &str, theirs: &str, expected: Expect) {
        let ours: PodTemplateSpec = serde_yaml::from_str(ours).unwrap();
        let theirs: PodTemplate = serde_yaml::from_str(theirs).unwrap();
        let merged = merged(&ours, &theirs, "spec.worker.podTemplate");
        expected.assert_eq(&merged.map_or_else(|e| e.to_string(), |m| serde_yaml::to_string(&m).unwrap()));
    }

    #[test]
    fn maps_are_merged_and_things_with_names_by_their_names() {
        check(
            "
metadata: {labels: {a: ours, b: ours}}
spec:
  nodeSelector: {a: ours}
  containers:
  - {name: floodmark, image: ours, args: [ours], env: [{name: A, value: ours}, {name: B, valueFrom: {fieldRef: {fieldPath: x}}}]}
  volumes: [{name: work, emptyDir: {}}, {name: tmp, emptyDir: {}}]",
            "
metadata: {labels: {b: theirs}, annotations: {c: theirs}}
spec:
  priorityClassName: theirs
  nodeSelector: {b: theirs}
  containers:
  - {name: log, image: theirs}
  - {name: floodmark, args: [theirs], env: [{name: B, value: theirs}, {name: C, value: theirs}]}
  volumes: [{name: work, ephemeral: {volumeClaimTemplate: {spec: {storageClassName: fast}}}}]",
            expect![[r#"
                metadata:
                  annotations:
                    c: theirs
                  labels:
                    a: ours
                    b: theirs
                spec:
                  containers:
                  - args:
                    - theirs
                    env:
                    - name: A
                      value: ours
                    - name: B
                      value: theirs
                    - name: C
                      value: theirs
                    image: ours
                    name: floodmark
                  - image: theirs
                    name: log
                  nodeSelector:
                    a: ours
                    b: theirs
                  priorityClassName: theirs
                  volumes:
                  - ephemeral:
                      volumeClaimTemplate:
                        spec:
                          storageClassName: fast
                    name: work
                  - emptyDir: {}
                    name: tmp
            "#]],
        );
    }

    #[test]
    fn what_must_stay_is_added_to_and_what_excludes_ours_takes_its_place() {
        check(
            "
spec:
  containers:
  - name: floodmark
    envFrom: [{secretRef: {name: ours}}]
    volumeMounts: [{name: work, mountPath: /a}]
    ports: [{name: http, containerPort: 8080}]
    livenessProbe: {httpGet: {port: 8080}, periodSeconds: 10}
    readinessProbe: {httpGet: {port: 8080}}
  tolerations: [{key: not-ready, tolerationSeconds: 10}, {key: unreachable, tolerationSeconds: 10}]
  topologySpreadConstraints: [{maxSkew: 1, topologyKey: host, whenUnsatisfiable: ScheduleAnyway}]",
            "
spec:
  containers:
  - name: floodmark
    envFrom: [{configMapRef: {name: theirs}}]
    volumeMounts: [{name: work, mountPath: /b, subPath: b}]
    ports: [{containerPort: 9000}, {containerPort: 8080, hostPort: 80}]
    livenessProbe: {tcpSocket: {port: 1}}
    readinessProbe: null
    resources: {limits: {cpu: 2}}
  tolerations: [{key: unreachable, tolerationSeconds: 60}, {key: dedicated}]
  topologySpreadConstraints: []",
            expect![[r#"
                spec:
                  containers:
                  - envFrom:
                    - secretRef:
                        name: ours
                    - configMapRef:
                        name: theirs
                    livenessProbe:
                      periodSeconds: 10
                      tcpSocket:
                        port: 1
                    name: floodmark
                    ports:
                    - containerPort: 8080
                      hostPort: 80
                      name: http
                    - containerPort: 9000
                    resources:
                      limits:
                        cpu: '2'
                    volumeMounts:
                    - mountPath: /a
                      name: work
                    - mountPath: /b
                      name: work
                      subPath: b
                  tolerations:
                  - key: not-ready
                    tolerationSeconds: 10
                  - key: unreachable
                    tolerationSeconds: 60
                  - key: dedicated
                  topologySpreadConstraints: []
            "#]],
        );
        check(
            "spec: {containers: [], tolerations: [{key: not-ready, tolerationSeconds: 10}]}",
            "spec: {tolerations: [{operator: Exists}]}",
            expect![[r#"
                spec:
                  containers: []
                  tolerations:
                  - operator: Exists
            "#]],
        );
    }

    #[test]
    fn what_is_no_pod_template_is_named() {
        let ours = "spec: {containers: [{name: floodmark}]}";
        for (theirs, expected) in [
            (
                "{spec: {containers: [{name: a}, {name: b, imag: c}]}}",
                expect![
                    "spec.worker.podTemplate.spec.containers[1].imag: no such field is known of pods; correct its name, or take it out"
                ],
            ),
            (
                "{nodeSelector: {a: b}}",
                expect![
                    "spec.worker.podTemplate.nodeSelector: no such field is known of pods; correct its name, or take it out"
                ],
            ),
            (
                "{spec: {containers: [{image: a}]}}",
                expect![
                    "spec.worker.podTemplate.spec.containers[0].name: is missing: by it one is told from the others"
                ],
            ),
            (
                "{spec: {containers: {name: a}}}",
                expect!["spec.worker.podTemplate.spec.containers: invalid type: map, expected a sequence"],
            ),
            (
                "{spec: {terminationGracePeriodSeconds: soon}}",
                expect![[
                    r#"spec.worker.podTemplate.spec.terminationGracePeriodSeconds: invalid type: string "soon", expected i64"#
                ]],
            ),
            ("{spec: [1]}", expect!["spec.worker.podTemplate.spec: invalid type: sequence, expected PodSpec"]),
        ] {
            check(ours, theirs, expected);
        }
    }
}
