//! From a manifest to a dataflow. Pure: touches no source, sink or storage, and the same manifest always gives the same graph.

use std::fmt;

use floodmark_crds::{CheckpointMode, Problem, StreamJob};
use floodmark_dataflow::{
    JobGraph,
    connector::{Guarantee, PlanContext},
};
use floodmark_snapshot::{Error, JobId, restore::Reference};
use floodmark_sql::SqlError;

/// Uid of a job that no cluster has given one.
const LOCAL_UID: &str = "local";
/// Namespace of a manifest that names none.
const DEFAULT_NAMESPACE: &str = "default";

/// A job that is ready to run.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Whose state it is.
    pub id: JobId,
    /// The manifest, defaults filled in.
    pub manifest: StreamJob,
    /// What it does.
    pub graph: JobGraph,
}

impl Planned {
    /// Plans a manifest.
    ///
    /// # Errors
    /// What is wrong with its fields; or else the first mistake in its SQL, with its place.
    pub fn of(manifest: &StreamJob) -> Result<Self, PlanError> {
        let problems = manifest.problems();
        if !problems.is_empty() {
            return Err(PlanError::Fields(problems));
        }
        let id = job_id(manifest);
        let guarantee = match manifest.spec.checkpoints.mode {
            CheckpointMode::ExactlyOnce => Guarantee::ExactlyOnce,
            CheckpointMode::AtLeastOnce => Guarantee::AtLeastOnce,
            CheckpointMode::Disabled => Guarantee::None,
        };
        let connectors = floodmark_connectors::all();
        let context = PlanContext { job: id.clone(), guarantee };
        let options = floodmark_sql::PlanOptions { context, connectors: &connectors };
        let graph = floodmark_sql::plan(&manifest.spec.sql, &options).map_err(PlanError::Sql)?;
        Ok(Self { id, manifest: manifest.clone(), graph })
    }

    /// What the job starts from if it has no past, as `spec.restore.from` has it.
    ///
    /// # Errors
    /// When that names no snapshot.
    pub fn initial(&self) -> Result<Option<Reference>, Error> {
        let from = self.manifest.spec.restore.from.as_deref().map(str::parse).transpose();
        from.map_err(|e: Error| e.context("spec.restore.from"))
    }

    /// Whether the job takes no snapshots, and starts from none.
    #[must_use]
    pub fn keeps_nothing(&self) -> bool {
        self.manifest.spec.checkpoints.mode == CheckpointMode::Disabled
    }
}

/// Whose state a manifest's job keeps.
#[must_use]
pub fn job_id(manifest: &StreamJob) -> JobId {
    let metadata = &manifest.metadata;
    let or = |value: &Option<String>, default: &str| value.clone().unwrap_or_else(|| default.to_owned());
    JobId {
        namespace: or(&metadata.namespace, DEFAULT_NAMESPACE),
        name: or(&metadata.name, "job"),
        uid: or(&metadata.uid, LOCAL_UID),
    }
}

/// Why a manifest can't be planned. Prints as people read it: fields with their paths, SQL with its place and its line quoted.
#[derive(Clone, Debug)]
pub enum PlanError {
    /// What is wrong with fields; never empty.
    Fields(Vec<Problem>),
    /// What is wrong in `spec.sql`.
    Sql(SqlError),
}

impl PlanError {
    /// Line in the SQL, from 1; `None` if the error has no place there.
    #[must_use]
    pub fn line(&self) -> Option<u64> {
        match self {
            Self::Fields(_) => None,
            Self::Sql(error) => error.location.map(|l| l.line),
        }
    }

    /// Column in that line, from 1.
    #[must_use]
    pub fn column(&self) -> Option<u64> {
        match self {
            Self::Fields(_) => None,
            Self::Sql(error) => error.location.map(|l| l.column),
        }
    }

    /// What is wrong and what to do, in one line, without the place in the SQL.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Fields(problems) => problems.iter().map(shown).collect::<Vec<_>>().join("; "),
            Self::Sql(SqlError { message, help: Some(help), .. }) => format!("{message}; {help}"),
            Self::Sql(SqlError { message, help: None, .. }) => message.clone(),
        }
    }
}

fn shown(problem: &Problem) -> String {
    match problem.path.as_str() {
        "" => problem.message.clone(),
        path => format!("{path}: {}", problem.message),
    }
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fields(problems) => f.write_str(&problems.iter().map(shown).collect::<Vec<_>>().join("\n")),
            Self::Sql(error) => write!(f, "spec.sql: {error}"),
        }
    }
}

impl std::error::Error for PlanError {}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::testing::{SQL, manifest};

    fn check(manifest: &StreamJob, place: (Option<u64>, Option<u64>), text: Expect, shown: Expect) {
        let error = Planned::of(manifest).unwrap_err();
        assert_eq!((error.line(), error.column()), place);
        text.assert_eq(&error.text());
        shown.assert_eq(&error.to_string());
    }

    #[test]
    fn a_job_is_known_by_its_manifest_and_the_same_manifest_gives_the_same_plan() {
        let mut job = manifest(SQL);
        let planned = Planned::of(&job).unwrap();
        assert_eq!(planned.id.to_string(), "default/sums/local");
        assert_eq!(planned.graph.fingerprint, Planned::of(&job).unwrap().graph.fingerprint);
        (job.metadata.namespace, job.metadata.uid) = (Some("shop".into()), Some("7f3a".into()));
        assert_eq!(job_id(&job).to_string(), "shop/sums/7f3a");
    }

    #[test]
    fn what_is_wrong_in_the_sql_is_said_with_line_and_column() {
        check(
            &manifest(&SQL.replace("sum(x)", "sum(y)")),
            (Some(3), Some(32)),
            expect!["unknown column 'y'; there is: k, x"],
            expect![[r#"
            spec.sql: line 3, column 32: unknown column 'y'; there is: k, x
              3 | INSERT INTO sums SELECT k, sum(y) FROM t GROUP BY k;
                |                                ^"#]],
        );
    }

    #[test]
    fn variables_of_whoever_connects_are_not_looked_up_and_are_no_part_of_the_plan() {
        let kafka = |password: &str| {
            let options = format!("'topic' = 't', 'properties.bootstrap.servers' = '${{NOT_SET_HERE}}', {password}");
            let t = format!("CREATE TABLE t (k BIGINT, x BIGINT) WITH ('connector' = 'kafka', {options});");
            manifest(&format!("{t}\n{}", SQL.split_once('\n').unwrap().1))
        };
        let planned = |password| Planned::of(&kafka(password)).unwrap().graph.fingerprint;
        let one = planned("'properties.sasl.password' = '${NOT_SET_HERE_EITHER}'");
        assert_eq!(one, planned("'properties.sasl.password' = 'another'"));
        check(
            &kafka("'properties.sasl.password' = '${ no name }'"),
            (Some(1), Some(133)),
            expect![
                "table 't': option 'properties.sasl.password': '${' begins no variable; write ${NAME}, or $${ for a literal ${"
            ],
            expect![[r#"
            spec.sql: line 1, column 133: table 't': option 'properties.sasl.password': '${' begins no variable; write ${NAME}, or $${ for a literal ${
              1 | CREATE TABLE t (k BIGINT, x BIGINT) WITH ('connector' = 'kafka', 'topic' = 't', 'properties.bootstrap.servers' = '${NOT_SET_HERE}', 'properties.sasl.password' = '${ no name }');
                |                                                                                                                                     ^"#]],
        );
    }

    #[test]
    fn fields_are_checked_before_anything_is_planned() {
        let mut job = manifest("nonsense");
        job.spec.parallelism = 0;
        check(
            &job,
            (None, None),
            expect!["spec.parallelism: must be at least 1"],
            expect!["spec.parallelism: must be at least 1"],
        );
    }

    #[test]
    fn what_a_job_begins_from_must_name_a_snapshot() {
        let mut job = manifest(SQL);
        let initial = |job: &StreamJob| Planned::of(job).unwrap().initial();
        assert_eq!(initial(&job).unwrap(), None);
        job.spec.restore.from = Some("base".into());
        assert_eq!(initial(&job).unwrap(), Some(Reference::Savepoint("base".into())));
        job.spec.restore.from = Some("two words".into());
        let error = initial(&job).unwrap_err().to_string();
        assert!(error.starts_with("spec.restore.from: 'two words' names no snapshot"), "{error}");
    }
}
