//! `floodmark state`: SQL over the state inside a snapshot, sources' positions included. Reads only.

mod database;

use floodmark_snapshot::restore::{Reference, Snapshot};
use rusqlite::{Connection, types::ValueRef};
use serde_json::{Map, Value as Json};

use self::database::{StateTable, load, quoted};
use crate::{
    args::{QueryOutput, SnapshotNamed, StateCommand, StateQueryArgs},
    exit::{Exit, Failure},
    history::{History, find_at, unusable},
    job,
    screen::print,
};

/// Widest column of a printed table, characters.
const COLUMN_WIDTH_MAX: usize = 60;

/// Carries the command out.
pub(crate) fn state(command: &StateCommand) -> Result<Exit, Failure> {
    job::runtime()?.block_on(async {
        match command {
            StateCommand::Query(args) => query(args).await,
            StateCommand::Tables(args) => tables(args).await,
        }
    })
}

async fn open(named: &SnapshotNamed) -> Result<Snapshot, Failure> {
    let text = named.snapshot.as_str();
    let found = match &named.job {
        None if text.contains('/') || std::path::Path::new(text).is_dir() => find_at(text).await?,
        None => {
            return Err(Failure::input(format!(
                "'{text}' is no location of a snapshot; to name one of a job's, give the job: --job JOB.yaml"
            )));
        }
        Some(manifest) => {
            let reference: Reference = text.parse().map_err(Failure::input)?;
            let history = History::read(manifest, named.storage.as_deref()).await?;
            history.find(&job::absolute_reference(reference)?).await?
        }
    };
    Ok(found.snapshot)
}

async fn tables(named: &SnapshotNamed) -> Result<Exit, Failure> {
    let snapshot = open(named).await?;
    let mut text = String::from(
        "operators: uid, kind, schema, parallelism, rows, bytes, splits\n\
         sources: uid, split, position, watermark, finished\n\
         shards: uid, subtask, kind, name, layer, first_key_group, last_key_group, rows, bytes, path, hash\n",
    );
    for table in StateTable::all(&snapshot.manifest) {
        text += &format!("{} ({} rows)", quoted(&table.name), table.rows());
        text += &match table.columns(&snapshot).await {
            Ok(columns) => {
                let columns: Vec<String> =
                    columns.iter().map(|c| format!("{} {}", quoted(&c.name), c.data_type)).collect();
                format!(": {}\n", columns.join(", "))
            }
            Err(error) => format!(": {error}\n"),
        };
    }
    print(&text);
    Ok(Exit::Done)
}

async fn query(args: &StateQueryArgs) -> Result<Exit, Failure> {
    let snapshot = open(&args.of).await?;
    let database = load(&snapshot, &args.sql).await.map_err(unusable)?;
    let (columns, rows) = answer(&database, &args.sql).map_err(|error| {
        let tables = StateTable::all(&snapshot.manifest);
        let names: Vec<String> = ["operators", "sources", "shards"].into_iter().map(str::to_owned).collect();
        let names: Vec<String> = names.into_iter().chain(tables.iter().map(|t| quoted(&t.name))).collect();
        Failure::input(format!("{error}; tables: {} (floodmark state tables shows their columns)", names.join(", ")))
    })?;
    print(&match args.output {
        QueryOutput::Table => table(&columns, &rows),
        QueryOutput::Json => json(&columns, &rows),
        QueryOutput::Csv => csv(&columns, &rows),
    });
    Ok(Exit::Done)
}

/// Runs one query; answers with its columns and rows.
fn answer(database: &Connection, sql: &str) -> Result<(Vec<String>, Vec<Vec<Json>>), String> {
    let text = |e: rusqlite::Error| e.to_string();
    let mut statement = database.prepare(sql).map_err(text)?;
    let columns: Vec<String> = statement.column_names().map(str::to_owned).collect();
    if columns.is_empty() || !statement.readonly() {
        return Err("a snapshot can only be read: write one SELECT".to_owned());
    }
    let mut found = statement.query([]).map_err(text)?;
    let mut rows = Vec::new();
    while let Some(row) = found.next().map_err(text)? {
        let cell = |at: usize| row.get_ref(at).map(cell).map_err(text);
        rows.push((0..columns.len()).map(cell).collect::<Result<_, _>>()?);
    }
    Ok((columns, rows))
}

fn cell(value: ValueRef<'_>) -> Json {
    match value {
        ValueRef::Null => Json::Null,
        ValueRef::Integer(n) => n.into(),
        ValueRef::Real(n) => serde_json::Number::from_f64(n).map_or_else(|| n.to_string().into(), Json::Number),
        ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned().into(),
        ValueRef::Blob(bytes) => bytes.iter().map(|b| format!("{b:02x}")).collect::<String>().into(),
    }
}

/// A value as it stands in a table or in CSV: text without quotes, nothing for null.
fn plain(value: &Json) -> String {
    match value {
        Json::Null => String::new(),
        Json::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn table(columns: &[String], rows: &[Vec<Json>]) -> String {
    let fit = |text: String| match text.char_indices().nth(COLUMN_WIDTH_MAX) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    };
    let head: Vec<String> = columns.to_vec();
    let body: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|v| fit(plain(v))).collect()).collect();
    let width = |at: usize| body.iter().chain([&head]).map(|row| row[at].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let number = |at: usize| rows.iter().all(|row| row[at].is_number() || row[at].is_null()) && !rows.is_empty();
    let right: Vec<bool> = (0..columns.len()).map(number).collect();
    let mut text = String::new();
    for row in [&head].into_iter().chain(&body) {
        let cells = row.iter().enumerate().map(|(at, cell)| match right[at] {
            true => format!("{cell:>width$}", width = widths[at]),
            false => format!("{cell:<width$}", width = widths[at]),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text + &format!("{} {}\n", rows.len(), if rows.len() == 1 { "row" } else { "rows" })
}

/// An array with a line per row.
fn json(columns: &[String], rows: &[Vec<Json>]) -> String {
    let object =
        |row: &Vec<Json>| Json::Object(columns.iter().cloned().zip(row.iter().cloned()).collect::<Map<_, _>>());
    let lines: Vec<String> = rows.iter().map(|row| object(row).to_string()).collect();
    format!("[{}]\n", lines.join(",\n"))
}

fn csv(columns: &[String], rows: &[Vec<Json>]) -> String {
    let field = |text: String| match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text,
    };
    let head = columns.iter().cloned().map(field).collect::<Vec<_>>().join(",");
    let line = |row: &Vec<Json>| row.iter().map(|v| field(plain(v))).collect::<Vec<_>>().join(",");
    let lines = [head].into_iter().chain(rows.iter().map(line));
    lines.map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use expect_test::expect;
    use floodmark_snapshot::ShardKind;
    use serde_json::json as j;

    use super::*;
    use crate::{
        args::{Args, Command},
        screen::Screen,
    };

    /// A job whose inputs end, and whose state outlasts them, the same in each run (no two events are of one time): numbers,
    /// texts, times, decimals, and accumulators that are kept encoded.
    const JOB: &str = "apiVersion: floodmark.io/v1alpha1
kind: StreamJob
metadata: {name: NAME}
spec:
  parallelism: 2
  state: {backend: BACKEND}
  checkpoints: {interval: 200ms, storage: FOLDER}
  sql: |
    CREATE TABLE nexmark (event_type INT,
      bid ROW<auction BIGINT, bidder BIGINT, price BIGINT, channel STRING, `dateTime` TIMESTAMP(3)>,
      `dateTime` AS bid.`dateTime`, WATERMARK FOR `dateTime` AS `dateTime` - INTERVAL '4' SECOND
    ) WITH ('connector' = 'nexmark', 'events' = '20000', 'event-rate' = '1000');
    CREATE VIEW bid AS
      SELECT bid.auction, bid.bidder, bid.price, bid.channel, `dateTime` FROM nexmark WHERE event_type = 2;
    CREATE TABLE sums (auction BIGINT, channel STRING, n BIGINT, s DECIMAL(38, 2), a DOUBLE, low BIGINT, high STRING, last TIMESTAMP(3),
      bidders BIGINT, PRIMARY KEY (auction, channel) NOT ENFORCED) WITH ('connector' = 'blackhole');
    CREATE TABLE latest (bidder BIGINT, auction BIGINT, price BIGINT, channel STRING, at TIMESTAMP(3),
      PRIMARY KEY (bidder, auction) NOT ENFORCED) WITH ('connector' = 'blackhole');
    INSERT INTO sums SELECT auction, channel, count(*), sum(CAST(price AS DECIMAL(20, 2))), avg(CAST(price AS DOUBLE)), min(price),
      max(channel), max(`dateTime`), count(DISTINCT bidder) FROM bid GROUP BY auction, channel;
    INSERT INTO latest SELECT bidder, auction, price, channel, `dateTime` FROM (
      SELECT *, ROW_NUMBER() OVER (PARTITION BY bidder, auction ORDER BY `dateTime` DESC) AS rn FROM bid) WHERE rn = 1;
";

    /// Runs the job to its end, and answers with what its last checkpoint says to each query.
    fn answers(folder: &std::path::Path, backend: &str, queries: &[&str]) -> Vec<(Vec<String>, Vec<Vec<Json>>)> {
        let at = folder.join(backend);
        let manifest = folder.join(format!("{backend}.yaml"));
        let text = JOB.replace("NAME", &backend.to_lowercase()).replace("BACKEND", backend);
        std::fs::write(&manifest, text.replace("FOLDER", &at.display().to_string())).unwrap();
        let (job, work) = (manifest.display().to_string(), folder.join("work").display().to_string());
        let args = Args::parse_from(["floodmark", "run", &job, "--work-dir", &work]);
        let Command::Run(run) = args.command else { panic!("run is a command") };
        crate::run::run(&run, &Screen::new()).map_err(|f| f.message).unwrap();
        let named = SnapshotNamed { snapshot: "latest".to_owned(), job: Some(manifest), storage: None };
        job::runtime().unwrap().block_on(async {
            let snapshot = open(&named).await.map_err(|f| f.message).unwrap();
            let kinds: Vec<ShardKind> = snapshot.manifest.shards().map(|s| s.kind).collect();
            assert_eq!(kinds.contains(&ShardKind::RocksDb), backend == "RocksDB", "{kinds:?}");
            let mut all = Vec::new();
            for query in queries {
                let database = load(&snapshot, query).await.unwrap();
                let (columns, mut rows) = answer(&database, query).unwrap();
                rows.iter_mut().flatten().for_each(|cell| *cell = in_order(cell));
                all.push((columns, rows));
            }
            for table in StateTable::all(&snapshot.manifest) {
                let columns = table.columns(&snapshot).await.unwrap();
                all.push((columns.iter().map(ToString::to_string).collect(), vec![vec![j!(table.name)]]));
            }
            all
        })
    }

    /// The set of values that a distinct count keeps has no order.
    fn in_order(cell: &Json) -> Json {
        let Some(list) = cell.as_str().and_then(|t| t.strip_prefix('[')?.strip_suffix(']')) else {
            return cell.clone();
        };
        let mut values: Vec<&str> = list.split(", ").collect();
        values.sort_unstable();
        values.join(", ").into()
    }

    #[test]
    fn a_checkpoint_of_either_back_end_answers_alike() {
        let folder = tempfile::tempdir().unwrap();
        let queries = [
            r#"SELECT * FROM "sums/group-aggregate-1" ORDER BY auction, channel"#,
            r#"SELECT * FROM "latest/deduplicate-1" ORDER BY bidder, auction"#,
            r#"SELECT "$subtask", count(*), sum(price) FROM "latest/deduplicate-1" GROUP BY 1 ORDER BY 1"#,
        ];
        let heap = answers(folder.path(), "Heap", &queries);
        let rocksdb = answers(folder.path(), "RocksDB", &queries);
        assert!(heap[0].1.len() > 1_000 && heap[1].1.len() > 1_000, "{} and {}", heap[0].1.len(), heap[1].1.len());
        for (heap, rocksdb) in heap.iter().zip(&rocksdb) {
            assert_eq!(heap.0, rocksdb.0);
            let differs = heap.1.iter().zip(&rocksdb.1).position(|(a, b)| a != b);
            assert_eq!(
                (differs, heap.1.len()),
                (None, rocksdb.1.len()),
                "{:?}",
                differs.map(|at| (&heap.1[at], &rocksdb.1[at]))
            );
        }
    }

    fn sample() -> (Vec<String>, Vec<Vec<Json>>) {
        let columns = ["shop", "n"].map(str::to_owned).to_vec();
        (columns, vec![vec![j!("a, \"b\""), j!(7)], vec![j!(null), j!(120)]])
    }

    #[test]
    fn rows_are_printed_for_people_and_programs() {
        let (columns, rows) = sample();
        expect![[r#"
            shop      n
            a, "b"    7
                    120
            2 rows
        "#]]
        .assert_eq(&table(&columns, &rows));
        expect![[r#"
            [{"shop":"a, \"b\"","n":7},
            {"shop":null,"n":120}]
        "#]]
        .assert_eq(&json(&columns, &rows));
        expect![[r#"
            shop,n
            "a, ""b""",7
            ,120
        "#]]
        .assert_eq(&csv(&columns, &rows));
    }

    #[test]
    fn only_queries_are_answered() {
        let database = Connection::open_in_memory().unwrap();
        assert_eq!(answer(&database, "SELECT 1 AS one").unwrap().0, ["one"]);
        for sql in ["CREATE TABLE t (a)", "SELEC 1", "SELECT 1; SELECT 2", ""] {
            assert!(answer(&database, sql).is_err(), "{sql}");
        }
    }
}
