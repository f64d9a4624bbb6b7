//! Reads a manifest strictly: one `StreamJob`, no unknown field, every mistake with its path and line. Pure: text in, value
//! or problems out.

use std::fmt;

use serde::Deserialize;
use serde_json::Value as Json;

use crate::{StreamJob, crd, streamjob::API_VERSION};

const KIND: &str = "StreamJob";
/// Documents in one file; more is taken for a mistake.
const DOCUMENTS_MAX: usize = 1_000;
/// Fields of `metadata` that a person writes: what a wrong one may have been meant to be.
const METADATA_FIELDS: [&str; 5] = ["name", "namespace", "labels", "annotations", "uid"];

/// One thing that is wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field at fault: `spec.checkpoints.interval`; empty if it is the document as a whole.
    pub path: String,
    /// Line in the file, from 1; `None` if it could not be found.
    pub line: Option<usize>,
    /// What is wrong, and what to do.
    pub message: String,
}

impl Problem {
    pub(crate) fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), line: None, message: message.into() }
    }
}

/// A manifest that can't be used: everything that is wrong with it, a line each: `job.yaml:7: spec.sqll: unknown field, …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The file's name, as the user gave it.
    pub file: String,
    /// What is wrong; never empty.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            f.write_str(&self.file)?;
            if let Some(line) = problem.line {
                write!(f, ":{line}")?;
            }
            f.write_str(": ")?;
            if !problem.path.is_empty() {
                write!(f, "{}: ", problem.path)?;
            }
            f.write_str(&problem.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ManifestError {}

impl StreamJob {
    /// Reads the one `StreamJob` of a manifest (YAML or JSON). `file` names it in errors. Documents of other kinds in the
    /// same file are left alone.
    ///
    /// # Errors
    /// Everything that is wrong, as far as it can be told at once: broken syntax; no `StreamJob` or several; unknown fields;
    /// wrong types; rules of [`StreamJob::problems`].
    pub fn from_yaml(text: &str, file: &str) -> Result<Self, ManifestError> {
        let error = |problems| ManifestError { file: file.to_owned(), problems };
        let index = find_document(text).map_err(|problem| error(vec![problem]))?;
        let lines = Lines::of_document(text, index);
        let read = read_document(text, index);
        let mut problems = match read {
            Ok((job, unknown)) => {
                let problems: Vec<_> = unknown.into_iter().chain(job.problems()).collect();
                if problems.is_empty() {
                    return Ok(job);
                }
                problems
            }
            Err(problems) => problems,
        };
        for problem in &mut problems {
            problem.line = problem.line.or_else(|| lines.find(&problem.path));
        }
        Err(error(problems))
    }
}

/// Index of the document that is the `StreamJob`.
fn find_document(text: &str) -> Result<usize, Problem> {
    let mut found = Vec::new();
    let mut others = Vec::new();
    for (index, document) in serde_yaml::Deserializer::from_str(text).enumerate() {
        if index >= DOCUMENTS_MAX {
            return Err(Problem::new(
                "",
                format!("holds more than {DOCUMENTS_MAX} documents; one StreamJob is expected"),
            ));
        }
        let value = serde_yaml::Value::deserialize(document).map_err(|e| syntax_problem(&e))?;
        let header = |key: &str| value.get(key).and_then(serde_yaml::Value::as_str).map(str::to_owned);
        match value {
            serde_yaml::Value::Null => {}
            serde_yaml::Value::Mapping(_) => match (header("apiVersion"), header("kind")) {
                (Some(version), Some(kind)) if version == API_VERSION && kind == KIND => found.push(index),
                other => others.push(other),
            },
            _ => {
                return Err(Problem::new(
                    "",
                    format!("is not a manifest; a {KIND} begins with 'apiVersion: {API_VERSION}'"),
                ));
            }
        }
    }
    match (&found[..], &others[..]) {
        ([index], _) => Ok(*index),
        ([], []) => Err(Problem::new("", format!("is empty; a {KIND} begins with 'apiVersion: {API_VERSION}'"))),
        ([], [(version, kind)]) => Err(header_problem(version.as_deref(), kind.as_deref())),
        ([], _) => {
            Err(Problem::new("", format!("none of its {} documents is a {KIND} of {API_VERSION}", others.len())))
        }
        (several, _) => {
            Err(Problem::new("", format!("holds {} {KIND}s; one file describes one job, so split it", several.len())))
        }
    }
}

fn header_problem(version: Option<&str>, kind: Option<&str>) -> Problem {
    match (version, kind) {
        (_, None) => Problem::new("kind", format!("is missing; write 'kind: {KIND}'")),
        (_, Some(kind)) if kind != KIND => {
            Problem::new("kind", format!("'{kind}' is not known here; it must be '{KIND}'"))
        }
        (None, _) => Problem::new("apiVersion", format!("is missing; write 'apiVersion: {API_VERSION}'")),
        (Some(version), _) => {
            Problem::new("apiVersion", format!("'{version}' is not known here; it must be '{API_VERSION}'"))
        }
    }
}

/// The job, and the fields that nobody knows.
fn read_document(text: &str, index: usize) -> Result<(StreamJob, Vec<Problem>), Vec<Problem>> {
    let Some(document) = serde_yaml::Deserializer::from_str(text).nth(index) else {
        return Err(vec![Problem::new("", "ends before its StreamJob")]);
    };
    let mut unknown = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(document, &mut track);
    let read = serde_ignored::deserialize(tracked, |path| {
        let path = path.to_string();
        if path != "apiVersion" && path != "kind" {
            unknown.push(unknown_field(&path));
        }
    });
    match read {
        Ok(job) => Ok((job, unknown)),
        Err(error) => {
            let path = track.path().to_string();
            let path = if path == "." { String::new() } else { path };
            let problem = type_problem(&path, &error);
            // A misspelt field is often why another one is missing: say both.
            Err(unknown.into_iter().chain([problem]).collect())
        }
    }
}

fn syntax_problem(error: &serde_yaml::Error) -> Problem {
    let line = error.location().map(|l| l.line());
    Problem { path: String::new(), line, message: format!("is not valid YAML: {error}") }
}

fn type_problem(path: &str, error: &serde_yaml::Error) -> Problem {
    let text = error.to_string();
    // It may begin with where it is, or with what that is in.
    let within = |place: &str| path == place || path.strip_prefix(place).is_some_and(|rest| rest.starts_with('.'));
    let text = text.split_once(": ").filter(|(place, _)| within(place)).map_or(&*text, |(_, text)| text);
    let text = error
        .location()
        .map_or(text, |l| text.strip_suffix(&format!(" at line {} column {}", l.line(), l.column())).unwrap_or(text));
    let mut message = text.to_owned();
    for (rust, words) in [
        ("expected u32", "expected a whole number"),
        ("expected u16", "expected a whole number up to 65535"),
        ("expected a boolean", "expected true or false"),
        ("expected struct ", "expected the fields of a "),
        ("CheckpointSpec", "checkpoints section"),
        ("RestoreSpec", "restore section"),
        ("RestartSpec", "restarts section"),
        ("StreamJobSpec", "spec"),
        ("invalid type: unit value", "nothing is given"),
        ("missing field `sql`", "field 'sql' is missing; it holds the job's SQL"),
        ("missing field `spec`", "field 'spec' is missing"),
        ("missing field `metadata`", "field 'metadata' is missing; write at least 'metadata: {name: …}'"),
    ] {
        message = message.replace(rust, words);
    }
    // A missing field has no line of its own, and the section's is found by its path.
    let line = error.location().map(|l| l.line()).filter(|_| !message.contains("is missing"));
    Problem { path: path.to_owned(), line, message }
}

fn unknown_field(path: &str) -> Problem {
    let (parent, name) = path.rsplit_once('.').unwrap_or(("", path));
    let known = known_fields(parent);
    let message = match nearest(name, &known) {
        Some(near) => format!("unknown field, did you mean '{near}'?"),
        None if known.is_empty() => "unknown field".to_owned(),
        None => format!("unknown field; known here are {}", known.join(", ")),
    };
    Problem::new(path, message)
}

/// The fields that the custom resource definition knows under a path.
fn known_fields(parent: &str) -> Vec<String> {
    if parent == "metadata" {
        return METADATA_FIELDS.map(str::to_owned).to_vec();
    }
    let definition = serde_json::to_value(crd()).unwrap_or(Json::Null);
    let root = "/spec/versions/0/schema/openAPIV3Schema".to_owned();
    let pointer = parent
        .split('.')
        .filter(|s| !s.is_empty())
        .fold(root, |pointer, field| format!("{pointer}/properties/{field}"));
    let properties = definition.pointer(&pointer).and_then(|schema| schema.get("properties")).and_then(Json::as_object);
    let mut fields: Vec<String> = properties.map(|p| p.keys().cloned().collect()).unwrap_or_default();
    if parent.is_empty() {
        fields.extend(["apiVersion", "kind", "metadata"].map(str::to_owned));
    }
    fields.sort();
    fields
}

/// The name that was most likely meant: at most a third of its letters differ.
fn nearest<'a>(name: &str, known: &'a [String]) -> Option<&'a str> {
    let lower = name.to_lowercase();
    let distance = |candidate: &str| strsim::damerau_levenshtein(&lower, &candidate.to_lowercase());
    let best = known.iter().map(|k| (distance(k), k)).min()?;
    (best.0 <= best.1.chars().count().div_ceil(3)).then_some(best.1.as_str())
}

/// The lines of one document, for finding where a field stands. Block style only; in flow style the line of the nearest
/// enclosing block field is found.
struct Lines<'a> {
    /// Line number in the file, indentation, text without it. Blank lines and comments are left out.
    lines: Vec<(usize, usize, &'a str)>,
}

impl<'a> Lines<'a> {
    fn of_document(text: &'a str, index: usize) -> Self {
        let mut lines = Vec::new();
        let mut document = 0;
        let mut begun = false;
        for (number, line) in text.lines().enumerate() {
            let trimmed = line.trim_start();
            if line == "---" || line.starts_with("--- ") {
                document += usize::from(begun);
                begun = false;
            } else if !trimmed.is_empty() && !trimmed.starts_with('#') {
                begun = true;
                if document == index {
                    lines.push((number + 1, line.len() - trimmed.len(), trimmed));
                }
            }
        }
        Self { lines }
    }

    fn find(&self, path: &str) -> Option<usize> {
        let mut found = None;
        let mut inside = &self.lines[..];
        // Of a list the line is found where it begins.
        let fields = path.split('.').map(|field| field.split_once('[').map_or(field, |(list, _)| list));
        for field in fields.filter(|s| !s.is_empty()) {
            let Some((_, indent, _)) = inside.first() else { break };
            let is_field = |text: &str| {
                let text = text.trim_start_matches(['"', '\'']);
                text.strip_prefix(field)
                    .is_some_and(|rest| rest.trim_start_matches(['"', '\'']).trim_start().starts_with(':'))
            };
            let Some(at) = inside.iter().position(|(_, i, text)| i == indent && is_field(text)) else { break };
            found = Some(inside[at].0);
            let rest = &inside[at + 1..];
            let end = rest.iter().position(|(_, i, _)| i <= indent).unwrap_or(rest.len());
            inside = &rest[..end];
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::{CheckpointMode, HumanDuration, RestartStrategy};

    const HEAD: &str = "apiVersion: floodmark.io/v1alpha1\nkind: StreamJob\nmetadata: {name: hot}\n";

    /// Reads `text`; checks the error, or that there is none if `expected` is empty.
    fn check(text: &str, expected: Expect) {
        let message = StreamJob::from_yaml(text, "job.yaml").map_or_else(|e| e.to_string(), |_| String::new());
        expected.assert_eq(&message);
    }

    /// The same for a text that follows a correct head.
    fn check_spec(spec: &str, expected: Expect) {
        check(&format!("{HEAD}{spec}"), expected);
    }

    #[test]
    fn a_short_manifest_gets_the_documented_defaults() {
        let job = StreamJob::from_yaml(&format!("{HEAD}spec:\n  sql: INSERT INTO a SELECT 1\n"), "job.yaml").unwrap();
        let checkpoints = &job.spec.checkpoints;
        assert_eq!((job.spec.parallelism, job.spec.max_parallelism), (1, 128));
        assert_eq!(checkpoints.storage, None);
        assert_eq!(checkpoints.interval, HumanDuration::from_millis(10_000));
        assert_eq!(checkpoints.mode, CheckpointMode::ExactlyOnce);
        assert_eq!((checkpoints.retain, checkpoints.tolerable_failures), (3, 3));
        assert!(!job.spec.restore.allow_dropped_state);
    }

    #[test]
    fn every_field_is_read() {
        let job = StreamJob::from_yaml(
            "apiVersion: floodmark.io/v1alpha1\nkind: StreamJob\nmetadata:\n  name: hot-items\n  namespace: shop\nspec:\n  \
             parallelism: 4\n  maxParallelism: 256\n  sql: |\n    INSERT INTO a SELECT 1;\n  restore: {allowDroppedState: true}\n  \
             checkpoints:\n    storage: s3://streams/floodmark\n    interval: 500ms\n    mode: AtLeastOnce\n    timeout: 1m\n    \
             minPause: 250ms\n    tolerableFailures: 0\n    retain: 5\n  restarts: {strategy: FixedDelay, delay: 2s, attempts: 7}\n",
            "job.yaml",
        )
        .unwrap();
        let again = StreamJob::from_yaml(&serde_yaml::to_string(&job).unwrap(), "again.yaml").unwrap();
        assert_eq!(job, again);
        assert_eq!(job.spec.checkpoints.interval.to_string(), "500ms");
        assert_eq!(job.spec.checkpoints.mode, CheckpointMode::AtLeastOnce);
        assert!(job.spec.restore.allow_dropped_state);
        let restarts = &job.spec.restarts;
        assert_eq!((restarts.strategy, restarts.attempts), (RestartStrategy::FixedDelay, 7));
        assert_eq!((restarts.delay.to_string(), restarts.max_delay.to_string()), ("2s".to_owned(), "1m".to_owned()));
    }

    #[test]
    fn a_first_delay_is_no_longer_than_the_longest() {
        check(
            &format!("{HEAD}spec:\n  sql: x\n  restarts: {{delay: 2m}}\n"),
            expect!["job.yaml:6: spec.restarts.delay: 2m exceeds maxDelay, which is 1m"],
        );
        check(&format!("{HEAD}spec:\n  sql: x\n  restarts: {{delay: 2m, strategy: FixedDelay}}\n"), expect![""]);
    }

    #[test]
    fn documents_of_other_kinds_are_left_alone() {
        let text = format!("---\n# secrets first\napiVersion: v1\nkind: Secret\n---\n{HEAD}spec: {{sql: x}}\n---\n");
        check(&text, expect![""]);
    }

    #[test]
    fn what_is_no_stream_job_is_refused() {
        check("", expect!["job.yaml: is empty; a StreamJob begins with 'apiVersion: floodmark.io/v1alpha1'"]);
        check(
            "hello",
            expect!["job.yaml: is not a manifest; a StreamJob begins with 'apiVersion: floodmark.io/v1alpha1'"],
        );
        check(
            "- a\n- b\n",
            expect!["job.yaml: is not a manifest; a StreamJob begins with 'apiVersion: floodmark.io/v1alpha1'"],
        );
        check(
            "kind: StreamJob\n",
            expect!["job.yaml: apiVersion: is missing; write 'apiVersion: floodmark.io/v1alpha1'"],
        );
        check("apiVersion: floodmark.io/v1alpha1\n", expect!["job.yaml: kind: is missing; write 'kind: StreamJob'"]);
        check(
            "apiVersion: floodmark.io/v1\nkind: StreamJob\n",
            expect!["job.yaml: apiVersion: 'floodmark.io/v1' is not known here; it must be 'floodmark.io/v1alpha1'"],
        );
        check(
            "apiVersion: v1\nkind: Pod\n",
            expect!["job.yaml: kind: 'Pod' is not known here; it must be 'StreamJob'"],
        );
        check(
            "apiVersion: v1\nkind: Pod\n---\napiVersion: v1\nkind: Secret\n",
            expect!["job.yaml: none of its 2 documents is a StreamJob of floodmark.io/v1alpha1"],
        );
        check(
            &format!("{HEAD}spec: {{sql: x}}\n---\n{HEAD}spec: {{sql: x}}\n"),
            expect!["job.yaml: holds 2 StreamJobs; one file describes one job, so split it"],
        );
        check(
            "a: [1\nb: 2\n",
            expect![
                "job.yaml:2: is not valid YAML: did not find expected ',' or ']' at line 2 column 2, while parsing a flow sequence at line 1 column 4"
            ],
        );
        check("a: 1\na: 2\n", expect![[r#"job.yaml:1: is not valid YAML: duplicate entry with key "a""#]]);
    }

    #[test]
    fn an_unknown_field_is_named_with_its_path_and_the_nearest_name() {
        check_spec(
            "spec:\n  sql: x\n  paralellism: 2\n",
            expect!["job.yaml:6: spec.paralellism: unknown field, did you mean 'parallelism'?"],
        );
        check_spec(
            "spec:\n  sql: x\n  checkpoints:\n    intervall: 1s\n    Mode: Disabled\n",
            expect![[r#"
            job.yaml:7: spec.checkpoints.intervall: unknown field, did you mean 'interval'?
            job.yaml:8: spec.checkpoints.Mode: unknown field, did you mean 'mode'?"#]],
        );
        check_spec(
            "spec:\n  sql: x\n  checkpoints: {banana: 1s}\n",
            expect![
                "job.yaml:6: spec.checkpoints.banana: unknown field; known here are credentials, incremental, interval, maxConcurrent, minPause, mode, onDelete, retain, storage, timeout, tolerableFailures, unaligned"
            ],
        );
        check_spec(
            "spec:\n  sqll: |\n    interval: 3\n",
            expect![[r#"
            job.yaml:5: spec.sqll: unknown field, did you mean 'sql'?
            job.yaml:4: spec: field 'sql' is missing; it holds the job's SQL"#]],
        );
        check_spec("spec: {sql: x}\nstate: {}\n", expect!["job.yaml:5: state: unknown field, did you mean 'status'?"]);
        check(
            "apiVersion: floodmark.io/v1alpha1\nkind: StreamJob\nmetadata:\n  nmae: hot\nspec: {sql: x}\n",
            expect![[r#"
                job.yaml:4: metadata.nmae: unknown field, did you mean 'name'?
                job.yaml:3: metadata.name: is missing; the job's state is kept under it"#]],
        );
    }

    #[test]
    fn a_wrong_type_is_named_with_its_path_and_line() {
        check_spec(
            "spec:\n  sql: x\n  parallelism: two\n",
            expect![[r#"job.yaml:6: spec.parallelism: invalid type: string "two", expected a whole number"#]],
        );
        check_spec(
            "spec:\n  sql: x\n  parallelism: -1\n",
            expect!["job.yaml:6: spec.parallelism: invalid type: integer `-1`, expected a whole number"],
        );
        check_spec(
            "spec:\n  sql: x\n  maxParallelism: 70000\n",
            expect![
                "job.yaml:6: spec.maxParallelism: invalid value: integer `70000`, expected a whole number up to 65535"
            ],
        );
        check_spec("spec:\n  sql: [a]\n", expect!["job.yaml:5: spec.sql: invalid type: sequence, expected a string"]);
        check_spec(
            "spec:\n  sql: x\n  checkpoints: daily\n",
            expect![[
                r#"job.yaml:6: spec.checkpoints: invalid type: string "daily", expected the fields of a checkpoints section"#
            ]],
        );
        check_spec(
            "spec:\n  sql: x\n  checkpoints:\n    interval: 10\n",
            expect![
                "job.yaml:7: spec.checkpoints.interval: '10' is not a duration; write a number and a unit (ms, s, m, h), such as 10s or 1m30s"
            ],
        );
        check_spec(
            "spec:\n  sql: x\n  checkpoints:\n    interval: 10 sec\n",
            expect![
                "job.yaml:7: spec.checkpoints.interval: '10 sec' is not a duration; write a number and a unit (ms, s, m, h), such as 10s or 1m30s"
            ],
        );
        check_spec(
            "spec:\n  sql: x\n  checkpoints:\n    mode: exactlyOnce\n",
            expect![
                "job.yaml:7: spec.checkpoints.mode: unknown variant `exactlyOnce`, expected one of `ExactlyOnce`, `AtLeastOnce`, `Disabled`"
            ],
        );
        check_spec(
            "spec:\n  sql: x\n  restore: {allowDroppedState: maybe}\n",
            expect![[
                r#"job.yaml:6: spec.restore.allowDroppedState: invalid type: string "maybe", expected true or false"#
            ]],
        );
        check_spec("spec:\n", expect!["job.yaml:4: spec: field 'sql' is missing; it holds the job's SQL"]);
        check_spec("", expect!["job.yaml: field 'spec' is missing"]);
    }

    #[test]
    fn values_out_of_range_are_named_all_at_once() {
        check_spec(
            "spec:\n  sql: ' '\n  parallelism: 0\n  maxParallelism: 0\n",
            expect![[r#"
            job.yaml:5: spec.sql: is empty; write at least one INSERT INTO
            job.yaml:6: spec.parallelism: must be at least 1
            job.yaml:7: spec.maxParallelism: 0 is not between 1 and 32768"#]],
        );
        check_spec(
            "spec:\n  sql: x\n  parallelism: 129\n",
            expect!["job.yaml:6: spec.parallelism: 129 exceeds maxParallelism, which is 128"],
        );
        check_spec(
            "spec:\n  sql: x\n  maxParallelism: 40000\n",
            expect!["job.yaml:6: spec.maxParallelism: 40000 is not between 1 and 32768"],
        );
        check_spec(
            "spec:\n  sql: x\n  checkpoints:\n    storage: ''\n    interval: 0s\n    timeout: 0ms\n    retain: 0\n    \
             tolerableFailures: 2000000\n",
            expect![[r#"
                job.yaml:7: spec.checkpoints.storage: is empty; name a location such as s3://bucket/folder, or leave it out
                job.yaml:8: spec.checkpoints.interval: must be longer than 0s
                job.yaml:9: spec.checkpoints.timeout: must be longer than 0s
                job.yaml:11: spec.checkpoints.tolerableFailures: must be at most 1000000
                job.yaml:10: spec.checkpoints.retain: must be between 1 and 1000"#]],
        );
        check_spec("spec:\n  sql: x\n  checkpoints: {mode: Disabled, interval: 0s}\n", expect![""]);
    }

    #[test]
    fn names_that_no_cluster_would_take_are_refused() {
        let with = |metadata: &str| {
            format!("apiVersion: floodmark.io/v1alpha1\nkind: StreamJob\nmetadata: {metadata}\nspec: {{sql: x}}\n")
        };
        check(&with("{}"), expect!["job.yaml:3: metadata.name: is missing; the job's state is kept under it"]);
        check(
            &with("{name: ../../etc}"),
            expect![
                "job.yaml:3: metadata.name: '../../etc' is not a valid name: use at most 63 lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit"
            ],
        );
        check(
            &with("{name: Hot_Items}"),
            expect![
                "job.yaml:3: metadata.name: 'Hot_Items' is not a valid name: use at most 63 lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit"
            ],
        );
        check(
            &with("{name: a, namespace: -b, uid: a/b}"),
            expect![[r#"
            job.yaml:3: metadata.namespace: '-b' is not a valid name: use at most 63 lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit
            job.yaml:3: metadata.uid: 'a/b' is not a valid name: use at most 63 lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit"#]],
        );
        check(
            &with(&format!("{{name: {}}}", "a".repeat(64))),
            expect![
                "job.yaml:3: metadata.name: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' is not a valid name: use at most 63 lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit"
            ],
        );
    }

    #[test]
    fn what_only_a_cluster_acts_upon_is_checked_as_well() {
        check_spec(
            "spec:\n  sql: x\n  restore: {nonce: 3}\n  upgrade: {timeout: 0s}\n  worker: {slots: 0}\n  env:\n  - {name: A}\n",
            expect![[r#"
                job.yaml:7: spec.upgrade.timeout: must be longer than 0s
                job.yaml:6: spec.restore.from: is missing; nonce says when to start from it
                job.yaml:8: spec.worker.slots: must be between 1 and 1024
                job.yaml:9: spec.env[0]: give either value or valueFrom"#]],
        );
        check_spec(
            "spec:\n  sql: x\n  worker:\n    slots: 2\n    resources: {limits: {memory: lots}}\n",
            expect![
                "job.yaml:8: spec.worker.resources.limits.memory: 'lots' is no quantity; write one such as 500m, 2 or 1Gi"
            ],
        );
        let text = format!(
            "{HEAD}spec:\n  sql: x\n  desiredState: Suspended\n  image: a:1\n  upgrade: {{mode: LastCheckpoint}}\n  \
             coordinator: {{standby: true, podTemplate: {{spec: {{nodeSelector: {{a: b}}}}}}}}\n  worker: {{slots: 2, \
             resources: {{requests: {{cpu: 2}}}}}}\n  env: [{{name: A, valueFrom: {{secretKeyRef: {{name: s, key: k}}}}}}]\n"
        );
        let job = StreamJob::from_yaml(&text, "job.yaml").unwrap();
        assert_eq!(job.spec.worker.resources.requests["cpu"].0, "2");
        assert_eq!(StreamJob::from_yaml(&serde_yaml::to_string(&job).unwrap(), "again.yaml").unwrap(), job);
    }

    #[test]
    fn definitions_are_small_enough_for_an_annotation() {
        for definition in [crd(), crate::savepoint_crd()] {
            let size = serde_json::to_string(&definition).unwrap().len();
            assert!(size < 200_000, "{size} bytes");
        }
    }

    #[test]
    fn the_definition_holds_the_same_rules() {
        let definition = serde_json::to_value(crd()).unwrap();
        let text = definition.to_string();
        for part in ["self.parallelism <= self.maxParallelism", "duration(self.interval)", "duration(self.timeout)"] {
            assert!(text.contains(part), "{part}");
        }
        let spec = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let mut undescribed = Vec::new();
        fn walk(path: &str, schema: &Json, undescribed: &mut Vec<String>) {
            for (name, field) in schema["properties"].as_object().into_iter().flatten() {
                let path = format!("{path}.{name}");
                if field["description"].as_str().unwrap_or_default().is_empty() {
                    undescribed.push(path.clone());
                }
                walk(&path, field, undescribed);
            }
        }
        walk("spec", spec, &mut undescribed);
        assert!(undescribed.is_empty(), "fields without a description: {undescribed:?}");
        assert!(!text.contains("uint"), "API servers warn of formats that they don't know");
    }
}
