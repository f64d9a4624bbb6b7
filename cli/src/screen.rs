//! Standard output for results; standard error, shared by log lines and the live display: on a terminal the display stays
//! below the lines.

use std::io::{self, IsTerminal, Write};

use indicatif::{MultiProgress, ProgressDrawTarget};

/// Prints results on standard output. Readers that have gone away (`| head`) are no failure.
pub(crate) fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Standard error.
#[derive(Clone)]
pub(crate) struct Screen {
    /// `None` if standard error is no terminal.
    bars: Option<MultiProgress>,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let terminal = io::stderr().is_terminal();
        Self { bars: terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr())) }
    }

    /// The screen for a job that prints rows: where rows and live lines would meet on one terminal, only the rows go there.
    pub(crate) fn shared_with_rows(&self) -> Self {
        Self { bars: self.bars.clone().filter(|_| !io::stdout().is_terminal()) }
    }

    /// Where live lines are drawn; `None` if there is no terminal to draw on.
    pub(crate) fn bars(&self) -> Option<&MultiProgress> {
        self.bars.as_ref()
    }

    /// Removes the live lines.
    pub(crate) fn clear(&self) {
        if let Some(bars) = &self.bars {
            // A terminal that is gone has nothing left to clear.
            let _ = bars.clear();
        }
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes).map(|()| bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &self.bars {
            Some(bars) => bars.suspend(|| io::stderr().write_all(bytes)),
            None => io::stderr().write_all(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
