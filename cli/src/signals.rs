//! Ctrl-C and SIGTERM: the first asks for a last checkpoint and a clean stop, the second ends the process at once.
//!
//! A thread of its own waits for them, so that a busy runtime never makes them late.

use floodmark_snapshot::env::spawn_thread;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    exit::{Exit, Failure},
    screen::Screen,
};

/// Turns signals into `stop`; `then` says what follows from the first. The handlers are installed when this returns.
pub(crate) fn listen(stop: watch::Sender<bool>, screen: Screen, then: &'static str) -> Result<(), Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::new(Exit::JobFailed, format!("listen for signals: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(|e| failed(&e))?;
    let guard = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| failed(&e))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| failed(&e))?;
    drop(guard);
    let body = move || {
        runtime.block_on(async {
            let mut asked = false;
            loop {
                let name = tokio::select! {
                    _ = interrupt.recv() => "Ctrl-C",
                    _ = terminate.recv() => "SIGTERM",
                };
                if asked {
                    screen.clear();
                    eprintln!("{name} again: ended at once; the next run resumes from the last completed checkpoint");
                    std::process::exit(i32::from(Exit::Interrupted.code()));
                }
                asked = true;
                tracing::info!("{name}: {then}; again to end at once");
                // The job may have ended at this very moment: then there is nobody left to ask.
                let _ = stop.send(true);
            }
        });
    };
    spawn_thread("signals".to_owned(), body).map_err(|e| failed(&e))?;
    Ok(())
}
