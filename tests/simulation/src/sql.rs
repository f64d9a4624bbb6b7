//! Jobs in SQL, planned by the real planner. A text is planned once; each process gets the plan with sources and sinks of its
//! own in it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use arrow::datatypes::SchemaRef;
use floodmark_dataflow::{
    JobGraph, Operator, SubtaskContext,
    connector::{Connector, Connectors, Guarantee, PlanContext, SinkInput, TableDef, TableError},
    graph::NodeKind,
    sink::{Committer, SinkFactory, SinkNode},
    source::{Source, SourceFactory},
};
use floodmark_snapshot::{Epoch, Error, JobId, Result, SplitState};
use floodmark_sql::PlanOptions;

use crate::{
    inputs::{Columns, Topic},
    process::Process,
    sink::Sink,
    topology::Topology,
};

/// Length of the windows of SQL jobs, milliseconds.
pub(crate) const WINDOW_MS: i64 = 500;
/// Length of the windows that are joined: longer, so that the slow topic's rows meet others.
pub(crate) const JOIN_WINDOW_MS: i64 = 2000;
/// The tables of the two topics.
const TABLES: [&str; 2] = ["fast", "slow"];

/// The statements of a job whose rows may come `delay_ms` behind the greatest time that was seen; `None` if it is not in SQL.
pub(crate) fn text(topology: Topology, delay_ms: i64) -> Option<String> {
    let interval = |ms: i64| format!("INTERVAL '{}.{:03}' SECOND", ms / 1000, ms % 1000);
    let of = |table: &str, ms: i64| format!("TABLE(TUMBLE(TABLE {table}, DESCRIPTOR(`time`), {}))", interval(ms));
    let ranked = |order: &str| {
        format!(
            "SELECT key, `time`, `value`, id FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY key ORDER BY `time` {order}) AS n \
             FROM fast) WHERE n = 1"
        )
    };
    let (columns, query) = match topology {
        Topology::Pipe | Topology::Windows | Topology::TwoSpeeds | Topology::Rebalanced | Topology::Funnel => {
            return None;
        }
        Topology::SqlWindows => (
            "key BIGINT, w TIMESTAMP(3), n BIGINT, total BIGINT",
            format!(
                "SELECT key, window_start, count(*), sum(`value`) FROM {} GROUP BY key, window_start, window_end",
                of("fast", WINDOW_MS)
            ),
        ),
        Topology::SqlJoin => (
            "key BIGINT, w TIMESTAMP(3), n BIGINT, total BIGINT, id BIGINT",
            format!(
                "SELECT a.key, a.window_start, a.n, a.total, b.id FROM \
                 (SELECT key, window_start, window_end, count(*) AS n, sum(`value`) AS total FROM {} \
                 GROUP BY key, window_start, window_end) AS a JOIN \
                 (SELECT key, window_start, window_end, id FROM {}) AS b \
                 ON a.key = b.key AND a.window_start = b.window_start AND a.window_end = b.window_end",
                of("fast", JOIN_WINDOW_MS),
                of("slow", JOIN_WINDOW_MS)
            ),
        ),
        Topology::SqlTotals => (
            "key BIGINT, n BIGINT, total BIGINT, newest BIGINT, PRIMARY KEY (key) NOT ENFORCED",
            "SELECT key, count(*), sum(`value`), max(id) FROM fast GROUP BY key".to_owned(),
        ),
        Topology::SqlLast => (UPSERTED, ranked("DESC")),
        Topology::SqlFirst => (UPSERTED, ranked("ASC")),
        Topology::SqlDistinct => {
            ("key BIGINT, `value` BIGINT", "SELECT DISTINCT key, MOD(`value`, 10) FROM fast".to_owned())
        }
    };
    let table = |name: &str| {
        format!(
            "CREATE TABLE {name} (key BIGINT, `time` TIMESTAMP(3), `value` BIGINT, id BIGINT, \
             WATERMARK FOR `time` AS `time` - {}) WITH ('connector' = 'simulated');\n",
            interval(delay_ms)
        )
    };
    let sink = format!("CREATE TABLE out ({columns}) WITH ('connector' = 'simulated');\n");
    Some(TABLES.map(table).concat() + &sink + &format!("INSERT INTO out {query};\n"))
}

const UPSERTED: &str = "key BIGINT, `time` TIMESTAMP(3), `value` BIGINT, id BIGINT, PRIMARY KEY (key) NOT ENFORCED";

/// A job as the planner left it.
#[derive(Clone)]
struct Planned {
    graph: JobGraph,
    /// The columns that each source must bring, by its table.
    columns: BTreeMap<String, SchemaRef>,
}

/// Plans that were made, by topology and delay.
static PLANS: Mutex<BTreeMap<(Topology, i64), Planned>> = Mutex::new(BTreeMap::new());

/// The graph of a job in SQL; `None` if it is not in SQL.
pub(crate) fn graph(topology: Topology, process: &Arc<Process>) -> Option<Result<JobGraph>> {
    let delay_ms = process.world.plan.delay_ms;
    let sql = text(topology, delay_ms)?;
    let mut plans = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
    let planned = match plans.get(&(topology, delay_ms)) {
        Some(planned) => planned.clone(),
        None => match plan(&sql) {
            Ok(planned) => plans.entry((topology, delay_ms)).or_insert(planned).clone(),
            Err(error) => return Some(Err(error)),
        },
    };
    drop(plans);
    Some(bind(planned, process))
}

fn plan(sql: &str) -> Result<Planned> {
    let simulated = Arc::new(Simulated::default());
    let connectors = Connectors::default().with(simulated.clone());
    let job = JobId { namespace: "sim".into(), name: "job".into(), uid: "1".into() };
    let context = PlanContext { job, guarantee: Guarantee::ExactlyOnce };
    let graph = floodmark_sql::plan(sql, &PlanOptions { context, connectors: &connectors })
        .map_err(|e| Error::abort(format!("plan: {e}\n{sql}")))?;
    let columns = simulated.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Ok(Planned { graph, columns })
}

/// Puts a process's sources and sinks where the planner has put placeholders.
fn bind(planned: Planned, process: &Arc<Process>) -> Result<JobGraph> {
    let Planned { mut graph, columns } = planned;
    for node in graph.vertices.iter_mut().flat_map(|v| &mut v.chain) {
        match &mut node.node {
            NodeKind::Source(source) => {
                let table = node.uid.0.trim_start_matches("source:");
                let topic = TABLES.iter().position(|t| *t == table);
                let (Some(topic), Some(columns)) = (topic, columns.get(table)) else {
                    return Err(Error::abort(format!("{} reads no topic", node.uid)));
                };
                let columns = Columns::of(columns.clone());
                source.factory = Arc::new(Topic { process: process.clone(), topic, columns });
            }
            NodeKind::Sink(sink) => *sink = Arc::new(Sink { process: process.clone(), uid: node.uid.0.clone() }),
            NodeKind::Operator(_) => {}
        }
    }
    Ok(graph)
}

/// The connector while jobs are planned: remembers what is asked of each table.
#[derive(Default)]
struct Simulated(Mutex<BTreeMap<String, SchemaRef>>);

impl Connector for Simulated {
    fn name(&self) -> &'static str {
        "simulated"
    }

    fn source(
        &self,
        table: &TableDef,
        projection: &SchemaRef,
        _: &PlanContext,
    ) -> Result<Arc<dyn SourceFactory>, TableError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(table.name.clone(), projection.clone());
        Ok(Arc::new(Placeholder))
    }

    fn sink(&self, _: &TableDef, _: &SinkInput, _: &PlanContext) -> Result<SinkNode, TableError> {
        Ok(Arc::new(Placeholder))
    }
}

/// Stands in a plan where a process puts its own.
struct Placeholder;

fn unbound<T>() -> Result<T> {
    Err(Error::abort("a plan was run that belongs to no process"))
}

impl SourceFactory for Placeholder {
    fn kind(&self) -> String {
        "simulated source".to_owned()
    }

    fn bounded(&self) -> bool {
        true
    }

    fn splits(&self, _: &[SplitState]) -> Result<Vec<SplitState>> {
        unbound()
    }

    fn open(&self, _: Vec<SplitState>, _: &SubtaskContext) -> Result<Box<dyn Source>> {
        unbound()
    }
}

impl SinkFactory for Placeholder {
    fn kind(&self) -> String {
        "simulated sink".to_owned()
    }

    fn check(&self) -> Result<()> {
        unbound()
    }

    fn create(&self, _: &SubtaskContext) -> Result<Box<dyn Operator>> {
        unbound()
    }

    fn committer(&self, _: u32, _: &str) -> Result<Option<Box<dyn Committer>>> {
        unbound()
    }

    fn visible(&self, _: u32, _: &str) -> Result<Option<Epoch>> {
        unbound()
    }
}
