//! Waiting for a job to do what it was told, with a line on the terminal that shows what is waited for, and for how long. Without a
//! terminal there is no line.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    control::{Answer, Place, ask},
    exit::{Exit, Failure},
    job,
    screen::Screen,
};

/// From one drawing to the next.
const REDRAW: Duration = Duration::from_millis(200);

/// Gives the job at `place` an order, and waits for its answer under `waiting`. Ctrl-C ends the waiting alone, with this to say.
///
/// # Errors
/// When the job can't be asked, or nobody waits any more.
pub(crate) fn order<O: Serialize, T: DeserializeOwned>(
    place: &Place,
    path: &str,
    order: &O,
    waiting: Waiting,
    interrupted: String,
) -> Result<Answer<T>, Failure> {
    let answer = job::runtime()?.block_on(async {
        tokio::select! {
            biased;
            answer = ask(place, "POST", path, Some(order)) => answer,
            _ = tokio::signal::ctrl_c() => Err(Failure::new(Exit::Interrupted, interrupted)),
        }
    });
    drop(waiting);
    answer
}

/// The line. Dropped, it goes.
pub(crate) struct Waiting(Option<ProgressBar>);

impl Waiting {
    /// Shows what is waited for, and a note on it.
    pub(crate) fn start(screen: &Screen, what: String, note: &str) -> Self {
        Self(screen.bars().map(|bars| {
            let style = ProgressStyle::with_template("{spinner} {msg}  {elapsed}  {prefix}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = bars.add(ProgressBar::new_spinner().with_style(style).with_message(what));
            bar.set_prefix(format!("({note})"));
            bar.enable_steady_tick(REDRAW);
            bar
        }))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
