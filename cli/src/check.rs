//! `floodmark check`: validates and plans a job, prints its dataflow, and with `--online` asks its tables and its storage.

use floodmark_dataflow::graph::NodeKind;
use floodmark_snapshot::{Disposition, Env, storage};

use crate::{
    args::CheckArgs,
    exit::{Exit, Failure},
    job::{self, Job},
    screen::print,
};

/// Checks the job; prints what it would do.
pub(crate) fn check(args: &CheckArgs) -> Result<Exit, Failure> {
    let env = Env::system();
    let job = job::load(&args.job, None)?;
    let spec = &job.manifest.spec;
    let head = format!("job {}: parallelism {}, {} key groups\n", job.id, spec.parallelism, spec.max_parallelism);
    print(&format!("{head}{}", job.graph));
    if args.online {
        check_tables(&job)?;
        check_storage(&job, &env)?;
    }
    print("ok\n");
    Ok(Exit::Done)
}

fn check_tables(job: &Job) -> Result<(), Failure> {
    for (_, node) in job.graph.nodes() {
        let asked = match &node.node {
            NodeKind::Source(source) => source.factory.splits(&[]).map(|splits| format!("{} splits", splits.len())),
            NodeKind::Sink(sink) => sink.check().map(|()| "writable".to_owned()),
            NodeKind::Operator(_) => continue,
        };
        match asked {
            Ok(answer) => print(&format!("{}: {answer}\n", node.uid)),
            Err(e) => {
                let exit = if e.disposition() == Disposition::Retry { Exit::JobFailed } else { Exit::BadInput };
                return Err(Failure::new(exit, e.context(&node.uid)));
            }
        }
    }
    Ok(())
}

fn check_storage(job: &Job, env: &Env) -> Result<(), Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::new(Exit::Storage, e);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| failed(&e))?;
    let storage = storage::open(&job::storage(None, &job.manifest)?).map_err(|e| failed(&e))?;
    runtime.block_on(storage::check_writable(&*storage, env)).map_err(|e| failed(&e))?;
    print(&format!("storage {}: writable\n", storage.describe()));
    Ok(())
}
