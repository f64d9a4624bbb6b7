//! What happened, as lines for people: virtual time, process, what.

use crate::executor::{Core, Pid};

/// Prints, if somebody wants to read.
pub(crate) struct Trace {
    core: Core,
    on: bool,
}

impl Trace {
    pub(crate) fn new(core: Core, on: bool) -> Self {
        Self { core, on }
    }

    /// A line of process `pid`; 0 is the world.
    pub(crate) fn line(&self, pid: Pid, what: impl FnOnce() -> String) {
        if self.on {
            let at = self.core.now();
            let who = if pid == 0 { "world".to_owned() } else { format!("process {pid}") };
            println!("{:>12.6} {who:<10} {}", at.as_secs_f64(), what());
        }
    }
}
