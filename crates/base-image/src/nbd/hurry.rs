//! When nobody waits for a server any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set when the program is to end.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Says that the program is to end: from now on whatever would wait for a server fails within a moment, also what waits
/// already. For ever: a read that failed so proves nothing but that.
pub fn stop_waiting_for_servers() {
    ENDING.store(true, Ordering::Release);
}

/// Whether the program is to end, and so nobody waits for a server: a read that has failed since may have failed for that alone.
pub fn is_ending() -> bool {
    ENDING.load(Ordering::Acquire)
}

/// Whether who uses a base can't wait for its server, or nobody can.
#[derive(Clone, Debug, Default)]
pub(super) struct Hurry(Arc<AtomicBool>);

impl Hurry {
    /// Says whether who uses the base can't wait.
    pub(super) fn set(&self, hurry: bool) {
        self.0.store(hurry, Ordering::Release);
    }

    /// Whether nothing is to be waited for. To be looked at again and again by who waits.
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire) || is_ending()
    }
}
