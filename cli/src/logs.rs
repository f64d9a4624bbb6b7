//! Log lines on standard error, without colour codes unless it is a terminal.

use tracing_subscriber::EnvFilter;

use crate::{
    exit::{Exit, Failure},
    screen::Screen,
};

const DEFAULT_FILTER: &str = "info";

/// Starts logging: `filter` goes before the variable `RUST_LOG`.
pub(crate) fn start(filter: Option<&str>, screen: &Screen) -> Result<(), Failure> {
    let (source, text) = match (filter, std::env::var("RUST_LOG")) {
        (Some(filter), _) => ("--log-level", filter.to_owned()),
        (None, Ok(variable)) if !variable.trim().is_empty() => ("RUST_LOG", variable),
        (None, Ok(_) | Err(_)) => ("default", DEFAULT_FILTER.to_owned()),
    };
    let filter = EnvFilter::builder().parse(&text).map_err(|e| {
        Failure::input(format!(
            "{source} '{text}': {e}; write a level (error, warn, info, debug, trace) or target=level"
        ))
    })?;
    let writer = screen.clone();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(screen.bars().is_some())
        .with_target(false)
        .with_writer(move || writer.clone())
        .try_init()
        .map_err(|e| Failure::new(Exit::JobFailed, format!("start logging: {e}")))
}
