//! An election within one process: for tests and the simulator.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use floodmark_link::transport::Endpoint;
use floodmark_snapshot::Result;
use tokio::sync::Notify;

use super::{Leadership, Lease};

/// Whoever has a clone is a candidate.
#[derive(Clone, Debug, Default)]
pub struct Election(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Number of the lease that is in force.
    held: Option<u64>,
    leases: u64,
    leader: Option<Endpoint>,
}

impl Election {
    /// Takes the lease from whoever has it.
    pub fn depose(&self) {
        self.0.let_go(None);
    }

    /// Where the leader says that it listens.
    #[must_use]
    pub fn leader(&self) -> Option<Endpoint> {
        self.0.lock().leader.clone()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends this lease, or any.
    fn let_go(&self, number: Option<u64>) {
        let mut state = self.lock();
        if number.is_none() || state.held == number {
            (state.held, state.leader) = (None, None);
            self.changed.notify_waiters();
        }
    }
}

#[async_trait]
impl Leadership for Election {
    async fn acquire(&self) -> Result<Box<dyn Lease>> {
        let mut waited = false;
        loop {
            let changed = self.0.changed.notified();
            {
                let mut state = self.0.lock();
                if state.held.is_none() {
                    state.leases += 1;
                    state.held = Some(state.leases);
                    return Ok(Box::new(Held { of: self.0.clone(), number: state.leases, waited }));
                }
            }
            waited = true;
            changed.await;
        }
    }
}

struct Held {
    of: Arc<Shared>,
    number: u64,
    waited: bool,
}

#[async_trait]
impl Lease for Held {
    fn waited(&self) -> bool {
        self.waited
    }

    async fn announce(&mut self, endpoint: &Endpoint) -> Result<()> {
        let mut state = self.of.lock();
        if state.held == Some(self.number) {
            state.leader = Some(endpoint.clone());
        }
        Ok(())
    }

    async fn lost(&mut self) -> String {
        loop {
            let changed = self.of.changed.notified();
            if self.of.lock().held != Some(self.number) {
                return "another has been elected".to_owned();
            }
            changed.await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.of.let_go(Some(self.number));
    }
}
