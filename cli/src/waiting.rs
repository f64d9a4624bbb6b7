//! A line on the terminal that shows that something is waited for, and for how long. Without a terminal there is none.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::screen::Screen;

/// From one drawing to the next.
const REDRAW: Duration = Duration::from_millis(200);

/// See the header of this file. Dropped, the line goes.
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
