//! Ends the test when nothing has happened for a long time: nothing may hang (invariants 3 and 8).

use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// Far longer than anything takes on a busy machine.
const HANG: Duration = Duration::from_secs(120);

/// Watches until it is dropped.
#[derive(Debug)]
pub(crate) struct Watchdog {
    last: Arc<Mutex<(Instant, String)>>,
}

impl Watchdog {
    pub(crate) fn start() -> Self {
        let last = Arc::new(Mutex::new((Instant::now(), String::new())));
        let watched: Weak<Mutex<(Instant, String)>> = Arc::downgrade(&last);
        std::thread::spawn(move || {
            while let Some(last) = watched.upgrade() {
                {
                    let (since, what) = &*last.lock().unwrap();
                    if since.elapsed() > HANG {
                        eprintln!("HANG: {what}");
                        std::process::abort();
                    }
                }
                drop(last);
                std::thread::sleep(Duration::from_millis(500));
            }
        });
        Self { last }
    }

    /// Something happens: `what`.
    pub(crate) fn beat(&self, what: String) {
        *self.last.lock().unwrap() = (Instant::now(), what);
    }
}
